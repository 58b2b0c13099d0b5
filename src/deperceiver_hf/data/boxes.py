# SPDX-License-Identifier: Apache-2.0
"""The formats of boxes: corners, which models and drawing speak, COCO's, and those of other tools' files."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..errors import UserError

LAYOUTS = {
    "xywh": "left, top, width, height",
    "xyxy": "left, top, right, bottom",
    "cxcywh": "centre x, centre y, width, height",
}
DECIMALS = 9  # of a coordinate in pixels; float64 is finer for images of any size
UNITS = {
    "pixels": None,
    "relative": 1,
    "percent": 100,
    "permille": 1000,
}  # what a whole side of the image is
BOX_FORMATS = (
    *(layout if unit == "pixels" else f"{layout}_{unit}" for unit in UNITS for layout in LAYOUTS),
    "voc",
)  # e.g. xyxy, cxcywh_relative; voc is xyxy of the first and the last pixel, counted from 1


@dataclass(frozen=True)
class BoxFormat:
    """How a file writes boxes.

    Attributes:
        layout: Key of `LAYOUTS`.
        unit: Key of `UNITS`.
        origin: Number of the first pixel, 0 or 1. From 1 pixels are counted, not edges: the right one is the last.
    """

    layout: str = "xywh"
    unit: str = "pixels"
    origin: int = 0

    @classmethod
    def parse(cls, name: str) -> "BoxFormat":
        """The format of a name in `BOX_FORMATS`.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in BOX_FORMATS:
            raise UserError(f"bbox_format must be one of {', '.join(BOX_FORMATS)}, got {name!r}")
        if name == "voc":
            return cls("xyxy", origin=1)
        layout, _, unit = name.partition("_")
        return cls(layout, unit or "pixels")

    def __str__(self) -> str:
        if self.origin:
            return "voc"
        return self.layout if self.unit == "pixels" else f"{self.layout}_{self.unit}"

    @property
    def description(self) -> str:
        """The format in words."""
        whole = UNITS[self.unit]
        pixels = "in pixels counted from 1" if self.origin else "in pixels"
        return f"{LAYOUTS[self.layout]} " + (pixels if whole is None else f"from 0 to {whole}")

    @property
    def whole(self) -> int | None:
        """The number for a whole side of an image; `None` for pixels."""
        return UNITS[self.unit]

    def to_xywh(self, boxes: np.ndarray, sizes: np.ndarray, named: np.ndarray | bool = False) -> np.ndarray:
        """Boxes as (x, y, width, height) in pixels.

        Args:
            boxes: (N, 4) in this format.
            sizes: (N, 2) width and height of the image of each box in pixels.
            named: (N,) boxes whose layout is (x, y, width, height) already, whatever the format's is.

        Returns:
            (N, 4); `boxes` itself where nothing is to be done. What is computed is rounded to `DECIMALS`, so that a
            box of no more is the same to the last bit whether a file holds it so, as corners or relative to the image.
        """
        if self.layout == "xywh" and self.whole is None:
            return boxes
        first, second = boxes[:, :2] - self.origin, boxes[:, 2:]
        parts = {
            "xywh": [first, second],
            "xyxy": [first, _rounded(second - first)],
            "cxcywh": [first - second / 2, second],
        }[self.layout]
        result = np.where(np.reshape(named, (-1, 1)), boxes, np.concatenate(parts, axis=1))
        if self.whole is not None:
            result = result * (np.concatenate([sizes, sizes], axis=1) / self.whole)
        return result if self.layout == "xyxy" and self.whole is None else _rounded(result)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Values in pixels to `DECIMALS`; those that are no coordinates stay as they are."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < 1e6, np.round(np.clip(values, -1e6, 1e6), DECIMALS), values)


def xyxy_to_xywh(boxes: ArrayLike, dtype: DTypeLike = np.float64) -> np.ndarray:
    """Corners (x_min, y_min, x_max, y_max) to COCO's (x, y, width, height).

    Args:
        boxes: (n, 4), also an empty list.
        dtype: Type to compute and answer in.

    Returns:
        (n, 4), a new array.
    """
    boxes = np.asarray(boxes, dtype=dtype).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def xywh_to_xyxy(boxes: ArrayLike, dtype: DTypeLike = np.float64) -> np.ndarray:
    """COCO's (x, y, width, height) to corners (x_min, y_min, x_max, y_max); otherwise as `xyxy_to_xywh`."""
    boxes = np.asarray(boxes, dtype=dtype).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
