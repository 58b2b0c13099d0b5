# SPDX-License-Identifier: Apache-2.0
"""Checks on the objects of a loaded split: how many, of which class, where, and how large they will be trained at.

Nothing is decoded: of ten thousand images this takes a fraction of a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers.image_utils import SizeDict

from ...errors import UserError
from ...models.detection_processing_deperceiver import resized_size
from ..classes import folded, listing
from ..fields import as_text
from ..records import DetectionData
from .findings import MOST_EXAMPLES, Example, Finding

MANY = 20  # boxes: fewer are no evidence
RARE = 10  # objects of a class
ALMOST_ALL = 0.99
NOT_FEW = 0.05  # of the objects: as many that are too small are worth a warning


@dataclass(frozen=True)
class TrainedSize:
    """What the images become, and what the model makes of them.

    Attributes:
        size: Of the image processor; `None` leaves images as large as they are.
        stride: Pixels per cell of the finest feature map; `None` if it is not known.
        num_queries: Objects that the model can find in an image; `None` if it is not known.
    """

    size: SizeDict | None = None
    stride: int | None = None
    num_queries: int | None = None

    def scales(self, sizes: np.ndarray) -> np.ndarray:
        """(N, 2) by what width and height of images of these sizes (N, 2) (width, height) are multiplied."""
        if self.size is None:
            return np.ones(sizes.shape)
        distinct, place = np.unique(sizes, axis=0, return_inverse=True)
        resized = [resized_size((int(height), int(width)), self.size)[::-1] for width, height in distinct]
        return (np.array(resized).reshape(-1, 2) / np.maximum(distinct, 1))[place.reshape(-1)]


@dataclass(frozen=True)
class ObjectTable:
    """The objects of a split as columns, crowds among them.

    Attributes:
        split: Its name.
        data: What they are of.
        files: (N,) path of each image; its id, where it is stored in the data set.
        is_path: (N,) whether that is a path.
        sizes: (N, 2) width and height of the images in pixels.
        rows: (M,) image of each object.
        boxes: (M, 4) x, y, width and height in pixels.
        labels: (M,).
        crowds: (M,) bool.
    """

    split: str
    data: DetectionData = field(repr=False)
    files: list[str]
    is_path: np.ndarray
    sizes: np.ndarray
    rows: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowds: np.ndarray

    @classmethod
    def of(cls, data: DetectionData, split: str) -> "ObjectTable":
        """The table of a loaded split; its images are not touched."""
        plain = data.dataset.with_format(None).select_columns(["image_id", "width", "height", "objects"])
        sizes, rows, boxes, labels, crowds, ids = [], [], [], [], [], []
        count = 0
        for batch in plain.with_format("arrow").iter(batch_size=10_000):
            column = batch["objects"].combine_chunks()
            lengths = pa.compute.list_value_length(column.field("category")).to_numpy(zero_copy_only=False)
            sizes.append(np.stack([batch["width"].to_numpy(), batch["height"].to_numpy()], axis=1))
            ids.append(batch["image_id"].to_numpy())
            rows.append(np.repeat(np.arange(count, count + len(lengths)), lengths))
            boxes.append(column.field("bbox").flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4))
            labels.append(column.field("category").flatten().to_numpy())
            crowds.append(column.field("iscrowd").flatten().to_numpy(zero_copy_only=False).astype(bool))
            count += len(lengths)
        paths = _paths(data, count)
        own = [data.own_image_id(image_id) for image_id in np.concatenate(ids or [np.zeros(0, int)]).tolist()]
        return cls(
            split=split,
            data=data,
            files=[as_text(path) if path else f"image_id {own_id}" for path, own_id in zip(paths, own, strict=True)],
            is_path=np.array([bool(path) for path in paths], dtype=bool),
            sizes=np.concatenate([*sizes, np.zeros((0, 2), dtype=np.int64)]).astype(np.int64),
            rows=np.concatenate([*rows, np.zeros(0, dtype=np.int64)]),
            boxes=np.concatenate([*boxes, np.zeros((0, 4))]),
            labels=np.concatenate([*labels, np.zeros(0, dtype=np.int64)]).astype(np.int64),
            crowds=np.concatenate([*crowds, np.zeros(0, dtype=bool)]),
        )

    @property
    def source(self) -> str:
        return self.data.report.source

    @property
    def label_names(self) -> list[str]:
        return self.data.label_names

    @property
    def num_images(self) -> int:
        return len(self.files)

    @cached_property
    def ordinary(self) -> np.ndarray:
        """Indices of the objects that are no crowds."""
        return np.flatnonzero(~self.crowds)

    @cached_property
    def per_image(self) -> np.ndarray:
        """(N,) objects of each image, crowds left out."""
        return np.bincount(self.rows[self.ordinary], minlength=self.num_images)

    @cached_property
    def per_class(self) -> np.ndarray:
        """(K,) objects of each label, crowds left out."""
        return np.bincount(self.labels[self.ordinary], minlength=len(self.label_names))

    @cached_property
    def images_per_class(self) -> np.ndarray:
        """(K,) images with an object of each label."""
        pairs = np.unique(np.stack([self.rows, self.labels])[:, self.ordinary], axis=1)
        return np.bincount(pairs[1], minlength=len(self.label_names))

    @cached_property
    def most_of_a_class(self) -> np.ndarray:
        """(N,) in each image, the objects of the class that has most."""
        num_classes = max(1, len(self.label_names))
        pairs, times = np.unique(
            self.rows[self.ordinary] * num_classes + self.labels[self.ordinary], return_counts=True
        )
        most = np.zeros(self.num_images, dtype=np.int64)
        np.maximum.at(most, pairs // num_classes, times)
        return most

    @cached_property
    def relative(self) -> np.ndarray:
        """(M, 4) boxes in parts of their images."""
        return self.boxes / np.maximum(np.tile(self.sizes[self.rows], 2), 1)

    def trained_sides(self, trained: TrainedSize) -> np.ndarray:
        """(M,) square roots of the areas in pixels, at the size that the images are trained at."""
        return np.sqrt((self.boxes[:, 2:] * trained.scales(self.sizes)[self.rows]).prod(axis=1))

    def stored_image(self, row: int) -> Any:
        """An image as it is stored, or as it is made on access, for `decode_rgb`."""
        return self._images[row]["image"]

    @cached_property
    def _images(self) -> Dataset:
        return self.data.stored_images

    def example(self, index: int, text: str = "") -> Example:
        """An object."""
        box = self.boxes[index].tolist()
        row = int(self.rows[index])
        return Example(self.files[row], (box[0], box[1], box[2], box[3]), text, self.split, row)

    def image_example(self, row: int, text: str = "") -> Example:
        """An image."""
        return Example(self.files[row], None, text, self.split, int(row))

    def finding(
        self,
        name: str,
        what: str,
        objects: Sequence[int] | np.ndarray = (),
        images: Sequence[int] | np.ndarray = (),
        count: int | None = None,
    ) -> Finding:
        """A finding whose examples are of these objects or images, which it counts."""
        examples = [self.example(int(index)) for index in objects[:MOST_EXAMPLES]]
        examples += [self.image_example(int(row)) for row in images[:MOST_EXAMPLES]]
        count = max(1, len(objects) + len(images)) if count is None else count
        return Finding(name, self.split, what, count, tuple(examples))


def _paths(data: DetectionData, count: int) -> list[str | None]:
    """The path of each image's file; `None` where it is stored in the data set, or made on access."""
    if data.paints_images:
        return [None] * count
    paths: list[str | None] = []
    for batch in data.dataset.select_columns("image").with_format("arrow").iter(batch_size=10_000):
        for chunk in batch["image"].chunks:  # what the images hold is not copied
            stored = chunk.field("bytes").is_valid().to_numpy(zero_copy_only=False)
            names = chunk.field("path").to_pylist()
            paths += [None if inside else name for name, inside in zip(names, stored, strict=True)]
    return paths


