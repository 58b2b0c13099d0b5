# SPDX-License-Identifier: Apache-2.0
"""Detection data in a directory of COCO's layout: image directories beside JSON files of instance annotations.

Recognised for a split `S` (and its aliases, `val` = `validation` = `valid`):

- `annotations/instances_S2017.json` with the images in `S2017/` (COCO),
- `annotations/instances_S.json` with the images in `S/`,
- `S/_annotations.coco.json` beside its images (Roboflow's export).

Images may also lie in `images/S2017/` or `images/S/`, or be named relative to the directory. Files are referenced by
path. Nothing is cached: a changed annotation file or image is seen at the next loading.
"""

import json
import os
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..errors import UserError
from .annotations import AnnotationList, ImageList, as_integer, assemble, image_path_column
from .images import read_headers
from .records import DETECTION_FEATURES, DetectionData, LoadingReport, split_aliases

ROBOFLOW_FILE = "_annotations.coco.json"


def is_coco_directory(root: Path) -> bool:
    """Whether a directory has an `annotations` directory, or a split in Roboflow's layout."""
    return (root / "annotations").is_dir() or any(root.glob(f"*/{ROBOFLOW_FILE}"))


def load_coco_directory(
    root: Path, split: str, *, strict: bool = False, max_samples: int | None = None
) -> DetectionData:
    """Load a split of a directory in COCO's layout.

    Labels are the categories in ascending order of their ids. Images without annotations are kept, crowds are kept and
    marked. What is broken is left out or repaired, counted in the report and logged once.

    Args:
        root: the directory.
        split: `train`, `val`, `test` or the name used in the file names.
        strict: refuse a data set in which anything is broken.
        max_samples: load the first images only.

    Raises:
        FileNotFoundError: directory, annotation file, image directory or all of the images are missing.
        ValueError: the annotation file is not COCO JSON, or anything is broken and `strict` is set.
    """
    annotation_file, image_dir = find_coco_split(root, split)
    content = _read_annotation_file(annotation_file)
    report = LoadingReport(f"{root.name}/{split} ({annotation_file})")
    category_ids, label_names = _read_categories(content["categories"], annotation_file, report)

    entries, listed = _read_image_entries(content["images"], report)
    entries = _find_image_files(entries[:max_samples], root, image_dir, report)
    paths = [entry["path"] for entry in entries]
    images = ImageList(
        ids=np.array([entry["id"] for entry in entries], dtype=np.int64),
        headers=read_headers(paths),
        stated_sizes=[entry["size"] for entry in entries],
        names=paths,
    )
    annotations = _read_annotations(content["annotations"], images.ids, listed, category_ids, report)
    kept, columns = assemble(images, annotations, report)
    column = image_path_column([paths[row] for row in kept])
    dataset = Dataset.from_dict({"image": column, **columns}, features=DETECTION_FEATURES)
    report.conclude(strict)
    return DetectionData(dataset, label_names, category_ids, f"{root.name}-{split}", report)


def find_coco_split(root: Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the image directory of a split.

    Raises:
        FileNotFoundError: one of them is missing; the message says what was looked for and what is there.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no directory {root}. Give the directory that holds `annotations/`.")
    tried = []
    for name in split_aliases(split):
        for annotation_file, image_dir_names in (
            (root / "annotations" / f"instances_{name}2017.json", (f"{name}2017", name)),
            (root / "annotations" / f"instances_{name}.json", (name, f"{name}2017")),
            (root / name / ROBOFLOW_FILE, (name,)),
        ):
            tried.append(str(annotation_file.relative_to(root)))
            if not annotation_file.is_file():
                continue
            candidates = [directory for n in image_dir_names for directory in (root / n, root / "images" / n)]
            for directory in (*candidates, root / "images"):
                if directory.is_dir():
                    return annotation_file, directory
            raise FileNotFoundError(
                f"{annotation_file} is there, but none of the image directories "
                f"{', '.join(str(c.relative_to(root)) for c in candidates)} is in {root}. Found: {_listing(root)}. "
                "Put the images in one of these, or link to them."
            )
    found = [str(path.relative_to(root)) for path in (*root.glob("annotations/*"), *root.glob(f"*/{ROBOFLOW_FILE}"))]
    raise FileNotFoundError(
        f"No annotations of split {split!r} in {root}. Looked for {', '.join(tried)}; annotation files found: "
        f"{', '.join(sorted(found)) or 'none'}; in the directory: {_listing(root)}. Choose a split that is there or "
        "rename the files."
    )


def _listing(root: Path, limit: int = 12) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    return ", ".join(names[:limit]) + (f", ... ({len(names)} entries)" if len(names) > limit else "") or "nothing"


def _read_annotation_file(path: Path) -> dict:
    def without_segmentation(value: dict) -> dict:
        value.pop("segmentation", None)  # most of the file; dropped while parsing, so that it never piles up
        return value

    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=without_segmentation)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno} "
            f"(character {error.pos}). Perhaps its download was cut off."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must hold a JSON object with images, annotations and categories, not a {type(content)}."
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise UserError(
                f"{path} has no list {key!r}, which COCO instance annotations have. Its keys: {', '.join(content)}."
            )
    return content


