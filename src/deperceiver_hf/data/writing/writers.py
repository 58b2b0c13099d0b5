# SPDX-License-Identifier: Apache-2.0
"""What each format makes of records: its annotation files, and the count of what it cannot carry."""

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import yaml

from ...errors import UserError
from ..boxes import DECIMALS, BoxFormat
from ..fields import Id
from ..formats.layouts import PICTURE_SUFFIXES
from ..formats.voc import COUNTED_FROM_ZERO
from ..records import DetectionData

CANNOT_CARRY = {
    "crowds": "crowds (iscrowd), which are left out: as objects they would teach and count something else",
    "areas": "areas of objects that differ from those of their boxes",
    "annotation_ids": "ids of objects",
    "image_ids": "ids of images",
    "category_ids": "ids of categories that are not 0, 1, 2, ...",
    "decimals": f"boxes whose coordinates have more than {DECIMALS} decimals, which are rounded to so many",
}


class SplitToWrite(NamedTuple):
    """A split, and the names of its image files in the order of its records, below the place of its images."""

    data: DetectionData
    files: list[str]


Splits = dict[str, SplitToWrite]


@dataclass(frozen=True)
class Writer:
    """How a format is written.

    Attributes:
        title: what the format is called.
        images: directory of the images of a split, `{split}` for its name.
        write: makes the annotation files in a directory, and counts what it cannot carry (keys of `CANNOT_CARRY`).
        one_file_each: annotation files are called after the images.
        flat: images are in one directory, all splits together.
    """

    title: str
    images: str
    write: Callable[[Splits, Path], Counter]
    one_file_each: bool = False
    flat: bool = False


