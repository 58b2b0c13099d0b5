# SPDX-License-Identifier: Apache-2.0
"""Annotations of any origin, checked, repaired and arranged as the columns of detection records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from .boxes import BoxFormat
from .fields import INT64, Id, as_boxes, as_integer, as_number, as_truth
from .images import ImageHeader, UnreadableImageError, seen_sizes
from .plausibility import check_box_format, drawn_before_turning, made_smaller_or_larger
from .records import BORDER_TOLERANCE, MOST_CASES, LoadingReport

MOST_PIXELS = 2**31  # of a side: more is no size


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
        self.iscrowd.append(iscrowd)
        self.id.append(id)

    def of_images(self, kept: Sequence[int] | np.ndarray) -> "AnnotationList":
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
        own_ids: The ids that the data set's files have, where they are others; see [`DetectionData`].
    """

    ids: np.ndarray
    headers: Sequence[ImageHeader | UnreadableImageError]
    stated_sizes: Sequence[tuple[int, int] | None]
    names: Sequence[str]
    own_ids: Mapping[int, Id] = field(default_factory=dict)


def stated_size(width: Any, height: Any, name: str, report: LoadingReport) -> tuple[int, int] | None:
    """Width and height of an image as its annotations state them, `None` where they do not; what is no size is
    reported under the image's name."""
    given = [as_integer(value) for value in (width, height) if value is not None]
    sides = [side for side in given if side is not None and 0 < side < MOST_PIXELS]
    if len(sides) < len(given):
        report.add("invalid_size", f"{name}: width {width!r}, height {height!r}")
    return (sides[0], sides[1]) if len(sides) == 2 else None


def assemble(
    images: ImageList,
    annotations: AnnotationList,
    report: LoadingReport,
    bbox_format: str | None = None,
    usual_format: str = "xywh",
) -> tuple[np.ndarray, dict[str, pa.Array]]:
    """What every loader does with what it has found: leave out images that cannot be read, decide on sizes and frames
    of the others, check and arrange their annotations.

    Args:
        images: All images.
        annotations: Of any of them, by their index.
        report: Is told what was left out and repaired.
        bbox_format: One of `BOX_FORMATS`; by default the usual one, which is refused where the boxes are plainly
            something else.
        usual_format: How the format of the files writes boxes.

    Returns:
        The indices (K,) of the images that can be read, and the columns of `DETECTION_FEATURES` for them, but for the
        image.

    Raises:
        ValueError: The boxes are in another format, or those of images of another size.
    """
    for name, header in zip(images.names, images.headers, strict=True):
        if isinstance(header, UnreadableImageError):
            report.add(header.issue, f"{name}: {header}")
    readable = {row: header for row, header in enumerate(images.headers) if isinstance(header, ImageHeader)}
    kept, headers = np.array(list(readable), dtype=np.int64), list(readable.values())
    stated, names = ([values[row] for row in kept] for values in (images.stated_sizes, images.names))
    sizes, rotations, differs = seen_sizes(headers, stated, names, report)
    annotations = annotations.of_images(kept)
    form = BoxFormat.parse(bbox_format or usual_format)
    asked_for = bbox_format is not None
    boxes, scales = _boxes_as_seen(annotations, sizes, stated, rotations, differs, form, asked_for, report)
    for row in np.flatnonzero(differs):
        issue = "size_mismatch" if (scales[row] == 1).all() else "rescaled_image"
        report.add(issue, f"{names[row]} is {headers[row].seen_size}, stated {stated[row]} (width, height)")
    turned = np.array([header.orientation >= 5 for header in headers], dtype=bool) & (rotations == 1)
    for row in np.flatnonzero(drawn_before_turning(boxes, np.asarray(annotations.image_index, int), sizes, turned)):
        report.add("unturned_boxes", names[row])
    if (scales != 1).any():
        factors = scales.prod(axis=1)[annotations.image_index]
        annotations.area = [
            area if area is None or factor == 1 else as_number(area) * factor
            for area, factor in zip(annotations.area, factors, strict=True)
        ]
    return kept, record_columns(images.ids[kept], sizes, annotations, report, boxes, images.own_ids, names)


