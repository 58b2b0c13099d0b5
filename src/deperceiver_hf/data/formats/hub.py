# SPDX-License-Identifier: Apache-2.0
"""Detection data from the Hub, from `save_to_disk` directories and from image folders, mapped to the record schema.

What is understood: an image column, and a column of objects, `objects` or of another name, either lists of values
(`{"bbox": [...], "category": [...]}`) or a list of objects (`[{"bbox": ..., "category": ...}]`), with boxes under any
of `BOX_KEYS`, categories under any of `CATEGORY_KEYS`, and optionally `id`, `area` and `iscrowd`; or these as columns
of lists themselves. `image_id`, `width` and `height` are optional columns.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from ...errors import UserError, one_line
from ..annotations import AnnotationList, ImageList, assemble, stated_size
from ..fields import Id, as_id, as_integer, record_ids
from ..images import ImageHeader, OutsideImageError, UnreadableImageError, try_header
from ..records import DETECTION_FEATURES, SPLIT_NAMES, DetectionData, LoadingReport, MissingSplitError, split_aliases
from .annotated_images import INSTEAD_OF_A_SPLIT, Request
from .layouts import EXPECTED, is_of_datasets, is_saved

BOX_KEYS = ("bbox", "bboxes", "boxes", "box", "bounding_box", "bounding_boxes", "bndbox")
CATEGORY_KEYS = (
    *("category", "categories", "category_id", "category_ids", "label", "labels", "class", "class_id"),
    *("classes", "class_ids", "class_label", "class_labels", "class_name", "class_names", "category_name", "name"),
)


def recognise(path: Path) -> str | None:
    """What a directory has that `datasets` reads, in words."""
    if path.is_file() or not is_of_datasets(path):
        return None
    return "written by save_to_disk" if is_saved(path) else "tables"


def splits(path: Path) -> list[str]:
    """The splits that a directory has."""
    there = _load_splits(str(path), None, None)
    return [split for split in SPLIT_NAMES if any(name in there for name in split_aliases(split))]


def load(request: Request) -> DetectionData:
    """A split of a `datasets` data set as detection records.

    Labels are those of a `ClassLabel`; of plain integers, the distinct values of all splits in ascending order, named
    `label_<value>`; of strings, the distinct strings of all splits in alphabetic order. Of a streamed data set, those
    of the rows that were read.

    Raises:
        FileNotFoundError: there is no such data set or split.
        ValueError: `datasets` cannot read it, the columns are not as described, the boxes are in another format, or
            anything is broken and `strict` is set.
    """
    source = request.source if request.path is None else str(request.path)
    if request.images is not None:
        raise UserError(f"{source} has its images in itself: a directory of images is for annotation files.")
    splits = _load_splits(source, request.cache_dir, request.config, request.streaming)
    split_name = next((name for name in split_aliases(request.split) if name in splits), None)
    if split_name is None:
        make = f" {INSTEAD_OF_A_SPLIT}" if request.split in SPLIT_NAMES["val"] else ""
        raise MissingSplitError(
            f"{source} has no split {request.split!r}; its splits are {', '.join(splits)}. Choose one of them.{make}"
        )
    with _as_user_errors(f"{source}, split {split_name}, cannot be read"):
        raw = splits[split_name]
        if request.streaming:
            raw = _first_rows(raw, request)
            splits = {split_name: raw}
        elif request.max_samples is not None:
            raw = raw.select(range(min(request.max_samples, len(raw))))
        columns_of = _find_columns(raw, source)

        report = LoadingReport(f"{source}/{split_name}")
        report.recognised = f"datasets ({columns_of.description}{', streamed' if request.streaming else ''})"
        categories, label_names = _read_categories(splits, columns_of)
        image_key = columns_of.image
        images = raw.select_columns(image_key).rename_columns({} if image_key == "image" else {image_key: "image"})
        images = images.cast_column("image", Image(decode=False))
        bounds = None if request.allow_outside else _bounds(source, request.cache_dir)
        headers = list(_iterate_headers(images, bounds))
        plain = raw.select_columns([name for name in raw.column_names if name != image_key])
        image_ids, own_ids = _read_image_ids(plain, report)
        names = [f"image_id {own_ids.get(image_id, image_id)}" for image_id in image_ids.tolist()]
        found = ImageList(image_ids, headers, _read_sizes(plain, names, report), names, own_ids)
        annotations = _read_annotations(plain, headers, columns_of, categories, report)
        kept, columns = assemble(found, annotations, report, request.box_format)
        records = _beside_images(images, kept, columns)
        report.conclude(request.strict)
    name = Path(source).name or source
    return DetectionData(records, label_names, list(categories), f"{name}-{split_name}", report, own_ids)


def _first_rows(stream: IterableDataset, request: Request) -> Dataset:
    """So many rows of a stream, kept in the cache of `datasets`: training goes through them again and again."""
    if request.max_samples is None:
        raise UserError(
            f"{request.source}: streaming=true reads as many images as are asked for; say how many, by "
            "--max_train_samples and --max_eval_samples (of training) or --max_samples."
        )
    features = stream.features  # of a stream, they may be known from its first row only
    rows = stream.take(request.max_samples)
    if features is None:
        rows = rows._resolve_features()
    if rows.features is not None:
        image_columns = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
        for name in image_columns:
            rows = rows.cast_column(name, Image(decode=False))
    kept = Dataset.from_generator(
        _rows_of, features=rows.features, cache_dir=request.cache_dir, gen_kwargs={"stream": rows}
    )
    for name in image_columns:
        kept = kept.cast_column(name, Image())
    return kept


def _rows_of(stream: IterableDataset) -> Iterator[dict]:
    yield from stream


def _beside_images(images: Dataset, kept: np.ndarray, columns: dict[str, pa.Array]) -> Dataset:
    """The images at the indices `kept` with their columns.

    Rows are left out at the end, so that the column of the images stays as it is and is referenced instead of copied;
    until then those that are left out have empty columns.
    """
    features = DETECTION_FEATURES.copy()
    features.pop("image")
    place = np.full(len(images), -1)
    place[kept] = np.arange(len(kept))
    rows = pa.array(place, mask=place < 0)
    spread = {name: column.take(rows) for name, column in columns.items()}
    records = concatenate_datasets([images, Dataset.from_dict(spread, features=features)], axis=1)
    records = records.cast_column("image", Image())
    return records if len(kept) == len(images) else records.select(kept)


def _load_splits(source: str, cache_dir: str | None, config: str | None, streaming: bool = False) -> dict[str, Any]:
    path = Path(source)
    if is_saved(path):
        if streaming:
            raise UserError(
                f"{source} is on this disk, in the format that is read without copying: leave out streaming."
            )
        with _as_user_errors(f"{source}, which `save_to_disk` wrote, cannot be loaded"):
            loaded = load_from_disk(source)
        return dict(loaded) if isinstance(loaded, DatasetDict) else {str(loaded.split or "train"): loaded}
    if "://" in source:
        raise UserError(f"{source} is an address. Download what is there, and give the directory. {EXPECTED}")
    if not path.is_dir() and (path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1):
        raise FileNotFoundError(f"There is no directory {source}. {EXPECTED}")
    try:
        with _as_user_errors(f"{source!r} could not be loaded"):
            return dict(load_dataset(source, config, cache_dir=cache_dir, streaming=streaming))
    except OSError as error:  # not found, no connection
        missing = "" if path.exists() else f"There is no directory {source}, and as a data set on the Hub "
        raise FileNotFoundError(
            f"{missing}{source!r} could not be loaded: {type(error).__name__}: {one_line(error)} A data set is "
            "'synthetic', a directory in COCO's layout (annotations/instances_SPLIT.json beside the images in "
            "SPLIT/), a directory that `datasets` can load, or the id of a data set on the Hub (which needs a "
            "connection)."
        ) from error


@contextlib.contextmanager
def _as_user_errors(what: str) -> Iterator[None]:
    """Whatever `datasets` and the libraries below it raise, each its own, becomes a `UserError` of one line; errors of
    the system, such as that there is no such file, stay what they are."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        reasons = [error, error.__cause__] if error.__cause__ is not None else [error]
        described = "; ".join(f"{type(reason).__name__}: {one_line(reason)}" for reason in reasons)
        raise UserError(f"{what}: {described} {_advice(described)}") from error


