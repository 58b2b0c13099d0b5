# SPDX-License-Identifier: Apache-2.0
"""Annotations of any origin, checked, repaired and arranged as the columns of detection records."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from .images import ImageHeader, UnreadableImageError, seen_sizes
from .records import BORDER_TOLERANCE, LoadingReport


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

    def of_images(self, kept: np.ndarray) -> "AnnotationList":
        """Those of the images at the indices `kept` (K,), whose indices are their places there."""
        place = {int(index): position for position, index in enumerate(kept)}
        chosen = [row for row, index in enumerate(self.image_index) if index in place]
        values = {name: [column[row] for row in chosen] for name, column in vars(self).items()}
        return AnnotationList(**values | {"image_index": [place[index] for index in values["image_index"]]})


@dataclass(frozen=True)
class ImageList:
    """Images as a loader finds them, one entry per image in each.

    Attributes:
        ids: (N,) integers, all different.
        headers: An error with the reason for an image that cannot be read.
        stated_sizes: Width and height that the annotations state; `None` where they do not.
        names: For messages.
    """

    ids: np.ndarray
    headers: Sequence[ImageHeader | UnreadableImageError]
    stated_sizes: Sequence[tuple[int, int] | None]
    names: Sequence[str]


def assemble(
    images: ImageList, annotations: AnnotationList, report: LoadingReport
) -> tuple[np.ndarray, dict[str, pa.Array]]:
    """What every loader does with what it has found: leave out images that cannot be read, decide on sizes and frames
    of the others, check and arrange their annotations.

    Args:
        images: All images.
        annotations: Of any of them, by their index.
        report: Is told what was left out and repaired.

    Returns:
        The indices (K,) of the images that can be read, and the columns of `DETECTION_FEATURES` for them, but for the
        image.
    """
    for name, header in zip(images.names, images.headers, strict=True):
        if isinstance(header, UnreadableImageError):
            report.add("unreadable_image", f"{name}: {header}")
    readable = {row: header for row, header in enumerate(images.headers) if isinstance(header, ImageHeader)}
    kept, headers = np.array(list(readable), dtype=np.int64), list(readable.values())
    stated, names = ([values[row] for row in kept] for values in (images.stated_sizes, images.names))
    sizes, rotations = seen_sizes(headers, stated, names, report)
    return kept, record_columns(images.ids[kept], sizes, annotations.of_images(kept), report, rotations)


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
