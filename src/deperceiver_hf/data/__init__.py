# SPDX-License-Identifier: Apache-2.0
"""Detection data: loading from COCO directories, `datasets` and synthetic scenes, augmentation, and batches."""

from .classes import align_labels, match_classes, with_labels_of
from .dataset import DetectionCollator, DetectionDataset
from .records import DETECTION_FEATURES, DetectionData, LoadingReport
from .sampling import TrainingBatchSampler, same_size_batches
from .sources import load_detection_data
from .synthetic.scenes import SyntheticScenes, is_synthetic
from .transforms import make_train_transforms

__all__ = [
    "DETECTION_FEATURES",
    "DetectionCollator",
    "DetectionData",
    "DetectionDataset",
    "LoadingReport",
    "SyntheticScenes",
    "TrainingBatchSampler",
    "align_labels",
    "is_synthetic",
    "load_detection_data",
    "make_train_transforms",
    "match_classes",
    "same_size_batches",
    "with_labels_of",
]