def _advice(message: str) -> str:
    if "Config name is missing" in message or "BuilderConfig" in message:
        return "Choose one by NAME:config=CONFIGURATION."
    if "scripts are no longer supported" in message:
        return f"Convert it to Parquet, by a version of `datasets` that runs the script. {EXPECTED}"
    return EXPECTED


@dataclass(frozen=True)
class _Columns:
    """Where a data set has what is needed.

    Attributes:
        image: column of the images.
        objects: column of the objects; `None` where their boxes and categories are columns themselves.
        box: field of an object, or column, that holds the box.
        category: that holds the category.
    """

    image: str
    objects: str | None
    box: str
    category: str

    @property
    def description(self) -> str:
        """The columns in words."""
        where = f"column {self.objects}" if self.objects else "columns"
        return f"{where} with {self.box} and {self.category}"

    def fields(self, dataset: Dataset) -> dict:
        """The features of one object."""
        return _object_fields(dataset.features[self.objects]) if self.objects else _column_fields(dataset)

    def iterate(self, dataset: Dataset) -> Iterator[list[dict]]:
        """The objects of each image one by one, the category under `category`."""
        if self.objects is not None:
            for entry in _iterate_column(dataset, self.objects):
                yield _as_object_list(entry, self.category)
            return
        names = [name for name in (self.box, self.category, "area", "iscrowd") if name in dataset.column_names]
        for batch in dataset.select_columns(names).with_format(None).iter(batch_size=1000):
            for row in zip(*(batch[name] for name in names), strict=True):
                yield _as_object_list(dict(zip(names, row, strict=True)), self.category)


