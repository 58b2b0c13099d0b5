# SPDX-License-Identifier: Apache-2.0
"""The evaluation of a saved model as a command does it: check everything, run, write the result files."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from ..data import DetectionData, load_detection_data
from ..machine import choose_precision, make_accelerator, versions
from ..output_files import require_writable_file, write_json
from ..saved_models import load_detector, require_model_source
from .coco_metric import COCO_MAX_DETECTIONS, COCO_SIZE_BOUNDARIES, areas_of_sizes, check_max_detections
from .evaluator import EvaluationResult, align_labels, evaluate_detector

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EvaluationJob:
    """A saved model, data and result files, all checked: what `prepare_evaluation` returns and `run` carries out."""

    model: nn.Module
    image_processor: Any
    data: DetectionData
    accelerator: Accelerator
    output: Path
    predictions: Path
    description: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> EvaluationResult:
        """Evaluate, and write the results on the main process."""
        result = evaluate_detector(
            self.model, self.image_processor, self.data, accelerator=self.accelerator, **self.options
        )
        if self.accelerator.is_main_process:
            write_json(self.predictions, result.predictions)
            report = {
                "metrics": result.metrics,
                "per_class": result.per_class,
                **self.description,
                "num_images": result.num_images,
                "predictions": str(self.predictions),
                "settings": {
                    **self.options,
                    "num_processes": self.accelerator.num_processes,
                    "device": str(self.accelerator.device.type),
                    "image_size": dict(getattr(self.image_processor, "size", None) or {}),
                },
                "versions": versions(),
                "seconds": round(result.seconds, 2),
                "date": time.strftime("%Y-%m-%d"),
            }
            write_json(self.output, report)
        return result


def prepare_evaluation(
    model: str,
    dataset: str,
    *,
    output: str,
    split: str = "val",
    predictions: str | None = None,
    max_samples: int | None = None,
    device: str = "auto",
    mixed_precision: str = "auto",
    size_boundaries: Sequence[float] = COCO_SIZE_BOUNDARIES,
    **options,
) -> EvaluationJob:
    """Check everything that an evaluation needs before it starts.

    Args:
        model: directory of a saved model, or a Hub id.
        dataset: whatever `load_detection_data` takes.
        output: JSON file for metrics, classes, settings and versions.
        split: split of the data set.
        predictions: JSON file for the detections in COCO's result format; by default `<output>_predictions.json`.
        max_samples: evaluate the first images only.
        device: see `find_device`.
        mixed_precision: see `choose_precision`; the options are those of `evaluate_detector`.
        size_boundaries: sides of squares, in pixels of the data, whose areas part small, medium and large objects.

    Raises:
        OSError: something is not there or cannot be written.
        ValueError: something does not fit.
    """
    require_model_source(model)
    output_file = require_writable_file(output)
    predictions_file = require_writable_file(
        predictions or output_file.with_name(f"{output_file.stem}_predictions.json")
    )
    if output_file.resolve() == predictions_file.resolve():
        raise ValueError(f"{output} cannot hold both the metrics and the predictions; give two names.")
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if options.get(name, least) < least:
            raise ValueError(f"{name} must be at least {least}, got {options[name]}.")
    check_max_detections(options.get("max_detections", COCO_MAX_DETECTIONS))
    area_boundaries = areas_of_sizes(size_boundaries)
    accelerator = make_accelerator(device)
    precision = choose_precision(mixed_precision, accelerator.device)
    if accelerator.is_main_process:
        logger.warning(f"Precision {precision.name}: {precision.reason}.")
    detector, image_processor = load_detector(model)
    data = load_detection_data(dataset, split, max_samples=max_samples)
    align_labels(detector.config.id2label, data.label_names)
    return EvaluationJob(
        model=detector,
        image_processor=image_processor,
        data=data,
        accelerator=accelerator,
        output=output_file,
        predictions=predictions_file,
        description={"model": str(model), "dataset": dataset, "split": split},
        options={"mixed_precision": precision.name, "area_boundaries": area_boundaries, **options},
    )
