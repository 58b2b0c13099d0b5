# SPDX-License-Identifier: Apache-2.0
"""Detection data in a directory of COCO's layout: image directories beside JSON files of instance annotations.

Recognised for a split `S` (and its aliases, `val` = `validation` = `valid`):

- `annotations/instances_S2017.json` with the images in `S2017/` (COCO),
- `annotations/instances_S.json` with the images in `S/`,
- `S/_annotations.coco.json` beside its images (Roboflow's export),
- any other JSON file with COCO's content that has `S` in its name or is in a directory `S`; and if there is only one
  such file and no split in its name (`result.json` of Label Studio), that one as the training split.

Images may also lie in `images/S2017/` or `images/S/`, or be named relative to the directory (see `annotated_files`).
Files are referenced by path. Nothing is cached: a changed annotation file or image is seen at the next loading.
"""

import contextlib
import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..annotations import AnnotationList, stated_size
from ..fields import Id, IdTable, as_id, as_text, category_order
from ..plausibility import check_category_ids
from ..records import SPLIT_NAMES, LoadingReport, MissingSplitError, split_aliases
from .annotated_images import INSTEAD_OF_A_SPLIT, AnnotatedImages, Request, listing_of, shortened, words_of
from .layouts import (
    ANNOTATION_DIRECTORIES,
    EXPECTED,
    ROBOFLOW_FILE,
    annotation_files,
    entries_of,
    image_directories,
    is_json_file,
    is_of_datasets,
)

# Other annotations of the same images, which a split has beside those of its instances.
_OTHER_TASKS = ("caption", "panoptic", "keypoint", "stuff", "image_info", "segm")


@dataclass(frozen=True)
class CocoSplit:
    """Where the annotations of a split are, and the images that they name.

    Attributes:
        root: the data directory, below which the images are.
        annotation_file: JSON in COCO's format.
        image_directories: that are there, in the order in which file names are looked up.
        usual: where the images would be in COCO's layout.
    """

    root: Path
    annotation_file: Path
    image_directories: list[Path]
    usual: list[Path]

    @property
    def name_of_file(self) -> str:
        """The annotation file, relative to the data directory if it is there."""
        within = self.annotation_file.is_relative_to(self.root)
        return str(self.annotation_file.relative_to(self.root) if within else self.annotation_file)


def read(request: Request) -> AnnotatedImages:
    """A split of a directory in COCO's layout, or of an annotation file.

    Labels are the categories in ascending order of their ids. Images without annotations are kept, crowds are kept and
    marked.

    Raises:
        FileNotFoundError: directory, annotation file or image directory are missing.
        ValueError: the annotation file is not COCO JSON.
    """
    assert request.path is not None
    if request.images is not None:
        place = CocoSplit(request.images, request.path, [request.images], [])
    elif request.alone:
        place = _place_of_file(request.path, request.split)
    else:
        place = find_coco_split(request.path, request.split)
    report = LoadingReport(f"{place.root.name}/{request.split} ({place.annotation_file})")
    content = _read_annotation_file(place.annotation_file, report)
    categories = _without_supercategory(content["categories"], content["annotations"])
    left_out = (
        "" if categories is content["categories"] else f", without the group {content['categories'][0]['name']!r}"
    )
    category_ids, label_names = _read_categories(categories, place.annotation_file, report)
    entries = _read_image_entries(content["images"], report)
    own_ids = [entry["id"] for entry in entries]
    return AnnotatedImages(
        report=report,
        root=place.root,
        directories=place.image_directories,
        file_names=[entry["file_name"] for entry in entries],
        label_names=label_names,
        annotations=_read_annotations(content["annotations"], own_ids, category_ids, report),
        category_ids=category_ids,
        ids=own_ids,
        sizes=[entry["size"] for entry in entries],
        usual=place.usual,
        evidence=f"{place.name_of_file}{left_out}",
    )


