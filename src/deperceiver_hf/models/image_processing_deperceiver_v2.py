# SPDX-License-Identifier: Apache-2.0
"""Image processor of DePerceiver v2: the preparation that both share, with detections from sigmoid scores."""

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


class DePerceiverV2ImageProcessorKwargs(DetectionProcessingKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    """Options of the image processors of this file."""


DePerceiverV2ImageProcessorPilKwargs = DePerceiverV2ImageProcessorKwargs


class SigmoidDetectionMixin(DetectionProcessingMixin):
    """Post-processing of models that score each class by a sigmoid of its own."""

    valid_kwargs = DePerceiverV2ImageProcessorKwargs

    @classmethod
    def backend_classes(cls) -> dict[str, Any]:
        return {"torchvision": DePerceiverV2ImageProcessor, "pil": DePerceiverV2ImageProcessorPil}

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        top_k: int | None = None,
        *,
        clip: bool = True,
    ) -> list[dict[str, torch.Tensor]]:
        """Turn the model's predictions into detections: the best pairs of a query and a class.

        Args:
            outputs: the model's output, with `logits` `(B, Q, num_labels)` and `pred_boxes` `(B, Q, 4)`,
                `(center_x, center_y, width, height)` in [0, 1].
            threshold: detections with a lower score are left out.
            target_sizes: `(height, width)` of each image in pixels, a list or a tensor `(B, 2)`; usually the sizes of
                the original images. Without them boxes stay in [0, 1].
            top_k: how many detections to keep per image at most; by default as many as there are queries. A query can
                be among them with several classes.
            clip: end boxes at the border of the image. One that lies outside entirely stays, without area. `False`
                gives boxes as predicted, which is what a metric is to see.

        Returns:
            For each image `scores` `(n,)` float32, best first; `labels` `(n,)` int64; `boxes` `(n, 4)` float32
            `(x_min, y_min, x_max, y_max)`.

        Raises:
            FloatingPointError: predictions are not finite.
            ValueError: `target_sizes` does not hold one `(height, width)` per image, or `top_k` is less than 1.
        """
        require_finite(outputs.logits, outputs.pred_boxes)
        logits = outputs.logits.float()
        num_queries, num_labels = logits.shape[1:]
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        count = min(num_queries if top_k is None else top_k, num_queries * num_labels)
        scores, pairs = logits.sigmoid().flatten(1).topk(count, dim=1)  # (B, count)
        queries, labels = pairs // num_labels, pairs % num_labels
        boxes = boxes_in_pixels(outputs.pred_boxes, target_sizes, clip)
        boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        keep = scores >= threshold
        return [
            {"scores": scores[i][keep[i]], "labels": labels[i][keep[i]], "boxes": boxes[i][keep[i]]}
            for i in range(len(boxes))
        ]


class DePerceiverV2ImageProcessor(SigmoidDetectionMixin, TorchvisionBackend):
    """Image processor of DePerceiver v2 on torchvision, on the CPU or with `device=...` on an accelerator.

    Images are prepared as by `DePerceiverImageProcessor`. See `preprocess` and `post_process_object_detection`.
    """


class DePerceiverV2ImageProcessorPil(SigmoidDetectionMixin, PilProcessingMixin, PilBackend):
    """Image processor of DePerceiver v2 on Pillow: the same arguments and results as `DePerceiverV2ImageProcessor`."""


__all__ = ["DePerceiverV2ImageProcessor", "DePerceiverV2ImageProcessorPil"]
