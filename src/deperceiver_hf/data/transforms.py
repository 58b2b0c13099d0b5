# SPDX-License-Identifier: Apache-2.0
"""Training augmentation on torchvision's v2 transforms, that of DETR (Carion et al., 2020) and DePerceiver, and more.

A sample is `{"image": tv_tensors.Image uint8 (3, H, W), "boxes": tv_tensors.BoundingBoxes XYXY (n, 4), "labels": (n,)
int64, "area": (n,) float32, "iscrowd": (n,) bool}`; images stay uint8, normalisation is the image processor's. All
random numbers come from torch's default generator.
"""

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from transformers.image_utils import PILImageResampling, SizeDict

from ..errors import UserError
from ..models.detection_processing_deperceiver import resized_size

AUGMENTATIONS = ("original", "flip", "none", "crop", "crop_any_orientation")

# Of a shortest edge of 800: the sizes to choose from, the sizes before a crop, the sides of the crop.
_REFERENCE_EDGE, _REFERENCE_LONGEST = 800, 1333
_SCALES = range(480, 801, 32)
_SCALES_BEFORE_CROP = (400, 500, 600)
_CROP_SIDES = (384, 600)
# Before a crop the original does not bound the longest edge: 1 x 2000 pixels would become 400 x 800,000.
_LONGEST_BEFORE_CROP = 8 * _REFERENCE_LONGEST

_INTERPOLATIONS = {
    PILImageResampling.NEAREST: v2.InterpolationMode.NEAREST_EXACT,
    PILImageResampling.BICUBIC: v2.InterpolationMode.BICUBIC,
    PILImageResampling.LANCZOS: v2.InterpolationMode.BICUBIC,  # torchvision has none for tensors
}

UNBOUNDED = 1 << 30
"""As a longest edge, in pixels: of an image processor that bounds the shortest edge only."""

LEAST_VISIBLE_AREA = 0.25
"""Of an object's box, as a fraction: what `crop` leaves less of is no target any more, since it is hard to tell."""

_CROP_PROBABILITY = 0.6
_LEAST_CROP = 0.6  # of the sides of the image
_COLOUR_JITTER = 0.2  # of brightness, contrast and saturation; a change of hue would take longer than all the rest


def make_train_transforms(
    augmentation: str = "original",
    shortest_edge: int = 800,
    longest_edge: int | None = None,
    resample: int = PILImageResampling.BILINEAR,
    *,
    other_size: SizeDict | None = None,
    resize: bool = True,
) -> v2.Compose:
    """The training transforms up to, and including, the resize.

    Args:
        augmentation: `original`: horizontal flip with probability 0.5; then with equal chance a random shortest edge
            of 0.6 to 1 times `shortest_edge`, or a resize, a random crop and then that random resize. `flip`:
            horizontal flip and resize. `none`: resize only. `crop`, for small data sets: horizontal flip; with
            probability 0.6 a crop of 0.6 to 1 times both sides; resize to the size of an uncropped image, so that
            images of one size stay of one size; up to 20 % more or less brightness, contrast and saturation. Objects
            of which the crop leaves less than `LEAST_VISIBLE_AREA` are dropped. `crop_any_orientation`, for images
            without an up (microscopy, aerial views): with vertical flips and, of square images, transpositions too.
        shortest_edge: of the image processor, in pixels; all sizes of the original are scaled in proportion to it.
        longest_edge: bound of the longest edge after the resize; by default 1333/800 of the shortest.
        resample: of the image processor, as Pillow counts it, so that training resizes as evaluation does.
        other_size: of an image processor that has no shortest edge, instead of both edges: `height` and `width`, or
            `max_height` and `max_width`. Every image then gets the size that evaluation gives it: `original` is a flip
            and the crop of `crop`.
        resize: `False` of an image processor that leaves images as large as they are; then as with `other_size`.

    Crowds are dropped first, boxes without area last; the area becomes that of the box.
    """
    if augmentation not in AUGMENTATIONS:
        raise UserError(f"augmentation must be one of {AUGMENTATIONS}, got {augmentation!r}")
    if shortest_edge < 1:
        raise UserError(f"shortest_edge must be at least 1 pixel, got {shortest_edge}")
    longest_edge = _scaled(_REFERENCE_LONGEST, shortest_edge) if longest_edge is None else longest_edge
    if longest_edge < shortest_edge:
        raise UserError(f"longest_edge must be at least the shortest_edge {shortest_edge}, got {longest_edge}")
    interpolation = _INTERPOLATIONS.get(resample, v2.InterpolationMode.BILINEAR)
    size = (other_size or SizeDict(shortest_edge=shortest_edge, longest_edge=longest_edge)) if resize else None
    before_crop = _scaled(_LONGEST_BEFORE_CROP, shortest_edge)
    if longest_edge < UNBOUNDED:
        before_crop = max(longest_edge, before_crop)

    steps: list[v2.Transform]
    if augmentation == "original" and (other_size or not resize):
        steps = [v2.RandomHorizontalFlip(0.5), RandomZoom(size, interpolation)]
    elif augmentation == "original":
        scale = RandomShortestEdge([_scaled(edge, shortest_edge) for edge in _SCALES], longest_edge, interpolation)
        crop = v2.Compose(
            [
                RandomShortestEdge(
                    [_scaled(edge, shortest_edge) for edge in _SCALES_BEFORE_CROP], before_crop, interpolation
                ),
                RandomSizeCrop(*(_scaled(side, shortest_edge) for side in _CROP_SIDES)),
                scale,
            ]
        )
        steps = [v2.RandomHorizontalFlip(0.5), v2.RandomChoice([scale, crop])]
    elif augmentation in ("crop", "crop_any_orientation"):
        turns = [v2.RandomVerticalFlip(0.5), v2.RandomApply([TransposeSquare()], 0.5)]
        steps = [
            v2.RandomHorizontalFlip(0.5),
            *(turns if augmentation == "crop_any_orientation" else []),
            RandomZoom(size, interpolation),
            v2.ColorJitter(brightness=_COLOUR_JITTER, contrast=_COLOUR_JITTER, saturation=_COLOUR_JITTER),
        ]
    else:
        flip = [v2.RandomHorizontalFlip(0.5)] if augmentation == "flip" else []
        steps = [*flip, RandomZoom(size, interpolation, probability=0)]
    return v2.Compose([DropCrowds(), *steps, v2.ClampBoundingBoxes(), DropEmptyBoxes()])


