# SPDX-License-Identifier: Apache-2.0
"""What a model card shows of an evaluation, in its text and in its metadata."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..benchmarks.report import markdown_table
from ..errors import UserError
from ..evaluation.coco_metric import COCO_MAX_DETECTIONS
from ..evaluation.report import EvaluationReport
from .tables import plural

# Key in an evaluation, name in a card.
METRIC_NAMES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}


@dataclass(frozen=True)
class Evaluation:
    """What a card needs of an evaluation.

    Attributes:
        metrics: Average precisions as fractions of 1, by the keys of [`METRIC_NAMES`]; only those that were measured.
        dataset: Name of the data set.
        split: Of the data set.
        num_images: How many images were evaluated.
        date: Day of the evaluation, `None` if unknown.
        max_detections: How many detections of a class in an image count.
    """

    metrics: dict[str, float]
    dataset: str
    split: str
    num_images: int
    date: str | None = None
    max_detections: int = COCO_MAX_DETECTIONS[-1]

    def described(self) -> str:
        """Data set, split, number of images, date, and how many detections count if not as many as in COCO."""
        parts = [self.split, plural(self.num_images, "image"), self.date]
        if self.max_detections != COCO_MAX_DETECTIONS[-1]:
            parts.append(f"{self.max_detections} detections of a class in an image count")
        return f"{self.dataset} ({', '.join(part for part in parts if part)})"

    def table(self) -> str:
        """The metrics in percent."""
        names = [METRIC_NAMES[key] for key in self.metrics]
        return markdown_table(names, [[f"{100 * value:.1f}" for value in self.metrics.values()]], labelled=False)


def read_evaluation(path: str | os.PathLike) -> Evaluation:
    """Read the JSON file that `deperceiver evaluate` writes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a file, or nothing was measured.
    """
    report = EvaluationReport.read(path)
    metrics = {key: float(report.metrics[key]) for key in METRIC_NAMES if report.metrics.get(key, -1) != -1}
    if not metrics:
        raise UserError(f"{path} has none of {', '.join(METRIC_NAMES)}: nothing was measured.")
    counted = (report.settings or {}).get("max_detections")
    return Evaluation(
        metrics,
        _dataset_name(report.dataset),
        report.split,
        report.num_images,
        report.date,
        counted[-1] if isinstance(counted, list) and counted else COCO_MAX_DETECTIONS[-1],
    )


def card_metadata(
    name: str,
    tags: Sequence[str],
    evaluations: Sequence[Evaluation],
    on_coco: bool,
    start_from: Mapping[str, str] | None = None,
) -> ModelCardData:
    """Metadata of a card.

    Args:
        name: Of the model.
        tags: Besides those of all detectors.
        evaluations: What was measured. Without any there is no `model-index`.
        on_coco: The model is trained on COCO.
        start_from: `name` and `license` of the detector that the weights started from, if there was one: its licence
            is the model's.
    """
    license: str | None = "apache-2.0"
    if start_from is not None:
        license = None if start_from["license"] == "unknown" else start_from["license"]
    results = [
        EvalResult(
            task_type="object-detection",
            dataset_type=evaluation.dataset,
            dataset_name=evaluation.dataset,
            dataset_split=evaluation.split,
            metric_type=key,
            metric_name=METRIC_NAMES[key],
            metric_value=round(100 * value, 2),
        )
        for evaluation in evaluations
        for key, value in evaluation.metrics.items()
    ]
    return ModelCardData(
        license=license,
        base_model=start_from["name"] if start_from is not None and "/" in start_from["name"] else None,
        library_name="transformers",
        pipeline_tag="object-detection",
        tags=["object-detection", "vision", *tags],
        datasets=["coco"] if on_coco else None,
        model_name=name if evaluations else None,
        eval_results=results or None,
    )


def _dataset_name(dataset: str) -> str:
    """The name of a directory or, as it is, a Hub id."""
    is_path = dataset.startswith((".", "~", "/")) or dataset.count("/") > 1
    return Path(dataset).expanduser().resolve().name if is_path else dataset.rstrip("/")
