# SPDX-License-Identifier: Apache-2.0
"""The schema of a detection record, the data set that holds them, and the report of what was repaired on the way."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed
from datasets import Dataset, Features, Image, Value
from transformers.utils import logging

from ..errors import UserError
from .fields import Id, as_text

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
    "renumbered_images": "data sets whose images have no ids that tell them apart, row numbers are used",
    "missing_image_file": "images whose file does not exist, left out",
    "respelled_image_file": "images found under another spelling of their file name (separators, capitals, folders)",
    "outside_image_file": "images whose file name leads out of the data directory, left out (NAME:outside=true reads "
    "them)",
    "unreadable_image": "image files that cannot be read as an image, left out",
    "invalid_size": "widths or heights that are no positive whole numbers, the file's size is used",
    "size_mismatch": "images of another size than stated, the file's size is used",
    "rescaled_image": "images of another size than stated whose boxes fit the stated one, boxes are scaled with them",
    "rotated_image": "images annotated before their EXIF rotation, boxes are rotated with the image",
    "unturned_boxes": "images that EXIF turns and whose boxes fit the stored picture only, left as they are",
    "invalid_annotation": "annotations that are no objects with a box, left out",
    "invalid_annotation_file": "annotation files of single images that cannot be read, left out with their images",
    "image_without_annotations": "images without an annotation file, which this format has for every image, left out",
    "unknown_image": "annotations of an image that is not listed, left out",
    "unknown_category": "annotations of a category that is not listed, left out",
    "shifted_category_ids": "annotations of which all would be of listed categories if ids were counted one higher or "
    "lower, left as they are",
    "invalid_box": "boxes that are not four finite numbers, left out",
    "empty_box": "boxes of zero or negative side, left out",
    "box_outside_image": "boxes wholly outside the image, left out",
    "clamped_box": "boxes over the border by more than a pixel, clipped to the image",
    "invalid_area": "areas that are no positive number, the box's area is used",
    "invalid_crowd": "values of iscrowd that are neither true nor false, taken for false",
    "invalid_annotation_id": "annotations without an integer id of their own, given a new one",
    "duplicate_category_name": "categories that share a name, their id is appended",
    "repeated_key": "JSON objects that have a key twice, the last value is used",
}
"""What can be wrong with a data set, and what is done about it."""

_LACKING_IMAGES = ("missing_image_file", "unreadable_image", "outside_image_file")

MOST_CASES = 5
"""Of an issue, that a report describes."""

BORDER_TOLERANCE = 1.0
"""Pixels by which a box may pass the border before its clipping counts as a repair (annotations are often rounded)."""

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}


class MissingSplitError(FileNotFoundError):
    """A data set is there, and has no split of the name."""


@dataclass
class LoadingReport:
    """Counts of what a loader left out or repaired.

    Attributes:
        source: what was loaded, for the messages.
        counts: number of cases for each key of `ISSUES` that occurred.
        examples: the first case of each, in words.
        cases: the first cases of each, at most `MOST_CASES`.
        remarks: what looks wrong with the data as a whole and was left as it is.
        recognised: the format of the files and what it was recognised by.
        num_images, num_objects, num_crowds, num_empty_images: what the loaded data set holds; empty images are kept.
    """

    source: str
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    cases: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    recognised: str = ""
    num_images: int = 0
    num_objects: int = 0
    num_crowds: int = 0
    num_empty_images: int = 0

    def add(self, issue: str, example: str, count: int = 1, more: Sequence[str] = ()) -> None:
        """Count cases of an issue.

        Args:
            issue: key of `ISSUES`.
            example: one of them, in words.
            count: how many they are.
            more: others of them.
        """
        if issue not in ISSUES:
            raise KeyError(f"{issue!r} is not one of {sorted(ISSUES)}")
        if count:
            self.counts[issue] = self.counts.get(issue, 0) + count
            self.examples.setdefault(issue, as_text(example))
            cases = self.cases.setdefault(issue, [])
            cases += map(as_text, [example, *more][: MOST_CASES - len(cases)])

    def summary(self) -> str:
        """The issues, one a line, with an example each; empty when there were none."""
        return "\n".join(
            f"  {count} {ISSUES[issue]}; e.g. {self.examples[issue]}" for issue, count in self.counts.items()
        )

    def sentence(self, issues: Iterable[str] | None = None) -> str:
        """These issues, or all of them, on one line; empty when there were none."""
        found = [issue for issue in (self.counts if issues is None else issues) if issue in self.counts]
        return "; ".join(f"{self.counts[issue]} {ISSUES[issue]}, e.g. {self.examples[issue]}" for issue in found)

    def require_images(self) -> None:
        """Refuse a data set of which images are missing or cannot be read.

        Raises:
            ValueError: some were left out for that.
        """
        if lacking := self.sentence(_LACKING_IMAGES):
            raise UserError(
                f"{self.source}: {lacking}. Mend or remove them, or leave them out by --on_bad_image skip."
            )

    def conclude(self, strict: bool) -> None:
        """Log the issues as one warning on the main process, or refuse them; the remarks are logged in any case.

        Raises:
            ValueError: there were issues and `strict` is set.
        """
        for remark in self.remarks if is_main_process() else ():
            logger.warning(f"{self.source}: {remark}")
        if not self.counts:
            return
        if strict:
            raise UserError(
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
        own_image_ids: the data set's own id of an image by its `image_id` in the records, for those where it is
            another one: text, or an integer of more than 64 bits. See `own_image_id`.
    """

    dataset: Dataset
    label_names: list[str]
    category_ids: list[Id]
    name: str
    report: LoadingReport
    own_image_ids: Mapping[int, Id] = field(default_factory=dict)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.label_names))

    @property
    def paints_images(self) -> bool:
        """Whether images are made on access, by the data set's own transform."""
        return self.dataset.format["type"] == "custom"

    @property
    def stored(self) -> Dataset:
        """The rows with images as they are stored, for `decode_rgb`: a dict of `path` and `bytes`; those that are made
        on access as they are made."""
        return self.dataset if self.paints_images else self.dataset.cast_column("image", Image(decode=False))

    @property
    def stored_images(self) -> Dataset:
        """The column `image` of `stored` alone, which is read faster."""
        return self.stored if self.paints_images else self.stored.select_columns("image")

    def own_image_id(self, image_id: int) -> Id:
        """The id that the data set's files have for an image of the records: for result files and messages."""
        return self.own_image_ids.get(image_id, image_id)


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
