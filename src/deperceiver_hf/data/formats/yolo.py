# SPDX-License-Identifier: Apache-2.0
"""Data in the format of YOLO: a text file for each image, with a row `class x y width height` for each object.

The numbers are those of the box's centre and sides in parts of the image; classes are numbered from 0. Longer rows are
polygons, whose boxes are taken, or keypoints, where `data.yaml` states their shape (`kpt_shape`). An image without a
text file has no objects. The text file of `images/S/a.jpg` is `labels/S/a.txt`, or `a.txt` beside the image.

`data.yaml` names the classes (a list, or numbers with names) and for each split a directory, a text file of image
paths or a list of these, relative to its `path` or to itself; `../train/images`, as Roboflow writes, is meant to be
below it. Without it, splits are what folders are called, and names come from `classes.txt` or one like it.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from ...errors import UserError, one_line
from ..annotated_files import find_image_files
from ..annotations import AnnotationList
from ..fields import as_integer, as_number
from ..plausibility import check_category_ids
from ..records import SPLIT_NAMES, LoadingReport, split_aliases
from .annotated_images import AnnotatedImages, Request, is_of_split, no_split, require_one_name_each, split_of
from .layouts import PICTURE_SUFFIXES, entries_of, files_below, head_of, lines_of, relative_files

NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "predefined_classes.txt", "_darknet.labels")
HOW_SPLITS_ARE_TOLD = (
    "data.yaml names its images, or a folder is called after it (images/train and labels/train, or train/images and "
    "train/labels)."
)
_USUAL_STEMS = ("data", "dataset")  # of the file that names classes and images
_PARALLEL = 0.002  # of the image: corners of a rotated box miss those of a parallelogram by no more, polygons do


class Settings(NamedTuple):
    """What `data.yaml` says.

    Attributes:
        file: itself; `None` where there is none.
        names: of the classes, if they are there.
        splits: entries of each split, by its name there.
        base: directory that these are relative to.
        keypoint_numbers: numbers in a row beside class and box.
        oriented: the boxes are said to be rotated.
    """

    file: Path | None
    names: list[str] | None
    splits: dict[str, list[str]]
    base: Path
    keypoint_numbers: int
    oriented: bool


def recognise(path: Path) -> str | None:
    """What a path has of YOLO's format, in words."""
    if path.is_file():
        return path.name if path.suffix.lower() in (".yaml", ".yml") and _is_settings(path) else None
    if files := _settings_files(path):
        return files[0].name
    labels = next(_label_files(path), None)
    return None if labels is None else f"{labels.relative_to(path)}, no data.yaml"


def splits(path: Path) -> list[str]:
    """The splits that a path has."""
    settings = _read_settings(path)
    if settings.splits:
        return [split for split in SPLIT_NAMES if any(name in settings.splits for name in split_aliases(split))]
    found = {split_of(name) or "train" for name in _images_below(settings.base)}
    return [split for split in SPLIT_NAMES if split in found]


def read(request: Request) -> AnnotatedImages:
    """A split; labels are the numbers of the classes.

    Raises:
        FileNotFoundError: the split, its images or all of its text files are not there.
        ValueError: `data.yaml` is none, or the rows are rotated boxes or something else that is no box.
    """
    assert request.path is not None
    root = request.directory
    settings = _read_settings(request.path)
    report = LoadingReport(f"{root.name}/{request.split} ({settings.file or root})")
    if request.images is not None:
        files = _images_below(request.images)
    elif settings.splits and not (request.alone and request.path.is_dir()):
        files = _images_of_entries(settings, request, report)
    else:
        files = [name for name in _images_below(root) if request.alone or is_of_split(name, request.split)]
        if not files:
            raise no_split(request, splits(request.path), HOW_SPLITS_ARE_TOLD)
    top = request.images or root
    labels = _Labels(top, apart=root if request.images is not None else None)
    found: list[Path | None] = []
    result = AnnotationList()
    rows = _Rows(settings, report)
    for index, name in enumerate(files[: request.max_samples]):
        found.append(labels.find(name))
        if found[-1] is not None:
            rows.read(found[-1], index, result)
    if not any(found) and not any(map(labels.find, files)):
        raise FileNotFoundError(
            f"{report.source}: none of the {len(found)} images has a text file with its objects; for {files[0]} it "
            f"would be {labels.usual(files[0])}, or beside the image."
        )
    rows.refuse_rotated()
    evidence = f"{settings.file.name if settings.file else 'no data.yaml'}, {sum(map(bool, found))} text files"
    names = settings.names or _names_in_files(root)
    if names is None:
        numbers = result.label if request.images is not None else _all_numbers(root)
        names = [f"class_{number}" for number in range(max([*numbers, *result.label], default=0) + 1)]
        evidence += f", no names of classes, as {NAME_FILES[0]} would give them"
    return AnnotatedImages(
        report=report,
        root=top,
        directories=[top],
        file_names=files,
        label_names=names,
        annotations=_with_known_labels(result, len(names), report),
        box_format="cxcywh_relative",
        evidence=evidence,
    )


