# SPDX-License-Identifier: Apache-2.0
"""What a run is set up from: the accelerator, and the data on every process."""

import dataclasses
import json
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig

from ..backbone_weights import IMAGENET_PREPROCESSING
from ..data import (
    DetectionCollator,
    DetectionData,
    DetectionDataset,
    TrainingBatchSampler,
    is_synthetic,
    make_train_transforms,
)
from ..data.classes import listing
from ..data.doctor.objects import ObjectTable, TrainedSize, require_objects
from ..data.doctor.quick import quick_check
from ..data.images import limit_pixels
from ..data.mixing import ImageMixing
from ..data.sampling import make_loader, repeat_factors
from ..data.transforms import UNBOUNDED
from ..errors import UserError
from ..machine import choose_precision, find_device, is_sharding_asked_for, make_accelerator
from .arguments import TrainingOptions
from .building import build_image_processor
from .sharding import NAME
from .splits import RunSplits

logger = get_logger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """The data of a run, as one process sees them.

    Attributes:
        splits: Records to train and to evaluate on.
        image_processor: Prepares images; saved with the model.
        dataset: `train` with its augmentation.
        collate: Makes a batch.
        repeats: How often an epoch takes each image; `None` for once.
        batches: Sampler of this process's batches; `None` before their size is chosen.
    """

    splits: RunSplits
    image_processor: Any
    dataset: DetectionDataset
    collate: DetectionCollator
    repeats: np.ndarray | None
    batches: TrainingBatchSampler | None

    @property
    def train(self) -> DetectionData:
        """Records to train on."""
        return self.splits.train

    @property
    def evaluation(self) -> DetectionData | None:
        """Records to evaluate on; `None` if the run never evaluates."""
        return self.splits.evaluation

    @classmethod
    def load(cls, options: TrainingOptions, accelerator: Accelerator, state: Path | None = None) -> "TrainingData":
        """Load the splits, on the main process first.

        Args:
            options: Of the run.
            accelerator: Of the run.
            state: Training state that the run goes on from.

        Raises:
            ValueError: They have other classes, or fewer images than a batch.
            OSError: They cannot be read.
        """
        limit_pixels(options.max_image_pixels)
        splits = RunSplits.load(options, accelerator, state)
        train, evaluation = splits.train, splits.evaluation
        require_objects(ObjectTable.of(train, options.train_split))
        if (
            options.early_stopping_patience
            and evaluation is not None
            and evaluation.report.num_objects == evaluation.report.num_crowds
        ):
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
        loaded = cls(splits, image_processor, dataset, collate, repeats, None)
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

    def look_over(self, options: TrainingOptions, config: PreTrainedConfig) -> None:
        """Say what the doctor finds without a look at pixels; what loading found has been said.

        Args:
            options: Of the run.
            config: Of its model.
        """
        splits = {options.train_split: self.train}
        if self.evaluation is not None:
            splits.setdefault(options.eval_split, self.evaluation)
        tables = {name: ObjectTable.of(data, name) for name, data in splits.items()}
        trained = trained_size(self.image_processor, config)
        findings = quick_check(
            tables, options.train_split, options.eval_split, trained, max_detections=options.max_detections[-1]
        )
        for finding in findings:
            logger.log(logging.INFO if finding.severity == "note" else logging.WARNING, finding.sentence())
        if any(finding.severity != "note" for finding in findings):
            given = "--annotations ..." if options.annotations is not None else shlex.quote(str(options.dataset))
            logger.warning(f"`deperceiver data check {given} --report DIR` shows more, with pictures.")

    def require_evaluation(self) -> DetectionData:
        """The data of the evaluations of a run that has some."""
        if self.evaluation is None:
            raise RuntimeError("this run never evaluates")
        return self.evaluation

    def loader(self, epoch: int, skip: int, *, num_workers: int, pin_memory: bool) -> DataLoader:
        """This process's batches of an epoch, but for the first `skip`."""
        self.sampler.set_epoch(epoch, skip=skip)
        return make_loader(self.dataset, self.sampler, self.collate, num_workers=num_workers, pin_memory=pin_memory)


def trained_size(image_processor: Any, config: PreTrainedConfig) -> TrainedSize:
    """What an image processor makes of images, and a model of them."""
    strides = getattr(config, "feature_strides", None) or getattr(config, "feat_strides", None)
    return TrainedSize(
        size=image_processor.size if getattr(image_processor, "do_resize", True) else None,
        stride=strides if strides is None or isinstance(strides, int) else min(strides),
        num_queries=getattr(config, "num_queries", None),
    )


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


def make_fingerprint(options: TrainingOptions, data: TrainingData, accelerator: Accelerator) -> dict[str, Any]:
    """What must be the same in a resumed run, as JSON gives it back."""
    facts = options.facts()
    fixed = {name: value for name, value in dataclasses.asdict(options).items() if not facts[name].resume_may_change}
    if options.model is not None:  # it has its architecture, whether that is named or not
        del fixed["architecture"]
    content = {"training images": len(data.dataset), "classes": data.train.label_names, **data.splits.fingerprint}
    if is_synthetic(options.data_name):  # a directory may have moved, scenes are what their name says
        content["scenes"] = options.data_name
    # Only what is unusual: earlier states, which know nothing of it, can be resumed if their images stay the same.
    content |= _unusual_preprocessing(options, data.image_processor)
    sharding = NAME if is_sharding_asked_for() else None  # states from before it are of runs without it
    run = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision, "sharding": sharding}
    return json.loads(json.dumps({**fixed, **run, **content}))
