# SPDX-License-Identifier: Apache-2.0
"""The way from a name to detection data: files of any format, `datasets` and the Hub, synthetic scenes."""

import os
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import UserError
from ..output_files import expand_home
from .boxes import BOX_FORMATS, BoxFormat
from .formats import FORMATS, Request, choose_format, data_directory
from .records import DetectionData, is_main_process
from .synthetic.scenes import is_synthetic, load_synthetic

logger = logging.get_logger(__name__)


def load_detection_data(
    dataset: str | os.PathLike,
    split: str,
    *,
    images: str | os.PathLike | None = None,
    alone: bool = False,
    format: str | None = None,
    strict: bool = False,
    max_samples: int | None = None,
    cache_dir: str | None = None,
    bbox_format: str | None = None,
    allow_outside: bool = False,
    config: str | None = None,
    streaming: bool = False,
    **options,
) -> DetectionData:
    """Load a split of a data set as detection records (`DETECTION_FEATURES`), wherever it comes from.

    What was recognised is logged in a line.

    Args:
        dataset: a directory or an annotation file in one of the `FORMATS`, or the id of a data set on the Hub; or
            `synthetic`, where integer options may follow, e.g.
            `synthetic:image_size=128,min_objects=2,max_objects=6,num_samples=500,seed=3` (see `synthetic.scenes`);
            with `context=1` something far away decides the class of some objects (see `synthetic.context`). Behind
            the others, options may follow too, `NAME:bbox_format=xyxy,strict=true`; they are `format`, `bbox_format`,
            `strict`, `outside` (which is `allow_outside`), `config` and `streaming`.
        split: `train`, `val` (also `validation`) or `test`.
        images: directory of the images, where they are apart from the annotations, `dataset`, which then are those of
            this split.
        alone: `dataset` is the annotation file of this split, or the directory of its annotation files, whatever their
            names say of splits.
        format: key of `FORMATS`, where the content does not tell.
        strict: refuse a data set in which anything is broken, instead of repairing, counting and reporting it.
        max_samples: load the first images only.
        cache_dir: where downloads from the Hub are kept.
        bbox_format: how boxes are written, one of `boxes.BOX_FORMATS`, e.g. `xyxy` or `cxcywh_relative`. By default
            as usual in the format; boxes that are plainly something else are refused then, see `plausibility`.
        allow_outside: read images whose names in the annotations lead out of the data directory. By default they are
            left out: whoever wrote the annotations would decide which files of this machine are opened.
        config: which of several configurations of a data set of `datasets`.
        streaming: read `max_samples` images of a data set of `datasets` without downloading the others.
        options: of a synthetic data set `num_samples` (of the split) and the fields of `SyntheticScenes`.

    Raises:
        FileNotFoundError: data set, split, annotations or images are not there.
        ValueError: the data are not as they should be, may be of several formats, or the options in a synthetic data
            set's name are not.
        TypeError: an option of synthetic scenes that there is not.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"max_samples must be at least 1, got {max_samples}")
    dataset = os.fspath(dataset)
    reading = {
        "bbox_format": bbox_format,
        "format": format,
        "config": config,
        "strict": strict,
        "allow_outside": allow_outside,
        "streaming": streaming,
        "alone": alone or images is not None,
    }
    if is_synthetic(dataset):
        if given := [name for name, value in reading.items() if value not in (None, False) and name != "strict"]:
            raise UserError(f"{dataset} has no files: {', '.join(given)} is not for it.")
        if images is not None:
            raise UserError(f"{dataset} has no files: images is not for it.")
        data = load_synthetic(dataset, split, max_samples=max_samples, **options)
    else:
        if options:
            raise UserError(f"{dataset} has no options {', '.join(options)}; they are for synthetic scenes.")
        dataset, named = split_options(dataset)
        for name, value in named.items():
            if reading[name] not in (None, False, value):
                raise UserError(f"{dataset} is given {name} {value} and {reading[name]}; give one of them.")
        data = _load(dataset, split, images, max_samples, cache_dir, **reading | named)
    if len(data.dataset) == 0:
        raise UserError(f"{data.report.source} has no images. {data.report.sentence()}".strip())
    return data


def dataset_format(dataset: str | os.PathLike) -> str | None:
    """The format (key of `FORMATS`) of a data set by its name; `None` for synthetic scenes.

    Raises:
        OSError: it is not there, or no data set.
        ValueError: it may be of several formats.
    """
    if is_synthetic(os.fspath(dataset)):
        return None
    name, options = split_options(os.fspath(dataset))
    return options.get("format") or _place_and_format(name, None)[1]


def dataset_splits(dataset: str | os.PathLike) -> list[str]:
    """Which of `train`, `val` and `test` a data set has.

    Raises:
        OSError: it is not there, or no data set.
        ValueError: it may be of several formats.
    """
    if is_synthetic(os.fspath(dataset)):
        return ["train", "val"]
    name, options = split_options(os.fspath(dataset))
    path, format = _place_and_format(name, options.get("format"))
    return FORMATS[format].splits(path if path is not None else Path(name))


def _load(
    dataset: str,
    split: str,
    images: str | os.PathLike | None,
    max_samples: int | None,
    cache_dir: str | None,
    *,
    bbox_format: str | None,
    format: str | None,
    **reading: Any,
) -> DetectionData:
    """Load whatever is no synthetic data set, by what it holds."""
    if bbox_format is not None:
        BoxFormat.parse(bbox_format)
    if format is not None and format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    place_of_images = None if images is None else Path(expand_home(images))
    if place_of_images is not None and not place_of_images.is_dir():
        raise FileNotFoundError(f"There is no directory of images {place_of_images}.")
    path, format = _place_and_format(dataset, format, alone=reading["alone"])
    request = Request(
        path=path,
        source=dataset,
        split=split,
        images=place_of_images,
        max_samples=max_samples,
        cache_dir=cache_dir,
        box_format=bbox_format,
        **reading,
    )
    data = FORMATS[format].load(request)
    if is_main_process():
        report = data.report
        logger.info(
            f"{report.source}: recognised as {report.recognised}: {report.num_images:,} images, "
            f"{report.num_objects:,} objects, {len(data.label_names)} classes."
        )
    return data


def _place_and_format(dataset: str, format: str | None, alone: bool = False) -> tuple[Path | None, str]:
    """Where a data set is, `None` for one on the Hub, and its format."""
    path = Path(expand_home(dataset))
    if not path.exists():
        if format not in (None, "datasets"):
            raise FileNotFoundError(f"There is no directory or file {path}.")
        return None, "datasets"
    if path.is_dir() and not alone and (root := data_directory(path)) != path:
        if is_main_process():
            logger.warning_once(f"{path} holds one directory; the data set in it, {root}, is loaded.")
        path = root
    return path, format or choose_format(path, alone=alone)


def split_options(dataset: str) -> tuple[str, dict[str, Any]]:
    """A name and the options behind it, `NAME:bbox_format=xyxy,strict=true`; a colon before none is the name's."""
    name, colon, listed = dataset.rpartition(":")
    if not colon or "=" not in listed or os.path.exists(os.path.expanduser(dataset)):
        return dataset, {}
    options: dict[str, Any] = {}
    for option in listed.split(","):
        key, _, value = option.partition("=")
        if (key == "bbox_format" and value in BOX_FORMATS) or (key == "format" and value in FORMATS):
            options[key] = value
        elif key in ("strict", "outside", "streaming") and value in ("true", "false"):
            options["allow_outside" if key == "outside" else key] = value == "true"
        elif key == "config" and value:
            options[key] = value
        else:
            raise UserError(
                f"{dataset!r}: {option!r} is no option of a data set; there are bbox_format={'|'.join(BOX_FORMATS)}, "
                f"format={'|'.join(FORMATS)}, strict=true|false, outside=true|false, streaming=true|false and "
                "config=NAME, separated by commas."
            )
    return name, options
