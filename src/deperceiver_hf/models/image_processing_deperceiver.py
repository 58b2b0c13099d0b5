# SPDX-License-Identifier: Apache-2.0
"""Image processor of DePerceiver: the preparation that both share, with detections from a softmax.

`DePerceiverImageProcessor` resizes with torchvision, `DePerceiverImageProcessorPil` with Pillow, as the 2021 code did.
"""

from typing import Any

import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend

from .detection_processing_deperceiver import (
    DetectionProcessingKwargs,
    DetectionProcessingMixin,
    PilProcessingMixin,
    boxes_in_pixels,
    require_finite,
)


class DePerceiverImageProcessorKwargs(DetectionProcessingKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    """Options of the image processors of this file."""


DePerceiverImageProcessorPilKwargs = DePerceiverImageProcessorKwargs


class SoftmaxDetectionMixin(DetectionProcessingMixin):
    """Post-processing of models whose classes, "no object" among them, share one softmax."""

    valid_kwargs = DePerceiverImageProcessorKwargs

    @classmethod
    def backend_classes(cls) -> dict[str, Any]:
        return {"torchvision": DePerceiverImageProcessor, "pil": DePerceiverImageProcessorPil}

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        *,
        clip: bool = True,
    ) -> list[dict[str, torch.Tensor]]:
        """Turn the model's predictions into detections.

        Args:
            outputs: the model's output, with `logits` `(B, Q, num_labels + 1)`, the last class being "no object", and
                `pred_boxes` `(B, Q, 4)`, `(center_x, center_y, width, height)` in [0, 1].
            threshold: detections with a lower score are left out; 0 keeps every query, in order.
            target_sizes: `(height, width)` of each image in pixels, a list or a tensor `(B, 2)`; usually the sizes of
                the original images. Without them boxes stay in [0, 1].
            clip: end boxes at the border of the image. One that lies outside entirely stays, without area. `False`
                gives boxes as predicted, which is what a metric is to see.

        Returns:
            For each image `scores` `(n,)` float32, the probability of the likeliest class; `labels` `(n,)` int64, that
            class; `boxes` `(n, 4)` float32 `(x_min, y_min, x_max, y_max)`.

        Raises:
            FloatingPointError: predictions are not finite.
            ValueError: `target_sizes` does not hold one `(height, width)` per image.
        """
        require_finite(outputs.logits, outputs.pred_boxes)
        # Half-precision predictions are converted first: 8 bits of mantissa cannot tell pixels of a large image apart.
        scores, labels = outputs.logits.float().softmax(-1)[..., :-1].max(-1)  # (B, Q)
        boxes = boxes_in_pixels(outputs.pred_boxes, target_sizes, clip)
        keep = scores >= threshold
        return [
            {"scores": scores[i][keep[i]], "labels": labels[i][keep[i]], "boxes": boxes[i][keep[i]]}
            for i in range(len(boxes))
        ]


class DePerceiverImageProcessor(SoftmaxDetectionMixin, TorchvisionBackend):
    """Image processor of DePerceiver on torchvision, on the CPU or with `device=...` on an accelerator.

    Images are resized (bilinear with antialiasing; by default the shortest edge to 800 pixels, the longest to at most
    1333), scaled to [0, 1], normalised by ImageNet's mean and standard deviation and padded with zeros. See
    `preprocess` and `post_process_object_detection`.
    """


class DePerceiverImageProcessorPil(SoftmaxDetectionMixin, PilProcessingMixin, PilBackend):
    """Image processor of DePerceiver on Pillow: the same arguments and results as `DePerceiverImageProcessor`."""


__all__ = ["DePerceiverImageProcessor", "DePerceiverImageProcessorPil"]
