# SPDX-License-Identifier: Apache-2.0
"""COCO detection scores as an `evaluate.Metric`.

The matching of detections with objects and the precision/recall curves are those of `pycocotools.cocoeval.COCOeval`
(Lin et al., "Microsoft COCO: Common Objects in Context", 2014); this module feeds it and reads its arrays.
"""

import contextlib
import io
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.boxes import xyxy_to_xywh
from ..errors import UserError

COCO_MAX_DETECTIONS = (1, 10, 100)
COCO_SIZE_BOUNDARIES = (32.0, 96.0)  # sides of squares in pixels: small | medium | large
COCO_AREA_BOUNDARIES = (32.0**2, 96.0**2)  # their areas

_PREDICTION = ("image_id", "scores", "labels", "boxes")
_REFERENCE = ("image_id", "labels", "bbox")

_INPUTS = """
    predictions: one dict per image with `image_id` (int), `scores` (n,), `labels` (n,) in [0, K) and
        `boxes` (n, 4), corners (x_min, y_min, x_max, y_max) in pixels. Every detection counts: no score threshold.
    references: one dict per image with `image_id`, `labels` (m,), `bbox` (m, 4) as COCO's (x, y, width, height) in
        pixels and, where known, `area` (m,) in pixels^2 (otherwise the box's) and `iscrowd` (m,) (otherwise false).
"""


class CocoDetectionMetric(evaluate.Metric):
    """The 12 COCO numbers and the AP of every class.

    `compute()` returns

    - `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`: average precision, as a fraction of 1,
    - `ar1`, `ar10`, `ar100`: average recall with that many detections per image and class (named after
      `max_detections`), `ar_small`, `ar_medium`, `ar_large`,
    - `per_class`: `{name: ap}`, `None` for a class without objects in the references.

    A number for which there is no object at all (`ap_small` without small objects) is -1, as in pycocotools. With the
    default options the numbers are those of `COCOeval.summarize()` to the last bit. Images are identified by
    `image_id`, so the order in which they are added does not matter; between equal scores in one image the earlier
    detection comes first.

    Args:
        label_names: name of each label. Without it the labels that occur in the references are named by their number.
        max_detections: ascending numbers of detections per image and class to score. AP is taken at the last one,
            which has to be raised for models with more than 100 queries or images with more than 100 objects.
        area_boundaries: areas in pixels^2 at which objects cease to be small, and medium.
        kwargs: those of `evaluate.Metric`. By default everything stays in memory, so that several processes can each
            evaluate without sharing a cache file.
    """

    def __init__(
        self,
        label_names: Sequence[str] | None = None,
        max_detections: Sequence[int] = COCO_MAX_DETECTIONS,
        area_boundaries: tuple[float, float] = COCO_AREA_BOUNDARIES,
        **kwargs,
    ):
        self.label_names = None if label_names is None else unique_names(label_names)
        self.max_detections = check_max_detections(max_detections)
        self.area_boundaries = check_area_boundaries(area_boundaries)
        if "cache_dir" not in kwargs:
            # evaluate makes its cache directory even if nothing is written to it; home may be read-only.
            self._cache = tempfile.TemporaryDirectory(prefix="coco_metric_", ignore_cleanup_errors=True)
            kwargs["cache_dir"] = self._cache.name
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        floats, integers = _list_of(datasets.Value("float64")), _list_of(datasets.Value("int64"))
        prediction = {"image_id": datasets.Value("int64"), "scores": floats, "labels": integers}
        reference = {"image_id": datasets.Value("int64"), "labels": integers, "bbox": _list_of(floats), "area": floats}
        return evaluate.MetricInfo(
            description="COCO average precision and recall of boxes, by pycocotools.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": prediction | {"boxes": _list_of(floats)},
                    "references": reference | {"iscrowd": _list_of(datasets.Value("bool"))},
                }
            ),
        )

    def add(self, *, prediction: dict, reference: dict):
        """Add one image."""
        super().add(prediction=_complete(prediction, _PREDICTION), reference=_complete(reference, _REFERENCE))

    def add_batch(self, *, predictions: Sequence[dict], references: Sequence[dict]):
        """Add several images."""
        super().add_batch(
            predictions=[_complete(prediction, _PREDICTION) for prediction in predictions],
            references=[_complete(reference, _REFERENCE) for reference in references],
        )

    def _finalize(self):
        if self.writer is None:
            raise UserError("Nothing to score: call `add` or `add_batch` with at least one image before `compute`.")
        super()._finalize()

    def _compute(self, *, predictions: list[dict], references: list[dict]) -> dict:
        _check_image_ids(predictions, references)
        found = sorted({label for record in references for label in record["labels"]})
        names = self.label_names if self.label_names is not None else {label: str(label) for label in found}
        labels = range(len(names)) if self.label_names is not None else found
        used = {label for record in (*references, *predictions) for label in record["labels"]}
        unknown = used - set(labels) if self.label_names is not None else set()
        if unknown:
            raise UserError(f"Labels {_shortened(sorted(unknown))} are outside of the {len(names)} label_names.")

        with contextlib.redirect_stdout(io.StringIO()):
            truth = _make_coco(references, labels, _reference_annotations)
            detections = _make_coco(predictions, labels, _prediction_annotations)
            # Images without references are in both, so that detections there count as wrong.
            evaluation = COCOeval(truth, detections, iouType="bbox")
            small, medium = self.area_boundaries
            everything = evaluation.params.areaRng[0]
            evaluation.params.areaRng = [everything, [0, small], [small, medium], [medium, everything[1]]]
            evaluation.params.maxDets = list(self.max_detections)
            evaluation.evaluate()
            evaluation.accumulate()

        precision = evaluation.eval[
            "precision"
        ]  # (thresholds, recalls, classes, areas, max_detections), -1 = undefined
        recall = evaluation.eval["recall"]  # (thresholds, classes, areas, max_detections)
        thresholds = evaluation.params.iouThrs
        at = {name: precision[np.isclose(thresholds, value)] for name, value in (("ap50", 0.5), ("ap75", 0.75))}
        areas = list(enumerate(("small", "medium", "large"), start=1))
        scores: dict[str, Any] = {"ap": _mean(precision[:, :, :, 0, -1])}
        scores |= {name: _mean(curves[:, :, :, 0, -1]) for name, curves in at.items()}
        scores |= {f"ap_{name}": _mean(precision[:, :, :, index, -1]) for index, name in areas}
        scores |= {f"ar{number}": _mean(recall[:, :, 0, index]) for index, number in enumerate(self.max_detections)}
        scores |= {f"ar_{name}": _mean(recall[:, :, index, -1]) for index, name in areas}
        per_class = [_mean(precision[:, :, index, 0, -1]) for index in range(len(labels))]
        scores["per_class"] = {
            names[label]: None if value < 0 else value for label, value in zip(labels, per_class, strict=True)
        }
        return scores