def require_objects(table: ObjectTable) -> None:
    """Refuse data to train on in which there is nothing to learn.

    Raises:
        ValueError: no object is left, or crowds only; the message says what became of the others.
    """
    for finding in _no_objects(table):
        raise UserError(f"{finding.what} Correct the annotations, or give other data.")


def check_training_objects(table: ObjectTable, trained: TrainedSize) -> list[Finding]:
    """What is to be known of objects that a model is trained on."""
    if found := _no_objects(table):
        return found
    return [
        *_classes(table),
        *_places(table),
        *_repeated_boxes(table),
        *_small_objects(table, trained),
        *_too_many(table, trained.num_queries, None),
        *_empty_images(table),
    ]


def check_evaluation_objects(
    table: ObjectTable, *, num_queries: int | None = None, max_detections: int | None = None
) -> list[Finding]:
    """What is to be known of objects that a model is evaluated on.

    Args:
        table: The objects.
        num_queries: Objects that the model can find in an image.
        max_detections: Detections per image and class that count.
    """
    if not len(table.ordinary):
        crowds = f", {len(table.rows)} crowds" if len(table.rows) else ""
        return [
            table.finding(
                "no_objects",
                f"{table.source} has no objects ({table.num_images} images{crowds}): nothing can be measured on it.",
            )
        ]
    return _too_many(table, num_queries, max_detections)


