# SPDX-License-Identifier: Apache-2.0
"""Training of a detector: options, model building, the loop, checkpoints and logs."""

from .architectures import ARCHITECTURES
from .architectures.deperceiver import deperceiver_config
from .architectures.detr import DetrForObjectDetection, detr_config
from .arguments import TrainingOptions, parse_arguments
from .building import build_image_processor, build_model
from .trainer import DetectionTrainer, NonFiniteLossError, TrainingResult

__all__ = [
    "ARCHITECTURES",
    "DetectionTrainer",
    "DetrForObjectDetection",
    "NonFiniteLossError",
    "TrainingOptions",
    "TrainingResult",
    "build_image_processor",
    "build_model",
    "deperceiver_config",
    "detr_config",
    "parse_arguments",
]
