# SPDX-License-Identifier: Apache-2.0
"""The schema of a detection record, the data set that holds them, and the report of what was repaired on the way."""

import os
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch.distributed
from datasets import Dataset, Features, Image, Value
from transformers.utils import logging

logger = logging.get_logger(__name__)

DETECTION_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("int64"),
        "width": Value("int32"),
        "height": Value("int32"),
        "objects": {
            "id": [Value("int64")],
            "bbox": [[Value("float64")]],
            "category": [Value("int64")],
            "area": [Value("float64")],
            "iscrowd": [Value("bool")],
        },
    }
)
"""
One row of a detection data set. `image` is decoded on access, a file is referenced by its path; `width` and `height`
are those of the image as it is seen, after the rotation that an EXIF tag asks for. Every list in `objects` has one
entry per object: `bbox` is `[x, y, width, height]` in pixels, inside the image and of positive area; `category` is a
label in `0 ... K-1` (NOT the data set's category id); `area` is the annotated area in pixels (the box's where none is
given); crowds (`iscrowd`) are kept, since evaluation needs them. Coordinates are float64, equal to the annotated ones.
"""

ISSUES = {
    "invalid_image_entry": "images without a usable id or file name, left out",
    "duplicate_image_id": "images whose id was seen before, left out",
    "renumbered_images": "data sets whose image ids are no distinct integers, row numbers are used",
    "missing_image_file": "images whose file does not exist, left out",
    "unreadable_image": "image files that cannot be read as an image, left out",
    "size_mismatch": "images of another size than stated, the file's size is used",
    "rotated_image": "images annotated before their EXIF rotation, boxes are rotated with the image",
    "invalid_annotation": "annotations that are no objects with a box, left out",
    "unknown_image": "annotations of an image that is not listed, left out",
    "unknown_category": "annotations of a category that is not listed, left out",
    "invalid_box": "boxes that are not four finite numbers, left out",
    "empty_box": "boxes of zero or negative side, left out",
    "box_outside_image": "boxes wholly outside the image, left out",
    "clamped_box": "boxes over the border by more than a pixel, clipped to the image",
    "invalid_area": "areas that are no positive number, the box's area is used",
    "invalid_annotation_id": "annotations without an integer id of their own, given a new one",
    "duplicate_category_name": "categories that share a name, their id is appended",
}
"""What can be wrong with a data set, and what is done about it."""

BORDER_TOLERANCE = 1.0
"""Pixels by which a box may pass the border before its clipping counts as a repair (annotations are often rounded)."""

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}


@dataclass
class LoadingReport:
    """Counts of what a loader left out or repaired.

    Attributes:
        source: what was loaded, for the messages.
        counts: number of cases for each key of `ISSUES` that occurred.
        examples: the first case of each, in words.
        num_images, num_objects, num_crowds, num_empty_images: what the loaded data set holds; empty images are kept.
    """

    source: str
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    num_images: int = 0
    num_objects: int = 0
    num_crowds: int = 0
    num_empty_images: int = 0

    def add(self, issue: str, example: str, count: int = 1) -> None:
        if issue not in ISSUES:
            raise KeyError(f"{issue!r} is not one of {sorted(ISSUES)}")
        if count:
            self.counts[issue] = self.counts.get(issue, 0) + count
            self.examples.setdefault(issue, example)

    def summary(self) -> str:
        """The issues, one a line, with an example each; empty when there were none."""
        return "\n".join(
            f"  {count} {ISSUES[issue]}; e.g. {self.examples[issue]}" for issue, count in self.counts.items()
        )

    def conclude(self, strict: bool) -> None:
        """Log the issues as one warning on the main process, or refuse them.

        Raises:
            ValueError: there were issues and `strict` is set.
        """
        if not self.counts:
            return
        if strict:
            raise ValueError(
                f"{self.source} is not clean and strict=True was asked for:\n{self.summary()}\n"
                "Correct the annotations, or load with strict=False to have these repaired or left out as described."
            )
        if is_main_process():
            logger.warning(f"{self.source}: repaired while loading:\n{self.summary()}")


@dataclass(frozen=True)
class DetectionData:
    """A data set of detection records and what their labels mean.

    Attributes:
        dataset: rows of `DETECTION_FEATURES`.
        label_names: the name of each label, all different.
        category_ids: the data set's own category id of each label, ascending.
        name: short name for messages and file names.
        report: what was repaired or left out.
    """

    dataset: Dataset
    label_names: list[str]
    category_ids: list[int]
    name: str
    report: LoadingReport

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.label_names))