def recognise(path: Path) -> str | None:
    """What a path has of COCO's format, in words."""
    if path.is_file():
        return path.name if is_json_file(path) else None
    if roboflow := sorted(path.glob(f"*/{ROBOFLOW_FILE}")) or sorted(path.glob(ROBOFLOW_FILE)):
        return shortened([str(file.relative_to(path)) for file in roboflow], 3)
    usual = path / "annotations"
    if usual.is_dir() and (files := [file.name for file in entries_of(usual) if is_json_file(file)]):
        return shortened([f"annotations/{name}" for name in sorted(files)], 3)
    if is_of_datasets(path):
        return None
    return shortened([str(file.relative_to(path)) for file in annotation_files(path)], 3) or None


def splits(path: Path) -> list[str]:
    """The splits that a path has."""
    found = []
    for split in SPLIT_NAMES:
        with contextlib.suppress(FileNotFoundError):
            place = find_coco_split(path, split)
            if path.is_dir() or place.annotation_file == path:
                found.append(split)
    return found


def find_coco_split(path: Path, split: str) -> CocoSplit:
    """The annotation file and the image directories of a split.

    Args:
        path: the data directory, or an annotation file of it.
        split: name of the split.

    Raises:
        FileNotFoundError: one of them is missing; the message says what was looked for and what is there.
    """
    if path.is_file():
        return _split_of_file(path, split)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no directory {path}. Give the directory that holds `annotations/`.")
    place, tried = _find_split(path, split)
    if place is not None:
        return place
    found = sorted(str(file.relative_to(path)) for file in {*path.glob("annotations/*"), *annotation_files(path)})
    make = f" {INSTEAD_OF_A_SPLIT}" if split in SPLIT_NAMES["val"] else ""
    raise MissingSplitError(
        f"No annotations of split {split!r} in {path}. Looked for {', '.join(tried)}; annotation files found: "
        f"{shortened(found) or 'none'}; in the directory: {listing_of(path)}. Choose a split that is there or "
        f"rename the files.{make}"
    )


def _find_split(root: Path, split: str) -> tuple[CocoSplit | None, list[str]]:
    """The split, if the directory has it, and where it was looked for."""
    tried = []
    for name in split_aliases(split):
        for annotation_file, image_dir_names in (
            (root / "annotations" / f"instances_{name}2017.json", (f"{name}2017", name)),
            (root / "annotations" / f"instances_{name}.json", (name, f"{name}2017")),
            (root / name / ROBOFLOW_FILE, (name,)),
        ):
            tried.append(str(annotation_file.relative_to(root)))
            if annotation_file.is_file():
                return _with_images(root, annotation_file, image_dir_names, usual_file=True), tried
    others = [file for file in annotation_files(root) if file.name != ROBOFLOW_FILE or file.parent == root]
    named = [file for file in others if _is_of_split(file, root, split)]
    instances = [file for file in named if not any(task in file.name.lower() for task in _OTHER_TASKS)]
    candidates = instances or named
    if not candidates and split in SPLIT_NAMES["train"] and len(others) == 1 and not _splits_of(others[0], root):
        candidates = others
    if len(candidates) > 1:
        raise UserError(
            f"{root} has several annotation files that may be of split {split!r}: "
            f"{', '.join(str(file.relative_to(root)) for file in candidates)}. Rename the right one to "
            f"annotations/instances_{split}.json."
        )
    if not candidates:
        return None, tried
    stem = candidates[0].name.split(".")[0].removeprefix("instances_")
    return _with_images(root, candidates[0], (stem, *split_aliases(split), f"{split}2017")), tried


def _root_of_file(path: Path) -> Path:
    """The data directory that an annotation file belongs to."""
    parent = path.parent
    known = {*ANNOTATION_DIRECTORIES, *(name for names in SPLIT_NAMES.values() for name in names)}
    within = parent.name.lower() in known or path.name == ROBOFLOW_FILE
    return parent.parent if within else parent


def _place_of_file(path: Path, split: str) -> CocoSplit:
    """An annotation file as that of a split."""
    root = _root_of_file(path)
    stem = path.name.split(".")[0].removeprefix("instances_")
    names = (stem, *_splits_of(path, root), *split_aliases(split), f"{split}2017")
    return _with_images(root, path, names)


