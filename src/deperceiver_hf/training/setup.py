# SPDX-License-Identifier: Apache-2.0
"""What a run is set up from: the accelerator, and the data on every process."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from ..backbone_weights import IMAGENET_PREPROCESSING
from ..data import (
    DetectionCollator,
    DetectionData,
    DetectionDataset,
    TrainingBatchSampler,
    is_synthetic,
    load_detection_data,
    make_train_transforms,
)
from ..data.classes import listing, with_labels_of
from ..data.images import limit_pixels
from ..data.mixing import ImageMixing
from ..data.plausibility import remarks_on_objects, require_objects
from ..data.sampling import make_loader, repeat_factors
from ..data.transforms import UNBOUNDED
from ..errors import UserError
from ..evaluation.coco_metric import COCO_MAX_DETECTIONS
from ..machine import choose_precision, find_device, is_sharding_asked_for, make_accelerator
from .arguments import TrainingOptions
from .building import build_image_processor
from .sharding import NAME

logger = get_logger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class TrainingData:
    """The data of a run, as one process sees them.

    Attributes:
        train: Records to train on.
        evaluation: Records to evaluate on; `None` if the run never evaluates.
        image_processor: Prepares images; saved with the model.
        dataset: `train` with its augmentation.
        collate: Makes a batch.
        repeats: How often an epoch takes each image; `None` for once.
        batches: Sampler of this process's batches; `None` before their size is chosen.
    """

    train: DetectionData
    evaluation: DetectionData | None
    image_processor: Any
    dataset: DetectionDataset
    collate: DetectionCollator
    repeats: np.ndarray | None
    batches: TrainingBatchSampler | None

    @classmethod
    def load(cls, options: TrainingOptions, accelerator: Accelerator) -> "TrainingData":
        """Load the splits, on the main process first.

        Raises:
            ValueError: They have other classes, or fewer images than a batch.
            OSError: They cannot be read.
        """
        limit_pixels(options.max_image_pixels)
        load_split = partial(load_detection_data, options.dataset, bbox_format=options.box_format)
        train = main_process_first(
            accelerator, partial(load_split, options.train_split, max_samples=options.max_train_samples)
        )
        require_objects(train)
        evaluation = None
        if options.eval_every or options.eval_steps:
            evaluation = main_process_first(
                accelerator, partial(load_split, options.eval_split, max_samples=options.max_eval_samples)
            )
            evaluation = with_labels_of(train, evaluation)
            if options.early_stopping_patience and evaluation.report.num_objects == evaluation.report.num_crowds:
                raise UserError(
                    f"--early_stopping_patience waits for a better AP, but {evaluation.name} has no object to find."
                )
        image_processor = build_image_processor(options)
        unusual = _unusual_preprocessing(options, image_processor)
        if unusual.keys() & {"image_mean", "image_std"}:
            logger.info(
                f"Images are normalised as the backbone's weights expect, by mean {image_processor.image_mean} and "
                f"standard deviation {image_processor.image_std}."
            )
        transforms = make_train_transforms(
            options.augmentation, resample=image_processor.resample, **_sizes_of(image_processor)
        )
        if options.on_bad_image == "stop":
            for data in filter(None, (train, evaluation)):
                data.report.require_images()
        dataset = DetectionDataset(
            train,
            transforms,
            seed=options.seed,
            mixing=ImageMixing(options.mosaic or 0.0, options.mixup or 0.0) if options.mixes_images else None,
            cache_images=options.cache_images,
            on_bad_image=options.on_bad_image,
            max_image_pixels=options.max_image_pixels,
        )
        collate = DetectionCollator(image_processor, do_resize=False)
        repeats = _repeats(train, options.repeat_factor_threshold)
        loaded = cls(train, evaluation, image_processor, dataset, collate, repeats, None)
        return loaded if options.has_automatic_batch_size else loaded.with_batches(options, accelerator)

    def with_batches(self, options: TrainingOptions, accelerator: Accelerator) -> "TrainingData":
        """The same data with a sampler of this process's batches.

        Raises:
            ValueError: They are fewer images than a batch.
        """
        sampler = TrainingBatchSampler(
            self.dataset,
            options.batch_size,
            group_by_aspect_ratio=options.group_by_aspect_ratio,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            repeats=self.repeats,
        )
        return dataclasses.replace(self, batches=sampler)

    @property
    def sampler(self) -> TrainingBatchSampler:
        """Chooses the images of this process's batches."""
        if self.batches is None:
            raise RuntimeError("the batch size has not been chosen yet")
        return self.batches

    def remark_on_objects(self, num_queries: int) -> None:
        """Say what the objects of the data mean for a model with so many queries."""
        remarks = remarks_on_objects(self.train, num_queries=num_queries, training=True)
        if self.evaluation is not None:
            remarks += remarks_on_objects(
                self.evaluation, num_queries=num_queries, max_detections=COCO_MAX_DETECTIONS[-1]
            )
        for remark in remarks:
            logger.warning(remark)

    def require_evaluation(self) -> DetectionData:
        """The data of the evaluations of a run that has some."""
        if self.evaluation is None:
            raise RuntimeError("this run never evaluates")
        return self.evaluation

    def loader(self, epoch: int, skip: int, *, num_workers: int, pin_memory: bool) -> DataLoader:
        """This process's batches of an epoch, but for the first `skip`."""
        self.sampler.set_epoch(epoch, skip=skip)
        return make_loader(self.dataset, self.sampler, self.collate, num_workers=num_workers, pin_memory=pin_memory)


