# SPDX-License-Identifier: Apache-2.0
"""The way from a name to detection data: COCO directories, `datasets` and the Hub, synthetic scenes."""

import os
from pathlib import Path

from ..errors import UserError
from .coco import is_coco_directory, load_coco_directory
from .hub import load_hub_data
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
            with `context=1` something far away decides the class of some objects (see `synthetic.context`).
        split: `train`, `val` (also `validation`) or `test`.
        strict: refuse a data set in which anything is broken, instead of repairing, counting and reporting it.
        max_samples: load the first images only.
        cache_dir: where downloads from the Hub are kept.
        options: of a synthetic data set `num_samples` (of the split) and the fields of `SyntheticScenes`; of one of
            `datasets`, `bbox_format`.

    Raises:
        FileNotFoundError: data set, split, annotations or images are not there.
        ValueError: the data are not as they should be, or the options in a synthetic data set's name are not.
        TypeError: an option that this kind of data set does not have.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"max_samples must be at least 1, got {max_samples}")
    dataset = os.fspath(dataset)
    path = Path(dataset).expanduser()
    if is_synthetic(dataset):
        data = load_synthetic(dataset, split, max_samples=max_samples, **options)
    elif is_coco_directory(path):
        if options:
            raise TypeError(f"A COCO directory has no options {', '.join(options)}; {dataset} is one.")
        data = load_coco_directory(path, split, strict=strict, max_samples=max_samples)
    else:
        source = str(path) if path.is_dir() else dataset
        data = load_hub_data(source, split, strict=strict, max_samples=max_samples, cache_dir=cache_dir, **options)
    if len(data.dataset) == 0:
        raise UserError(f"{data.report.source} has no images.\n{data.report.summary()}")
    return data