def _split_of_file(path: Path, split: str) -> CocoSplit:
    """The split of the data set that an annotation file belongs to; the file itself if that is its split."""
    root = _root_of_file(path)
    own_splits = _splits_of(path, root)
    if _is_of_split(path, root, split) or (not own_splits and split in SPLIT_NAMES["train"]):
        return _place_of_file(path, split)
    if own_splits:
        place, _ = _find_split(root, split)
        if place is not None:
            return place
    own = f"split {', '.join(own_splits)}" if own_splits else "one split, which is taken for train"
    make = f" {INSTEAD_OF_A_SPLIT}" if split in SPLIT_NAMES["val"] else ""
    raise MissingSplitError(
        f"{path} has the annotations of {own}; there are none of split {split!r} in {root}. Write them to "
        f"annotations/instances_{split}.json in the directory with the images, or name the split that is there.{make}"
    )


def _splits_of(file: Path, root: Path) -> list[str]:
    """The splits that the name of an annotation file, or of its directory below `root`, speaks of."""
    known = [name for names in SPLIT_NAMES.values() for name in names]
    return [name for name in known if name in words_of(file.relative_to(root))]


def _is_of_split(file: Path, root: Path, split: str) -> bool:
    return any(name.lower() in words_of(file.relative_to(root)) for name in split_aliases(split))


def _with_images(
    root: Path, annotation_file: Path, image_dir_names: Sequence[str], *, usual_file: bool = False
) -> CocoSplit:
    """The split with the directories in which its images may be.

    Args:
        usual_file: The annotation file has its usual name. Images of others are also looked for in a directory of any
            name, if it is the only one that holds images.
    """
    names, parent = dict.fromkeys(image_dir_names), annotation_file.parent
    usual = [directory for name in names for directory in (root / name, root / "images" / name)]
    beside = [] if parent.name.lower() == "annotations" else [parent / "images", parent]
    places = dict.fromkeys([*usual, root / "images", *beside, root, parent])
    directories = [place for place in places if place.is_dir()]
    holding = [] if usual_file else image_directories(root)
    if len(holding) == 1:
        directories = list(dict.fromkeys([*holding, *directories]))
    return CocoSplit(root, annotation_file, directories, usual)


def _read_annotation_file(path: Path, report: LoadingReport) -> dict:
    def as_object(pairs: list[tuple[str, Any]]) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            report.add("repeated_key", f"{twice!r} in {str(value)[:100]}")
        value.pop("segmentation", None)  # most of the file; dropped while parsing, so that it never piles up
        return value

    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        text = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        content = json.loads(text, object_pairs_hook=as_object)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise UserError(f"{path} is empty.") from error
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno} "
            f"(character {error.pos}). Perhaps its download was cut off."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is no COCO JSON: lists or objects are nested too deeply in it.") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is cut off: {error}") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must hold a JSON object with images, annotations and categories; it holds a "
            f"{'list' if isinstance(content, list) else 'single value'}{_of_detections(content)}."
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise UserError(
                f"{path} has no list {key!r}, which COCO instance annotations have{_of_another_kind(content)}. Its "
                f"keys: {', '.join(map(as_text, list(content)[:20]))}. {EXPECTED}"
            )
    annotations = [entry for entry in content["annotations"] if isinstance(entry, dict)]
    if annotations and not any("bbox" in annotation for annotation in annotations):
        raise UserError(
            f"{path} has no boxes in its {len(annotations)} annotations{_of_another_kind(content)}; their keys: "
            f"{', '.join(map(as_text, list(annotations[0])[:20]))}. Give annotations of instances, with a bbox each."
        )
    return content


def _of_detections(content: Any) -> str:
    first = content[0] if isinstance(content, list) and content else None
    detections = isinstance(first, dict) and "score" in first and "bbox" in first
    return " of detections (a result file; annotations are needed)" if detections else ""


def _of_another_kind(content: dict) -> str:
    """What a file holds that is no file of instances, to go on with a sentence; nothing if that cannot be said."""
    if content.get("type") in ("FeatureCollection", "Feature"):
        return "; it is GeoJSON"
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    if isinstance(first, dict) and "bbox" not in first:
        kinds = {"caption": "captions", "segments_info": "panoptic segments", "keypoints": "keypoints alone"}
        return next((f"; it holds {kind}" for key, kind in kinds.items() if key in first), "")
    if "_via_img_metadata" in content or "_via_settings" in content:
        return "; it is a project of the VGG Image Annotator"
    if "shapes" in content:
        return "; it is a file of LabelMe"
    return ""


