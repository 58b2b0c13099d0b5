# SPDX-License-Identifier: Apache-2.0
"""What a training run leaves on disk, and where.

    output_dir/
        state-00000400-0003/    newest training state (after 400 steps, 3 epochs), to go on from as if never stopped
            training_state.json     where the run is, its schedule, and what must be the same when it is resumed
            ...                     weights, optimizer (or the shards of both, see `sharding`) and random states
        epoch-003-step-400/     one of the best models: weights, configuration, image processor, metrics.json
        best -> epoch-003-step-400    (a copy where there are no symbolic links)
        last/                   the model at the end of training, with the same files
        metrics.jsonl           one line for each log interval and each evaluation
        curves.png              what is in it, drawn
        predictions/            the same validation images with what was detected: latest.jpg, best.jpg
        options.yaml            the options of the run, as a recipe that repeats it
        train_images.txt, val_images.txt    names of the images on both sides, where the run has divided a split
        summary.json            written at the end

A directory is written under a temporary name and renamed when it is complete, and renamed before it is deleted, so
that a kill at any moment leaves every directory whole or under a name that the next start clears away.
"""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ..output_files import PROBE, is_temporary

STATE_FILE = "training_state.json"  # in a training state
METRICS_FILE = "metrics.json"  # in a model
STATE_PATTERN = re.compile(r"state-(\d{8,})-(\d{4,})")
MODEL_PATTERN = re.compile(r"epoch-(\d{3,})-step-(\d+)")
PREDICTIONS = ("latest.jpg", "best.jpg")
TEMPORARY_SUFFIX = ".incomplete"
DELETED_SUFFIX = ".deleted"


class RunDirectory:
    """Names the files of a run, finds those that are there, and clears them away.

    Attributes:
        path: The output directory.
        log: Lines of numbers, JSON each.
        curves: Picture of the log.
        predictions: Directory of pictures of detections.
        options: What the run was told, as a recipe.
        train_list, val_list: Names of the images on both sides of a split that the run divided.
        summary: How the run ended; there is none before.
        best: Link to the model of the highest AP.
        last: The model at the end of training.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.log = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"
        self.predictions = self.path / "predictions"
        self.options = self.path / "options.yaml"
        self.train_list = self.path / "train_images.txt"
        self.val_list = self.path / "val_images.txt"
        self.summary = self.path / "summary.json"
        self.best = self.path / "best"
        self.last = self.path / "last"

    def state(self, step: int, epoch: int) -> Path:
        """The training state after so many steps and epochs."""
        return self.path / f"state-{step:08d}-{epoch:04d}"

    def model(self, epoch: int, step: int) -> Path:
        """One of the best models."""
        return self.path / f"epoch-{epoch:03d}-step-{step}"

    @property
    def is_finished(self) -> bool:
        return self.summary.is_file()

    def states(self) -> list[Path]:
        """Complete training states, oldest first."""
        if not self.path.is_dir():
            return []
        numbered = {path: STATE_PATTERN.fullmatch(path.name) for path in self.path.iterdir()}
        found = {path: match for path, match in numbered.items() if match and is_state(path)}
        return sorted(found, key=lambda path: [int(number) for number in found[path].groups()])

    def models(self) -> list[Path]:
        """Those of the best models that have not been removed."""
        return [path for path in self.path.iterdir() if MODEL_PATTERN.fullmatch(path.name)]

    def clear(self) -> None:
        """Remove all of an earlier run; files of others stay."""
        for entry in self.path.iterdir():
            if self._is_ours(entry):
                remove(entry)

    def clear_leftovers(self, models: Collection[str], state: Path) -> None:
        """Remove what a run left that was killed while it was writing or deleting, after its newest state.

        Args:
            models: Names of those of the best models that the state knows.
            state: The newest training state, which the run goes on from.
        """
        for entry in self.path.iterdir():
            older_state = STATE_PATTERN.fullmatch(entry.name) and entry != state
            other_model = MODEL_PATTERN.fullmatch(entry.name) and entry.name not in models
            if older_state or other_model or self._is_half_written(entry) or (entry == self.best and not models):
                remove(entry)
        for picture in self.predictions.iterdir() if self.predictions.is_dir() else ():
            if any(is_temporary(picture, of=self.predictions / name) for name in PREDICTIONS):
                remove(picture)

    def remove_states(self) -> None:
        """Delete all complete training states: the run cannot be resumed any more."""
        for state in self.states():
            remove(state)

    def point_best_to(self, model: str) -> None:
        """Make `best` a symbolic link to its sibling `model`, or a copy where links are not possible."""
        temporary = temporary_path(self.best)
        if temporary.is_symlink() or temporary.exists():
            remove(temporary)
        try:
            temporary.symlink_to(model, target_is_directory=True)
        except OSError:  # exFAT, network disks, Windows without the right
            shutil.copytree(self.path / model, temporary, copy_function=_link_or_copy)
        if self.best.is_dir() and not (self.best.is_symlink() and temporary.is_symlink()):
            remove(self.best)
        os.replace(temporary, self.best)

    def best_is(self, model: str) -> bool:
        """Whether `best` is the one of the best models that is called `model`."""
        metrics = [directory / METRICS_FILE for directory in (self.best, self.path / model)]
        if self.best.is_symlink() or not all(path.is_file() for path in metrics):
            return self.best.is_symlink() and os.readlink(self.best) == model
        return metrics[0].read_bytes() == metrics[1].read_bytes()

    def _is_half_written(self, path: Path) -> bool:
        files = (self.log, self.curves, self.options, self.train_list, self.val_list, self.summary, self.path / PROBE)
        unfinished = path.name.endswith((TEMPORARY_SUFFIX, DELETED_SUFFIX))
        return unfinished or any(is_temporary(path, of=file) for file in files)

    def _is_ours(self, path: Path) -> bool:
        patterns = (STATE_PATTERN, MODEL_PATTERN)
        lists = (self.train_list, self.val_list)
        pictures = (self.curves, self.predictions)
        named = (self.log, self.options, *pictures, *lists, self.summary, self.best, self.last)
        matches = any(pattern.fullmatch(path.name) for pattern in patterns)
        return path in named or matches or self._is_half_written(path)


def is_state(directory: Path) -> bool:
    """Whether a directory, wherever it is, holds a complete training state."""
    return (directory / STATE_FILE).is_file()


def temporary_path(target: Path) -> Path:
    """Where a file or directory is written before it is renamed to `target`."""
    return target.with_name(target.name + TEMPORARY_SUFFIX)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole directory, which is out of the way before it is half-deleted."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if not path.name.endswith((TEMPORARY_SUFFIX, DELETED_SUFFIX)):
        doomed = path.with_name(path.name + DELETED_SUFFIX)
        if doomed.exists():
            shutil.rmtree(doomed)
        path = path.rename(doomed)
    shutil.rmtree(path)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
