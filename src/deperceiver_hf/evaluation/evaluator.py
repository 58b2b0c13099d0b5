# SPDX-License-Identifier: Apache-2.0
"""COCO evaluation of any object detection model of transformers on detection data.

Every query of every image is scored, without a threshold. The metrics are the same to the last digit for any batch
size, any number of processes and of CPU threads. Matrix and convolution kernels choose their order of summation by
batch size and number of threads, which moves the last bits of scores and boxes and with them, now and then, the rank
of a detection. So each image goes through the model alone, unpadded, and on a CPU in one thread; the threads of the
process work on different images instead, which is no slower.
"""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data import DetectionData, DetectionDataset, same_size_batches
from ..data.classes import align_labels, listing
from ..data.detections import Detections
from ..data.fields import Id
from ..data.images import UnreadableImageError
from ..data.records import is_main_process
from ..data.sampling import iterating, make_loader
from ..errors import UserError
from ..machine import choose_precision, make_accelerator
from .coco_metric import CocoDetectionMetric
from .options import EvaluationOptions

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found; the same on every process.

    Attributes:
        metrics: the COCO numbers by name, see `CocoDetectionMetric`; -1 where there was no object to find.
        per_class: AP of each class by name, `None` for classes without objects.
        predictions: every detection in COCO's result format, `{"image_id", "category_id", "bbox", "score"}`, with the
            data set's own ids of images and categories and boxes as (x, y, width, height) in pixels, ordered by image
            and query.
        num_images: number of images evaluated.
        seconds: wall time.
        left_out: why images that could not be read were left out, with their objects, by the data set's own id.
    """

    metrics: dict[str, float]
    per_class: dict[str, float | None]
    predictions: list[dict]
    num_images: int
    seconds: float
    left_out: dict[Id, str] = field(default_factory=dict)

    def summary(self) -> str:
        """The metrics and the AP per class as a table, in percent; a dash where there was nothing to find."""
        rows = [*self.metrics.items(), ("", None), *self.per_class.items()]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {as_percent(value)}" if name else "AP per class" for name, value in rows]
        left_out = [f"left out: {reason}" for reason in self.left_out.values()]
        return "\n".join([f"{self.num_images} images, {self.seconds:.1f} s", *left_out, *lines])


class InterruptedEvaluationError(RuntimeError):
    """The evaluation was asked to stop before its end."""


def evaluate_detector(
    model: nn.Module,
    image_processor: Any,
    data: DetectionData,
    *,
    accelerator: Accelerator | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> EvaluationResult:
    """Run a detector over a data set and score it as COCO does.

    To be called on every process. The model keeps its mode, and torch its number of threads and random state.

    Args:
        model: any object detection model of transformers; it is moved to the accelerator's device.
        image_processor: its processor. Each image is processed alone, so nothing is padded.
        data: the images with their objects. The classes of model and data are matched by name (`align_labels`).
        accelerator: by default that of `make_accelerator`.
        should_stop: asked now and then; once it says so on any process, all of them end.
        options: `batch_size`, `num_workers`, `mixed_precision`, `max_detections`, `area_boundaries`, `batched_forward`
            and `progress`, see `EvaluationOptions`.

    Raises:
        ValueError: empty data, labels that do not fit or options out of range.
        OSError: an image cannot be read, and `on_bad_image` is `"stop"`.
        FloatingPointError: the model predicts numbers that are not finite.
        InterruptedEvaluationError: `should_stop` said so.
    """
    start = time.perf_counter()
    how = EvaluationOptions(**options)
    if len(data.dataset) == 0:
        raise UserError(f"{data.name} holds no images to evaluate.")
    accelerator = accelerator or make_accelerator()
    autocast = autocast_context(accelerator, how.mixed_precision)
    detector = _Detector(_on_device(model, accelerator), image_processor, accelerator.device, autocast)
    labels = align_labels(detector.model.config.id2label, data.label_names)

    share = _detect_all(detector, data, accelerator, how, should_stop)
    shares = gather_object([share])
    for problem in (share.problem, *(other.problem for other in shares)):
        if problem is not None:
            raise problem
    left_out = {image_id: reason for one in shares for image_id, reason in one.left_out.items()}
    if len(left_out) == len(data.dataset):
        raise UserError(f"None of the {len(data.dataset)} images can be read. {next(iter(left_out.values()))}")
    for reason in left_out.values() if accelerator.is_main_process else ():
        logger.warning(f"{reason} It is left out, with its objects.")
    detected = [detections for one in shares for detections in one.found]
    found = sorted(
        (_with_data_labels(detections, labels) for detections in detected), key=lambda detections: detections.image_id
    )
    own_ids = [data.own_image_id(int(detections.image_id)) for detections in found]
    scores = [score_detections(found, data, how) if accelerator.is_main_process else None]
    metrics = broadcast_object_list(scores)[0]
    per_class = metrics.pop("per_class")
    return EvaluationResult(
        metrics=metrics,
        per_class=per_class,
        predictions=[
            result
            for detections, image_id in zip(found, own_ids, strict=True)
            for result in replace(detections, image_id=image_id).to_coco(data.category_ids)
        ],
        num_images=len(found),
        seconds=time.perf_counter() - start,
        left_out={data.own_image_id(image_id): reason for image_id, reason in left_out.items()},
    )


def autocast_context(accelerator: Accelerator, mixed_precision: str | None) -> Callable:
    """What makes the context to run the model in; a `ValueError` for a precision that is unknown or impossible."""
    if mixed_precision is None:
        return accelerator.autocast
    precision = choose_precision(mixed_precision, accelerator.device)
    if precision.warning:
        _warn_once(precision.warning)
    if precision.name == "no":
        return contextlib.nullcontext
    return lambda: torch.autocast(accelerator.device.type, dtype=precision.dtype)


class _Unreadable(NamedTuple):
    image_id: int
    reason: str


class _Image(NamedTuple):
    image_id: int
    pixel_values: torch.Tensor  # (1, 3, H, W)
    pixel_mask: torch.Tensor | None  # (1, H, W), only from processors that pad a single image
    size: tuple[int, int]  # height, width of the original


class _ProcessedImages(Dataset):
    """The images of detection data, each processed alone."""

    def __init__(self, data: DetectionData, image_processor: Any, how: EvaluationOptions):
        self.dataset = DetectionDataset(data, max_image_pixels=how.max_image_pixels)
        self.image_processor = image_processor
        self.skip = how.on_bad_image == "skip"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> "_Image | _Unreadable":
        try:
            item = self.dataset[index]
        except UnreadableImageError as error:
            if not self.skip:
                raise
            return _Unreadable(self.dataset.image_id(index), str(error))
        image = item["image"].as_subclass(torch.Tensor)  # (3, height, width) uint8
        inputs = self.image_processor(images=[image], return_tensors="pt")
        mask = inputs.get("pixel_mask")
        return _Image(
            image_id=item["annotations"]["image_id"],
            pixel_values=inputs["pixel_values"],
            pixel_mask=None if mask is None or bool(mask.all()) else mask,
            size=tuple(image.shape[-2:]),
        )


@contextlib.contextmanager
def _prediction_mode(model: nn.Module, single_thread: bool) -> Iterator[Executor]:
    """Put the model in evaluation mode and make torch deterministic; yields what images are to be computed on."""
    device = next(model.parameters()).device
    training, threads = model.training, torch.get_num_threads()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    single_thread = single_thread and device.type == "cpu"
    # A forward pass that accelerate has wrapped shares one autocast state between threads.
    parallel = single_thread and not hasattr(model, "_original_forward")
    model.eval()
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        if single_thread:
            torch.set_num_threads(1)
        with ThreadPoolExecutor(max_workers=threads if parallel else 1) as executor:
            yield executor
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
        model.train(training)


@dataclass(frozen=True)
class _Detector:
    """A model as it is evaluated."""

    model: nn.Module
    image_processor: Any
    device: torch.device
    autocast: Callable

    @torch.no_grad()
    def detect(self, images: list[_Image]) -> list[Detections]:
        """Every query's detection on images of one size, with the model's labels."""
        pixel_values = torch.cat([image.pixel_values for image in images])
        inputs = {"pixel_values": pixel_values.to(self.device, self.model.dtype)}
        if images[0].pixel_mask is not None:
            inputs["pixel_mask"] = torch.cat([image.pixel_mask for image in images]).to(self.device)
        with self.autocast():
            outputs = self.model(**inputs)
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        if not (outputs.logits.isfinite().all() and outputs.pred_boxes.isfinite().all()):
            raise FloatingPointError(
                f"The model predicts numbers that are not finite, for image_id {listing(i.image_id for i in images)}."
            )
        found = detections_as_predicted(self.image_processor, outputs, [image.size for image in images])
        return [
            Detections(image.image_id, **{key: columns[key].cpu().numpy() for key in ("scores", "labels", "boxes")})
            for image, columns in zip(images, found, strict=True)
        ]


def detections_as_predicted(image_processor: Any, outputs: Any, sizes: list[tuple[int, int]]) -> list[dict]:
    """`scores`, `labels` and `boxes` of every query on each image, of (height, width): the metric is of boxes as they
    are predicted, which DePerceiver's processors clip to the image if nobody asks them not to, and others do not."""
    post_process = image_processor.post_process_object_detection
    as_predicted = {"clip": False} if "clip" in inspect.signature(post_process).parameters else {}
    return post_process(outputs, threshold=0.0, target_sizes=sizes, **as_predicted)