class _Rows:
    """Reads the rows of text files, and keeps what tells boxes that are rotated."""

    def __init__(self, settings: Settings, report: LoadingReport):
        self.settings, self.report = settings, report
        self.label_of = {name: label for label, name in enumerate(settings.names or [])}
        self.num_polygons = self.num_rotated = 0
        self.example = ""

    def read(self, file: Path, index: int, result: AnnotationList) -> None:
        """Append the objects in a text file to the result, as those of the image of an index."""
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError) as error:
            self.report.add("invalid_annotation", f"{file} is no text: {one_line(error)}")
            return
        for number, line in enumerate(text.splitlines(), start=1):
            if not (fields := line.split()):
                continue
            label = as_integer(fields[0])
            label = self.label_of.get(fields[0]) if label is None else label
            numbers = [as_number(value) for value in fields[1:]]
            box = None if any(map(math.isnan, numbers)) else self._box(numbers, f"{file}, line {number}: {line[:100]}")
            if box is None or label is None:
                self.report.add("invalid_annotation", f"{file}, line {number}: {line[:100]}")
            else:
                result.append(index, label, box, id=None)

    def _box(self, numbers: list[float], where: str) -> list[float] | None:
        """Centre and sides of the object in a row, of which these are the numbers behind the class."""
        if len(numbers) in (4, 4 + self.settings.keypoint_numbers):
            return numbers[:4]
        if len(numbers) == 5:
            raise UserError(
                f"{where}: behind the class there are five numbers, as in rotated boxes (the last is the angle) and "
                "in predictions (a confidence). Boxes of four are needed: class x y width height."
            )
        if len(numbers) < 6 or len(numbers) % 2:
            return None
        xs, ys = numbers[0::2], numbers[1::2]
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
        self._look_for_rotated(xs, ys, where)
        return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]

    def _look_for_rotated(self, xs: list[float], ys: list[float], where: str) -> None:
        sides = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
        if len(xs) == 4 and all(min(abs(x - x2), abs(y - y2)) <= _PARALLEL for x, y, x2, y2 in sides):
            return  # upright
        self.num_polygons += 1
        if len(xs) == 4 and all(abs(a + c - b - d) <= _PARALLEL for a, b, c, d in (xs, ys)):
            self.num_rotated += 1
            self.example = self.example or where

    def refuse_rotated(self) -> None:
        """Raise a `ValueError` if the rows of four corners are rotated boxes."""
        if self.num_rotated and (self.settings.oriented or self.num_rotated > 0.9 * self.num_polygons):
            raise UserError(
                f"{self.report.source} has rotated boxes, by their four corners ({self.num_rotated} rows, e.g. "
                f"{self.example}): an upright box around one would hold more than the object. Export upright boxes "
                "(class x y width height), or outlines of the objects."
            )


def _with_known_labels(annotations: AnnotationList, num_classes: int, report: LoadingReport) -> AnnotationList:
    known = [0 <= label < num_classes for label in annotations.label]
    if not all(known):
        wrong = [label for label, fits in zip(annotations.label, known, strict=True) if not fits]
        check_category_ids(annotations.label, range(num_classes), report)
        report.add("unknown_category", f"class {wrong[0]}, where 0 to {num_classes - 1} have names", len(wrong))
        columns = {
            name: [value for value, fits in zip(column, known, strict=True) if fits]
            for name, column in vars(annotations).items()
        }
        annotations = AnnotationList(**columns)
    return annotations


