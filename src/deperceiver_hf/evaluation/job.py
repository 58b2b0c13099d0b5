# SPDX-License-Identifier: Apache-2.0
"""The evaluation of a saved model as a command does it: check everything, run, write the result files."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from ..data import DetectionData, load_detection_data
from ..data.boxes import BOX_FORMATS
from ..data.classes import align_labels
from ..data.dataset import BAD_IMAGE_POLICIES
from ..data.doctor.objects import ObjectTable, check_evaluation_objects
from ..data.formats import FORMATS
from ..data.images import limit_pixels
from ..data.splitting import find_listed, part_of
from ..errors import UserError
from ..machine import PRECISIONS, choose_precision, make_accelerator, versions
from ..output_files import require_writable_file, write_json
from ..saved_models import add_dial_arguments, load_detector, require_model_source
from .coco_metric import COCO_SIZE_BOUNDARIES, areas_of_sizes
from .evaluator import EvaluationResult, evaluate_detector
from .options import EvaluationOptions
from .report import EvaluationReport

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class WrittenEvaluation(EvaluationResult):
    """What an evaluation found, and the files that it is in.

    Attributes:
        report: The numbers with settings and versions.
        output: JSON file of the report.
        predictions_file: JSON file of the detections.
    """

    report: EvaluationReport
    output: Path
    predictions_file: Path

    def summary(self) -> str:
        """The tables, and where the files are."""
        return f"{super().summary()}\nResults: {self.output}\nDetections: {self.predictions_file}"

    def to_dict(self) -> dict[str, Any]:
        """The content of the report's file."""
        return self.report.to_dict()


