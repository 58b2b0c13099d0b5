# SPDX-License-Identifier: Apache-2.0
"""The quick part of the doctor, without a look at pixels: a training runs it first, and goes on."""

from collections.abc import Mapping

from .findings import Finding
from .objects import ObjectTable, TrainedSize, check_evaluation_objects, check_training_objects
from .splits import check_splits


def quick_check(
    tables: Mapping[str, ObjectTable],
    train: str,
    evaluation: str,
    trained: TrainedSize,
    max_detections: int | None = None,
) -> list[Finding]:
    """What annotations and names of files say.

    Args:
        tables: The splits, by name.
        train: The one to train on.
        evaluation: The one to evaluate on.
        trained: What images become, and what the model makes of them.
        max_detections: Detections per image and class that count in an evaluation.
    """
    found: list[Finding] = []
    if train in tables:
        found += check_training_objects(tables[train], trained)
    if evaluation in tables and evaluation != train:
        found += check_evaluation_objects(
            tables[evaluation], num_queries=trained.num_queries, max_detections=max_detections
        )
    return found + check_splits(tables, train, evaluation)
