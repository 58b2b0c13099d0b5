# SPDX-License-Identifier: Apache-2.0
"""Data in the format of Pascal VOC: an XML file for each image, with `bndbox` of `xmin, ymin, xmax, ymax` in pixels.

Splits are the lists in `ImageSets/Main/SPLIT.txt` where these are there, else what folders are called; what is in
neither is the training split. An XML file belongs to the image of its name (`a.xml`, `a.jpg`) that shares most folders
with it, or to the one that its `filename` names. Images without an XML file are left out: nobody has looked at them.

Coordinates are pixels from the image's corner, and may have fractions: most tools write them so. The original's are
the numbers of the first and the last pixel, counted from 1 (`box_format` `voc`). Which of the two is told by objects
at the border, where one has 0 and the other 1; without such objects, they are taken as they are written. Classes are
sorted by name, those of all splits together, unless `labels.txt` or `labelmap.txt` (as of CVAT) gives their order.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from ...errors import UserError, one_line
from ..annotations import AnnotationList, stated_size
from ..fields import as_number, as_text
from ..records import SPLIT_NAMES, LoadingReport, split_aliases
from .annotated_images import AnnotatedImages, Request, is_of_split, no_split, require_one_name_each
from .layouts import PICTURE_SUFFIXES, files_below, head_of, lines_of, relative_files

NAME_FILES = ("labels.txt", "labelmap.txt", "classes.txt")
HOW_SPLITS_ARE_TOLD = "A list ImageSets/Main/SPLIT.txt names its images, or a folder is called after it."
COUNTED_FROM_ZERO = "coordinates count from 0"  # in source/annotation, by which our own files say so
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_FEW_AT_BORDER = 4


def recognise(path: Path) -> str | None:
    """What a path has of Pascal VOC's format, in words."""
    if path.is_file():
        return None
    file = next((file for file in files_below(path) if file.suffix.lower() == ".xml" and _is_annotation(file)), None)
    return None if file is None else str(file.relative_to(path))


def splits(path: Path) -> list[str]:
    """The splits that a path has."""
    files = _Files(path)
    return [split for split in SPLIT_NAMES if files.of_split(split)]


def read(request: Request) -> AnnotatedImages:
    """A split.

    Raises:
        FileNotFoundError: there is none of that name.
        ValueError: none of the XML files can be read.
    """
    assert request.path is not None
    files = _Files(request.path, request.images)
    chosen = files.annotations if request.alone else files.of_split(request.split)
    if not chosen:
        raise no_split(request, splits(request.path), HOW_SPLITS_ARE_TOLD)
    report = LoadingReport(f"{request.path.name}/{request.split} ({request.path})")
    names, sizes, objects = [], [], []
    for file in chosen[: request.max_samples]:
        root = files.parse(file, report)
        if root is None:
            continue
        names.append(files.image_of(file, _text(root, "filename")))
        size = root.find("size")
        stated = (None, None) if size is None else (size.findtext("width"), size.findtext("height"))
        sizes.append(None if stated[0] in (None, "0", "") else stated_size(*stated, names[-1], report))
        objects.append((file, root.findall("object")))
    if not names:
        raise UserError(f"{report.source}: none of the {len(chosen)} XML files can be read. {report.sentence()}")
    label_names = files.label_names()
    from_one = files.count_from_one()
    annotations = _read_objects(objects, label_names, report)
    if without := files.without_annotations(request.split) if not request.alone else []:
        report.add("image_without_annotations", without[0], len(without))
    return AnnotatedImages(
        report=report,
        root=request.path,
        directories=[request.path],
        file_names=names,
        label_names=label_names,
        annotations=annotations,
        sizes=sizes,
        box_format="voc" if from_one else "xyxy",
        evidence=f"{len(chosen)} XML files{', lists in ImageSets' if files.lists else ''}, pixels counted from "
        f"{int(from_one)}",
    )


def _read_objects(
    objects: Sequence[tuple[str, list]], label_names: list[str], report: LoadingReport
) -> AnnotationList:
    labels = {name: label for label, name in enumerate(label_names)}
    result = AnnotationList()
    for index, (file, elements) in enumerate(objects):
        for number, element in enumerate(elements, start=1):
            name, box = _text(element, "name"), element.find("bndbox")
            if box is None:
                kind = next((kind for kind in ("robndbox", "polygon") if element.find(kind) is not None), "no bndbox")
                report.add("invalid_annotation", f"{file}, object {number}: {kind}")
            elif name not in labels:
                report.add("unknown_category", f"{file}, object {number}: {name!r}")
            else:
                result.append(index, labels[name], [_text(box, side) for side in _SIDES])
    return result


