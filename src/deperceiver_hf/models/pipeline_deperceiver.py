# SPDX-License-Identifier: Apache-2.0
"""`pipeline("object-detection")` that opens pictures as everything else here does, and takes them in any batch."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers.pipelines.object_detection import ObjectDetectionPipeline

from .detection_processing_deperceiver import DetectionProcessingMixin
from .pixels_deperceiver import open_rgb_picture, to_rgb


class DePerceiverObjectDetectionPipeline(ObjectDetectionPipeline):
    """transformers' pipeline for object detection; with another model's image processor it is just that.

    With one of ours, a picture of any mode and depth gives what the image processor would give for it, where
    transformers' own loading clips 16 bit and stops at damaged metadata; and with `batch_size` pictures may differ in
    size: they are padded, which changes no detection.
    """

    def preprocess(self, image: str | Path | Image.Image, timeout: float | None = None) -> Any:
        """One picture, prepared, and its size.

        Raises:
            TypeError: it is neither a path, a URL, base64 nor a PIL image.
            ValueError: it cannot be read.
        """
        if not isinstance(self.image_processor, DetectionProcessingMixin):
            return super().preprocess(image, timeout)
        if not isinstance(image, str | Path | Image.Image):
            raise TypeError(
                f"Got a {type(image).__name__} as an image; expected a path, a URL, base64 or a PIL image. Arrays and "
                "tensors are for the image processor and the model."
            )
        picture = to_rgb(image) if isinstance(image, Image.Image) else open_rgb_picture(image, timeout)
        prepared = self.image_processor(images=[picture], return_tensors="pt").to(self.dtype)
        return {"prepared": prepared, "target_size": torch.tensor([[picture.height, picture.width]])}

    def _forward(self, model_inputs: Any) -> Any:
        if "prepared" not in model_inputs:
            return super()._forward(model_inputs)
        prepared = model_inputs["prepared"]  # a list of several in a batch
        images = prepared if isinstance(prepared, list) else [prepared]
        return super()._forward({**_joined(images), "target_size": model_inputs["target_size"]})


def _joined(images: list[Any]) -> dict[str, torch.Tensor]:
    """`pixel_values` `(B, 3, H, W)` and `pixel_mask` `(B, H, W)` of images `(1, 3, H_i, W_i)`, which are padded."""
    height, width = (max(image["pixel_values"].shape[side] for image in images) for side in (-2, -1))

    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([nn.functional.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2])) for t in tensors])

    pixel_values = [image["pixel_values"] for image in images]
    masks = [
        image["pixel_mask"] if "pixel_mask" in image else values.new_ones(values[:, 0].shape, dtype=torch.int64)
        for image, values in zip(images, pixel_values, strict=True)
    ]
    return {"pixel_values": join(pixel_values), "pixel_mask": join(masks)}


__all__ = ["DePerceiverObjectDetectionPipeline"]