def require_same_labels(reference: DetectionData, *others: DetectionData) -> None:
    """Refuse data sets whose labels mean something else than the reference's.

    Raises:
        ValueError: names or category ids differ.
    """
    for other in others:
        if (other.label_names, other.category_ids) != (reference.label_names, reference.category_ids):
            mine, theirs = (dict(zip(d.category_ids, d.label_names, strict=True)) for d in (reference, other))
            differing = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            raise ValueError(
                f"The categories of {reference.report.source} and {other.report.source} differ, so their labels "
                f"cannot be compared. Category ids that differ: {differing[:10]}; e.g. {differing[0]} is "
                f"{mine.get(differing[0])!r} in the first and {theirs.get(differing[0])!r} in the second."
            )


def split_aliases(split: str) -> tuple[str, ...]:
    """Names under which a split may be stored, the one asked for first: `val -> (val, validation, valid, dev)`."""
    for names in SPLIT_NAMES.values():
        if split in names:
            return (split, *(name for name in names if name != split))
    return (split,)


def is_main_process() -> bool:
    """Whether this process should log; works before and without `torch.distributed`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


@dataclass
class AnnotationList:
    """Annotations as a loader finds them, one entry per object in each list; unchecked but for image and label."""

    image_index: list[int] = field(default_factory=list)
    id: list = field(default_factory=list)
    bbox: list = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    area: list = field(default_factory=list)
    iscrowd: list = field(default_factory=list)

    def append(self, image_index: int, label: int, bbox, area=None, iscrowd=None, id=None) -> None:
        self.image_index.append(image_index)
        self.label.append(label)
        self.bbox.append(bbox)
        self.area.append(area)
        self.iscrowd.append(bool(iscrowd))
        self.id.append(id)


def record_columns(
    image_ids: np.ndarray,  # (N,)
    sizes: np.ndarray,  # (N, 2) width, height as seen
    annotations: AnnotationList,
    report: LoadingReport,
    rotations: np.ndarray | None = None,  # (N,) EXIF orientation still to be applied to the boxes, 1 for none
) -> dict[str, pa.Array]:
    """Check the annotations and arrange them as the columns of `DETECTION_FEATURES`, but for the image."""
    image_index = np.asarray(annotations.image_index, dtype=np.int64)
    boxes = _as_boxes(annotations.bbox)
    if rotations is not None and (rotations != 1).any():
        boxes = rotate_boxes(boxes, rotations[image_index], sizes[image_index])

    def describe(position: int) -> str:
        image_id, box = image_ids[image_index[position]], annotations.bbox[position]
        return f"image_id {image_id}, annotation id {annotations.id[position]}, bbox {box!r}"

    def note(issue: str, flags: np.ndarray) -> None:
        if flags.any():
            report.add(issue, describe(int(flags.argmax())), int(flags.sum()))

    width, height = sizes[image_index].astype(np.float64).T
    finite = np.isfinite(boxes).all(axis=1)
    positive = finite & (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    limits = np.stack([width, height], axis=1)
    clipped_low, clipped_high = low.clip(0, limits), high.clip(0, limits)
    inside = (clipped_high > clipped_low).all(axis=1)
    keep = positive & inside
    excess = np.maximum(clipped_low - low, high - clipped_high).max(axis=1, initial=0)
    note("invalid_box", ~finite)
    note("empty_box", finite & ~positive)
    note("box_outside_image", positive & ~inside)
    note("clamped_box", keep & (excess > BORDER_TOLERANCE))
    # Boxes within the image stay as they are to the last bit: x + w - x is not always w.
    moved = keep & (excess > 0)
    boxes[moved] = np.concatenate([clipped_low, clipped_high - clipped_low], axis=1)[moved]

    area = np.asarray([_as_float(value) for value in annotations.area], dtype=np.float64)
    stated = np.asarray([value is not None for value in annotations.area], dtype=bool)
    usable = np.isfinite(area) & (area > 0)
    note("invalid_area", keep & stated & ~usable)
    area = np.where(usable, area, boxes[:, 2] * boxes[:, 3])

    order = np.flatnonzero(keep)
    order = order[np.argsort(image_index[order], kind="stable")]
    objects_per_image = np.bincount(image_index[order], minlength=len(image_ids))
    offsets = pa.array(np.concatenate([[0], np.cumsum(objects_per_image)]), type=pa.int32())
    crowd = np.asarray(annotations.iscrowd, dtype=bool)[order]
    ids, replaced = _as_annotation_ids([annotations.id[i] for i in order])
    if any(annotations.id[i] is not None for i in order):  # a data set without any ids needs no remark
        flags = np.zeros(len(keep), dtype=bool)
        flags[order[replaced]] = True
        note("invalid_annotation_id", flags)
    box_offsets = pa.array(np.arange(len(order) + 1) * 4, type=pa.int32())
    columns = {
        "id": pa.array(ids, type=pa.int64()),
        "bbox": pa.ListArray.from_arrays(box_offsets, pa.array(boxes[order].reshape(-1), type=pa.float64())),
        "category": pa.array(np.asarray(annotations.label, dtype=np.int64)[order]),
        "area": pa.array(area[order], type=pa.float64()),
        "iscrowd": pa.array(crowd, type=pa.bool_()),
    }
    report.num_images = len(image_ids)
    report.num_objects = len(order)
    report.num_crowds = int(crowd.sum())
    report.num_empty_images = int((objects_per_image == 0).sum())
    return {
        "image_id": pa.array(image_ids, type=pa.int64()),
        "width": pa.array(sizes[:, 0], type=pa.int32()),
        "height": pa.array(sizes[:, 1], type=pa.int32()),
        "objects": pa.StructArray.from_arrays(
            [pa.ListArray.from_arrays(offsets, values) for values in columns.values()], names=list(columns)
        ),
    }


def image_path_column(paths: list[str | None]) -> pa.StructArray:
    """The storage of a `datasets.Image` column that refers to files; `None` where there is no image yet."""
    missing = pa.array([None] * len(paths), type=pa.binary())
    return pa.StructArray.from_arrays(
        [missing, pa.array(paths, type=pa.string())],
        names=["bytes", "path"],
        mask=pa.array([path is None for path in paths], type=pa.bool_()),
    )


def rotate_boxes(boxes: np.ndarray, orientations: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Turn boxes of the stored image into boxes of the image as seen, for the EXIF orientations 5 to 8.

    Args:
        boxes: (N, 4) xywh in pixels of the stored image.
        orientations: (N,) EXIF orientation of the image of each box.
        sizes: (N, 2) width and height of that image as seen.
    """
    x, y, width, height = boxes.T
    seen_width, seen_height = sizes.T
    turned_x = np.where(np.isin(orientations, (6, 7)), seen_width - y - height, y)
    turned_y = np.where(np.isin(orientations, (7, 8)), seen_height - x - width, x)
    turned = np.stack([turned_x, turned_y, height, width], axis=1)
    return np.where((orientations >= 5)[:, None], turned, boxes)


