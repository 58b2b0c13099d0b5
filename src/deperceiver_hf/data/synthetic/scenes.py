# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes: rotated coloured shapes, many of them small, on a textured background with clutter lines.

Where the objects are is drawn when the data set is made (a millisecond per scene; of a thousand objects, a tenth of a
second); a picture is painted when its row is read. Both depend on the seed, the split and the scene's number alone, so
that every process and machine sees the same. In context scenes, the class of some objects depends on something else in
the image (see `context`).
"""

import functools
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
from datasets import Dataset

from ...errors import UserError
from ..annotations import AnnotationList, image_path_column, record_columns
from ..fields import as_integer
from ..records import DETECTION_FEATURES, DetectionData, LoadingReport, split_aliases
from .context import (
    CONTEXT_LABELS,
    MIN_CONTEXT_IMAGE_SIZE,
    Beacon,
    context_label,
    is_allowed,
    random_beacon,
    random_context_shape,
)
from .shapes import SHAPES, PlacedShapes, Shape, paint_shape, random_shape

NAMED_OPTIONS = (
    *("image_size", "min_objects", "max_objects", "min_side", "max_side"),
    *("num_samples", "seed", "context"),
)
DEFAULT_NUM_SAMPLES = {"train": 9000, "val": 300, "test": 300}
ENOUGH_PLACED = 0.95  # share of the objects drawn that find room; of less it is said
# (share, least side, greatest side in pixels) of the objects
LARGE_SCENE_SIZES = ((0.55, 7, 20), (0.30, 20, 48), (0.15, 48, 110))  # for 256 pixels
SMALL_SCENE_SIZES = ((0.55, 8, 20), (0.30, 20, 40), (0.15, 40, 64))  # for 128 pixels


@dataclass(frozen=True)
class SyntheticScenes:
    """What the scenes look like.

    Attributes:
        image_size: side of the square image in pixels, at least 32.
        min_objects, max_objects: bounds of the number of objects; by default 3 and 20, in scenes of less than 192
            pixels 2 and 10.
        object_sizes: share, least and greatest side (the longer side of the box, in pixels) of classes of objects; by
            default the distributions above, limited to half of the image.
        seed: of all random choices, at least 0.
        context: 1 for context scenes, whose classes are `context.CONTEXT_LABELS`; 0 for ordinary ones.
    """

    image_size: int = 256
    # Of these three, None stands for what suits `image_size`, and is replaced by it.
    min_objects: int = None  # type: ignore[assignment]
    max_objects: int = None  # type: ignore[assignment]
    object_sizes: tuple[tuple[float, float, float], ...] = None  # type: ignore[assignment]
    seed: int = 0
    context: int = 0

    def __post_init__(self):
        small = self.image_size < 192
        defaults = {"min_objects": 2 if small else 3, "max_objects": 10 if small else 20}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.object_sizes is None:
            limit = self.image_size // 2
            sizes = SMALL_SCENE_SIZES if small else LARGE_SCENE_SIZES
            object.__setattr__(self, "object_sizes", tuple((p, min(a, limit), min(b, limit)) for p, a, b in sizes))
        if self.image_size < 32:
            raise UserError(f"image_size must be at least 32 pixels, got {self.image_size}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")
        if self.context not in (0, 1):
            raise UserError(f"context must be 0 or 1, got {self.context}")
        if self.context and self.image_size < MIN_CONTEXT_IMAGE_SIZE:
            raise UserError(
                f"context scenes need an image_size of at least {MIN_CONTEXT_IMAGE_SIZE} pixels, got {self.image_size}"
            )
        if not 0 <= self.min_objects <= self.max_objects:
            raise UserError(
                f"0 <= min_objects <= max_objects is needed, got {self.min_objects} and {self.max_objects}"
            )
        for share, low, high in self.object_sizes:
            if share < 0 or not 4 <= low <= high <= 0.9 * self.image_size:
                raise UserError(
                    f"object_sizes must be (share >= 0, least side >= 4, greatest side <= 90 % of {self.image_size} "
                    f"pixels), got {(share, low, high)}"
                )
        if sum(share for share, _, _ in self.object_sizes) <= 0:
            raise UserError(f"the shares of object_sizes must not all be 0, got {self.object_sizes}")

    @property
    def label_names(self) -> list[str]:
        return list(CONTEXT_LABELS if self.context else SHAPES)

    def beacon(self, stream: int, index: int) -> Beacon | None:
        """What decides the classes in a context scene; `None` in an ordinary one."""
        if not self.context:
            return None
        return random_beacon(np.random.default_rng((self.seed, stream, index, 2)), self.image_size)

    def count(self, stream: int, index: int) -> int:
        """How many objects scene `index` of a stream is to have; where they do not fit, it has fewer."""
        return self._drawn_count(np.random.default_rng((self.seed, stream, index, 0)))

    def _drawn_count(self, random: np.random.Generator) -> int:
        return int(random.integers(self.min_objects, self.max_objects + 1))

    def layout(self, stream: int, index: int) -> list[Shape]:
        """The objects of scene `index` of a stream, wholly inside the image and not overlapping.

        Raises:
            ValueError: so many objects of such sizes do not fit.
        """
        random = np.random.default_rng((self.seed, stream, index, 0))
        count = self._drawn_count(random)
        shares, lows, highs = (np.array(column, dtype=np.float64) for column in zip(*self.object_sizes, strict=True))
        bins = random.choice(len(shares), size=count, p=shares / shares.sum())
        sides = np.sort(lows[bins] + random.random(count) * (highs[bins] - lows[bins]))[::-1]
        beacon = self.beacon(stream, index)
        shapes: list[Shape] = []
        occupied = PlacedShapes()
        if beacon is not None:
            occupied.add(beacon.place)
        for side in sides:
            shape = self._place(random, float(side), occupied, beacon)
            if shape is not None:
                shapes.append(shape)
                occupied.add(shape)
        if len(shapes) < self.min_objects:
            raise UserError(
                f"Only {len(shapes)} of {count} objects found room in scene {index} of {self.image_size} pixels. "
                "Ask for fewer or smaller objects, or a larger image."
            )
        return shapes

    def _place(
        self, random: np.random.Generator, side: float, occupied: PlacedShapes, beacon: Beacon | None
    ) -> Shape | None:
        """A shape that overlaps none of those placed; where there is no room, a smaller one."""
        least = min(low for _, low, _ in self.object_sizes)
        while True:
            shape = random_shape(random, side) if beacon is None else random_context_shape(random, side)
            x, y, width, height = shape.box
            room = np.array([self.image_size - width, self.image_size - height])
            for target in random.random((24, 2)) * room:
                candidate = shape.moved(target[0] - x, target[1] - y)
                if beacon is not None and not is_allowed(candidate, beacon, self.image_size):
                    continue
                if not occupied.overlap(candidate):
                    return candidate
            if side <= least:
                return None
            side = max(least, side / 2)

    def paint(self, stream: int, index: int) -> PIL.Image.Image:
        """The picture of scene `index` of a stream, RGB."""
        random = np.random.default_rng((self.seed, stream, index, 1))
        base = random.integers(60, 196, size=3)
        canvas = self._background(random, base)
        beacon = self.beacon(stream, index)
        shapes = self.layout(stream, index)
        for shape in shapes if beacon is None else [*shapes, beacon.shape]:
            paint_shape(canvas, shape, _contrasting_colour(random, base))
        noise = random.integers(-6, 7, size=canvas.shape, dtype=np.int16)
        return PIL.Image.fromarray((canvas.astype(np.int16) + noise).clip(0, 255).astype(np.uint8))

    def _background(self, random: np.random.Generator, base: np.ndarray) -> np.ndarray:
        """Blotches of two scales around a base colour, crossed by 3 to 10 thin lines; (H, W, 3) uint8."""
        size = self.image_size
        texture = np.zeros((size, size, 3), dtype=np.int16)
        for cells, strength in ((6, 36), (32, 22)):
            grid = random.integers(128 - strength, 129 + strength, size=(cells, cells, 3)).astype(np.uint8)
            smooth = PIL.Image.fromarray(grid).resize((size, size), PIL.Image.Resampling.BICUBIC)
            texture += np.asarray(smooth, dtype=np.int16) - 128
        image = PIL.Image.fromarray((texture + base.astype(np.int16)).clip(0, 255).astype(np.uint8))
        draw = PIL.ImageDraw.Draw(image)
        for _ in range(int(random.integers(3, 11))):
            ends = random.integers(-size // 8, size + size // 8, size=4).tolist()
            colour = tuple(random.integers(0, 256, size=3).tolist())
            draw.line(ends, fill=colour, width=int(random.integers(1, 3)))
        return np.array(image)


class ScenePainter:
    """Fills the image column of the rows that are read; the format transform of a synthetic data set."""

    def __init__(self, scenes: SyntheticScenes, stream: int):
        self.scenes = scenes
        self.stream = stream

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "image" in batch and "image_id" in batch:
            batch["image"] = [self.scenes.paint(self.stream, image_id) for image_id in batch["image_id"]]
        return batch


def is_synthetic(dataset: str) -> bool:
    """Whether a data set's name is `synthetic`, with or without options."""
    return dataset.partition(":")[0] == "synthetic"