def _without_supercategory(categories: list, annotations: list) -> list:
    """The categories but for one that Roboflow lists as the first and names all others' supercategory after, and that
    no object has; exports of the same data in other formats do not have it."""
    listed = [category for category in categories if isinstance(category, dict)]
    first = listed[0] if len(listed) > 1 and listed == categories else {}
    if (
        first.get("supercategory") != "none"
        or any(category.get("supercategory") != first.get("name") for category in listed[1:])
        or any(isinstance(one, dict) and one.get("category_id") == first.get("id") for one in annotations)
    ):
        return categories
    return listed[1:]


def _read_categories(categories: list, annotation_file: Path, report: LoadingReport) -> tuple[list[Id], list[str]]:
    names: dict[Id, str] = {}
    for category in categories:
        category_id = as_id(category.get("id")) if isinstance(category, dict) else None
        if category_id is None:
            raise UserError(
                f"{annotation_file}: the category {as_text(category)[:200]} has no integer id and no text for one."
            )
        name = category.get("name")
        name = f"category_{category_id}" if name is None or not str(name).strip() else as_text(name)
        if names.setdefault(category_id, name) != name:
            raise UserError(
                f"{annotation_file}: category id {category_id} is given twice, as {names[category_id]!r} and {name!r}."
            )
    if not names:
        raise UserError(f"{annotation_file} lists no categories.")
    category_ids = sorted(names, key=category_order)
    label_names = [names[category_id] for category_id in category_ids]
    shared = {name for name in label_names if label_names.count(name) > 1}
    for label, name in enumerate(label_names):
        if name in shared:
            label_names[label] = f"{name} ({category_ids[label]})"
            report.add(
                "duplicate_category_name", f"{name!r} of id {category_ids[label]} becomes {label_names[label]!r}"
            )
    return category_ids, label_names


def _read_image_entries(images: list, report: LoadingReport) -> list[dict]:
    """Id, file name and stated size of the images that have a distinct id and a file name."""
    entries: list[dict] = []
    listed: set[Id] = set()
    for image in images:
        image_id = as_id(image.get("id")) if isinstance(image, dict) else None
        file_name = image.get("file_name") if isinstance(image, dict) else None
        if image_id is None or not isinstance(file_name, str) or not file_name:
            report.add("invalid_image_entry", str(image)[:200])
            continue
        if image_id in listed:
            report.add("duplicate_image_id", f"id {image_id}, file {file_name}")
            continue
        listed.add(image_id)
        size = stated_size(image.get("width"), image.get("height"), file_name, report)
        entries.append({"id": image_id, "file_name": file_name, "size": size})
    return entries


def _read_annotations(
    annotations: list, image_ids: list[Id], category_ids: list[Id], report: LoadingReport
) -> AnnotationList:
    """The objects of the listed images.

    Args:
        annotations: As the file lists them.
        image_ids: Of all images that the file lists.
        category_ids: In the order of their labels.
        report: Is told what is left out.
    """
    images, labels = IdTable(image_ids), IdTable(category_ids)
    result = AnnotationList()
    used = (as_id(annotation.get("category_id")) for annotation in annotations if isinstance(annotation, dict))
    check_category_ids((category_id for category_id in used if category_id is not None), category_ids, report)
    for annotation in annotations:
        if not isinstance(annotation, dict) or "bbox" not in annotation:
            report.add("invalid_annotation", str(annotation)[:200])
            continue
        row, label = images.find(annotation.get("image_id")), labels.find(annotation.get("category_id"))
        if row is None:
            report.add(
                "unknown_image", f"annotation id {annotation.get('id')}, image_id {annotation.get('image_id')!r}"
            )
        elif label is None:
            described = f"annotation id {annotation.get('id')}, category_id {annotation.get('category_id')!r}"
            report.add("unknown_category", described)
        else:
            result.append(
                image_index=row,
                label=label,
                bbox=annotation["bbox"],
                area=annotation.get("area"),
                iscrowd=annotation.get("iscrowd"),
                id=annotation.get("id"),
            )
    return result