def _is_settings(file: Path) -> bool:
    """Whether a YAML file names classes or, under the usual name, images: one that lacks names is no other file."""
    keys = ("names", *(("train", "val", "nc") if file.stem in _USUAL_STEMS else ()))
    starts = tuple(f"{quote}{key}{quote}{space}:" for key in keys for quote in ("", '"') for space in ("", " "))
    return any(line.startswith(starts) for line in head_of(file).splitlines())


def _settings_files(root: Path) -> list[Path]:
    files = [path for path in sorted(entries_of(root)) if path.suffix.lower() in (".yaml", ".yml") and path.is_file()]
    return [file for file in files if _is_settings(file)]


def _label_files(root: Path) -> Iterator[Path]:
    """Text files called like an image whose first row is one of numbers."""
    files = list(files_below(root))
    of_images = {path.stem for path in files if path.suffix.lower() in PICTURE_SUFFIXES}
    for path in files:
        if path.suffix.lower() == ".txt" and path.stem in of_images:
            fields = head_of(path).split("\n", 1)[0].split()
            if not fields or (len(fields) >= 5 and not np.isnan([as_number(field) for field in fields[1:]]).any()):
                yield path


def _read_settings(path: Path) -> Settings:
    root = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else _settings_files(root)
    named = [file for file in files if file.stem in _USUAL_STEMS]
    if len(files) > 1 and len(named) != 1:
        raise UserError(
            f"{root} has several files that name classes: {', '.join(file.name for file in files)}. Give the right "
            "one as the data set."
        )
    if not files:
        return Settings(None, None, {}, root, 0, False)
    file = (named or files)[0]
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold `names: ...` and the images of each split, as in `train: images/train`.")
    base = root / str(content.get("path") or ".").replace("\\", "/")
    base = base if base.is_dir() else root
    known = {name for names in SPLIT_NAMES.values() for name in names}
    usual = {"names", "nc", "path", "kpt_shape", "flip_idx", "download", "roboflow", "task"}
    entries = {
        str(name): [str(entry) for entry in (value if isinstance(value, list) else [value])]
        for name, value in content.items()
        if value and (name in known or (name not in usual and isinstance(value, str) and (base / value).exists()))
    }
    shape = content.get("kpt_shape")
    keypoints = 0
    if shape is not None:
        counts = [as_integer(count) for count in shape] if isinstance(shape, list) else []
        if len(counts) != 2 or None in counts:
            raise UserError(f"{file}: kpt_shape must be two numbers, as in [17, 3], not {shape!r}.")
        keypoints = int(np.prod([count or 0 for count in counts]))
    oriented = str(content.get("task", "")).lower() == "obb"
    return Settings(file, _names_in_settings(content, file), entries, base, keypoints, oriented)


def _names_in_settings(content: dict, file: Path) -> list[str] | None:
    names, count = content.get("names"), as_integer(content.get("nc"))
    if names is None:
        return None
    if isinstance(names, dict):
        numbers = {as_integer(number): name for number, name in names.items()}
        if set(numbers) != set(range(len(names))):
            raise UserError(f"{file}: names must have the numbers 0 to {len(names) - 1}, they have {list(names)}.")
        names = [numbers[number] for number in range(len(names))]
    if not isinstance(names, list) or any(isinstance(name, dict | list) or name is None for name in names):
        raise UserError(f"{file}: names must be a list of names or numbers with names, not {str(names)[:200]}.")
    if count is not None and count != len(names):
        raise UserError(f"{file}: nc says {count} classes, names has {len(names)}. Correct the one that is wrong.")
    return require_one_name_each(names, str(file))


def _images_of_entries(settings: Settings, request: Request, report: LoadingReport) -> list[str]:
    """The images of a split, relative to the data directory where they are in it."""
    root = request.directory
    key = next((name for name in split_aliases(request.split) if name in settings.splits), None)
    if key is None:
        raise no_split(request, list(settings.splits), f"{settings.file} names none.")
    files: list[str] = []
    for entry in settings.splits[key]:
        place = _place_of(entry, settings, request)
        if place.is_dir():
            files += _images_below(place, Path(os.path.abspath(root)))
        else:
            files += _listed_images(place, settings, request, report)
    if not files:
        raise FileNotFoundError(f"{settings.file}: there are no images in {', '.join(settings.splits[key])} ({key}).")
    return list(dict.fromkeys(files))


