# SPDX-License-Identifier: Apache-2.0
"""The twin of `DePerceiverImageProcessor` that resizes with Pillow, pixel for pixel as the 2021 code did."""

import numpy as np
from transformers.image_processing_backends import PilBackend

from .image_processing_deperceiver import DetectionProcessingMixin


class PilProcessingMixin(DetectionProcessingMixin):
    """What the Pillow backend needs of a processor."""

    def process_image(self, image, **kwargs) -> np.ndarray:
        """One image as an array `(C, H, W)`, which is what this backend resizes."""
        return super().process_image(image, **kwargs).cpu().numpy()


class DePerceiverImageProcessorPil(PilProcessingMixin, PilBackend):
    """Image processor of DePerceiver on Pillow: the same arguments and results as `DePerceiverImageProcessor`."""


__all__ = ["DePerceiverImageProcessorPil"]