@dataclass(frozen=True)
class EvaluationJob:
    """A saved model, data and result files, all checked: what `prepare_evaluation` returns and `run` carries out."""

    model: nn.Module
    image_processor: Any
    data: DetectionData
    accelerator: Accelerator
    output: Path
    predictions: Path
    model_name: str
    dataset: str
    split: str
    options: EvaluationOptions
    dials: dict[str, float] = field(default_factory=dict)  # what was asked of the model, see `load_detector`
    image_list: str | None = None  # that names the images, if not all of the split are evaluated on

    def run(self) -> WrittenEvaluation:
        """Evaluate, and write the results on the main process."""
        result = evaluate_detector(
            self.model, self.image_processor, self.data, accelerator=self.accelerator, **vars(self.options)
        )
        report = self._report(result)
        if self.accelerator.is_main_process:
            write_json(self.predictions, result.predictions)
            report.write(self.output)
        return WrittenEvaluation(**vars(result), report=report, output=self.output, predictions_file=self.predictions)

    def _report(self, result: EvaluationResult) -> EvaluationReport:
        return EvaluationReport(
            metrics=result.metrics,
            per_class=result.per_class,
            model=self.model_name,
            dataset=self.dataset,
            split=self.split,
            num_images=result.num_images,
            predictions=str(self.predictions),
            settings={
                **self.options.settings(),
                **self.dials,
                **({} if self.image_list is None else {"image_list": self.image_list}),
                "num_processes": self.accelerator.num_processes,
                "device": str(self.accelerator.device.type),
                "image_size": dict(getattr(self.image_processor, "size", None) or {}),
            },
            versions=versions(),
            seconds=round(result.seconds, 2),
            date=time.strftime("%Y-%m-%d"),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of the command."""
    parser.description = (
        "Evaluate a saved detector: print the COCO numbers, write them as JSON, and the detections in COCO's result\n"
        "format. Starts plainly, or by `accelerate launch scripts/evaluate.py` or `torchrun`, with the same figures."
    )
    parser.epilog = (
        "example:\n  deperceiver evaluate --model outputs/mine/best --dataset path/to/coco --output outputs/eval.json"
    )
    parser.add_argument(
        "--model", required=True, help="Directory of a saved model with its image processor, or Hub id."
    )
    parser.add_argument(
        "--dataset",
        help="Directory or annotation file of COCO, YOLO (data.yaml), Pascal VOC or a CSV of boxes, Hub id or local "
        "`datasets` directory (also with options: `NAME:config=...,outside=true`), or `synthetic`, also with options: "
        "`synthetic:image_size=128,min_objects=2,max_objects=6,num_samples=500,seed=3`.",
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="Instead of --dataset: the annotation file to evaluate on, or the directory of XML or text files.",
    )
    parser.add_argument("--images", metavar="DIR", help="Directory of the images of --annotations.")
    parser.add_argument("--format", choices=FORMATS, help="Format of the annotations, where the files do not tell.")
    parser.add_argument(
        "--image_list",
        metavar="FILE",
        help="Evaluate on the images that a text file names, one in a line, such as the val_images.txt of a run.",
    )
    parser.add_argument("--split", default="val", help="Split of the data set (%(default)s).")
    parser.add_argument(
        "--box_format",
        choices=BOX_FORMATS,
        metavar="FORMAT",
        help="How the data's files write boxes: xywh (if not given), xyxy, cxcywh, in pixels, or in parts of the "
        "image with _relative (0 to 1), _percent (0 to 100) or _permille (0 to 1000), e.g. xyxy_relative.",
    )
    parser.add_argument("--output", required=True, help="JSON file for the results.")
    parser.add_argument("--predictions", help="JSON file for the detections (OUTPUT with `_predictions`).")
    parser.add_argument("--batch_size", type=int, default=8, help="Images of a process in memory (%(default)s).")
    parser.add_argument("--num_workers", type=int, default=2, help="Loading processes per process (%(default)s).")
    parser.add_argument("--max_samples", type=int, help="Evaluate the first images only.")
    parser.add_argument(
        "--on_bad_image",
        choices=BAD_IMAGE_POLICIES,
        default="skip",
        help="What becomes of images that are missing or cannot be read: they are left out, or the command ends.",
    )
    parser.add_argument(
        "--max_image_pixels", type=int, help="Images of more pixels cannot be read (178956970 if not given)."
    )
    parser.add_argument(
        "--mixed_precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto: what is fast here (%(default)s).",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:1, mps, ... (%(default)s).")
    parser.add_argument(
        "--max_detections",
        type=int,
        nargs="+",
        default=[1, 10, 100],
        help="Detections per image and class to score; AP at the last number (1 10 100). Crowded images need more.",
    )
    add_dial_arguments(parser)
    parser.add_argument(
        "--size_boundaries",
        type=float,
        nargs=2,
        metavar=("SMALL", "MEDIUM"),
        default=[32, 96],
        help="Sides of squares, in pixels of the data, whose areas part small, medium and large objects (32 96).",
    )
    parser.add_argument(
        "--batched_forward",
        action="store_true",
        help="Images of one size go through the model together: faster for small models on a GPU, but the last digits "
        "may then depend on the batch size.",
    )


def prepare(arguments: argparse.Namespace) -> EvaluationJob:
    """[`prepare_evaluation`] with the command's arguments."""
    return prepare_evaluation(**vars(arguments))


def prepare_evaluation(
    model: str,
    dataset: str | None = None,
    *,
    output: str,
    annotations: str | None = None,
    images: str | None = None,
    format: str | None = None,
    image_list: str | None = None,
    split: str = "val",
    predictions: str | None = None,
    box_format: str | None = None,
    max_samples: int | None = None,
    device: str = "auto",
    mixed_precision: str = "auto",
    size_boundaries: Sequence[float] = COCO_SIZE_BOUNDARIES,
    num_queries: int | None = None,
    num_blocks: int | None = None,
    token_share: float | None = None,
    **options,
) -> EvaluationJob:
    """Check everything that an evaluation needs before it starts.

    Args:
        model: directory of a saved model, or a Hub id.
        dataset: whatever `load_detection_data` takes; not with `annotations`.
        output: JSON file for metrics, classes, settings and versions.
        annotations: annotation file of the split, or directory of its annotation files.
        images: directory of their images, if they stand apart.
        format: key of `FORMATS`, where the files do not tell.
        image_list: text file that names the images to evaluate on, see `splitting`.
        split: split of the data set.
        predictions: JSON file for the detections in COCO's result format; by default `<output>_predictions.json`.
        box_format: how the data's files write boxes, one of `BOX_FORMATS`.
        max_samples: evaluate the first images only.
        device: see `find_device`.
        mixed_precision: see `choose_precision`.
        size_boundaries: sides of squares, in pixels of the data, whose areas part small, medium and large objects.
        num_queries, num_blocks, token_share: see `load_detector`.
        options: the others of `EvaluationOptions`.

    Raises:
        OSError: something is not there or cannot be written.
        ValueError: something does not fit.
    """
    if (dataset is None) == (annotations is None):
        raise UserError("give --dataset, or --annotations with the annotation file to evaluate on.")
    if images is not None and annotations is None:
        raise UserError(f"--images {images} is where the images of --annotations are, which is not given.")
    require_model_source(model)
    output_file = require_writable_file(output)
    predictions_file = require_writable_file(
        predictions or output_file.with_name(f"{output_file.stem}_predictions.json")
    )
    if output_file.resolve() == predictions_file.resolve():
        raise UserError(f"{output} cannot hold both the metrics and the predictions; give two names.")
    how = EvaluationOptions(**{"area_boundaries": areas_of_sizes(size_boundaries), **options})
    accelerator = make_accelerator(device)
    precision = choose_precision(mixed_precision, accelerator.device)
    if accelerator.is_main_process:
        logger.warning(f"Precision {precision.name}: {precision.reason}.")
    dials: dict[str, Any] = {"num_queries": num_queries, "num_blocks": num_blocks, "token_share": token_share}
    detector, image_processor = load_detector(model, **dials)
    limit_pixels(how.max_image_pixels)
    source = str(annotations if dataset is None else dataset)
    data = load_detection_data(
        source,
        split,
        images=images,
        alone=annotations is not None,
        format=format,
        max_samples=max_samples if image_list is None else None,
        bbox_format=box_format,
    )
    if image_list is not None:
        data = part_of(data, find_listed(data, image_list)[:max_samples], Path(image_list).name)
    if accelerator.is_main_process:
        queries = getattr(detector.config, "num_queries", None)
        table = ObjectTable.of(data, split)
        for found in check_evaluation_objects(table, num_queries=queries, max_detections=how.max_detections[-1]):
            logger.warning(found.what)
    if how.on_bad_image == "stop":
        data.report.require_images()
    align_labels(detector.config.id2label, data.label_names)
    return EvaluationJob(
        model=detector,
        image_processor=image_processor,
        data=data,
        accelerator=accelerator,
        output=output_file,
        predictions=predictions_file,
        model_name=str(model),
        dataset=source,
        split=split,
        options=replace(how, mixed_precision=precision.name),
        dials={name: value for name, value in dials.items() if value is not None},
        image_list=image_list,
    )
