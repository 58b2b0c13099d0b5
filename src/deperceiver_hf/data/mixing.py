# SPDX-License-Identifier: Apache-2.0
"""Training images made of several: mosaic and mixup. They come before the transforms, and see other images through a
function that draws one.

Samples are those of `transforms`; all random numbers come from torch's default generator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..errors import UserError
from .transforms import DropCrowds, select_objects, visible_enough

Sample = dict[str, Any]

_LEAST_SIDE = 16  # pixels of an image that others are put into
_CENTRE = (0.3, 0.7)  # of both sides, where the four images of a mosaic meet
_MOST_ENLARGED = 1.5  # over the size at which an image covers its place: what is cut off is chosen at random
_BLEND = (0.4, 0.6)  # weight of the first image in a mixup


@dataclass(frozen=True)
class ImageMixing:
    """Mosaic (Bochkovskiy et al. 2020, YOLOv4, arXiv:2004.10934) and mixup (Zhang et al. 2019, arXiv:1902.04103).

    A mosaic has the size of its first image: four images meet at a random point, each enlarged or reduced, in its own
    ratio, to cover its quarter, and cut to it at a random place. A mixup is the mean, of random weights near a half,
    of two images, the second cut to the size of the first in the same way, with the objects of both; it may be of
    mosaics. Crowds are dropped first. Objects of which a cut leaves less than `LEAST_VISIBLE_AREA` are dropped, as in
    the crops of the augmentation; the boxes of others are clipped. Images with a side below 16 pixels stay as they
    are.

    Args:
        mosaic: Probability that an image becomes part of a mosaic.
        mixup: Probability that it is blended with another one.
    """

    mosaic: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        for name, probability in vars(self).items():
            if not 0 <= probability <= 1:
                raise UserError(f"{name} must be a probability from 0 to 1, got {probability}")

    def __call__(self, sample: Sample, draw: Callable[[], Sample]) -> Sample:
        """The sample, mixed or not, without crowds.

        Args:
            sample: The image that others are mixed into; the size of the result is its own.
            draw: Gives a random sample of the data set.
        """
        if min(sample["image"].shape[-2:]) < _LEAST_SIDE:
            return DropCrowds()(sample)
        sample = self._maybe_mosaic(sample, draw)
        if self.mixup and float(torch.rand(())) < self.mixup:
            sample = mix_up(sample, self._maybe_mosaic(draw(), draw))
        return sample

    def _maybe_mosaic(self, sample: Sample, draw: Callable[[], Sample]) -> Sample:
        large_enough = min(sample["image"].shape[-2:]) >= _LEAST_SIDE
        if self.mosaic and large_enough and float(torch.rand(())) < self.mosaic:
            return make_mosaic([sample, draw(), draw(), draw()])
        return DropCrowds()(sample)


def make_mosaic(samples: list[Sample]) -> Sample:
    """Four samples as one of the size of the first, which has a random quarter."""
    height, width = samples[0]["image"].shape[-2:]
    y, x = (_between(side) for side in (height, width))
    quarters = [(0, 0, y, x), (0, x, y, width - x), (y, 0, height - y, x), (y, x, height - y, width - x)]
    canvas = samples[0]["image"].new_empty(3, height, width)
    parts = []
    for place, sample in zip(torch.randperm(4).tolist(), samples, strict=True):
        top, left, part_height, part_width = quarters[place]
        part = cut_to(DropCrowds()(sample), part_height, part_width)
        canvas[:, top : top + part_height, left : left + part_width] = part["image"]
        parts.append({**part, "boxes": part["boxes"] + part["boxes"].new_tensor([left, top, left, top])})
    return _joined(canvas, parts)


def mix_up(first: Sample, second: Sample) -> Sample:
    """Two samples blended into one of the size of the first."""
    low, high = _BLEND
    weight = low + (high - low) * float(torch.rand(()))
    second = cut_to(second, *first["image"].shape[-2:])
    blended = weight * first["image"].float() + (1 - weight) * second["image"].float()
    return _joined(blended.round().to(torch.uint8), [first, second])


def cut_to(sample: Sample, height: int, width: int) -> Sample:
    """A random part of an image, of a random size between all that fits the ratio and `_MOST_ENLARGED` times less on
    a side, at `height` x `width` pixels."""
    own_height, own_width = sample["image"].shape[-2:]
    scale = max(height / own_height, width / own_width) * (1 + (_MOST_ENLARGED - 1) * float(torch.rand(())))
    crop_height, crop_width = (
        max(1, min(own, round(side / scale))) for own, side in ((own_height, height), (own_width, width))
    )
    top, left = (
        int(torch.randint(own - cropped + 1, ()))
        for own, cropped in ((own_height, crop_height), (own_width, crop_width))
    )
    place = (top, left, crop_height, crop_width)
    boxes = F.clamp_bounding_boxes(F.crop(sample["boxes"], *place))
    keep = visible_enough(boxes, sample["boxes"])
    image = F.crop(sample["image"], *place)
    sample = select_objects({**sample, "image": image, "boxes": boxes}, keep)
    return {**sample, **{key: F.resize(sample[key], [height, width]) for key in ("image", "boxes")}}


def _joined(image: torch.Tensor, parts: list[Sample]) -> Sample:
    """An image with the objects of all parts, whose boxes are in its pixels."""
    boxes = torch.cat([part["boxes"].as_subclass(torch.Tensor) for part in parts])
    return {
        "image": tv_tensors.Image(image.as_subclass(torch.Tensor)),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:])),
        **{key: torch.cat([part[key] for part in parts]) for key in ("labels", "area", "iscrowd")},
    }


def _between(side: int) -> int:
    low, high = _CENTRE
    return round(side * (low + (high - low) * float(torch.rand(()))))
