# SPDX-License-Identifier: Apache-2.0
"""Training states and best models: written, found again and restored. Their places are those of [`RunDirectory`]."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..errors import UserError
from ..output_files import write_json
from .arguments import TrainingOptions
from .run_directory import METRICS_FILE, STATE_FILE, RunDirectory, is_state, temporary_path


@dataclass
class SavedModel:
    """One of the best models: where it is (relative to the output directory) and how good."""

    path: str
    ap: float
    epoch: int
    step: int


@dataclass
class TrainingProgress:
    """Where a run is. Together with accelerate's state this is all that resuming needs."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done, evaluation included
    batches: int = 0  # batches of one process done in the epoch under way
    closed_step: int = 0  # step after which evaluation and best models were last brought up to date
    seconds: float = 0.0  # spent training, over all resumptions
    best: list[SavedModel] = field(default_factory=list)  # best first
    last_metrics: dict[str, float] = field(default_factory=dict)  # of the latest evaluation

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TrainingProgress":
        return cls(**{**fields, "best": [SavedModel(**saved) for saved in fields["best"]]})


def save_state(
    accelerator: Accelerator,
    run_directory: RunDirectory,
    progress: TrainingProgress,
    fingerprint: dict[str, Any],
    computation: dict[str, Any],
) -> Path:
    """Write the training state of all processes, then remove older ones; every process must call this.

    Args:
        fingerprint: What must be the same when the run is resumed.
        computation: What a resumed run takes over.
    """
    target = run_directory.state(progress.step, progress.epoch)
    if target.exists():  # the run has not moved since
        return target
    with _written_by_all(accelerator, target) as temporary:
        accelerator.save_state(str(temporary))
        if accelerator.is_main_process:
            content = {"progress": progress.to_dict(), "fingerprint": fingerprint, "computation": computation}
            write_json(temporary / STATE_FILE, content)
    if accelerator.is_main_process:
        for older in run_directory.states()[:-1]:
            shutil.rmtree(older)
    return target


def load_state(accelerator: Accelerator, state: Path, fingerprint: dict[str, Any]) -> TrainingProgress:
    """Restore what `save_state` wrote into the prepared objects of `accelerator`.

    Raises:
        ValueError: The state is of a run with other options, data or number of processes.
    """
    saved = json.loads((state / STATE_FILE).read_text())
    if differences := [
        f"{name} was {saved['fingerprint'].get(name)!r} and is {value!r}"
        for name, value in fingerprint.items()
        if saved["fingerprint"].get(name) != value
    ]:
        raise UserError(f"cannot resume from {state}, the run would not be the same: {'; '.join(differences)}.")
    accelerator.load_state(str(state))
    return TrainingProgress.from_dict(saved["progress"])


def find_resumed_state(options: TrainingOptions, run_directory: RunDirectory) -> Path | None:
    """The state that a run goes on from, or `None` for a new run.

    Raises:
        FileNotFoundError: `options.resume` is a path that holds no complete state.
        FileExistsError: A new run is to write to a directory that is not empty.
        NotADirectoryError: The output directory is a file.
    """
    output_dir = run_directory.path
    if output_dir.exists() and not output_dir.is_dir():
        raise NotADirectoryError(f"--output_dir {output_dir} is a file.")
    if options.resume is None:
        if not options.overwrite_output_dir and output_dir.exists() and any(output_dir.iterdir()):
            raise FileExistsError(
                f"--output_dir {output_dir} is not empty. Go on with --resume auto, delete the earlier run with "
                f"--overwrite_output_dir, or choose another directory."
            )
        return None
    directory = output_dir if options.resume == "auto" else Path(options.resume)
    if is_state(directory):
        return directory
    states = RunDirectory(directory).states()
    if not states and options.resume != "auto":
        raise FileNotFoundError(f"--resume {directory}: no complete training state (state-*/{STATE_FILE}) there.")
    return states[-1] if states else None


class BestModels:
    """Keeps the `top_k` models of the highest AP; of equal ones the later, which has learned longer."""

    def __init__(self, accelerator: Accelerator, run_directory: RunDirectory, top_k: int):
        self.accelerator = accelerator
        self.run_directory = run_directory
        self.top_k = top_k

    def offer(
        self, progress: TrainingProgress, epoch: int, metrics: dict[str, float], save: Callable[[Path], None]
    ) -> None:
        """Save the model by `save(directory)` if `metrics["ap"]` is among the best; every process must call this."""
        ap = metrics["ap"]
        if self.top_k == 0 or (len(progress.best) >= self.top_k and ap < progress.best[-1].ap):
            return
        target = self.run_directory.model(epoch, progress.step)
        saved = SavedModel(target.name, ap, epoch, progress.step)
        save_model(self.accelerator, target, save, {"epoch": epoch, "step": saved.step, **metrics})
        others = [model for model in progress.best if model.path != saved.path]
        progress.best = sorted([*others, saved], key=lambda model: (-model.ap, -model.step))[: self.top_k]
        if self.accelerator.is_main_process:
            self.run_directory.point_best_to(progress.best[0].path)

    def remove_others(self, progress: TrainingProgress) -> None:
        """Delete the models that are no longer among the best, once a state has been saved that knows it."""
        kept = {model.path for model in progress.best}
        if self.accelerator.is_main_process:
            for path in self.run_directory.models():
                if path.name not in kept:
                    shutil.rmtree(path)


def save_model(
    accelerator: Accelerator, target: Path, save: Callable[[Path], None], metrics: dict[str, float]
) -> None:
    """Write a model directory by `save(directory)`, with its metrics beside it; every process must call this."""
    with _written_by_all(accelerator, target) as temporary:
        if accelerator.is_main_process:
            save(temporary)
            write_json(temporary / METRICS_FILE, metrics)


@contextmanager
def _written_by_all(accelerator: Accelerator, target: Path) -> Iterator[Path]:
    """A temporary directory for all processes that becomes `target` when all have written."""
    temporary = temporary_path(target)
    if accelerator.is_main_process:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield temporary
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    accelerator.wait_for_everyone()
