# SPDX-License-Identifier: Apache-2.0
"""The options of how to evaluate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.dataset import BAD_IMAGE_POLICIES
from ..errors import UserError
from .coco_metric import COCO_AREA_BOUNDARIES, COCO_MAX_DETECTIONS, check_area_boundaries, check_max_detections


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How to evaluate, checked.

    Attributes:
        mixed_precision: `"auto"`, `"no"`, `"fp16"` or `"bf16"`, see `choose_precision`; by default what the
            accelerator is set to.
        area_boundaries: see `CocoDetectionMetric`. Areas are those of the data, not of the images that the image
            processor makes of them.
        batch_size: images of one process that are in memory at a time; on a CPU, also computed at a time.
        num_workers: processes that load and resize images, for each process.
        max_detections: see `CocoDetectionMetric`.
        batched_forward: send all images of a batch that have the same size through the model together. Faster with a
            small model on a GPU; but then the last digits of the metrics can depend on batch size and hardware.
        on_bad_image: what becomes of an image that cannot be read: `"skip"` leaves it out, with its objects, and says
            so; `"stop"` is an error.
        max_image_pixels: images of more pixels cannot be read, see `limit_pixels`.
        progress: show a progress bar on the main process.

    Raises:
        ValueError: an option is out of range.
    """

    mixed_precision: str | None = None
    area_boundaries: tuple[float, float] = COCO_AREA_BOUNDARIES
    batch_size: int = 8
    num_workers: int = 0
    max_detections: Sequence[int] = COCO_MAX_DETECTIONS
    batched_forward: bool = False
    on_bad_image: str = "skip"
    max_image_pixels: int | None = None
    progress: bool = True

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.on_bad_image not in BAD_IMAGE_POLICIES:
            raise UserError(f"on_bad_image must be one of {BAD_IMAGE_POLICIES}, got {self.on_bad_image!r}.")
        object.__setattr__(self, "max_detections", check_max_detections(self.max_detections))
        object.__setattr__(self, "area_boundaries", check_area_boundaries(self.area_boundaries))

    def settings(self) -> dict[str, Any]:
        """What the numbers and the time may depend on: all but the bar, and limits that are not set."""
        return {name: value for name, value in vars(self).items() if name != "progress" and value is not None}