def _place_of(entry: str, settings: Settings, request: Request) -> Path:
    """The directory or file that an entry of `data.yaml` means."""
    root = request.directory
    name = entry.replace("\\", "/")
    within = "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
    places = [settings.base / name, settings.base / within, root / name, root / within]
    # From another machine: the longest end of it that is here.
    parts = within.split("/")
    places += [root / "/".join(parts[start:]) for start in range(1, len(parts))]
    there = [place for place in dict.fromkeys(Path(os.path.abspath(place)) for place in places) if place.exists()]
    for place in there:
        if request.allow_outside or place.is_relative_to(os.path.abspath(root)):
            return place
    if there:
        raise FileNotFoundError(
            f"{settings.file}: {entry!r} leads out of its directory, to {there[0]}. Move the images there, or, if you "
            "trust the file, read them with NAME:outside=true."
        )
    raise FileNotFoundError(f"{settings.file}: there is no {entry!r}, neither in {settings.base} nor in {root}.")


def _images_below(directory: Path, root: Path | None = None) -> list[str]:
    """Images below a directory, sorted, relative to it or to another."""
    prefix = Path(os.path.relpath(directory, root)) if root is not None else Path()
    return [(prefix / name).as_posix() for name in relative_files(directory, PICTURE_SUFFIXES)]


def _listed_images(file: Path, settings: Settings, request: Request, report: LoadingReport) -> list[str]:
    """The images that a text file names, one a line: relative to it, to the data or with folders of another place."""
    names = [line.strip().removeprefix("./") for line in lines_of(file)]
    root = request.directory
    found = find_image_files(
        names, root, list(dict.fromkeys([file.parent, settings.base, root])), allow_outside=request.allow_outside
    )
    for name, image in zip(names, found, strict=True):
        if image.path is not None and image.issue is not None:
            report.add(image.issue, f"{name} is {image.path}")
    return [
        name if image.path is None else Path(os.path.relpath(image.path, os.path.abspath(root))).as_posix()
        for name, image in zip(names, found, strict=True)
    ]


class _Labels:
    """Finds the text files of images.

    Args:
        root: the data directory, or that of the images where the text files are elsewhere.
        apart: directory of the text files, if it is that.
    """

    def __init__(self, root: Path, apart: Path | None = None):
        self.root, self.apart = root, apart
        self._directories: dict[str, list[str]] = {}  # in which the text files of a folder's images may be

    def find(self, image: str) -> Path | None:
        """The text file of an image, whose path is relative to `root`; `None` if it has none."""
        folder, name = os.path.split(image)
        stem = os.path.splitext(name)[0]
        if folder not in self._directories:
            self._directories[folder] = [str(place) for place in self._places(folder) if place.is_dir()]
        for directory in self._directories[folder]:
            for suffix in (".txt", ".TXT"):
                if os.path.isfile(path := os.path.join(directory, stem + suffix)):
                    return Path(path)
        return None

    def usual(self, image: str) -> Path:
        """Where the text file of an image would be."""
        path = Path(image)
        return self._places(path.parent.as_posix())[0] / f"{path.stem}.txt"

    def _places(self, folder: str) -> list[Path]:
        parts = [part for part in Path(folder).parts if part != "."]
        if self.apart is not None:
            return [self.apart.joinpath(*parts)]
        mirrored = [
            self.root.joinpath(*parts[:position], "labels", *parts[position + 1 :])
            for position in reversed(range(len(parts)))
            if parts[position].lower() in ("images", "jpegimages", "imgs", "img")
        ]
        return [*mirrored, self.root.joinpath(*parts), self.root.joinpath("labels", *parts)]


def _names_in_files(root: Path) -> list[str] | None:
    for directory in (root, root / "labels", root / "data", root / "train"):
        for name in NAME_FILES:
            if (file := directory / name).is_file():
                return require_one_name_each(lines_of(file), str(file))
    return None


def _all_numbers(root: Path) -> Sequence[int]:
    """The classes in the text files of all splits, where no file names them."""
    numbers: set[int] = set()
    labels = _Labels(root)
    for image in _images_below(root):
        if (file := labels.find(image)) is not None:
            first = (
                line.split()[0]
                for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
                if line.split()
            )
            numbers |= {number for number in map(as_integer, first) if number is not None and 0 <= number < 10_000}
    return sorted(numbers)
