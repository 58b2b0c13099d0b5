# SPDX-License-Identifier: Apache-2.0
"""Training of a detector: options, model building, the loop, checkpoints and logs."""

from .architectures import ARCHITECTURES
from .architectures.detr import DetrForObjectDetection
from .arguments import TrainingOptions, parse_arguments
from .building import build_image_processor, build_model
from .reporting import TrainingResult
from .trainer import DetectionTrainer, NonFiniteLossError

__all__ = [
    "ARCHITECTURES",
    "DetectionTrainer",
    "DetrForObjectDetection",
    "NonFiniteLossError",
    "TrainingOptions",
    "TrainingResult",
    "build_image_processor",
    "build_model",
    "parse_arguments",
]