def _no_objects(table: ObjectTable) -> list[Finding]:
    if len(table.ordinary):
        return []
    report = table.data.report
    why = f"While loading: {report.sentence()}." if report.counts else "Its annotations list no others."
    crowds = "; they are crowds (iscrowd), from which nothing is learned" if len(table.rows) else ""
    return [
        table.finding(
            "no_objects",
            f"{table.source} has no object to learn from: {table.num_images} images with {len(table.rows)} objects"
            f"{crowds}. {why}",
        )
    ]


def _classes(table: ObjectTable) -> list[Finding]:
    found, names, counts = [], table.label_names, table.per_class
    if without := [name for name, count in zip(names, counts, strict=True) if not count]:
        found.append(
            table.finding(
                "class_without_objects",
                f"{table.source} has no object of {len(without)} of its {len(names)} classes: {listing(without)}.",
                count=len(without),
            )
        )
    if rare := [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if 0 < count < RARE]:
        found.append(
            table.finding(
                "rare_classes",
                f"{len(rare)} of {len(names)} classes have fewer than {RARE} objects to learn from: {listing(rare)}.",
                count=len(rare),
            )
        )
    total, most = int(counts.sum()), int(counts.argmax())
    if len(names) > 1 and total >= 5 * MANY and counts[most] >= ALMOST_ALL * total:
        found.append(
            table.finding(
                "dominant_class",
                f"{int(counts[most])} of {total} objects are {names[most]}; {total - int(counts[most])} are left for "
                f"the other {len(names) - 1} classes.",
                count=int(counts[most]),
            )
        )
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(folded(name), []).append(name)
    if several := [group for group in alike.values() if len(group) > 1]:
        shown = "; ".join(" and ".join(map(repr, group)) for group in several[:MOST_EXAMPLES])
        found.append(
            table.finding(
                "similar_class_names", f"Classes whose names hardly differ: {shown}.", count=sum(map(len, several))
            )
        )
    return found


def _places(table: ObjectTable) -> list[Finding]:
    boxes, objects = table.relative[table.ordinary], table.ordinary
    if len(objects) < MANY or len(np.unique(table.rows[objects])) < 5:
        return []
    whole = (boxes[:, 2:] >= 0.98).all(axis=1)
    if whole.mean() >= 0.5:
        return [
            table.finding(
                "whole_images",
                f"{int(whole.sum())} of {len(objects)} boxes enclose their whole image.",
                objects[whole],
            )
        ]
    _, place, times = np.unique(np.round(boxes * 100), axis=0, return_inverse=True, return_counts=True)
    same = place.reshape(-1) == times.argmax()
    if same.mean() >= 0.5:
        return [
            table.finding(
                "same_place",
                f"{int(same.sum())} of {len(objects)} boxes are at the same place of their images.",
                objects[same],
            )
        ]
    low, high = np.quantile(boxes[:, :2], 0.01, axis=0), np.quantile(boxes[:, :2] + boxes[:, 2:], 0.99, axis=0)
    if (high - low < 0.25).all():
        return [
            table.finding(
                "same_place",
                f"Nearly all of {len(objects)} boxes lie within one part of their images, from "
                f"{low[0]:.0%} to {high[0]:.0%} of the width and {low[1]:.0%} to {high[1]:.0%} of the height.",
                objects,
            )
        ]
    return []