def _scaled(size: int, shortest_edge: int) -> int:
    return max(1, round(size * shortest_edge / _REFERENCE_EDGE))


class RandomShortestEdge(v2.RandomShortestSize):
    """Resize so that the shortest edge is one of `min_size`, the longest at most `max_size`, no edge below a pixel.

    The base class truncates, so that an edge can miss the size asked for by a pixel and become 0 in narrow images;
    this computes sizes as the image processor does.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        shortest = self.min_size[int(torch.randint(len(self.min_size), ()))]
        bounds = SizeDict(shortest_edge=shortest, longest_edge=self.max_size)
        return {"size": resized_size((height, width), bounds)}


class RandomSizeCrop(v2.Transform):
    """Crop a random part whose sides are drawn from `min_side ... max_side` pixels each, less in smaller images."""

    def __init__(self, min_side: int, max_side: int):
        super().__init__()
        self.min_side = min_side
        self.max_side = max_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        crop_height, crop_width = (
            _randint(min(self.min_side, side), min(self.max_side, side)) for side in (height, width)
        )
        return {
            "top": _randint(0, height - crop_height),
            "left": _randint(0, width - crop_width),
            "height": crop_height,
            "width": crop_width,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class RandomZoom(v2.Transform):
    """Resize the image or, at random, a part of it of the same aspect ratio, to the size that all of it would get.

    Objects of which less than `LEAST_VISIBLE_AREA` is left are dropped. `size` is that of the image processor; `None`
    leaves the image as large as it is.
    """

    def __init__(
        self,
        size: SizeDict | None,
        interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR,
        probability: float = _CROP_PROBABILITY,
    ):
        super().__init__()
        self.size = size
        self.interpolation = interpolation
        self.probability = probability

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        height, width = sample["image"].shape[-2:]
        size = (height, width) if self.size is None else resized_size((height, width), self.size)
        if self.probability and float(torch.rand(())) < self.probability:
            sample = self._crop(sample, height, width)
        resized = {key: F.resize(sample[key], size, self.interpolation) for key in ("image", "boxes")}
        return {**sample, **resized}

    def _crop(self, sample: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        scale = _LEAST_CROP + (1 - _LEAST_CROP) * float(torch.rand(()))
        crop_height, crop_width = (max(1, round(scale * side)) for side in (height, width))
        top, left = _randint(0, height - crop_height), _randint(0, width - crop_width)
        cropped = {key: F.crop(sample[key], top, left, crop_height, crop_width) for key in ("image", "boxes")}
        boxes = F.clamp_bounding_boxes(cropped["boxes"])
        visible = visible_enough(boxes, sample["boxes"])
        return select_objects({**sample, "image": cropped["image"], "boxes": boxes}, visible)


class TransposeSquare(v2.Transform):
    """Exchange x and y, of square images only: the others would change their size."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            height, width = inpt.canvas_size
            transposed = inpt[:, [1, 0, 3, 2]]
        else:
            height, width = inpt.shape[-2:]
            transposed = inpt.transpose(-2, -1)
        return tv_tensors.wrap(transposed, like=inpt) if height == width else inpt


def _randint(low: int, high: int) -> int:
    """A random integer from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))


class DropCrowds(v2.Transform):
    """Leave out the objects that stand for a crowd."""

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        return select_objects(sample, ~sample["iscrowd"])


class DropEmptyBoxes(v2.Transform):
    """Leave out objects without area, whatever was cropped away, and set `area` to that of the box.

    `SanitizeBoundingBoxes` cannot be used: it drops all boxes of less than a pixel too, which are right targets in a
    down-scaled image.
    """

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        sides = _box_sides(sample["boxes"])
        sample = {**sample, "area": sides.prod(dim=1)}
        return select_objects(sample, (sides > 0).all(dim=1))


def _box_sides(boxes: torch.Tensor) -> torch.Tensor:
    return boxes[:, 2:] - boxes[:, :2]  # (n, 2) width, height


def _box_areas(boxes: torch.Tensor) -> torch.Tensor:
    return _box_sides(boxes).prod(dim=1)


def visible_enough(cropped: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Which objects are still targets after a crop, (n,) bool, by their boxes (n, 4) after and before it."""
    return _box_areas(cropped) >= LEAST_VISIBLE_AREA * _box_areas(whole)


def select_objects(sample: dict[str, Any], keep: torch.Tensor) -> dict[str, Any]:
    """A sample with those of its objects that a (n,) bool tensor says."""
    boxes = tv_tensors.wrap(sample["boxes"][keep], like=sample["boxes"])
    return {**sample, "boxes": boxes, **{key: sample[key][keep] for key in ("labels", "area", "iscrowd")}}