class _Files:
    """The XML files, images and lists below a directory, by paths relative to it."""

    def __init__(self, root: Path, images: Path | None = None):
        self.root = root
        below = relative_files(root)
        self.annotations = [path for path in below if path.lower().endswith(".xml")]
        self.lists = [path for path in below if re.search(r"(^|/)ImageSets/Main/[^/]+\.txt$", path)]
        self.images: dict[str, list[str]] = {}
        for path in relative_files(images or root, PICTURE_SUFFIXES):
            self.images.setdefault(Path(path).stem, []).append(path)
        self._names: dict[str, set[str]] = {}  # of the classes in each XML file that was parsed
        self._lows: dict[str, list[float]] = {}  # left and top sides in each
        self._from_zero = False

    def of_split(self, split: str) -> list[str]:
        """The XML files of a split, in the order of its list or sorted."""
        if self._has_lists:
            files = {(_base(path), Path(path).stem): path for path in self.annotations}
            return [files[image] for image in self._listed(split) if image in files]
        return [path for path in self.annotations if is_of_split(path, split)]

    def without_annotations(self, split: str) -> list[str]:
        """Images of a split that no XML file belongs to."""
        stems = {Path(path).stem for path in self.annotations}
        if self._has_lists:
            return [stem for _, stem in self._listed(split) if stem not in stems]
        others = [path for stem, paths in self.images.items() if stem not in stems for path in paths]
        return [path for path in others if is_of_split(path, split)]

    @property
    def _has_lists(self) -> bool:
        """Whether lists tell splits apart; there are lists of single classes, too."""
        known = {name for names in SPLIT_NAMES.values() for name in names}
        return any(Path(path).stem in known for path in self.lists)

    def _listed(self, split: str) -> list[tuple[str, str]]:
        """Directory and name of the images in the lists of a split."""
        stems = {Path(path).stem for path in self.annotations} | self.images.keys()
        return [
            (_base(path), _listed_name(line.strip(), stems))
            for path in self.lists
            if Path(path).stem in split_aliases(split)
            for line in lines_of(self.root / path)
        ]

    def image_of(self, annotation: str, stated: str) -> str:
        """The image that an XML file belongs to; the name that it states if none is found."""
        stated = stated.replace("\\", "/")
        same = self.images.get(Path(annotation).stem) or self.images.get(Path(stated).stem, [])
        if not same:
            return stated or f"{Path(annotation).stem}.jpg"
        folders = Path(annotation).parts[:-1]

        def likeness(path: str) -> tuple[int, bool]:
            pairs = zip(folders, Path(path).parts[:-1], strict=False)
            return sum(ours == theirs for ours, theirs in pairs), Path(path).name == Path(stated).name

        return max(same, key=likeness)

    def parse(self, annotation: str, report: LoadingReport) -> ElementTree.Element | None:
        """The content of an XML file; what is none is reported."""
        self._names[annotation], self._lows[annotation] = set(), []
        try:
            root = ElementTree.parse(self.root / annotation).getroot()
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            report.add("invalid_annotation_file", f"{annotation}: {one_line(error)}")
            return None
        if root.tag != "annotation":
            report.add("invalid_annotation_file", f"{annotation}: its root is <{root.tag[:50]}>, not <annotation>")
            return None
        self._names[annotation] = {_text(element, "name") for element in root.findall("object")}
        boxes = root.findall("object/bndbox")
        self._lows[annotation] = [as_number(_text(box, side)) for box in boxes for side in _SIDES[:2]]
        self._from_zero |= root.findtext("source/annotation") == COUNTED_FROM_ZERO
        return root

    def count_from_one(self) -> bool:
        """Whether coordinates count pixels from 1: whole numbers of which none is 0 and more are 1 than others."""
        self._parse_all()
        lows = np.concatenate([np.zeros(0), *map(np.array, self._lows.values())])
        lows = lows[np.isfinite(lows)]
        if self._from_zero or not len(lows) or lows.min() < 1 or (lows != np.round(lows)).any():
            return False
        at_border, near = int((lows == 1).sum()), int(((lows > 1) & (lows < 10)).sum()) / 8
        return at_border >= _FEW_AT_BORDER and at_border > 3 * near + 2

    def _parse_all(self) -> None:
        for path in self.annotations:
            if path not in self._names:
                self.parse(path, LoadingReport(""))

    def label_names(self) -> list[str]:
        """Names of the classes: those in a file for them, else those of all splits, sorted."""
        for name in NAME_FILES:
            if (file := self.root / name).is_file():
                listed = [line for line in lines_of(file) if not line.startswith("#")]
                if name == "labelmap.txt":
                    listed = [line.split(":")[0] for line in listed if line.split(":")[0] != "background"]
                return require_one_name_each(listed, str(file))
        self._parse_all()
        names = sorted(set().union(*self._names.values()) - {""})
        if not names:
            raise UserError(f"{self.root}: none of the {len(self.annotations)} XML files has an object with a name.")
        return names


def _listed_name(line: str, stems: Collection[str]) -> str:
    """The image that a line of a list names: perhaps with its suffix, or with 1 or -1 behind it."""
    for name in (line, line.rsplit(None, 1)[0]):
        for stem in (name, Path(name).stem):
            if stem in stems:
                return stem
    return line


def _base(path: str) -> str:
    """The directory that an XML file or a list belongs to: above `Annotations`, above `ImageSets`."""
    parts = Path(path).parts[:-1]
    for name in ("Annotations", "ImageSets"):
        if name in parts:
            parts = parts[: parts.index(name)]
    return "/".join(parts)


def _text(element: ElementTree.Element, tag: str) -> str:
    return as_text(element.findtext(tag) or "").strip()


def _is_annotation(file: Path) -> bool:
    return "<annotation" in head_of(file) and "<annotations" not in head_of(file)