def _find_columns(dataset: Dataset, source: str) -> _Columns:
    """The image column, and where boxes and categories are."""
    described = ", ".join(f"{name}: {feature}" for name, feature in dataset.features.items())
    wanted = (
        "An image column and `objects` with `bbox` and a category are needed: rename or map the columns; or give a "
        "directory in COCO's layout (annotations/instances_SPLIT.json beside the images)."
    )
    image_key = next((name for name, feature in dataset.features.items() if isinstance(feature, Image)), None)
    if image_key is None:
        raise UserError(f"{source} has no column of images. Columns found: {described}. {wanted}")
    others = [name for name in dataset.features if name != image_key]
    for name in sorted(others, key=lambda name: name != "objects"):  # of several, that of the usual name
        box_key, category_key = _box_and_category(_object_fields(dataset.features[name]))
        if box_key is not None and category_key is not None:
            return _Columns(image_key, name, box_key, category_key)
    if "objects" in others:
        fields = _object_fields(dataset.features["objects"])
        box_key, _ = _box_and_category(fields)
        missing = f"boxes (any of {BOX_KEYS})" if box_key is None else f"categories (any of {CATEGORY_KEYS})"
        raise UserError(f"`objects` of {source} has no {missing}; it has {', '.join(fields) or 'no fields'}. {wanted}")
    box_key, category_key = _box_and_category(_column_fields(dataset))
    if box_key is not None and category_key is not None:
        return _Columns(image_key, None, box_key, category_key)
    raise UserError(
        f"{source} has no column `objects`. Columns found: {described}; none has both boxes and categories. {wanted}"
    )


def _box_and_category(fields: dict) -> tuple[str | None, str | None]:
    return (
        next((key for key in BOX_KEYS if key in fields), None),
        next((key for key in CATEGORY_KEYS if key in fields), None),
    )


def _object_fields(feature: Any) -> dict:
    """The features of one object, whether objects are stored as lists of values or as a list of objects."""
    feature = getattr(feature, "feature", feature)  # List(...) or Sequence(...)
    if isinstance(feature, list):
        feature = feature[0]
    fields = feature if isinstance(feature, dict) else {}
    return {key: _innermost(value) if key in CATEGORY_KEYS else value for key, value in fields.items()}


def _column_fields(dataset: Dataset) -> dict:
    """The features of one object where each of its fields is a column of lists."""
    columns = {
        key: value for key, value in dataset.features.items() if isinstance(value, list) or hasattr(value, "feature")
    }
    return {key: _innermost(value) if key in CATEGORY_KEYS else value for key, value in columns.items()}


def _innermost(feature):
    while isinstance(feature, list) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature


def _read_categories(splits: dict[str, Dataset], columns: _Columns) -> tuple[dict, list[str]]:
    """Stored value -> label for all splits together (a class may be absent from one), and the label names."""
    first = next(iter(splits.values()))
    feature = columns.fields(first).get(columns.category) if columns.objects in (None, *first.column_names) else None
    if isinstance(feature, ClassLabel):
        return {index: index for index in range(feature.num_classes)}, list(feature.names)
    values: set[Any] = set()
    for dataset in splits.values():
        if (columns.objects or columns.category) in dataset.column_names:
            for objects in columns.iterate(dataset):
                values.update(_category(one) for one in objects)
    values.discard(None)
    if any(isinstance(value, str) for value in values):
        ordered = sorted(map(str, values))
        return {value: label for label, value in enumerate(ordered)}, ordered
    ordered = sorted(values)
    return {value: label for label, value in enumerate(ordered)}, [f"label_{value}" for value in ordered]