def write_coco(splits: Splits, directory: Path) -> Counter:
    """`annotations/instances_SPLIT.json` for each split."""
    (directory / "annotations").mkdir()
    lost: Counter = Counter()
    for split, (data, files) in splits.items():
        image_ids = _image_ids(data)
        images, annotations = [], []
        for place, (row, file) in enumerate(zip(_rows(data), files, strict=True)):
            image_id = place + 1 if image_ids is None else image_ids[place]
            images.append({"id": image_id, "file_name": file, "width": row["width"], "height": row["height"]})
            objects = row["objects"]
            annotations += [
                {"id": own, "image_id": image_id, "category_id": data.category_ids[label], "bbox": box, "area": area}
                | {"iscrowd": int(crowd)}
                for own, label, box, area, crowd in zip(
                    *(objects[key] for key in ("id", "category", "bbox", "area", "iscrowd")), strict=True
                )
            ]
        categories = [{"id": own, "name": name} for own, name in zip(data.category_ids, data.label_names, strict=True)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
        (directory / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")
    return lost


def write_yolo(splits: Splits, directory: Path) -> Counter:
    """`data.yaml`, `labels/SPLIT/NAME.txt` for each image, and `SPLIT.txt` with their order where it is not sorted."""
    lost: Counter = Counter()
    entries, names = {}, _same_names(splits)
    for split, (data, files) in splits.items():
        labels = directory / "labels" / split
        labels.mkdir(parents=True)
        for row, file in zip(_rows(data), files, strict=True):
            boxes, kept = _ordinary_boxes(row, lost)
            centres, sides = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]
            size = np.array([[row["width"], row["height"]]], dtype=np.float64)
            relative = np.concatenate([centres / size, sides / size], axis=1)
            back = BoxFormat("cxcywh", "relative").to_xywh(relative, np.repeat(size, len(relative), axis=0))
            lost["decimals"] += int((back != boxes).any(axis=1).sum())
            lines = [
                " ".join([str(row["objects"]["category"][place]), *map(_positional, numbers)])
                for place, numbers in zip(kept, relative, strict=True)
            ]
            target = labels / PurePosixPath(file).with_suffix(".txt")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        entries[split] = f"images/{split}"
        if files != sorted(files):
            entries[split] = f"{split}.txt"
            listed = "".join(f"./images/{split}/{file}\n" for file in files)
            (directory / entries[split]).write_text(listed, encoding="utf-8")
        _count_ids(data, lost)
    settings = {**entries, "nc": len(names), "names": dict(enumerate(names))}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (directory / "data.yaml").write_text(text, encoding="utf-8")
    return lost


def write_voc(splits: Splits, directory: Path) -> Counter:
    """`Annotations/NAME.xml` for each image, `ImageSets/Main/SPLIT.txt`, `labels.txt` with the order of classes."""
    lost: Counter = Counter()
    names = _same_names(splits)
    if odd := [name for name in names if not name.isprintable() or name.startswith("#") or name != name.strip()]:
        raise UserError(f"the class {odd[0]!r} has a name that Pascal VOC's files cannot hold. Rename it.")
    for folder in ("Annotations", "ImageSets/Main"):
        (directory / folder).mkdir(parents=True)
    for split, (data, files) in splits.items():
        for row, file in zip(_rows(data), files, strict=True):
            boxes, kept = _ordinary_boxes(row, lost)
            root = ElementTree.Element("annotation")
            _add(root, folder="JPEGImages", filename=file)
            _add(ElementTree.SubElement(root, "source"), annotation=COUNTED_FROM_ZERO)
            _add(ElementTree.SubElement(root, "size"), width=row["width"], height=row["height"], depth=3)
            for place, box in zip(kept, boxes.tolist(), strict=True):
                element = ElementTree.SubElement(root, "object")
                _add(element, name=names[row["objects"]["category"][place]], difficult=0)
                x, y, width, height = (Decimal(repr(value)) for value in box)
                corners = (x, y, x + width, y + height)
                sides = zip(("xmin", "ymin", "xmax", "ymax"), map(_plain, corners), strict=True)
                _add(ElementTree.SubElement(element, "bndbox"), **dict(sides))
                back = BoxFormat("xyxy").to_xywh(np.array([[float(value) for value in corners]]), np.ones((1, 2)))
                lost["decimals"] += back[0].tolist() != box
            ElementTree.indent(root)
            target = directory / "Annotations" / PurePosixPath(file).with_suffix(".xml")
            ElementTree.ElementTree(root).write(target, encoding="utf-8")
        listed = "".join(f"{PurePosixPath(file).stem}\n" for file in files)
        (directory / "ImageSets" / "Main" / f"{split}.txt").write_text(listed, encoding="utf-8")
        _count_ids(data, lost)
    (directory / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return lost


WRITERS = {
    "coco": Writer("COCO", "{split}", write_coco),
    "yolo": Writer("YOLO", "images/{split}", write_yolo, one_file_each=True),
    "voc": Writer("Pascal VOC", "JPEGImages", write_voc, one_file_each=True, flat=True),
}


def _rows(data: DetectionData) -> Iterator[dict[str, Any]]:
    return iter(data.dataset.with_format(None).remove_columns("image"))


def _same_names(splits: Splits) -> list[str]:
    """The names of the classes, which are those of all splits."""
    (names,) = {tuple(data.label_names) for data, _ in splits.values()}
    return list(names)


def _image_ids(data: DetectionData) -> list[Id] | None:
    """The ids of the images in their files; `None` where those are the names of image files."""
    own = [data.own_image_id(image_id) for image_id in data.dataset.with_format(None)["image_id"]]
    named = any(isinstance(one, str) and PurePosixPath(one).suffix.lower() in PICTURE_SUFFIXES for one in own)
    return None if named else own


def _ordinary_boxes(row: dict[str, Any], lost: Counter) -> tuple[np.ndarray, list[int]]:
    """The boxes (N, 4) of the objects of an image that are no crowds, and their places (N,)."""
    objects = row["objects"]
    kept = [place for place, crowd in enumerate(objects["iscrowd"]) if not crowd]
    lost["crowds"] += len(objects["iscrowd"]) - len(kept)
    boxes = np.array([objects["bbox"][place] for place in kept], dtype=np.float64).reshape(-1, 4)
    areas = np.array([objects["area"][place] for place in kept], dtype=np.float64)
    lost["areas"] += int((areas != boxes[:, 2] * boxes[:, 3]).sum())
    return boxes, kept


def _count_ids(data: DetectionData, lost: Counter) -> None:
    """Count the ids that only COCO's files have, where they say something."""
    own = _image_ids(data)
    lost["image_ids"] += 0 if own is None or own == list(range(len(own))) else len(own)
    numbered = data.category_ids == list(range(len(data.category_ids)))
    lost["category_ids"] = max(lost["category_ids"], 0 if numbered else len(data.category_ids))
    ids = [own for row in data.dataset.with_format(None).select_columns("objects") for own in row["objects"]["id"]]
    lost["annotation_ids"] += 0 if ids == list(range(1, len(ids) + 1)) else len(ids)


def _add(parent: ElementTree.Element, **values: Any) -> None:
    for tag, value in values.items():
        ElementTree.SubElement(parent, tag).text = str(value)


def _positional(value: float) -> str:
    """A number to its last digit, without an exponent."""
    return np.format_float_positional(value, trim="0")


def _plain(value: Decimal) -> str:
    """A decimal number without an exponent, a whole one without a point."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