def _repeated_boxes(table: ObjectTable) -> list[Finding]:
    """Objects of one image with one box: copies, or of two classes."""
    objects, found = table.ordinary, []
    keys = np.concatenate([table.rows[objects, None], table.boxes[objects]], axis=1)
    order = np.lexsort(keys.T)
    keys, objects = keys[order], objects[order]
    again = np.flatnonzero((keys[1:] == keys[:-1]).all(axis=1)) + 1  # also of three: each with the one before
    same_class = table.labels[objects[again]] == table.labels[objects[again - 1]]
    if same_class.any():
        copies = np.sort(objects[again[same_class]])
        found.append(
            table.finding("duplicate_boxes", f"Objects that are there twice, box and class: {len(copies)}.", copies)
        )
    if not same_class.all():
        pairs = again[~same_class]
        examples = tuple(
            table.example(
                int(objects[place]),
                f"{table.label_names[table.labels[objects[place - 1]]]} and "
                f"{table.label_names[table.labels[objects[place]]]}",
            )
            for place in pairs[:MOST_EXAMPLES]
        )
        what = f"Boxes that have two classes: {len(pairs)}."
        found.append(Finding("contradicting_classes", table.split, what, len(pairs), examples))
    return found


def _small_objects(table: ObjectTable, trained: TrainedSize) -> list[Finding]:
    if trained.stride is None:
        return []
    objects = table.ordinary
    sides = table.trained_sides(trained)[objects]
    small = sides < trained.stride
    if small.mean() < NOT_FEW:
        return []
    order = np.argsort(sides, kind="stable")
    return [
        table.finding(
            "small_objects",
            f"{int(small.sum())} of {len(objects)} objects ({small.mean():.0%}) become smaller than one cell of the "
            f"feature map, {trained.stride} x {trained.stride} pixels, when images are resized to "
            f"{describe_size(trained.size)}; half of all are below {np.median(sides):.0f} pixels a side.",
            objects[order][: int(small.sum())],
        )
    ]


def _too_many(table: ObjectTable, num_queries: int | None, max_detections: int | None) -> list[Finding]:
    found, source, total = [], table.source, len(table.ordinary)
    if num_queries is not None and (most := int(table.per_image.max())) > num_queries:
        possible = np.minimum(table.per_image, num_queries).sum() / total
        crowded = np.flatnonzero(table.per_image > num_queries)
        found.append(
            table.finding(
                "more_objects_than_queries",
                f"{source} has up to {most} objects in an image ({table.per_image.mean():.1f} on average), the model "
                f"{num_queries} queries, each of which finds one: at most {100 * possible:.0f} % of the objects can "
                f"be found. --num_queries {most} gives enough to a new model, and to a trained one that picks them "
                "from the image.",
                images=crowded[np.argsort(-table.per_image[crowded], kind="stable")],
            )
        )
    if max_detections is not None and (most := int(table.most_of_a_class.max())) > max_detections:
        found.append(
            table.finding(
                "more_objects_than_detections",
                f"{source} has up to {most} objects of a class in an image; AP counts {max_detections} detections of "
                f"a class in an image only. `deperceiver evaluate --max_detections 1 10 {most}` counts all.",
                images=np.flatnonzero(table.most_of_a_class > max_detections),
            )
        )
    return found


def _empty_images(table: ObjectTable) -> list[Finding]:
    empty = np.flatnonzero(table.per_image == 0)
    if len(empty) < 0.5 * table.num_images or table.num_images < 2:
        return []
    return [
        table.finding(
            "mostly_without_objects",
            f"{len(empty)} of {table.num_images} images have no objects.",
            images=empty,
        )
    ]


def describe_size(size: SizeDict | None) -> str:
    """The size of an image processor, in words."""
    if size is None:
        return "the size that they have"
    if size.shortest_edge:
        longest = f", at most {size.longest_edge} at the longest" if size.longest_edge else ""
        return f"{size.shortest_edge} pixels at the shortest edge{longest}"
    return f"{size.height or size.max_height} x {size.width or size.max_width} pixels"