def _category(entry: dict) -> int | str | None:
    value = entry["category"]
    if isinstance(value, str):
        return value if value.strip() else None
    return as_integer(value)


def _iterate_column(dataset: Dataset, column: str) -> Iterator:
    for batch in dataset.select_columns(column).with_format(None).iter(batch_size=1000):
        yield from batch[column]


def _as_object_list(entry, category_key: str) -> list[dict]:
    """Objects of an image one by one, the category under `category`, from either way of storing them."""
    if not entry:
        return []
    if isinstance(entry, dict):
        columns = {key: value for key, value in entry.items() if isinstance(value, list)}
        count = max((len(value) for value in columns.values()), default=0)
        # A list that is too short gives objects without that value, which are then counted as broken.
        entry = [{key: v[i] if i < len(v) else None for key, v in columns.items()} for i in range(count)]
    return [{**one, "category": one.get(category_key)} for one in entry if isinstance(one, dict)]


def _read_annotations(
    plain: Dataset,
    headers: list[ImageHeader | UnreadableImageError],
    columns: _Columns,
    categories: dict,
    report: LoadingReport,
) -> AnnotationList:
    """The objects of all images that have a header."""
    result = AnnotationList()
    for row, (header, objects) in enumerate(zip(headers, columns.iterate(plain), strict=True)):
        for one in objects if isinstance(header, ImageHeader) else ():
            label = categories.get(_category(one))
            box = one.get(columns.box)
            if box is None:
                report.add("invalid_annotation", f"row {row}: {one}"[:200])
                continue
            if label is None:
                report.add("unknown_category", f"row {row}, category {one['category']!r}")
                continue
            result.append(row, label, box, one.get("area"), one.get("iscrowd"), one.get("id"))
    return result


def _iterate_headers(images: Dataset, bounds: list[str] | None) -> Iterator[ImageHeader | UnreadableImageError]:
    """Headers of all images; of images stored in the data set, only the pages that hold the header are read.

    Args:
        images: With the column `image`, not decoded.
        bounds: Directories below which files have to be; `None` for anywhere.
    """
    for batch in images.with_format("arrow").iter(batch_size=1000):
        column = batch["image"].combine_chunks()
        for scalar in column:
            content, path = scalar["bytes"], scalar["path"].as_py() if scalar.is_valid else None
            if scalar.is_valid and content.is_valid:
                yield try_header(pa.BufferReader(content.as_buffer()))
            elif not path:
                yield UnreadableImageError("there is neither a file nor its content")
            elif bounds is not None and not os.path.abspath(path).startswith(tuple(bounds)):
                yield OutsideImageError(path)
            else:
                yield try_header(path)


def _bounds(source: str, cache_dir: str | None) -> list[str]:
    """Where the files of a data set may be: below its directory, or where downloads and unpacked archives are kept."""
    caches = [
        *(datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH),
        *(datasets.config.EXTRACTED_DATASETS_PATH, huggingface_hub.constants.HF_HUB_CACHE),
    ]
    places = [*caches, *filter(None, [cache_dir]), *([source] if os.path.isdir(source) else [])]
    return [os.path.join(os.path.abspath(place), "") for place in places]


def _read_image_ids(plain: Dataset, report: LoadingReport) -> tuple[np.ndarray, dict[int, Id]]:
    """Integer ids of the images, and the stored ids where they are something else; see `record_ids`."""
    rows = np.arange(len(plain), dtype=np.int64)
    if "image_id" not in plain.column_names:
        return rows, {}
    stored = list(_iterate_column(plain, "image_id"))
    own = [value for value in map(as_id, stored) if value is not None]
    times = Counter(own)
    if odd := [value for value in stored if as_id(value) is None or times[value] > 1]:
        report.add("renumbered_images", f"image_id {odd[0]!r}")
        return rows, {}
    return record_ids(own)


def _read_sizes(plain: Dataset, names: list[str], report: LoadingReport) -> list[tuple[int, int] | None]:
    if not {"width", "height"} <= set(plain.column_names):
        return [None] * len(plain)
    columns = names, _iterate_column(plain, "width"), _iterate_column(plain, "height")
    return [stated_size(width, height, name, report) for name, width, height in zip(*columns, strict=True)]
