# SPDX-License-Identifier: Apache-2.0
"""What transformers' own `Trainer` needs to train and score a detector as this package does.

See `examples/transformers_trainer.py`. Its evaluation needs `TRAINING_ARGUMENTS`.
"""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import DetectionCollator, DetectionData, DetectionDataset
from ..data.detections import Detections
from ..errors import UserError
from ..evaluation.evaluator import detections_as_predicted, score_detections
from ..evaluation.options import EvaluationOptions

IMAGE_IDS = "image_ids"
TRAINING_ARGUMENTS: dict[str, Any] = {
    "remove_unused_columns": False,  # a data set's items are no arguments of the model before they are collated
    "eval_do_concat_batches": False,  # batches may have other numbers of queries
    "label_names": [IMAGE_IDS],  # what processes gather of an evaluation: as many numbers in each, unlike objects
    "metric_for_best_model": "ap",
    "greater_is_better": True,
    "max_grad_norm": 0.1,
}
"""Fields of `TrainingArguments` that are not as they are by default."""


class TrainerCollator(DetectionCollator):
    """A [`DetectionCollator`] of batches that `Trainer` gives to a model as they are, and that name their images.

    A batch has `pixel_values`, `pixel_mask`, `labels`, and `image_ids` (B,), which models pass over.
    """

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(items)
        del batch["unreadable"]
        return {**batch, IMAGE_IDS: torch.tensor([item["annotations"]["image_id"] for item in items])}


class TrainerMetrics:
    """A `compute_metrics` for `Trainer`: the COCO numbers that `evaluate_detector` finds, and the AP of each class.

    Args:
        data: What is evaluated on, with the labels of the model.
        image_processor: That of the model.
        options: `max_detections` and `area_boundaries`, see `EvaluationOptions`.
    """

    def __init__(self, data: DetectionData, image_processor: Any, **options: Any):
        self._data = data
        self._image_processor = image_processor
        self._options = EvaluationOptions(**options)
        columns = data.dataset.with_format(None).select_columns(["image_id", "height", "width"])
        self._sizes = {row["image_id"]: (row["height"], row["width"]) for row in columns}

    def __call__(self, results: EvalPrediction) -> dict[str, float]:
        """The numbers by name, as `Trainer` logs them; `ap_of_NAME` is that of a class.

        Raises:
            ValueError: The `Trainer` was not given `TRAINING_ARGUMENTS`.
        """
        if not isinstance(results.predictions, list) or not all(ids.ndim == 1 for ids in results.label_ids):
            raise UserError(
                "TrainerMetrics needs TrainingArguments(**TRAINING_ARGUMENTS, ...) and TrainerCollator, both of "
                "deperceiver_hf.training.transformers_trainer."
            )
        found: dict[int, Detections] = {}
        for (_, logits, boxes, *_), image_ids in zip(results.predictions, results.label_ids, strict=True):
            ids = image_ids.tolist()
            outputs = SimpleNamespace(logits=torch.tensor(logits).float(), pred_boxes=torch.tensor(boxes).float())
            sizes = [self._sizes[image_id] for image_id in ids]
            detected = detections_as_predicted(self._image_processor, outputs, sizes)
            for image_id, columns in zip(ids, detected, strict=True):
                found[image_id] = Detections(
                    image_id, **{name: columns[name].numpy() for name in ("scores", "labels", "boxes")}
                )
        ordered = [found[image_id] for image_id in sorted(found)]
        metrics = score_detections(ordered, self._data, self._options)
        per_class = metrics.pop("per_class")
        return metrics | {f"ap_of_{name}": ap for name, ap in per_class.items() if ap is not None}


class AugmentationEpochs(TrainerCallback):
    """Gives a data set other random augmentations in each epoch; `Trainer` tells the epoch to its sampler only."""

    def __init__(self, dataset: DetectionDataset):
        self._dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run begins in the midst of an epoch, whose number is a fraction then."""
        self._dataset.set_epoch(int((state.epoch or 0) + 1e-6))
