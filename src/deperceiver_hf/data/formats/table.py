# SPDX-License-Identifier: Apache-2.0
"""Data in a CSV of boxes: a row `file, xmin, ymin, xmax, ymax, label` for each object.

Columns are known by their names, in any order and in the usual spellings (`_COLUMNS`): those of TensorFlow's and
Roboflow's `filename,width,height,class,xmin,ymin,xmax,ymax`, for instance, where width and height are the image's;
with `x, y, width, height` instead of corners they are the box's. Without a header, the columns are in the order above,
as of Keras-RetinaNet. A row with an image alone says that it has no objects. Splits are what files or folders are
called after, and a single table is the training split. Classes are sorted by name, those of all tables together,
unless `classes.csv` (`name,number` in each row) or `labels.txt` gives their order.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError, one_line
from ..annotations import AnnotationList, stated_size
from ..fields import Id, as_integer, as_number, as_text, category_order
from ..records import SPLIT_NAMES, LoadingReport, split_aliases
from .annotated_images import AnnotatedImages, Request, no_split, require_one_name_each, shortened, words_of
from .layouts import entries_of, head_of, lines_of

SUFFIXES = (".csv", ".tsv")
HOW_SPLITS_ARE_TOLD = (
    "A table is of the split that is in its name or in that of its folder (train.csv, train/boxes.csv)."
)
_COLUMNS = {
    "file": (
        "file",
        "filename",
        "filepath",
        "image",
        "imagepath",
        "path",
        "imagename",
        "imagefile",
        "img",
        "imageid",
        "imgpath",
    ),
    "label": (
        "label",
        "class",
        "classname",
        "category",
        "categoryname",
        "labelname",
        "name",
        "classid",
        "categoryid",
        "labelid",
    ),
    "xmin": ("xmin", "x1", "left", "bboxxmin", "xtl", "x0"),
    "ymin": ("ymin", "y1", "top", "bboxymin", "ytl", "y0"),
    "xmax": ("xmax", "x2", "right", "bboxxmax", "xbr"),
    "ymax": ("ymax", "y2", "bottom", "bboxymax", "ybr"),
    "x": ("x", "bboxx", "xmin", "left"),
    "y": ("y", "bboxy", "ymin", "top"),
    "w": ("w", "width", "bboxwidth", "bboxw"),
    "h": ("h", "height", "bboxheight", "bboxh"),
    "image_width": ("imagewidth", "imgwidth", "width"),
    "image_height": ("imageheight", "imgheight", "height"),
}
_CORNERS, _SIDES = ("xmin", "ymin", "xmax", "ymax"), ("x", "y", "w", "h")


class _Table(NamedTuple):
    """How a file is to be read: its delimiter, the place of each column, and whether a header comes first."""

    file: Path
    delimiter: str
    places: dict[str, int]
    has_header: bool

    @property
    def box(self) -> tuple[str, ...]:
        """The columns of a box."""
        return _CORNERS if set(_CORNERS) <= self.places.keys() else _SIDES

    def rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Number of the line and values of each row that is not blank."""
        try:
            with self.file.open(encoding="utf-8-sig", newline="") as file:
                for number, fields in enumerate(csv.reader(file, delimiter=self.delimiter), start=1):
                    if (number > 1 or not self.has_header) and any(field.strip() for field in fields):
                        padded = [field.strip() for field in fields] + [""] * len(self.places) * 2
                        yield number, {name: padded[place] for name, place in self.places.items()}
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{self.file} is no CSV: {one_line(error)}") from error


def recognise(path: Path) -> str | None:
    """What a path has of a CSV of boxes, in words."""
    if path.is_file():
        return path.name if path.suffix.lower() in SUFFIXES and _as_table(path) else None
    return shortened([str(table.file.relative_to(path)) for table in _tables(path)], 3) or None


def splits(path: Path) -> list[str]:
    """The splits that a path has."""
    tables = _tables(path)
    root = path if path.is_dir() else path.parent
    return [split for split in SPLIT_NAMES if _of_split(tables, root, split)]


