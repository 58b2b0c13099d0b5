# SPDX-License-Identifier: Apache-2.0
"""What can be found in a data set: the kinds of findings, how severe each is, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
MOST_EXAMPLES = 5


@dataclass(frozen=True)
class Kind:
    """What all findings of a name have in common.

    Attributes:
        severity: `error`: a training on these data does not learn what is meant, or measures it wrongly; `warning`:
            probably a mistake, or it costs accuracy; `note`: worth to know.
        advice: What to do.
    """

    severity: Severity
    advice: str


_MEND = "Correct these annotations where they were made and export them again."

LOADING_KINDS = {
    "missing_image_file": Kind("error", "Put the files where the annotations name them, or remove their entries."),
    "unreadable_image": Kind("error", "Replace these files, or remove their entries."),
    "outside_image_file": Kind("error", "Move the images into the data directory, or load NAME:outside=true."),
    "invalid_image_entry": Kind("error", "Give every image an id and a file name."),
    "duplicate_image_id": Kind("error", "Give every image an id of its own; annotations of both went to the first."),
    "unknown_image": Kind("error", "Are annotations and image list of the same export? Export both together."),
    "unknown_category": Kind("error", "Add the missing categories to the list, or correct the ids."),
    "shifted_category_ids": Kind(
        "error",
        "Count the ids in the annotations from the number that the list of "
        "categories begins with; until then objects have the name of the class beside.",
    ),
    "invalid_annotation": Kind("error", _MEND),
    "invalid_annotation_file": Kind("error", "Replace these files; until then their images are left out."),
    "image_without_annotations": Kind(
        "warning", "Annotate these images (a file without objects says that there are none), or leave them out."
    ),
    "invalid_box": Kind("error", _MEND),
    "unturned_boxes": Kind(
        "error",
        "The boxes were drawn on the picture as it is stored. Turn the pixels and remove "
        "the EXIF tag (for example by `mogrify -auto-orient` before annotating), or state width "
        "and height of the stored picture: boxes are turned with it then.",
    ),
    "empty_box": Kind("warning", _MEND),
    "box_outside_image": Kind("warning", f"{_MEND} Were the images resized or cropped afterwards?"),
    "clamped_box": Kind("warning", "Many of them mean that images were resized or cropped after they were annotated."),
    "size_mismatch": Kind("warning", "Are these the images that were annotated? Look at their boxes in the report."),
    "rescaled_image": Kind("warning", "Nothing, if the pictures of the report look right."),
    "rotated_image": Kind("note", "Nothing, if the pictures of the report look right."),
    "invalid_size": Kind("warning", "Nothing: the size of the file is used."),
    "invalid_crowd": Kind("warning", "Write iscrowd as 0 or 1."),
    "invalid_area": Kind("note", "Nothing: the area of the box is used."),
    "invalid_annotation_id": Kind("note", "Nothing: ids are given anew."),
    "renumbered_images": Kind("note", "Nothing, unless results are to be written under the ids of the data set."),
    "respelled_image_file": Kind("note", "Nothing here; other programs may not find these files."),
    "duplicate_category_name": Kind("warning", "Give each category a name of its own, or make them one."),
    "repeated_key": Kind("warning", "Write the file with a JSON library."),
}
"""Of what loaders leave out or repair: keys of `ISSUES` in `records.py`."""

KINDS = LOADING_KINDS | {
    "cannot_be_loaded": Kind("error", "Do what the message says; until then nothing else of this split is known."),
    "box_format": Kind("error", "Give the right --box_format, here and to `deperceiver train`."),
    "resized_images": Kind("error", "Give the images that were annotated, or write width, height and boxes anew."),
    "doubtful_boxes": Kind("warning", "Look at the pictures of the report: do the boxes enclose the objects?"),
    "no_objects": Kind("error", "Are these the right annotations? Without objects there is nothing to learn."),
    "unknown_classes": Kind("error", "Give the classes of all splits the same names."),
    "split_leak": Kind(
        "error",
        "Remove the copies from one of the splits: what was trained on says nothing of how "
        "well other images are understood.",
    ),
    "unreadable_pixels": Kind("error", "Replace these files, or remove their entries; training would leave them out."),
    "no_validation": Kind(
        "warning",
        "Name another --eval_split, hold images back by --val_fraction 0.1, or train with --eval_every 0.",
    ),
    "few_validation_images": Kind("note", "AP of so few images says little; hold more of them back."),
    "near_split_leak": Kind("warning", "Look at the pairs in the report. Put pictures of one scene into one split."),
    "duplicate_images": Kind(
        "warning",
        "Keep one of each: the copies weigh more than other images, and their annotations may contradict each other.",
    ),
    "near_duplicate_images": Kind("note", "Nothing, if they are pictures of one scene; keep them in one split."),
    "repeated_file": Kind(
        "warning", "Merge the entries: each of them teaches that the objects of the others are background."
    ),
    "plain_images": Kind("warning", "Look at these files: an image of one colour is mostly a failed export."),
    "turned_by_exif": Kind("note", "Look at their boxes in the report: some tools draw them on the stored picture."),
    "unlisted_images": Kind(
        "note", "Nothing, if they are not meant to be used; else annotate them (without objects, too)."
    ),
    "same_place": Kind(
        "warning",
        "Look at the pictures of the report: were the boxes written in another unit, or "
        "with other sizes of the images?",
    ),
    "whole_images": Kind(
        "warning",
        "A detector learns little from boxes that enclose the whole image; such data are for image classification.",
    ),
    "duplicate_boxes": Kind("warning", "Keep one of each: the model would have to find every copy."),
    "contradicting_classes": Kind("warning", "Decide on one class for each of these objects."),
    "class_without_objects": Kind(
        "warning", "Remove the class from the list, or check that its objects are not under another name."
    ),
    "only_in_validation": Kind("warning", "Move images with these classes to the training split."),
    "not_in_validation": Kind("note", "Their AP cannot be measured; move images with them to the validation split."),
    "similar_class_names": Kind("warning", "Make them one class, if they are one."),
    "rare_classes": Kind("note", "Annotate more of them: of so few objects a class is seldom learned."),
    "dominant_class": Kind(
        "warning",
        "The other classes will hardly be learned; annotate more of them, or check that classes were not lost.",
    ),
    "mostly_without_objects": Kind(
        "note", "Right, if there is nothing to find on them; if they were not annotated, leave them out."
    ),
    "small_objects": Kind(
        "warning",
        "Train at a larger size (--shortest_edge) or with a finer stride "
        "(--downsample_factor), or cut the images into tiles.",
    ),
    "more_objects_than_queries": Kind("warning", "Give more --num_queries."),
    "more_objects_than_detections": Kind("note", "Evaluate with more --max_detections."),
}
"""All kinds by name."""

_UNKNOWN = Kind("warning", "See what the loader says.")


@dataclass(frozen=True)
class Example:
    """One case of a finding.

    Attributes:
        file: The image, as a path or by its id; empty where there is none.
        box: (x, y, width, height) in pixels of the image, if the finding is of a box.
        text: What else there is to say.
        split, row: Where the image stands, for the report's pictures; `row` is `None` if it was not loaded.
        beside: Split and row of the image that it is to be compared with.
    """

    file: str = ""
    box: tuple[float, float, float, float] | None = None
    text: str = ""
    split: str = ""
    row: int | None = None
    beside: tuple[str, int] | None = None

    def __str__(self) -> str:
        box = "" if self.box is None else f"box [{', '.join(f'{side:g}' for side in map(_rounded, self.box))}]"
        return ", ".join(filter(None, (self.file, box, self.text)))

    def to_dict(self) -> dict[str, Any]:
        box = None if self.box is None else [float(side) for side in self.box]
        return {"file": self.file or None, "box": box, "text": self.text or None}


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        name: Key of `KINDS`.
        split: Of the data; empty where it is of all of them.
        what: A sentence.
        count: How many cases.
        examples: The first of them.
    """

    name: str
    split: str
    what: str
    count: int = 1
    examples: tuple[Example, ...] = ()

    @property
    def kind(self) -> Kind:
        return KINDS.get(self.name, _UNKNOWN)

    @property
    def severity(self) -> Severity:
        return self.kind.severity

    @property
    def advice(self) -> str:
        return self.kind.advice

    def sentence(self) -> str:
        """What was found, an example and what to do, on one line."""
        example = f" E.g. {self.examples[0]}." if self.examples else ""
        return f"{self.what}{example} {self.advice}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "severity": self.severity,
            "split": self.split or None,
            "count": self.count,
            "what": self.what,
            "advice": self.advice,
            "examples": [example.to_dict() for example in self.examples],
        }


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Findings, errors first, otherwise in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def _rounded(side: float) -> float:
    return round(float(side), 1)