def load_synthetic(dataset: str, split: str, *, max_samples: int | None = None, **options) -> DetectionData:
    """A synthetic data set.

    `area` is the area of the box, so that COCO's size classes follow the sides of the boxes.

    Args:
        dataset: `synthetic`, or with any of `NAMED_OPTIONS` as integers: `synthetic:image_size=128,seed=3`. Crowded:
            `synthetic:image_size=640,min_objects=300,max_objects=1000,min_side=6,max_side=16`.
        split: `train`, `val` or `test`; their scenes are drawn from independent random streams.
        max_samples: use the first scenes only.
        options: `num_samples`, the number of scenes, by default 9000 for training and 300 else; `min_side` and
            `max_side`, for objects of all sides between these, in pixels; and the fields of `SyntheticScenes`.

    Raises:
        FileNotFoundError: there is no such split.
        ValueError: an option in the name is unknown or no integer, or the scenes are impossible.
        TypeError: another option is unknown, or is in the name too.
    """
    canonical = next((name for name in DEFAULT_NUM_SAMPLES if name in split_aliases(split)), None)
    if canonical is None:
        raise FileNotFoundError(
            f"The synthetic data set has the splits {', '.join(DEFAULT_NUM_SAMPLES)}, not {split!r}."
        )
    options = dict(**_named_options(dataset), **options)
    count = options.pop("num_samples", DEFAULT_NUM_SAMPLES[canonical])
    if count < 1:
        raise UserError(f"num_samples must be at least 1, got {count}")
    count = count if max_samples is None else min(count, max_samples)
    sides = [options.pop(name, None) for name in ("min_side", "max_side")]
    if sides != [None, None]:
        if None in sides or "object_sizes" in options:
            raise UserError("give both min_side and max_side, and object_sizes instead of them or not at all.")
        options["object_sizes"] = ((1.0, *sides),)
    return _build(SyntheticScenes(**options), count, canonical)


