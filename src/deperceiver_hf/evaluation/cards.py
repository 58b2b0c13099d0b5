# SPDX-License-Identifier: Apache-2.0
"""What a model card shows of an evaluation, in its text and in its metadata."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..errors import UserError
from ..jobs import markdown_table, plural
from .coco_metric import COCO_MAX_DETECTIONS
from .report import EvaluationReport

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
        public_name(report.dataset),
        report.split,
        report.num_images,
        report.date,
        counted[-1] if isinstance(counted, list) and counted else COCO_MAX_DETECTIONS[-1],
    )


def card_metadata(
    name: str,
    tags: Sequence[str],
    evaluations: Sequence[Evaluation],
    datasets: Sequence[str] = (),
    origin: Mapping[str, str] | None = None,
) -> ModelCardData:
    """Metadata of a card.

    Args:
        name: Of the model.
        tags: Besides those of all detectors.
        evaluations: What was measured. Without any there is no `model-index`.
        datasets: Ids, on the Hub, of the data that the model is trained on.
        origin: `name` and `license` of the detector that the weights started from, if there was one: its licence is
            the model's.
    """
    license: str | None = "apache-2.0"
    if origin is not None:
        license = None if origin["license"] == "unknown" else origin["license"]
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
        base_model=origin["name"] if origin is not None and is_hub_id(origin["name"]) else None,
        library_name="transformers",
        pipeline_tag="object-detection",
        tags=["object-detection", "vision", *tags],
        datasets=list(datasets) or None,
        model_name=name if evaluations else None,
        eval_results=results or None,
    )


def is_hub_id(source: str) -> bool:
    """Whether a name may be one on the Hub, `owner/name`, and is no path."""
    return source.count("/") == 1 and not source.startswith((".", "~", "/")) and not Path(source).exists()


def public_name(source: str) -> str:
    """The name of a directory without its place on this machine; other names, such as ids on the Hub, as they are."""
    is_path = source.startswith((".", "~", "/")) or source.count("/") > 1 or ("/" in source and Path(source).exists())
    return Path(source).expanduser().resolve().name if is_path else source.rstrip("/")
