# SPDX-License-Identifier: Apache-2.0
"""The twin of `DePerceiverV2ImageProcessor` that resizes with Pillow."""

from transformers.image_processing_backends import PilBackend

from .image_processing_deperceiver_v2 import SigmoidDetectionMixin
from .image_processing_pil_deperceiver import PilProcessingMixin


class DePerceiverV2ImageProcessorPil(SigmoidDetectionMixin, PilProcessingMixin, PilBackend):
    """Image processor of DePerceiver v2 on Pillow: the same arguments and results as `DePerceiverV2ImageProcessor`."""


__all__ = ["DePerceiverV2ImageProcessorPil"]
