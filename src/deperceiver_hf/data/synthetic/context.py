# SPDX-License-Identifier: Apache-2.0
"""The rule of the context scenes: the class of some objects is decided by something far away in the image.

Each context scene has one beacon, a star or a cross near a border, that is painted but not annotated. Discs and
squares take their class from it; each is at least half the side of the image away, so that nothing near an object
tells its class. The other shapes are classed by themselves. The layout is drawn without knowing which of the two the
beacon is: exchanging it changes the picture inside the beacon's place only, and there is no other cue. Train on these
scenes without crops, which may leave the beacon out.
"""

from dataclasses import dataclass

import numpy as np

from .shapes import SHAPES, Shape, random_shape

BEACONS = ("star", "cross")
DEPENDENT_SHAPES = ("disc", "square")
INDEPENDENT_SHAPES = tuple(name for name in SHAPES if name not in (*BEACONS, *DEPENDENT_SHAPES))
CONTEXT_LABELS = (*(f"{shape} ({beacon})" for shape in DEPENDENT_SHAPES for beacon in BEACONS), *INDEPENDENT_SHAPES)
"""Names of the classes: `disc (star)`, `disc (cross)`, `square (star)`, `square (cross)`, `triangle`, ..."""

MIN_CONTEXT_IMAGE_SIZE = 96
"""Side of the image in pixels, below which a star and a cross of a beacon's size look alike."""

LEAST_DISTANCE = 0.5
"""Of the centre of a dependent object from that of the beacon, as a fraction of the side of the image."""

_DEPENDENT_SHARE = 0.6  # of the objects
_BEACON_SIDES = (3 / 32, 1 / 8)  # of the side of the image: 24 to 32 pixels of 256
_BORDER = 1 / 16  # greatest distance of the beacon's place from the nearest border, of the side of the image


@dataclass(frozen=True)
class Beacon:
    """What decides the class of dependent objects.

    Attributes:
        shape: the star or cross that is painted.
        place: the square around its centre that is kept free for it, whichever of the two it is.
    """

    shape: Shape
    place: Shape


def random_beacon(random: np.random.Generator, image_size: int) -> Beacon:
    """A star or a cross, with equal chance, somewhere along one of the borders of the image."""
    name = BEACONS[int(random.integers(len(BEACONS)))]
    side = random.uniform(*_BEACON_SIDES) * image_size
    room = image_size - side
    along, from_border = random.random() * room, random.random() * _BORDER * image_size
    across = from_border if random.random() < 0.5 else room - from_border
    x, y = (along, across) if random.random() < 0.5 else (across, along)
    corners = np.array([(0, 0), (side, 0), (side, side), (0, side)])
    place = Shape(SHAPES.index("square"), corners, (0.0, 0.0, side, side)).moved(x, y)
    shape = random_shape(random, side, SHAPES.index(name))
    _, _, width, height = shape.box
    return Beacon(shape.moved(x + (side - width) / 2, y + (side - height) / 2), place)


def random_context_shape(random: np.random.Generator, side: float) -> Shape:
    """`random_shape` of the shapes that are objects of context scenes."""
    names = DEPENDENT_SHAPES if random.random() < _DEPENDENT_SHARE else INDEPENDENT_SHAPES
    return random_shape(random, side, SHAPES.index(names[int(random.integers(len(names)))]))


def is_allowed(shape: Shape, beacon: Beacon, image_size: int) -> bool:
    """Whether an object may be where it is: a dependent one must be far enough from the beacon."""
    if SHAPES[shape.label] not in DEPENDENT_SHAPES:
        return True
    return distance(shape, beacon) >= LEAST_DISTANCE * image_size


def distance(shape: Shape, beacon: Beacon) -> float:
    """Pixels between the centres of the boxes of an object and of the beacon's place."""
    (x, y, width, height), (bx, by, bwidth, bheight) = shape.box, beacon.place.box
    return float(np.hypot(x + width / 2 - bx - bwidth / 2, y + height / 2 - by - bheight / 2))


def context_label(shape: Shape, beacon: Beacon) -> int:
    """Index into `CONTEXT_LABELS` of an object of a context scene."""
    name = SHAPES[shape.label]
    return CONTEXT_LABELS.index(f"{name} ({SHAPES[beacon.shape.label]})" if name in DEPENDENT_SHAPES else name)