def read(request: Request) -> AnnotatedImages:
    """A split.

    Raises:
        FileNotFoundError: there is none of that name.
        ValueError: several tables may be meant, or one is no CSV.
    """
    assert request.path is not None
    root, tables = request.directory, _tables(request.path)
    chosen = tables if request.alone else _of_split(tables, root, request.split)
    if request.path.is_file() and not request.alone:
        tables = _tables(root)  # those of the other splits are beside it
        chosen = chosen or _of_split(tables, root, request.split)
    if not chosen:
        raise no_split(request, splits(root), HOW_SPLITS_ARE_TOLD)
    if len(chosen) > 1:
        listed = ", ".join(str(table.file.relative_to(root)) for table in chosen)
        raise UserError(
            f"{root} has several tables that may be of split {request.split!r}: {listed}. Give the right one."
        )
    (table,) = chosen
    report = LoadingReport(f"{root.name}/{request.split} ({table.file})")
    names, numbers = _classes(root, tables)
    labels: dict[str, int] = {name: label for label, name in enumerate(names)}
    labels |= {number: label for label, number in enumerate(numbers)}
    places: dict[str, int] = {}
    sizes: list[tuple[int, int] | None] = []
    objects = AnnotationList()
    for line, row in table.rows():
        file, label, box = row["file"], row["label"], [row[column] for column in table.box]
        if not file:
            report.add("invalid_annotation", f"{table.file}, line {line}: no image is named")
            continue
        if file not in places:
            places[file] = len(places)
            size = row.get("image_width"), row.get("image_height")
            sizes.append(stated_size(*size, file, report) if all(size) else None)
        if not label and not any(box):
            continue
        if label not in labels:
            report.add("unknown_category", f"{table.file}, line {line}: {label!r}")
        else:
            objects.append(places[file], labels[label], box)
    usual = [directory for directory in (table.file.parent, root, table.file.parent / "images", root / "images")]
    beside = [
        root / name for name in (*split_aliases(request.split), *(f"images/{n}" for n in split_aliases(request.split)))
    ]
    return AnnotatedImages(
        report=report,
        root=root,
        directories=list(dict.fromkeys(directory for directory in (*usual, *beside) if directory.is_dir())),
        file_names=list(places),
        label_names=names,
        annotations=objects,
        sizes=sizes,
        box_format="xyxy" if table.box is _CORNERS else "xywh",
        evidence=str(table.file.relative_to(root)),
    )


def _tables(path: Path) -> list[_Table]:
    """The tables of boxes in a directory or one below it, or in a file."""
    folders = [] if path.is_file() else [path, *sorted(entry for entry in entries_of(path) if entry.is_dir())]
    files = [path] if path.is_file() else [file for folder in folders for file in sorted(entries_of(folder))]
    tables = [_as_table(file) for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
    return [table for table in tables if table is not None]


def _of_split(tables: list[_Table], root: Path, split: str) -> list[_Table]:
    known = {name for names in SPLIT_NAMES.values() for name in names}
    named = [(table, words_of(table.file.relative_to(root))) for table in tables]
    chosen = [table for table, words in named if words & {name.lower() for name in split_aliases(split)}]
    if not chosen and split in SPLIT_NAMES["train"]:
        chosen = [table for table, words in named if not words & known]
    return chosen


def _as_table(file: Path) -> _Table | None:
    """How to read a file; `None` if it is no table of boxes."""
    lines = head_of(file).splitlines()
    if not lines:
        return None
    delimiter = max(",;\t", key=lines[0].count)
    try:
        fields = next(csv.reader(lines[:1], delimiter=delimiter))
    except (csv.Error, StopIteration):
        return None
    spelled = ["".join(letter for letter in field.lower() if letter.isalnum()) for field in fields]
    places = {
        name: next(spelled.index(known) for known in spellings if known in spelled)
        for name, spellings in _COLUMNS.items()
        if any(known in spelled for known in spellings)
    }
    corners, sides = set(_CORNERS) <= places.keys(), set(_SIDES) <= places.keys()
    if {"file", "label"} <= places.keys() and (corners or sides):
        if not corners and places["w"] == places.get("image_width"):
            places = {name: place for name, place in places.items() if name not in ("image_width", "image_height")}
        return _Table(file, delimiter, places, True)
    if len(fields) == 6 and all(not field.strip() or as_number(field) == as_number(field) for field in fields[1:5]):
        columns = ("file", *_CORNERS, "label")
        if Path(fields[0]).suffix and (fields[5].strip() or not any(fields[1:])):
            return _Table(file, delimiter, {name: place for place, name in enumerate(columns)}, False)
    return None


def _classes(root: Path, tables: list[_Table]) -> tuple[list[str], list[str]]:
    """Names of the classes, and their numbers if they are given, as text."""
    for name in ("classes.csv", "class.csv"):
        if (file := root / name).is_file():
            rows = [line.rsplit(",", 1) for line in lines_of(file)]
            numbered = sorted((number, row[0]) for row in rows if (number := as_integer(row[-1])) is not None)
            if len(numbered) < len(rows):
                raise UserError(f"{file} must have a name and a number in each row, as in cat,0.")
            names = require_one_name_each([name for _, name in numbered], str(file))
            return names, [str(number) for number, _ in numbered]
    for name in ("labels.txt", "classes.txt"):
        if (file := root / name).is_file():
            names = require_one_name_each(lines_of(file), str(file))
            return names, [str(number) for number in range(len(names))]
    found: set[Id] = {as_text(row["label"]) for table in tables for _, row in table.rows()}
    names = [str(name) for name in sorted(found - {""}, key=category_order)]
    if not names:
        raise UserError(f"{root}: no row of {', '.join(table.file.name for table in tables)} has a label.")
    return names, []