def _boxes_as_seen(
    annotations: AnnotationList,
    sizes: np.ndarray,  # (K, 2) width, height as seen
    stated: Sequence[tuple[int, int] | None],
    rotations: np.ndarray,  # (K,)
    differs: np.ndarray,  # (K,)
    form: BoxFormat,
    asked_for: bool,
    report: LoadingReport,
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes (N, 4) as (x, y, width, height) in pixels of the images as seen, and by what those of each image were
    scaled (K, 2)."""
    image_index = np.asarray(annotations.image_index, dtype=np.int64)
    given, named = as_boxes(annotations.bbox)
    turned = (rotations >= 5)[:, None]
    frames = np.where(turned, sizes[:, ::-1], sizes).astype(np.float64)  # that the boxes are drawn in
    scales = np.ones_like(frames)
    if form.whole is None and differs.any():
        stated_sizes = np.array(
            [size if size and other else (0, 0) for size, other in zip(stated, differs, strict=True)]
        )
        boxes = form.to_xywh(given, frames[image_index], named)
        resized = made_smaller_or_larger(boxes, image_index, sizes, stated_sizes, report)
        frames[resized] = stated_sizes[resized]
        scales[resized] = sizes[resized] / stated_sizes[resized]
    check_box_format(given, named, frames[image_index], image_index, form, asked_for, report)
    boxes = form.to_xywh(given, frames[image_index], named)
    if (rotations != 1).any():
        boxes = rotate_boxes(boxes, rotations[image_index], sizes[image_index])
    if (scales != 1).any():
        boxes = boxes * np.concatenate([scales, scales], axis=1)[image_index]
    return boxes, scales


def record_columns(
    image_ids: np.ndarray,  # (N,)
    sizes: np.ndarray,  # (N, 2) width, height as seen
    annotations: AnnotationList,
    report: LoadingReport,
    boxes: np.ndarray | None = None,  # (M, 4) xywh in pixels, if not those of the annotations
    own_ids: Mapping[int, Id] | None = None,  # of images, for messages
    names: Sequence[str] | None = None,  # (N,) of images, for messages
) -> dict[str, pa.Array]:
    """Check the annotations and arrange them as the columns of `DETECTION_FEATURES`, but for the image."""
    image_index = np.asarray(annotations.image_index, dtype=np.int64)
    boxes = as_boxes(annotations.bbox)[0] if boxes is None else boxes.copy()

    def describe(position: int) -> str:
        image_id = int(image_ids[image_index[position]])
        own_id, box = (own_ids or {}).get(image_id, image_id), annotations.bbox[position]
        name = "" if names is None else str(names[image_index[position]])
        file = f"{name}, " if name and not name.startswith("image_id") else ""
        return f"{file}image_id {own_id}, annotation id {annotations.id[position]}, bbox {str(box)[:100]}"

    def note(issue: str, flags: np.ndarray, of: str | None = None) -> None:
        if flags.any():
            cases = []
            for position in np.flatnonzero(flags)[:MOST_CASES].tolist():
                value = "" if of is None else f", {of} {str(getattr(annotations, of)[position])[:100]}"
                cases.append(f"{describe(position)}{value}")
            report.add(issue, cases[0], int(flags.sum()), cases[1:])

    width, height = sizes[image_index].astype(np.float64).T
    finite = np.isfinite(boxes).all(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers at the end of the floats
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        limits = np.stack([width, height], axis=1)
        clipped_low, clipped_high = low.clip(0, limits), high.clip(0, limits)
        positive = finite & (boxes[:, 2:] > 0).all(axis=1) & _have_extent(low, high)
        inside = _have_extent(clipped_low, clipped_high)
        keep = positive & inside
        excess = np.maximum(clipped_low - low, high - clipped_high).max(axis=1, initial=0)
    note("invalid_box", ~finite)
    note("empty_box", finite & ~positive)
    note("box_outside_image", positive & ~inside)
    note("clamped_box", keep & (excess > BORDER_TOLERANCE))
    # Boxes within the image stay as they are to the last bit: x + w - x is not always w.
    moved = keep & (excess > 0)
    boxes[moved] = np.concatenate([clipped_low, clipped_high - clipped_low], axis=1)[moved]

    area = np.asarray([as_number(value) for value in annotations.area], dtype=np.float64)
    stated = np.asarray([value is not None for value in annotations.area], dtype=bool)
    usable = (area > 0) & (area < np.finfo(np.float32).max)
    note("invalid_area", keep & stated & ~usable, of="area")
    area = np.where(usable, area, boxes[:, 2] * boxes[:, 3])

    order = np.flatnonzero(keep)
    order = order[np.argsort(image_index[order], kind="stable")]
    objects_per_image = np.bincount(image_index[order], minlength=len(image_ids))
    offsets = pa.array(np.concatenate([[0], np.cumsum(objects_per_image)]), type=pa.int32())
    crowds = [False if value is None else as_truth(value) for value in annotations.iscrowd]
    note("invalid_crowd", keep & np.array([value is None for value in crowds], dtype=bool), of="iscrowd")
    crowd = np.array(crowds, dtype=bool)[order]
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


def _have_extent(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(N,) whether boxes have an extent in float32, in which models compute."""
    return np.all(high.astype(np.float32) > low.astype(np.float32), axis=1)


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


def _as_annotation_ids(values: list) -> tuple[np.ndarray, np.ndarray]:
    """Distinct integers, and which of them are new (missing, repeated or no integer of 64 bits before)."""
    numbers = [as_integer(value) for value in values]
    numbers = [number if number is not None and number in INT64 else None for number in numbers]
    used = {number for number in numbers if number is not None}
    next_id = max(used, default=0) + 1
    if next_id + len(values) not in INT64:
        next_id = 1
    seen: set[int] = set()
    replaced = np.zeros(len(values), dtype=bool)
    for position, number in enumerate(numbers):
        if number is None or number in seen:
            while next_id in used:
                next_id += 1
            numbers[position], replaced[position] = next_id, True
            next_id += 1
        else:
            seen.add(number)
    return np.asarray(numbers, dtype=np.int64), replaced
