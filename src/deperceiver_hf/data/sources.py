# SPDX-License-Identifier: Apache-2.0
"""The way from a name to detection data: COCO directories, `datasets` and the Hub, synthetic scenes."""

import os
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import UserError
from ..output_files import expand_home
from .boxes import BOX_FORMATS, BoxFormat
from .coco import load_coco_directory
from .hub import load_hub_data
from .layouts import data_directory, describe_directory, describe_file, is_coco_directory
from .records import DetectionData, is_main_process
from .synthetic.scenes import is_synthetic, load_synthetic

logger = logging.get_logger(__name__)


def load_detection_data(
    dataset: str | os.PathLike,
    split: str,
    *,
    strict: bool = False,
    max_samples: int | None = None,
    cache_dir: str | None = None,
    bbox_format: str | None = None,
    allow_outside: bool = False,
    config: str | None = None,
    **options,
) -> DetectionData:
    """Load a split of a data set as detection records (`DETECTION_FEATURES`), wherever it comes from.

    Args:
        dataset: a directory in COCO's layout, or an annotation file of one (see `coco`); a directory that `datasets`
            reads or wrote, or the id of a data set on the Hub (see `hub`); or `synthetic`, where integer options may
            follow, e.g. `synthetic:image_size=128,min_objects=2,max_objects=6,num_samples=500,seed=3` (see
            `synthetic.scenes`); with `context=1` something far away decides the class of some objects (see
            `synthetic.context`). Behind the others, options may follow too, `NAME:bbox_format=xyxy,strict=true`; they
            are `bbox_format`, `strict`, `outside` (which is `allow_outside`) and `config`.
        split: `train`, `val` (also `validation`) or `test`.
        strict: refuse a data set in which anything is broken, instead of repairing, counting and reporting it.
        max_samples: load the first images only.
        cache_dir: where downloads from the Hub are kept.
        bbox_format: how boxes are written, one of `boxes.BOX_FORMATS`, e.g. `xyxy` or `cxcywh_relative`. By default
            `xywh`; boxes that are plainly something else are refused then, see `plausibility`.
        allow_outside: read images whose names in the annotations lead out of the data directory. By default they are
            left out: whoever wrote the annotations would decide which files of this machine are opened.
        config: which of several configurations of a data set of `datasets`.
        options: of a synthetic data set `num_samples` (of the split) and the fields of `SyntheticScenes`.

    Raises:
        FileNotFoundError: data set, split, annotations or images are not there.
        ValueError: the data are not as they should be, or the options in a synthetic data set's name are not.
        TypeError: an option of synthetic scenes that there is not.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"max_samples must be at least 1, got {max_samples}")
    dataset = os.fspath(dataset)
    if is_synthetic(dataset):
        if bbox_format is not None or allow_outside or config is not None:
            raise UserError(f"{dataset} has no files: bbox_format, allow_outside and config are not for it.")
        data = load_synthetic(dataset, split, max_samples=max_samples, **options)
    else:
        if options:
            raise UserError(f"{dataset} has no options {', '.join(options)}; they are for synthetic scenes.")
        dataset, named = _split_options(dataset)
        given = {"bbox_format": bbox_format} if bbox_format is not None else {}
        if given and named.get("bbox_format", bbox_format) != bbox_format:
            raise UserError(
                f"{dataset} is given bbox_format {named['bbox_format']} and {bbox_format}; give one of them."
            )
        reading = (
            {"strict": strict, "allow_outside": allow_outside, "config": config, "bbox_format": None} | named | given
        )
        if reading["bbox_format"] is not None:
            BoxFormat.parse(reading["bbox_format"])
        data = _load(dataset, split, max_samples, cache_dir, **reading)
    if len(data.dataset) == 0:
        raise UserError(f"{data.report.source} has no images. {data.report.sentence()}".strip())
    return data


def _load(
    dataset: str, split: str, max_samples: int | None, cache_dir: str | None, *, config: str | None, **reading: Any
) -> DetectionData:
    """Load whatever is no synthetic data set, by what it holds."""
    path = Path(expand_home(dataset))
    if path.is_file() and (problem := describe_file(path)):
        raise UserError(problem)
    if path.is_dir() and (root := data_directory(path)) != path:
        if is_main_process():
            logger.warning_once(f"{path} holds one directory; the data set in it, {root}, is loaded.")
        path = root
    if path.is_file() or (path.is_dir() and is_coco_directory(path)):
        if config is not None:
            raise UserError(
                f"{dataset} is in COCO's layout, which has no configurations: config={config} is not for it."
            )
        return load_coco_directory(path, split, max_samples=max_samples, **reading)
    if path.is_dir() and (problem := describe_directory(path)):
        raise FileNotFoundError(problem)
    source = str(path) if path.is_dir() else dataset
    return load_hub_data(source, split, max_samples=max_samples, cache_dir=cache_dir, config=config, **reading)


def _split_options(dataset: str) -> tuple[str, dict[str, Any]]:
    """A name and the options behind it, `NAME:bbox_format=xyxy,strict=true`; a colon before none is the name's."""
    name, colon, listed = dataset.rpartition(":")
    if not colon or "=" not in listed or os.path.exists(os.path.expanduser(dataset)):
        return dataset, {}
    options: dict[str, Any] = {}
    for option in listed.split(","):
        key, _, value = option.partition("=")
        if key == "bbox_format" and value in BOX_FORMATS:
            options[key] = value
        elif key in ("strict", "outside") and value in ("true", "false"):
            options["allow_outside" if key == "outside" else key] = value == "true"
        elif key == "config" and value:
            options[key] = value
        else:
            raise UserError(
                f"{dataset!r}: {option!r} is no option of a data set; there are bbox_format={'|'.join(BOX_FORMATS)}, "
                "strict=true|false, outside=true|false and config=NAME, separated by commas."
            )
    return name, options