def _named_options(dataset: str) -> dict[str, int]:
    _, colon, listed = dataset.partition(":")
    options: dict[str, int] = {}
    for option in listed.split(",") if colon else ():
        name, _, text = option.partition("=")
        value = as_integer(text)
        if name not in NAMED_OPTIONS or name in options or value is None:
            raise UserError(
                f"{dataset!r}: {option!r} is none of the options of synthetic scenes, or is given twice. They are "
                f"{', '.join(f'{known}=INTEGER' for known in NAMED_OPTIONS)}, separated by commas only."
            )
        options[name] = value
    return options


@functools.lru_cache(maxsize=8)  # laying out the default training scenes takes some ten seconds
def _build(scenes: SyntheticScenes, count: int, split: str) -> DetectionData:
    stream = list(DEFAULT_NUM_SAMPLES).index(split)
    report = LoadingReport(f"synthetic/{split}")
    annotations = AnnotationList()
    drawn = sum(scenes.count(stream, index) for index in range(count))
    for index in range(count):
        beacon = scenes.beacon(stream, index)
        for shape in scenes.layout(stream, index):
            label = shape.label if beacon is None else context_label(shape, beacon)
            annotations.append(index, label, list(shape.box), id=len(annotations.id) + 1)
    sizes = np.full((count, 2), scenes.image_size)
    columns = record_columns(np.arange(count), sizes, annotations, report)
    if (placed := len(annotations.id)) < ENOUGH_PLACED * drawn:
        report.remarks.append(
            f"{drawn} objects were drawn for {count} scenes, and {placed} found room in {scenes.image_size} pixels. "
            "Fewer or smaller objects, or a larger image_size, make the scenes that were asked for."
        )
    report.conclude(strict=False)
    images = image_path_column([None] * count)
    dataset = Dataset.from_dict({"image": images, **columns}, features=DETECTION_FEATURES)
    dataset = dataset.with_transform(ScenePainter(scenes, stream))
    label_names = scenes.label_names
    return DetectionData(dataset, label_names, list(range(len(label_names))), f"synthetic-{split}", report)


def _contrasting_colour(random: np.random.Generator, base: np.ndarray) -> np.ndarray:
    """A colour that differs from the background's by at least 90 in some channel."""
    while True:
        colour = random.integers(0, 256, size=3)
        if np.abs(colour - base).max() >= 90:
            return colour
