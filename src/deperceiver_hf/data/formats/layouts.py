# SPDX-License-Identifier: Apache-2.0
"""A look at what is in a directory, and what to say of what is no data set that can be loaded."""

import gzip
import itertools
import os
import re
import tarfile
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath

from ...errors import UserError
from ..annotated_files import walk_files
from ..image_files import HEIF_SUFFIXES, IMAGE_SUFFIXES

EXPECTED = (
    "What is expected is a directory in COCO's layout, annotations/instances_SPLIT.json (SPLIT is train, val, ...) "
    "beside the images in SPLIT/, or in that of YOLO (data.yaml), of Pascal VOC (Annotations/*.xml) or with a CSV of "
    "boxes, or one that `datasets` loads."
)
ROBOFLOW_FILE = "_annotations.coco.json"
_NOTES = "notes.json"  # of Label Studio beside text files of YOLO: the classes, as COCO lists them, and no images
ANNOTATION_DIRECTORIES = ("annotations", "annotation", "labels", "ann", "anno")
PICTURE_SUFFIXES = IMAGE_SUFFIXES | HEIF_SUFFIXES
TABLE_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".csv", ".tsv")
MOST_LOOKED_AT = 200  # files of a directory whose content is looked at

_FIRST_KEY = re.compile(
    r'\s*\{\s*"(images|annotations|categories|info|licenses|videos|type)"\s*:\s*(.{0,20})', re.DOTALL
)


def is_json_file(path: Path) -> bool:
    """Whether a file is JSON by its name, also where it is packed by gzip."""
    return path.name.lower().endswith((".json", ".json.gz"))


def holds_coco_json(path: Path) -> bool:
    """Whether a JSON file begins as COCO's do."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            head = file.read(1024).decode("utf-8-sig", "replace")
    except (OSError, EOFError):
        return False
    match = _FIRST_KEY.match(head)
    return match is not None and "Feature" not in match[2]


def annotation_files(root: Path) -> list[Path]:
    """The files in a directory, or one below it, that begin as COCO's do; those in `annotations/` first."""
    folders = [root, *sorted(path for path in entries_of(root) if path.is_dir())]
    folders.sort(key=lambda folder: folder == root or folder.name.lower() not in ANNOTATION_DIRECTORIES)
    return [
        path
        for folder in folders
        for path in itertools.islice(sorted(filter(is_json_file, entries_of(folder))), MOST_LOOKED_AT)
        if path.name != _NOTES and path.is_file() and holds_coco_json(path)
    ]


def image_directories(root: Path) -> list[Path]:
    """The directories with images in them, the one itself among them."""
    images = (path for path in files_below(root) if path.suffix.lower() in PICTURE_SUFFIXES)
    return list(dict.fromkeys(path.parent for path in images))


def is_of_datasets(root: Path) -> bool:
    """Whether `datasets` wrote a directory, or it has a table that `datasets` reads."""
    return is_saved(root) or any(map(_is_table_of_datasets, files_below(root)))


def _is_table_of_datasets(path: Path) -> bool:
    """Whether a file is of a kind that `datasets` reads; a CSV is one if it is called as in an image folder."""
    suffix = path.suffix.lower()
    return suffix in TABLE_SUFFIXES and (suffix not in (".csv", ".tsv") or path.stem == "metadata")


def describe_file(path: Path) -> str | None:
    """Why a file is no data set and what to give instead; `None` if it may hold annotations as JSON."""
    suffix = path.suffix.lower()
    if is_json_file(path):
        return None
    if suffix in (".csv", ".tsv"):
        return f"{path} is a table without the columns of boxes (file, xmin, ymin, xmax, ymax, label). {EXPECTED}"
    if suffix in TABLE_SUFFIXES:
        return f"{path} is a single table. Give the directory that holds it, {path.parent}."
    if suffix in (".yaml", ".yml"):
        return f"{path} is no data.yaml of YOLO, which has the names of the classes (names: ...). {EXPECTED}"
    if suffix in PICTURE_SUFFIXES:
        return f"{path} is an image. {EXPECTED}"
    if suffix in (".xml", ".txt"):
        return (
            f"{path} is a single file of annotations. Give the directory of the data set, or its data.yaml. {EXPECTED}"
        )
    try:
        if zipfile.is_zipfile(path) or tarfile.is_tarfile(path) or suffix in (".rar", ".7z"):
            return f"{path} is an archive. Unpack it and give the directory. {EXPECTED}"
    except OSError:
        pass
    return f"{path} is a file that holds no data set known here. {EXPECTED}"


def describe_directory(root: Path) -> str | None:
    """Why a directory is no data set and what to give instead; `None` if `datasets` may know it."""
    if not entries_of(root):
        return f"The directory {root} is empty. Give one that holds a data set. {EXPECTED}"
    if is_of_datasets(root) or any(path.suffix == ".py" for path in entries_of(root)):
        return None
    if (root / "config.json").is_file():
        return f"{root} holds a saved model (config.json), no data set. {EXPECTED}"
    if other := _of_another_tool(root):
        return (
            f"{root} has {other}, which cannot be loaded. {EXPECTED} Export the annotations in one of these formats."
        )
    files = [path for path in files_below(root) if not path.name.startswith((".", "_"))]
    images = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    if images and len(images) == len(files):
        return f"{root} holds images alone, e.g. {images[0].relative_to(root)}, and no annotations. {EXPECTED}"
    return None


def _of_another_tool(root: Path) -> str | None:
    """What a directory has of the layout of another tool."""
    files = list(files_below(root, depth=3))
    kinds = {path.suffix.lower() for path in files}
    of_images = {path.stem for path in files if path.suffix.lower() in PICTURE_SUFFIXES}
    if ".tfrecord" in kinds:
        return "records of TensorFlow"
    if any(path.name.endswith(".createml.json") for path in files):
        return "annotations of CreateML"
    if ".json" in kinds and any(path.suffix == ".json" and path.stem in of_images for path in files):
        return "a JSON file for each image (as of LabelMe)"
    return None


def head_of(path: Path) -> str:
    """The first characters of a text file; nothing if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return ""


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: it is no text.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: {error.reason} at byte {error.start}.") from error


def is_saved(root: Path) -> bool:
    """Whether `save_to_disk` wrote a directory."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def entries_of(folder: Path) -> list[Path]:
    """What is in a directory, but for what systems and archives leave there."""
    return [path for path in folder.iterdir() if not path.name.startswith((".", "__"))]


def relative_files(root: Path, suffixes: Collection[str] | None = None) -> list[str]:
    """Paths of all files below a directory, sorted and relative to it, parted by `/`; with these suffixes only."""
    files = (PurePath(os.path.relpath(path, root)) for path in walk_files(str(root)))
    wanted = (path for path in files if suffixes is None or path.suffix.lower() in suffixes)
    return sorted(path.as_posix() for path in wanted if not any(part.startswith((".", "__")) for part in path.parts))


def files_below(root: Path, depth: int = 4) -> Iterator[Path]:
    """Files below a directory, the first of each folder."""
    folders = []
    for path in itertools.islice(sorted(entries_of(root), key=lambda path: path.name), MOST_LOOKED_AT):
        if path.is_dir():
            folders.append(path)
        else:
            yield path
    for folder in folders if depth else ():
        yield from files_below(folder, depth - 1)