def _read_categories(categories: list, annotation_file: Path, report: LoadingReport) -> tuple[list[int], list[str]]:
    names: dict[int, str] = {}
    for category in categories:
        category_id = as_integer(category.get("id")) if isinstance(category, dict) else None
        if category_id is None:
            raise UserError(f"{annotation_file}: the category {category!r} has no integer id.")
        name = str(category.get("name") or f"category_{category_id}")
        if names.setdefault(category_id, name) != name:
            raise UserError(
                f"{annotation_file}: category id {category_id} is given twice, as {names[category_id]!r} and {name!r}."
            )
    if not names:
        raise UserError(f"{annotation_file} lists no categories.")
    category_ids = sorted(names)
    label_names = [names[category_id] for category_id in category_ids]
    shared = {name for name in label_names if label_names.count(name) > 1}
    for label, name in enumerate(label_names):
        if name in shared:
            label_names[label] = f"{name} ({category_ids[label]})"
            report.add(
                "duplicate_category_name", f"{name!r} of id {category_ids[label]} becomes {label_names[label]!r}"
            )
    return category_ids, label_names


def _read_image_entries(images: list, report: LoadingReport) -> tuple[list[dict], set[int]]:
    """Entries with a distinct id and a file name, and all ids that the file lists."""
    entries, listed = [], set()
    for image in images:
        image_id = as_integer(image.get("id")) if isinstance(image, dict) else None
        file_name = image.get("file_name") if isinstance(image, dict) else None
        if image_id is None or not isinstance(file_name, str) or not file_name:
            report.add("invalid_image_entry", repr(image)[:200])
            continue
        if image_id in listed:
            report.add("duplicate_image_id", f"id {image_id}, file {file_name}")
            continue
        listed.add(image_id)
        width, height = as_integer(image.get("width")), as_integer(image.get("height"))
        size = (width, height) if width and height else None
        entries.append({"id": image_id, "file_name": file_name, "size": size})
    return entries, listed


def _find_image_files(entries: list[dict], root: Path, image_dir: Path, report: LoadingReport) -> list[dict]:
    present = set(os.listdir(image_dir))  # one call instead of one per image
    found = []
    for entry in entries:
        path = os.path.join(image_dir, entry["file_name"])
        if entry["file_name"] not in present and not os.path.isfile(path):
            path = os.path.join(root, entry["file_name"])
            if not os.path.isfile(path):
                report.add("missing_image_file", os.path.join(image_dir, entry["file_name"]))
                continue
        found.append({**entry, "path": os.path.abspath(path)})
    if entries and not found:
        raise FileNotFoundError(
            f"None of the {len(entries)} images that the annotations name is in {image_dir}, e.g. "
            f"{entries[0]['file_name']!r}; found there: {_listing(image_dir, 4)}."
        )
    return found


def _read_annotations(
    annotations: list, image_ids: np.ndarray, listed: set[int], category_ids: list[int], report: LoadingReport
) -> AnnotationList:
    rows = {int(image_id): row for row, image_id in enumerate(image_ids)}
    labels = {category_id: label for label, category_id in enumerate(category_ids)}
    result = AnnotationList()
    for annotation in annotations:
        if not isinstance(annotation, dict) or "bbox" not in annotation:
            report.add("invalid_annotation", repr(annotation)[:200])
            continue
        image_id, category_id = as_integer(annotation.get("image_id")), as_integer(annotation.get("category_id"))
        if image_id not in listed:
            report.add(
                "unknown_image", f"annotation id {annotation.get('id')}, image_id {annotation.get('image_id')!r}"
            )
        elif category_id not in labels:
            described = f"annotation id {annotation.get('id')}, category_id {annotation.get('category_id')!r}"
            report.add("unknown_category", described)
        elif image_id in rows:  # else its image was left out and counted
            result.append(
                image_index=rows[image_id],
                label=labels[category_id],
                bbox=annotation["bbox"],
                area=annotation.get("area"),
                iscrowd=annotation.get("iscrowd"),
                id=annotation.get("id"),
            )
    return result
