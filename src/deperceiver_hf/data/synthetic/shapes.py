# SPDX-License-Identifier: Apache-2.0
"""The shapes of the synthetic scenes: outlines as polygons, their boxes, overlap and painting."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw

_CURVE_POINTS = 48
_GAP = 1.0  # pixels between two shapes
_SUPERSAMPLING = 4


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


def any_overlap(shape: Shape, others: list[Shape]) -> bool:
    """Whether the convex hull of a shape comes near that of another, so that one could hide the other."""
    x, y, width, height = shape.box
    for other in others:
        ox, oy, other_width, other_height = other.box
        apart_x = x > ox + other_width + _GAP or ox > x + width + _GAP
        apart_y = y > oy + other_height + _GAP or oy > y + height + _GAP
        if not (apart_x or apart_y) and not _separable(shape.outline, other.outline):
            return True
    return False


def _separable(first: np.ndarray, second: np.ndarray, directions: int = 24) -> bool:
    """Whether a line keeps two point sets apart, tried in some directions: it may overlook one, but never invents."""
    angles = np.arange(directions) * (np.pi / directions)
    axes = np.stack([np.cos(angles), np.sin(angles)])  # (2, directions)
    a, b = first @ axes, second @ axes
    gap = np.maximum(b.min(axis=0) - a.max(axis=0), a.min(axis=0) - b.max(axis=0))
    return bool(gap.max() > _GAP)


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
