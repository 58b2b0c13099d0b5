# SPDX-License-Identifier: Apache-2.0
"""The training and the validation images of a run: two splits of a data set, two pairs of annotations and images, or
one split that is divided by a fraction or by lists. What a division came to is written to the run's directory, and a
resumed run goes by that."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..data import DetectionData, load_detection_data
from ..data.classes import with_labels_of
from ..data.formats.annotated_images import INSTEAD_OF_A_SPLIT
from ..data.records import MissingSplitError
from ..data.splitting import draw_parts, image_names, listed_parts, part_of, write_list
from ..errors import UserError
from .arguments import TrainingOptions
from .processes import main_process_first, on_main_process
from .run_directory import RunDirectory

logger = get_logger(__name__)

DEFAULT_VAL_SEED = 42


@dataclass(frozen=True)
class RunSplits:
    """Attributes:
    train: Records to train on.
    evaluation: Records to evaluate on; `None` if the run never evaluates.
    lists: The images of both sides where one split was divided, to be written down; else `None`.
    """

    train: DetectionData
    evaluation: DetectionData | None
    lists: tuple[list[str], list[str]] | None = None

    @classmethod
    def load(cls, options: TrainingOptions, accelerator: Accelerator, state: Path | None = None) -> "RunSplits":
        """Load them, on the main process first.

        Args:
            options: Of the run.
            accelerator: Of the run.
            state: Training state that the run goes on from.

        Raises:
            ValueError: They have other classes, or cannot be divided as asked for.
            OSError: They cannot be read.
        """
        if options.divides_a_split:
            return _divided(options, accelerator, state)
        train = _load(options, accelerator, options.train_split, options.max_train_samples)
        evaluation = None
        if options.evaluates:
            if options.annotations is not None and options.val_annotations is None:
                raise UserError(
                    f"--annotations {options.annotations} is what is trained on. Give --val_annotations FILE (and "
                    f"--val_images DIR) to evaluate on, or none of it by --eval_every 0. {INSTEAD_OF_A_SPLIT}"
                )
            try:
                evaluation = _load(options, accelerator, options.eval_split, options.max_eval_samples)
            except MissingSplitError as error:
                before = None if state is None else RunDirectory(state.parent)
                if before is None or not before.val_list.is_file():
                    raise
                raise UserError(
                    f"The run in {before.path} divided its images, by --val_fraction or lists, and split "
                    f"{options.eval_split!r} is not there. Resume it with the options it had: "
                    f"--recipe {before.options}"
                ) from error
            evaluation = with_labels_of(train, evaluation)
        return cls(train, evaluation)

    def write(self, directory: RunDirectory) -> None:
        """Write the names of the images of both sides, if one split was divided."""
        if self.lists is not None:
            for path, names in zip((directory.train_list, directory.val_list), self.lists, strict=True):
                write_list(path, names)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same in a resumed run."""
        if self.lists is None:
            return {}
        return {"division": hashlib.sha256("\0".join([*self.lists[0], "", *self.lists[1]]).encode()).hexdigest()[:16]}


def _load(
    options: TrainingOptions, accelerator: Accelerator, split: str, max_samples: int | None, pile: bool = False
) -> DetectionData:
    for_evaluation = split == options.eval_split and not pile
    if options.annotations is None:
        source, images = options.dataset, None
    elif for_evaluation:
        source, images = str(options.val_annotations), options.val_images
    else:
        source, images = options.annotations, options.images
    load = partial(
        load_detection_data,
        source,
        split,
        images=images,
        alone=options.annotations is not None,
        format=options.format,
        bbox_format=options.box_format,
        max_samples=max_samples,
    )
    return main_process_first(accelerator, load)


def _divided(options: TrainingOptions, accelerator: Accelerator, state: Path | None) -> RunSplits:
    pile = _load(options, accelerator, options.train_split, None, pile=True)
    before = None if state is None else RunDirectory(state.parent)
    # Decoding every image is for one process; the others are told.
    train, val = on_main_process(accelerator, lambda: _parts(options, pile, before))
    names = image_names(pile)
    lists = ([names[index] for index in train], [names[index] for index in val])
    logger.info(f"{pile.report.source}: {len(train):,} of the images are for training, {len(val):,} for validation.")
    evaluation = part_of(pile, val[: options.max_eval_samples], "val") if options.evaluates else None
    return RunSplits(part_of(pile, train[: options.max_train_samples], "train"), evaluation, lists)


def _parts(
    options: TrainingOptions, pile: DetectionData, before: RunDirectory | None
) -> tuple[np.ndarray, np.ndarray]:
    if before is not None and before.train_list.is_file() and before.val_list.is_file():
        return listed_parts(pile, before.train_list, before.val_list)
    if options.val_fraction is None:
        return listed_parts(pile, options.train_list, options.val_list)
    seed = DEFAULT_VAL_SEED if options.val_seed is None else options.val_seed
    val, train = draw_parts(pile, [options.val_fraction], seed)
    return train, val