def as_integer(value) -> int | None:
    """An id as an integer: `7`, `7.0` and `"7"` are 7; anything else is `None`."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = int(value)
        return number if isinstance(value, str) or number == value else None
    except (TypeError, ValueError, OverflowError):
        return None


def _as_float(value) -> float:
    try:
        return float("nan") if value is None else float(value)
    except (TypeError, ValueError):
        return float("nan")


def _as_boxes(values: list) -> np.ndarray:
    """(N, 4) float64; a box that is not four numbers becomes NaN."""
    try:
        boxes = np.array(values, dtype=np.float64)
        if boxes.shape == (len(values), 4):
            return boxes
    except (TypeError, ValueError):
        pass
    boxes = np.full((len(values), 4), np.nan)
    for row, value in enumerate(values):
        if isinstance(value, (list, tuple, np.ndarray)) and len(value) == 4:
            boxes[row] = [_as_float(coordinate) for coordinate in value]
    return boxes


def _as_annotation_ids(values: list) -> tuple[np.ndarray, np.ndarray]:
    """Distinct integers, and which of them are new (missing, repeated or no integer before)."""
    numbers = [as_integer(value) for value in values]
    next_id = max((number for number in numbers if number is not None), default=0) + 1
    seen: set[int] = set()
    replaced = np.zeros(len(values), dtype=bool)
    for position, number in enumerate(numbers):
        if number is None or number in seen:
            numbers[position], replaced[position] = next_id, True
            next_id += 1
        else:
            seen.add(number)
    return np.asarray(numbers, dtype=np.int64), replaced
