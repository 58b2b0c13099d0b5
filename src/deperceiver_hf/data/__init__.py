# SPDX-License-Identifier: Apache-2.0
"""Detection data: loading from COCO directories, `datasets` and synthetic scenes, augmentation, and batches."""

from pathlib import Path

from .coco import find_coco_split, is_coco_directory, load_coco_directory
from .hub import load_hub_data
from .images import decode_rgb
from .loading import DetectionCollator, DetectionDataset, make_eval_dataloader, make_train_dataloader
from .records import DETECTION_FEATURES, DetectionData, LoadingReport, require_same_labels
from .sampling import TrainingBatchSampler, same_size_batches
from .sizes import resized_size
from .synthetic import SyntheticScenes, load_synthetic
from .transforms import AUGMENTATIONS, make_train_transforms

__all__ = [
    "AUGMENTATIONS",
    "DETECTION_FEATURES",
    "DetectionCollator",
    "DetectionData",
    "DetectionDataset",
    "LoadingReport",
    "SyntheticScenes",
    "TrainingBatchSampler",
    "decode_rgb",
    "find_coco_split",
    "is_coco_directory",
    "load_coco_directory",
    "load_detection_data",
    "load_hub_data",
    "load_synthetic",
    "make_eval_dataloader",
    "make_train_dataloader",
    "make_train_transforms",
    "require_same_labels",
    "resized_size",
    "same_size_batches",
]


def load_detection_data(
    dataset: str,
    split: str,
    *,
    strict: bool = False,
    max_samples: int | None = None,
    cache_dir: str | None = None,
    **options,
) -> DetectionData:
    """Load a split of a data set as detection records (`DETECTION_FEATURES`), wherever it comes from.

    Args:
        dataset: `synthetic`; a directory in COCO's layout (see `coco`); a directory that `datasets` reads or wrote, or
            the id of a data set on the Hub (see `hub`).
        split: `train`, `val` (also `validation`) or `test`.
        strict: refuse a data set in which anything is broken, instead of repairing, counting and reporting it.
        max_samples: load the first images only.
        cache_dir: where downloads from the Hub are kept.
        options: of a synthetic data set `num_samples` and the fields of `SyntheticScenes`; of one of `datasets`,
            `bbox_format`.

    Raises:
        FileNotFoundError: data set, split, annotations or images are not there.
        ValueError: the data are not as they should be.
        TypeError: an option that this kind of data set does not have.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    path = Path(dataset).expanduser()
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if dataset == "synthetic":
        data = load_synthetic(split, max_samples=max_samples, **options)
    elif not saved and path.is_dir() and is_coco_directory(path):
        if options:
            raise TypeError(f"A COCO directory has no options {', '.join(options)}; {dataset} is one.")
        data = load_coco_directory(path, split, strict=strict, max_samples=max_samples)
    else:
        source = str(path) if path.is_dir() else dataset
        data = load_hub_data(source, split, strict=strict, max_samples=max_samples, cache_dir=cache_dir, **options)
    if len(data.dataset) == 0:
        raise ValueError(f"{data.report.source} has no images.\n{data.report.summary()}")
    return data
