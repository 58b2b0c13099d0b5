# SPDX-License-Identifier: Apache-2.0
"""What a training run leaves on disk, and where.

    output_dir/
        state-00000400-0003/    newest training state (after 400 steps, 3 epochs), to go on from as if never stopped
            training_state.json     where the run is, and what must be the same when it is resumed
            ...                     what accelerate saves: weights, optimizer, schedule, random states
        epoch-003-step-400/     one of the best models: weights, configuration, image processor, metrics.json
        best -> epoch-003-step-400
        last/                   the model at the end of training, with the same files
        metrics.jsonl           one line for each log interval and each evaluation
        options.yaml            the options of the run, as a recipe that repeats it
        summary.json            written at the end

A directory is written under a temporary name and renamed when it is complete, so that a kill at any moment leaves the
previous one whole.
"""

import os
import re
import shutil
from pathlib import Path

STATE_FILE = "training_state.json"  # in a training state
METRICS_FILE = "metrics.json"  # in a model
STATE_PATTERN = re.compile(r"state-(\d{8,})-(\d{4,})")
MODEL_PATTERN = re.compile(r"epoch-(\d{3,})-step-(\d+)")
TEMPORARY_SUFFIX = ".incomplete"


class RunDirectory:
    """Names the files of a run, finds those that are there, and clears them away.

    Attributes:
        path: The output directory.
        log: Lines of numbers, JSON each.
        options: What the run was told, as a recipe.
        summary: How the run ended; there is none before.
        best: Link to the model of the highest AP.
        last: The model at the end of training.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.log = self.path / "metrics.jsonl"
        self.options = self.path / "options.yaml"
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

    def clear(self, *, keep_run: bool) -> None:
        """Make the directory and remove what a killed run left half-written, or all of an earlier run."""
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in self.path.iterdir():
            if entry.name.endswith(TEMPORARY_SUFFIX) or (self._is_ours(entry) and not keep_run):
                _remove(entry)

    def remove_states(self) -> None:
        """Delete all complete training states: the run cannot be resumed any more."""
        for state in self.states():
            _remove(state)

    def point_best_to(self, model: str) -> None:
        """Make `best` a symbolic link to its sibling `model`, replacing an earlier one in one move."""
        temporary = temporary_path(self.best)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(model, target_is_directory=True)
        os.replace(temporary, self.best)

    def _is_ours(self, path: Path) -> bool:
        patterns = (STATE_PATTERN, MODEL_PATTERN)
        named = (self.log, self.options, self.summary, self.best, self.last)
        return path in named or any(pattern.fullmatch(path.name) for pattern in patterns)


def is_state(directory: Path) -> bool:
    """Whether a directory, wherever it is, holds a complete training state."""
    return (directory / STATE_FILE).is_file()


def temporary_path(target: Path) -> Path:
    """Where a file or directory is written before it is renamed to `target`."""
    return target.with_name(target.name + TEMPORARY_SUFFIX)


def _remove(path: Path) -> None:
    """Delete a file, a link or a whole directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