def check_max_detections(max_detections: Sequence[int]) -> tuple[int, ...]:
    """`max_detections` as a tuple, or a `ValueError` if the numbers are not positive and ascending."""
    numbers = tuple(int(number) for number in max_detections)
    if not numbers or numbers[0] < 1 or any(low >= high for low, high in itertools.pairwise(numbers)):
        raise UserError(f"max_detections must be ascending positive integers such as (1, 10, 100), got {numbers}.")
    return numbers


def check_area_boundaries(area_boundaries: Sequence[float]) -> tuple[float, float]:
    """`area_boundaries` as a tuple, or a `ValueError` if they are not two ascending areas."""
    areas = tuple(float(area) for area in area_boundaries)
    if len(areas) != 2 or not 0 < areas[0] < areas[1] < float("inf"):
        raise UserError(f"area_boundaries must be two ascending areas in pixels^2, got {area_boundaries}.")
    return areas


def areas_of_sizes(size_boundaries: Sequence[float]) -> tuple[float, float]:
    """The `area_boundaries` of squares with these two sides in pixels, e.g. `COCO_SIZE_BOUNDARIES`.

    Raises:
        ValueError: they are not two ascending lengths.
    """
    sides = tuple(float(side) for side in size_boundaries)
    if len(sides) != 2 or not 0 < sides[0] < sides[1] < float("inf"):
        given = " ".join(str(side) for side in size_boundaries)
        raise UserError(f"size_boundaries must be two ascending sides in pixels such as 32 96, got {given}.")
    return check_area_boundaries([side**2 for side in sides])


def unique_names(label_names: Iterable[str]) -> list[str]:
    """The names, those that occur more than once followed by their label, so that each can be a key."""
    names = [str(name) for name in label_names]
    return [name if names.count(name) == 1 else f"{name} ({label})" for label, name in enumerate(names)]


def _list_of(feature):
    # A `List` where datasets has it; before 4.0 a `Sequence` of a plain feature means the same.
    return datasets.List(feature) if hasattr(datasets, "List") else datasets.Sequence(feature)


def _complete(record: dict, required: tuple[str, ...]) -> dict:
    missing = [key for key in required if key not in record]
    if missing:
        raise UserError(f"{', '.join(missing)} missing in a record with {sorted(record)}; needed: {required}.")
    keys = required if required is _PREDICTION else (*required, "area", "iscrowd")
    return {key: record.get(key) for key in keys}


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def _check_image_ids(predictions: list[dict], references: list[dict]) -> None:
    ids = {}
    for role, records in (("predictions", predictions), ("references", references)):
        ids[role] = [record["image_id"] for record in records]
        if len(set(ids[role])) != len(ids[role]):
            twice = sorted({image_id for image_id in ids[role] if ids[role].count(image_id) > 1})
            raise UserError(f"{role} hold some images more than once, image_id {_shortened(twice)}.")
    if set(ids["predictions"]) != set(ids["references"]):
        odd = sorted(set(ids["predictions"]) ^ set(ids["references"]))
        raise UserError(f"Each image needs its predictions and its references, image_id {_shortened(odd)} lack one.")


def _shortened(values: list) -> str:
    return ", ".join(str(value) for value in values[:10]) + (", ..." if len(values) > 10 else "")


def _make_coco(records: list[dict], labels: Iterable[int], annotations_of) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": record["image_id"]} for record in records],
        "categories": [{"id": label} for label in labels],
        "annotations": [annotation for record in records for annotation in annotations_of(record)],
    }
    # Numbered from 1: COCOeval takes a match with annotation 0 for no match.
    for number, annotation in enumerate(coco.dataset["annotations"], start=1):
        annotation["id"] = number
    coco.createIndex()
    return coco


def _reference_annotations(record: dict) -> list[dict]:
    count = len(record["labels"])
    areas = record["area"] if record["area"] is not None else [None] * count
    crowds = record["iscrowd"] if record["iscrowd"] is not None else [False] * count
    return [
        {
            "image_id": record["image_id"],
            "category_id": label,
            "bbox": box,
            "area": box[2] * box[3] if area is None else area,
            "iscrowd": int(bool(crowd)),
        }
        for label, box, area, crowd in zip(record["labels"], record["bbox"], areas, crowds, strict=True)
    ]


def _prediction_annotations(record: dict) -> list[dict]:
    boxes = xyxy_to_xywh(record["boxes"]).tolist()  # in float64, as in a result file
    return [
        {"image_id": record["image_id"], "category_id": label, "bbox": box, "area": box[2] * box[3], "score": score}
        for label, box, score in zip(record["labels"], boxes, record["scores"], strict=True)
    ]
