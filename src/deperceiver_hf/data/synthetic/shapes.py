# SPDX-License-Identifier: Apache-2.0
"""The shapes of the synthetic scenes: outlines as polygons, their boxes, overlap and painting."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw

_CURVE_POINTS = 48
_GAP = 1.0  # pixels between two shapes
_SUPERSAMPLING = 4
_ANGLES = np.arange(24) * (np.pi / 24)
_DIRECTIONS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])  # (2, directions)


def _regular(points: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    angles = np.arange(points) * (2 * np.pi / points)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.resize(np.array(radii), points)[:, None]


def _semicircle() -> np.ndarray:
    angles = np.linspace(0, np.pi, _CURVE_POINTS // 2)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _cross() -> np.ndarray:
    a = 0.33  # half the width of an arm
    right = [(a, 1), (a, a), (1, a), (1, -a), (a, -a), (a, -1)]
    return np.array([*right, *((-x, -y) for x, y in right)])


_OUTLINES = {
    "disc": _regular(_CURVE_POINTS),
    "square": _regular(4),
    "triangle": _regular(3),
    "star": _regular(10, (1.0, 0.42)),
    "cross": _cross(),
    "ring": _regular(_CURVE_POINTS),
    "semicircle": _semicircle(),
    "bar": np.array([(1.0, 0.36), (1.0, -0.36), (-1.0, -0.36), (-1.0, 0.36)]),
}
SHAPES = tuple(_OUTLINES)
_HOLE = 0.55  # inner radius of the ring over its outer one


@dataclass(frozen=True)
class Shape:
    """A shape in the image.

    Attributes:
        label: index into `SHAPES`.
        outline: (P, 2) corners in pixels; x to the right and y down, pixel (0, 0) covers [0, 1] x [0, 1].
        box: x, y, width, height of the outline in pixels.
    """

    label: int
    outline: np.ndarray
    box: tuple[float, float, float, float]

    def moved(self, dx: float, dy: float) -> "Shape":
        x, y, width, height = self.box
        return Shape(self.label, self.outline + np.array([dx, dy]), (float(x + dx), float(y + dy), width, height))


def random_shape(random: np.random.Generator, side: float, label: int | None = None) -> Shape:
    """A shape of random angle whose box has `side` pixels on its longer side, of a random class or the one given."""
    label = int(random.integers(len(SHAPES))) if label is None else label
    angle = random.random() * 2 * np.pi
    cos, sin = np.cos(angle), np.sin(angle)
    outline = _OUTLINES[SHAPES[label]] @ np.array([[cos, sin], [-sin, cos]])
    low, high = outline.min(axis=0), outline.max(axis=0)
    scale = side / (high - low).max()
    width, height = ((high - low) * scale).tolist()
    return Shape(label, (outline - low) * scale, (0.0, 0.0, width, height))


class PlacedShapes:
    """Shapes that have their place in the image, and what is close to them.

    The boxes of all are looked at together and the outlines of those only whose boxes are near, so that a thousand
    shapes find their places in a fraction of a second.
    """

    def __init__(self):
        self.shapes: list[Shape] = []
        self._boxes = np.empty((4, 64))  # left, top, and right and bottom with the gap; in columns
        self._extents = np.empty((2, 64, _DIRECTIONS.shape[1]))  # least and greatest along each direction

    def add(self, shape: Shape) -> None:
        count = len(self.shapes)
        if count == self._boxes.shape[1]:
            self._boxes = np.concatenate((self._boxes, np.empty_like(self._boxes)), axis=1)
            self._extents = np.concatenate((self._extents, np.empty_like(self._extents)), axis=1)
        x, y, width, height = shape.box
        self._boxes[:, count] = x, y, x + width + _GAP, y + height + _GAP
        self._extents[:, count] = _extent(shape.outline)
        self.shapes.append(shape)

    def overlap(self, shape: Shape) -> bool:
        """Whether the convex hull of a shape comes near that of one of these, so that one could hide the other."""
        x, y, width, height = shape.box
        left, top, right, bottom = self._boxes[:, : len(self.shapes)]
        apart = (x > right) | (left > x + width + _GAP) | (y > bottom) | (top > y + height + _GAP)
        near = np.flatnonzero(~apart)
        if not len(near):
            return False
        low, high = _extent(shape.outline)
        other_low, other_high = self._extents[:, near]  # (near, directions)
        gap = np.maximum(other_low - high, low - other_high).max(axis=1)
        return bool((gap <= _GAP).any())


def _extent(outline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far an outline (P, 2) reaches along each of some directions: a line across one of them that keeps two
    outlines apart may be overlooked, but is never invented."""
    along = outline @ _DIRECTIONS
    return along.min(axis=0), along.max(axis=0)


def paint_shape(canvas: np.ndarray, shape: Shape, colour: np.ndarray) -> None:
    """Paint a shape onto a (H, W, 3) uint8 canvas in place, with smooth edges."""
    x, y, width, height = shape.box
    left, top = int(np.floor(x)), int(np.floor(y))
    right, bottom = int(np.ceil(x + width)), int(np.ceil(y + height))
    factor = _SUPERSAMPLING
    mask = PIL.Image.new("L", ((right - left) * factor, (bottom - top) * factor))
    draw = PIL.ImageDraw.Draw(mask)
    corners = (shape.outline - (left, top)) * factor
    draw.polygon(corners.ravel().tolist(), fill=255)
    if SHAPES[shape.label] == "ring":
        centre = corners.mean(axis=0)
        draw.polygon((centre + (corners - centre) * _HOLE).ravel().tolist(), fill=0)
    alpha = np.asarray(mask.reduce(factor), dtype=np.float32)[:, :, None] / 255  # (h, w, 1)
    patch = canvas[top:bottom, left:right]
    patch[:] = (patch * (1 - alpha[: patch.shape[0], : patch.shape[1]]) + colour * alpha).round().astype(np.uint8)
