# SPDX-License-Identifier: Apache-2.0
"""What a path holds, recognised by its content, and what to say of what is no data set that can be loaded."""

import gzip
import itertools
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .image_files import HEIF_SUFFIXES, IMAGE_SUFFIXES

EXPECTED = (
    "What is expected is a directory in COCO's layout, annotations/instances_SPLIT.json (SPLIT is train, val, ...) "
    "beside the images in SPLIT/, or one that `datasets` loads."
)
ROBOFLOW_FILE = "_annotations.coco.json"
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
    folders = [root, *sorted(path for path in _entries(root) if path.is_dir())]
    folders.sort(key=lambda folder: folder == root or folder.name.lower() not in ANNOTATION_DIRECTORIES)
    return [
        path
        for folder in folders
        for path in itertools.islice(sorted(filter(is_json_file, _entries(folder))), MOST_LOOKED_AT)
        if path.is_file() and holds_coco_json(path)
    ]


def image_directories(root: Path) -> list[Path]:
    """The directories with images in them, the one itself among them."""
    images = (path for path in _files_below(root) if path.suffix.lower() in PICTURE_SUFFIXES)
    return list(dict.fromkeys(path.parent for path in images))


def is_coco_directory(root: Path) -> bool:
    """Whether a directory holds annotations in COCO's format, in their usual place or another one."""
    if any(root.glob(f"*/{ROBOFLOW_FILE}")):
        return True
    usual = root / "annotations"
    if usual.is_dir() and (any(map(is_json_file, _entries(usual))) or not _of_another_tool(root)):
        return True
    return not is_of_datasets(root) and bool(annotation_files(root))


def is_of_datasets(root: Path) -> bool:
    """Whether `datasets` wrote a directory, or it has a table that `datasets` reads."""
    if _is_saved(root):
        return True
    return any(path.suffix.lower() in TABLE_SUFFIXES for path in _files_below(root))


def data_directory(root: Path) -> Path:
    """The directory itself, or the one in it that is the data set: archives often hold a single directory."""
    inner = root
    for _ in range(3):
        if is_coco_directory(inner) or _is_saved(inner):
            return inner
        folders = [path for path in _entries(inner) if path.is_dir()]
        if len(folders) != 1:
            break
        inner = folders[0]
    return root


def describe_file(path: Path) -> str | None:
    """Why a file is no data set and what to give instead; `None` if it may hold annotations as JSON."""
    suffix = path.suffix.lower()
    if is_json_file(path):
        return None
    if suffix in TABLE_SUFFIXES:
        return f"{path} is a single table. Give the directory that holds it, {path.parent}."
    if suffix in PICTURE_SUFFIXES:
        return f"{path} is an image. {EXPECTED}"
    if suffix in (".xml", ".txt", ".yaml", ".yml"):
        other = _of_another_tool(path.parent) or _of_another_tool(path.parent.parent)
        return f"{path} is a single file{f', and {path.parent} has {other}' if other else ''}. {EXPECTED}"
    try:
        if zipfile.is_zipfile(path) or tarfile.is_tarfile(path) or suffix in (".rar", ".7z"):
            return f"{path} is an archive. Unpack it and give the directory. {EXPECTED}"
    except OSError:
        pass
    return f"{path} is a file that holds no data set known here. {EXPECTED}"


def describe_directory(root: Path) -> str | None:
    """Why a directory is no data set and what to give instead; `None` if `datasets` may know it."""
    if not _entries(root):
        return f"The directory {root} is empty. Give one that holds a data set. {EXPECTED}"
    if is_of_datasets(root) or any(path.suffix == ".py" for path in _entries(root)):
        return None
    if (root / "config.json").is_file():
        return f"{root} holds a saved model (config.json), no data set. {EXPECTED}"
    if other := _of_another_tool(root):
        return f"{root} has {other}, which cannot be loaded. {EXPECTED} Convert the annotations to COCO's format."
    files = [path for path in _files_below(root) if not path.name.startswith((".", "_"))]
    images = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    if images and len(images) == len(files):
        return f"{root} holds images alone, e.g. {images[0].relative_to(root)}, and no annotations. {EXPECTED}"
    return None


def _of_another_tool(root: Path) -> str | None:
    """What a directory has of the layout of another tool, or a directory in it if that is the only one."""
    folders = {path.name.lower(): path for path in _entries(root) if path.is_dir()}
    files = list(_files_below(root, depth=3))
    kinds = {path.suffix.lower() for path in files}
    if "jpegimages" in folders or (".xml" in kinds and any(_is_voc(path) for path in files)):
        return "annotations of Pascal VOC (XML, one file for each image)"
    settings = [path for path in files if path.suffix.lower() in (".yaml", ".yml") and _names_classes(path)]
    of_images = {path.stem for path in files if path.suffix.lower() in PICTURE_SUFFIXES}
    labels = any(path.suffix.lower() == ".txt" and path.stem in of_images for path in files)
    if settings or labels:
        return "labels of YOLO (a text file for each image)"
    if ".tfrecord" in kinds:
        return "records of TensorFlow"
    if ".json" in kinds and any(path.suffix == ".json" and path.stem in of_images for path in files):
        return "a JSON file for each image (as of LabelMe)"
    return None


def _is_voc(path: Path) -> bool:
    return path.suffix.lower() == ".xml" and "<annotation" in _head(path)


def _names_classes(path: Path) -> bool:
    return re.search(r"^names\s*:", _head(path), re.MULTILINE) is not None


def _head(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return ""


def _is_saved(root: Path) -> bool:
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _entries(folder: Path) -> list[Path]:
    """What is in a directory, but for what systems and archives leave there."""
    return [path for path in folder.iterdir() if not path.name.startswith((".", "__"))]


def _files_below(root: Path, depth: int = 4) -> Iterator[Path]:
    """Files below a directory, the first of each folder."""
    folders = []
    for path in itertools.islice(sorted(_entries(root)), MOST_LOOKED_AT):
        if path.is_dir():
            folders.append(path)
        else:
            yield path
    for folder in folders if depth else ():
        yield from _files_below(folder, depth - 1)
