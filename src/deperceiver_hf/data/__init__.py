# SPDX-License-Identifier: Apache-2.0
"""Detection data: loading from COCO directories, `datasets` and synthetic scenes, augmentation, and batches."""

from .dataset import DetectionCollator, DetectionDataset
from .records import DETECTION_FEATURES, DetectionData, LoadingReport, require_same_labels
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
    "is_synthetic",
    "load_detection_data",
    "make_train_transforms",
    "require_same_labels",
    "same_size_batches",
]