def _on_device(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model itself: neither distributed nor compiled, which would happen anew for every size of image."""
    model = accelerator.unwrap_model(model)
    return getattr(model, "_orig_mod", model).to(accelerator.device)


@dataclass
class _Share:
    """What a process has to say of its share of the images."""

    found: list[Detections] = field(default_factory=list)  # with the model's labels
    left_out: dict[int, str] = field(default_factory=dict)  # reason by image id
    problem: Exception | None = None  # that all processes are to raise


def _detect_all(
    detector: _Detector,
    data: DetectionData,
    accelerator: Accelerator,
    how: EvaluationOptions,
    should_stop: Callable[[], bool],
) -> _Share:
    """The detections on this process's share of the images; the others are waiting, so that nothing is raised."""
    share = _Share()
    loader = _make_loader(data, detector.image_processor, accelerator, how)
    show = how.progress and accelerator.is_main_process
    try:
        with (
            iterating(loader) as batches,
            _prediction_mode(detector.model, single_thread=not how.batched_forward) as executor,
            tqdm(batches, desc="Evaluating", total=len(loader), disable=not show) as bar,
        ):
            for batch in bar:
                share.left_out |= {item.image_id: item.reason for item in batch if isinstance(item, _Unreadable)}
                images = [item for item in batch if isinstance(item, _Image)]
                groups = _group_by_shape(images) if how.batched_forward else [[image] for image in images]
                for detections in executor.map(detector.detect, groups):
                    share.found += detections
                if should_stop():
                    raise InterruptedEvaluationError("The evaluation was asked to stop.")
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        share.problem = _picklable(error)
    return share


def _picklable(error: Exception) -> Exception:
    """An error of the same kind and message; its own attributes, such as a traceback's tensors, stay here."""
    for kind in (UnreadableImageError, UserError, FloatingPointError, InterruptedEvaluationError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def _make_loader(
    data: DetectionData, image_processor: Any, accelerator: Accelerator, how: EvaluationOptions
) -> DataLoader:
    """Lists of processed images, this process's share of them."""
    images = _ProcessedImages(data, image_processor, how)
    if how.batched_forward:
        batches = same_size_batches(images.dataset.image_sizes, how.batch_size, dict(image_processor.size))
    else:
        order = list(range(len(images)))
        batches = [order[start : start + how.batch_size] for start in order[:: how.batch_size]]
    return make_loader(images, batches[accelerator.process_index :: accelerator.num_processes], list, how.num_workers)


def _group_by_shape(batch: list[_Image]) -> list[list[_Image]]:
    groups: dict[tuple, list[_Image]] = {}
    for image in batch:
        groups.setdefault((image.pixel_values.shape, image.pixel_mask is None), []).append(image)
    return list(groups.values())


def _with_data_labels(detections: Detections, table: np.ndarray) -> Detections:
    """The detections with labels of the data set; without those of classes that it does not know."""
    labels = detections.labels
    labels = np.where(labels < len(table), table[np.minimum(labels, len(table) - 1)], -1)
    known = labels >= 0
    return replace(detections, scores=detections.scores[known], labels=labels[known], boxes=detections.boxes[known])


def score_detections(found: list[Detections], data: DetectionData, how: EvaluationOptions) -> dict:
    """What `CocoDetectionMetric` says of detections with the data set's labels, one of each image, in order of ids."""
    metric = CocoDetectionMetric(
        data.label_names, max_detections=how.max_detections, area_boundaries=how.area_boundaries
    )
    evaluated = {detections.image_id for detections in found}
    truth = data.dataset.with_format(None).select_columns(["image_id", "objects"])  # without decoding images
    references = [
        {
            "image_id": row["image_id"],
            "labels": row["objects"]["category"],
            **{key: row["objects"][key] for key in ("bbox", "area", "iscrowd")},
        }
        for row in truth
        if row["image_id"] in evaluated
    ]
    metric.add_batch(
        predictions=[vars(detections) for detections in found],
        references=sorted(references, key=lambda reference: reference["image_id"]),
    )
    return metric.compute()


def _warn_once(message: str) -> None:
    if is_main_process():
        logger.warning_once(message)


def as_percent(value: float | None) -> str:
    """A fraction of 1 in percent; a dash for `None` or -1, where there was nothing to find."""
    return "     -" if value is None or value < 0 else f"{100 * value:6.2f}"