def _repeats(data: DetectionData, threshold: float | None) -> np.ndarray | None:
    """How often an epoch takes each image, see `repeat_factors`; said in a line."""
    if threshold is None:
        return None
    labels = [
        [label for label, crowd in zip(objects["category"], objects["iscrowd"], strict=True) if not crowd]
        for objects in data.dataset.with_format(None)["objects"]
    ]
    repeats = repeat_factors(labels, threshold)
    alone = {  # the factor of a class is that of images with no other
        name: float(repeats[[label in image for image in labels]].min())
        for label, name in enumerate(data.label_names)
        if any(label in image for image in labels)
    }
    rare = [f"{name} ({factor:.2g} times)" for name, factor in alone.items() if factor > 1]
    logger.info(
        f"An epoch takes {int(repeats.sum())} of {len(labels)} images, those with rare classes more than once: "
        f"{listing(rare) if rare else f'none is on less than {threshold:g} of the images'}."
    )
    return repeats


def _sizes_of(image_processor: Any) -> dict[str, Any]:
    """What the transforms must know of an image processor to give images the sizes that it gives them."""
    size = image_processor.size
    if not getattr(image_processor, "do_resize", True):
        return {"resize": False}
    if not size.shortest_edge:
        return {"other_size": size}
    longest = size.longest_edge or UNBOUNDED
    return {"shortest_edge": min(size.shortest_edge, longest), "longest_edge": longest}


def _unusual_preprocessing(options: TrainingOptions, image_processor: Any) -> dict[str, Any]:
    """What a new model's backbone wants otherwise than the original's in how images are prepared."""
    if options.model is not None:
        return {}
    return {
        name: getattr(image_processor, name)
        for name, usual in IMAGENET_PREPROCESSING.items()
        if np.any(np.not_equal(getattr(image_processor, name), usual))
    }


def create_accelerator(options: TrainingOptions) -> Accelerator:
    """The accelerator of a run.

    Raises:
        ValueError: The precision is not possible here, a tracker is not installed, or the launcher was asked for
            gradient accumulation.
    """
    trackers = [name for name in options.report_to if name != "none"]
    available = [str(tracker) for tracker in get_available_trackers()]
    if missing := sorted(set(trackers) - {"all", *available}):
        raise UserError(f"--report_to {' '.join(missing)}: not installed; try `pip install {' '.join(missing)}`.")
    if options.optimizer == "muon" and is_sharding_asked_for():
        raise UserError(f"--optimizer muon needs whole matrices, and {NAME} shards them; give --optimizer adamw.")
    precision = choose_precision(options.precision, find_device())
    accelerator = make_accelerator(
        mixed_precision=precision.name,
        log_with=trackers or None,
        project_dir=options.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)],
    )
    logger.info(f"Precision {precision.name}: {precision.reason}.")
    if precision.warning:
        logger.warning(precision.warning)
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError("give --gradient_accumulation_steps to the script, not to `accelerate launch`.")
    return accelerator


def main_process_first(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call on the main process, then on the others, which find its downloads; its error is raised on all."""
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = function()
        except (ValueError, OSError) as raised:
            error = raised
    (message,) = broadcast_object_list([error and str(error)])  # not every exception can be pickled
    if message is not None:
        raise error or ValueError(message)
    return result if accelerator.is_main_process else function()


def make_fingerprint(options: TrainingOptions, data: TrainingData, accelerator: Accelerator) -> dict[str, Any]:
    """What must be the same in a resumed run, as JSON gives it back."""
    facts = options.facts()
    fixed = {name: value for name, value in dataclasses.asdict(options).items() if not facts[name].resume_may_change}
    if options.model is not None:  # it has its architecture, whether that is named or not
        del fixed["architecture"]
    content = {"training images": len(data.dataset), "classes": data.train.label_names}
    if is_synthetic(options.dataset):  # a directory may have moved, scenes are what their name says
        content["scenes"] = options.dataset
    # Only what is unusual: earlier states, which know nothing of it, can be resumed if their images stay the same.
    content |= _unusual_preprocessing(options, data.image_processor)
    sharding = NAME if is_sharding_asked_for() else None  # states from before it are of runs without it
    run = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision, "sharding": sharding}
    return json.loads(json.dumps({**fixed, **run, **content}))
