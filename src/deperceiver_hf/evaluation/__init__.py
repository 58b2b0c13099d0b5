# SPDX-License-Identifier: Apache-2.0
"""How good a detector is: the COCO numbers of any object detection model of transformers."""

from ..data.classes import align_labels
from .coco_metric import CocoDetectionMetric
from .evaluator import EvaluationResult, InterruptedEvaluationError, evaluate_detector
from .report import EvaluationReport

__all__ = [
    "CocoDetectionMetric",
    "EvaluationReport",
    "EvaluationResult",
    "InterruptedEvaluationError",
    "align_labels",
    "evaluate_detector",
]
