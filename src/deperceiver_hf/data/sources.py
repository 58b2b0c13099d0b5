# SPDX-License-Identifier: Apache-2.0
"""The way from a name to detection data: COCO directories, `datasets` and the Hub, synthetic scenes."""

import os
from typing import Any

from ..errors import UserError
from ..output_files import as_path
from .coco import is_coco_directory, load_coco_directory
from .hub import BOX_FORMATS, load_hub_data
from .records import DetectionData
from .synthetic.scenes import is_synthetic, load_synthetic


def load_detection_data(
    dataset: str | os.PathLike,
    split: str,
    *,
    strict: bool = False,
    max_samples: int | None = None,
    cache_dir: str | None = None,
    **options,
) -> DetectionData:
    """Load a split of a data set as detection records (`DETECTION_FEATURES`), wherever it comes from.

    Args:
        dataset: a directory in COCO's layout (see `coco`); a directory that `datasets` reads or wrote, or the id of a
            data set on the Hub (see `hub`); or `synthetic`, where integer options may follow, e.g.
            `synthetic:image_size=128,min_objects=2,max_objects=6,num_samples=500,seed=3` (see `synthetic.scenes`);
            with `context=1` something far away decides the class of some objects (see `synthetic.context`). Of the
            others, `NAME:bbox_format=xyxy` says that boxes of `datasets` are corners, and `NAME:strict=true` refuses
            what is broken.
        split: `train`, `val` (also `validation`) or `test`.
        strict: refuse a data set in which anything is broken, instead of repairing, counting and reporting it.
        max_samples: load the first images only.
        cache_dir: where downloads from the Hub are kept.
        options: of a synthetic data set `num_samples` (of the split) and the fields of `SyntheticScenes`; of one of
            `datasets`, `bbox_format`.

    Raises:
        FileNotFoundError: data set, split, annotations or images are not there.
        ValueError: the data are not as they should be, or the options in a synthetic data set's name are not.
        TypeError: an option of synthetic scenes that there is not.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"max_samples must be at least 1, got {max_samples}")
    dataset = os.fspath(dataset)
    if not is_synthetic(dataset):
        dataset, named = _split_options(dataset)
        strict = named.pop("strict", strict)
        options |= named
    path = as_path(dataset)
    if is_synthetic(dataset):
        data = load_synthetic(dataset, split, max_samples=max_samples, **options)
    elif is_coco_directory(path):
        if options:
            raise UserError(f"A COCO directory has no options {', '.join(options)}; {dataset} is one.")
        data = load_coco_directory(path, split, strict=strict, max_samples=max_samples)
    else:
        source = str(path) if path.is_dir() else dataset
        data = load_hub_data(source, split, strict=strict, max_samples=max_samples, cache_dir=cache_dir, **options)
    if len(data.dataset) == 0:
        raise UserError(f"{data.report.source} has no images.\n{data.report.summary()}")
    return data


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
        elif key == "strict" and value in ("true", "false"):
            options[key] = value == "true"
        else:
            raise UserError(
                f"{dataset!r}: {option!r} is no option of a data set; there are "
                f"bbox_format={'|'.join(BOX_FORMATS)} and strict=true|false, separated by commas."
            )
    return name, options
