# SPDX-License-Identifier: Apache-2.0
"""What every reader of a format of files hands over, and the one road from there to detection records."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datasets import Dataset

from ...errors import UserError
from ..annotated_files import FoundFile, find_image_files
from ..annotations import AnnotationList, ImageList, assemble, image_path_column
from ..fields import Id, as_text, is_text, record_ids
from ..images import UnreadableImageError, read_headers
from ..records import DETECTION_FEATURES, SPLIT_NAMES, DetectionData, LoadingReport, MissingSplitError, split_aliases

INSTEAD_OF_A_SPLIT = "--val_fraction 0.1 takes a part of the training images for validation."


@dataclass(frozen=True)
class Request:
    """What is asked of a reader.

    Attributes:
        path: directory or annotation file; `None` for a data set on the Hub.
        source: the same as the user gave it.
        split: `train`, `val`, `test` or a name of the user's own.
        images: directory of the images, where they are apart from the annotations.
        alone: `path` holds the annotations of this split alone, whatever it is called.
        strict: refuse a data set in which anything is broken.
        max_samples: load the first images only.
        cache_dir: where `datasets` keeps what it makes.
        box_format: one of `BOX_FORMATS`, instead of the format's own.
        allow_outside: read images whose names lead out of the data directory, too.
        config: which of several configurations of a data set of `datasets`.
        streaming: read no more of a data set of `datasets` than is needed.
    """

    path: Path | None
    source: str
    split: str
    images: Path | None = None
    alone: bool = False
    strict: bool = False
    max_samples: int | None = None
    cache_dir: str | None = None
    box_format: str | None = None
    allow_outside: bool = False
    config: str | None = None
    streaming: bool = False

    @property
    def directory(self) -> Path:
        """The data directory: `path`, or that of the annotation file."""
        assert self.path is not None
        return self.path if self.path.is_dir() else self.path.parent


@dataclass
class AnnotatedImages:
    """Images and their objects as a reader finds them in a split, unchecked; one entry per image in each list.

    Attributes:
        report: is told what the reader left out; names the source.
        root: directory below which the images are to be.
        directories: that image names are relative to, the first of which goes first.
        file_names: of the images, as annotated.
        label_names: the name of each label, all different.
        category_ids: the files' own id of each label, ascending; the labels themselves if not given.
        annotations: of all images, by their place in `file_names`.
        ids: the files' own ids of the images, all different; the file names if not given.
        sizes: width and height that are stated.
        box_format: how this format writes boxes.
        usual: where images would be, for the message that there are none.
        evidence: what was recognised, to go on with a comma after the name of the format.
    """

    report: LoadingReport
    root: Path
    directories: list[Path]
    file_names: list[str]
    label_names: list[str]
    annotations: AnnotationList
    category_ids: list[Id] | None = None
    ids: Sequence[Id] | None = None
    sizes: Sequence[tuple[int, int] | None] | None = None
    box_format: str = "xywh"
    usual: list[Path] = field(default_factory=list)
    evidence: str = ""


def load_records(found: AnnotatedImages, request: Request) -> DetectionData:
    """The records of a split: find the image files, read their headers, check and arrange the annotations.

    Raises:
        FileNotFoundError: None of the images is there.
        ValueError: The boxes are in another format, or anything is broken and `strict` is asked for.
    """
    report, names = found.report, found.file_names[: request.max_samples]
    if request.images is not None:
        found.root, found.directories, found.usual = request.images, [request.images], []
    own_ids: list[Id] = list(found.file_names if found.ids is None else found.ids)
    ids, differing_ids = record_ids(own_ids)
    files = find_image_files(names, found.root, found.directories, allow_outside=request.allow_outside)
    rows = [row for row, file in enumerate(files) if file.path is not None]
    if names and not rows:
        raise FileNotFoundError(_why_no_image_is_found(found, files))
    for name, file in zip(names, files, strict=True):
        if file.issue is not None:
            report.add(file.issue, f"{name} is {file.path}" if file.path else f"{found.directories[0] / name}")
    paths = [file.path for file in files if file.path is not None]
    images = ImageList(
        ids=ids[rows],
        headers=[
            header if is_text(path) else UnreadableImageError("its path is no UTF-8 text, rename it")
            for path, header in zip(paths, read_headers(paths), strict=True)
        ],
        stated_sizes=[found.sizes[row] if found.sizes is not None else None for row in rows],
        names=[as_text(path) for path in paths],
        own_ids=differing_ids,
    )
    annotations = found.annotations.of_images(rows)
    kept, columns = assemble(images, annotations, report, request.box_format, found.box_format)
    column = image_path_column([images.names[row] for row in kept])
    dataset = Dataset.from_dict({"image": column, **columns}, features=DETECTION_FEATURES)
    report.conclude(request.strict)
    labels = found.label_names
    category_ids: list[Id] = [*range(len(labels))] if found.category_ids is None else found.category_ids
    name = f"{found.root.name}-{request.split}"
    return DetectionData(dataset, labels, category_ids, name, report, differing_ids)


def split_of(path: str) -> str | None:
    """The split (key of `SPLIT_NAMES`) that a folder in the relative path of a file is called after, as train2017 is
    after train."""
    folders = [re.sub(r"\d+$", "", folder.lower()) for folder in PurePosixPath(path).parts[:-1]]
    return next((split for name in folders for split, names in SPLIT_NAMES.items() if name in names), None)


def is_of_split(path: str, split: str) -> bool:
    """Whether a file is of a split by its folders; files without one are for training."""
    known = {name for names in SPLIT_NAMES.values() for name in names}
    if split in known:
        return (split_of(path) or "train") in split_aliases(split)
    return split in PurePosixPath(path).parts[:-1]


def words_of(path: Path) -> set[str]:
    """The words of the name of an annotation file, with and without their digits, and the name of its directory."""
    stem = path.name.split(".")[0].lower()
    words = {*re.split(r"[^a-z0-9]+", stem), *re.split(r"[^a-z]+", stem), stem.removeprefix("instances_")}
    return words if len(path.parts) < 2 else words | {path.parent.name.lower()}


def no_split(request: Request, found: Sequence[str], how: str) -> MissingSplitError:
    """The error that the split is not there.

    Args:
        request: what was asked for.
        found: the splits that are there.
        how: how this format tells splits apart, a sentence.
    """
    there = f"there are {', '.join(found)}" if found else "there is none"
    make = f" {INSTEAD_OF_A_SPLIT}" if request.split in SPLIT_NAMES["val"] else ""
    return MissingSplitError(f"{request.path} has no split {request.split!r}; {there}. {how}{make}")


def require_one_name_each(names: Sequence[str], source: str) -> list[str]:
    """Names of classes, stripped.

    Raises:
        ValueError: There are none, or two are equal.
    """
    stripped = [as_text(name).strip() for name in names]
    if not stripped:
        raise UserError(f"{source} names no classes.")
    if twice := [name for name in dict.fromkeys(stripped) if stripped.count(name) > 1]:
        raise UserError(
            f"{source} names the class {twice[0]!r} {stripped.count(twice[0])} times. Give each its own name."
        )
    return stripped


def _why_no_image_is_found(found: AnnotatedImages, files: list[FoundFile]) -> str:
    example, count, source = as_text(found.file_names[0]), len(files), found.report.source
    if any(file.issue == "outside_image_file" for file in files):
        return (
            f"None of the {count} images that {source} names is in the data directory {found.root}, and names such as "
            f"{example!r} lead out of it. Move the images there, or, if you trust the file, read them with "
            "NAME:outside=true."
        )
    if found.usual and not any(directory.is_dir() for directory in (*found.usual, found.root / "images")):
        usual = ", ".join(str(directory.relative_to(found.root)) for directory in found.usual)
        return (
            f"{source} is there, but none of the image directories {usual} is in {found.root}, and no image "
            f"{example!r}. Found: {listing_of(found.root)}. Put the images in one of these, link to them, or name "
            "their directory: --annotations FILE --images DIR."
        )
    directory = found.directories[0]
    return (
        f"None of the {count} images that the annotations name is in {directory}, e.g. {example!r}; found there: "
        f"{listing_of(directory, 4)}. --annotations FILE --images DIR says where they are."
    )


def listing_of(directory: Path, limit: int = 12) -> str:
    """What is in a directory, for a message."""
    return shortened(sorted(path.name + "/" * path.is_dir() for path in directory.iterdir()), limit) or "nothing"


def shortened(names: Sequence[str], limit: int = 12) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)} entries)" if len(names) > limit else "")
