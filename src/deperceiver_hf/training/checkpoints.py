# SPDX-License-Identifier: Apache-2.0
"""Training states and best models: written, found again and restored. Their places are those of [`RunDirectory`]."""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import load
from torch.optim.lr_scheduler import LRScheduler

from ..errors import UserError, one_line
from ..output_files import write_json
from .arguments import TrainingOptions
from .averaging import WeightAverage
from .run_directory import METRICS_FILE, STATE_FILE, RunDirectory, is_state, remove, temporary_path
from .sharding import ModelShards

# Found in states of version 0.2, which hold the schedule as a pickle: loading it runs whatever code is in it.
PICKLED_SCHEDULE = "custom_checkpoint_0.pkl"


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
    unreadable: list[int] = field(default_factory=list)  # images that could not be read, by their place in the data
    reference_ap: float = -1.0  # that a later evaluation has to exceed, or it counts as one without improvement
    stale_evaluations: int = 0  # in a row, without improvement
    decay_from: int | None = None  # step after which the rate decays because the AP had ceased to improve
    overflows: int = 0  # steps in a row that the scaler of float16 has skipped

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TrainingProgress":
        return cls(**{**fields, "best": [SavedModel(**saved) for saved in fields["best"]]})


def save_state(
    accelerator: Accelerator,
    run_directory: RunDirectory,
    progress: TrainingProgress,
    schedule: LRScheduler,
    fingerprint: dict[str, Any],
    computation: dict[str, Any],
    average: WeightAverage | None = None,
    shards: ModelShards | None = None,
) -> Path:
    """Write the training state of all processes, then remove others; every process must call this.

    Args:
        schedule: Of the learning rate.
        fingerprint: What must be the same when the run is resumed.
        computation: What a resumed run takes over.
        average: Of the weights, if the run has one.
        shards: Of the model and its optimizer, if they are in some.
    """
    target = run_directory.state(progress.step, progress.epoch)
    if is_state(target):  # the run has not moved since
        return target
    with _written_by_all(accelerator, target) as temporary:
        accelerator.save_state(str(temporary))
        if shards is not None:
            shards.save(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if average is not None:
                average.save(temporary)
            content = {
                "progress": progress.to_dict(),
                "schedule": schedule.state_dict(),
                "fingerprint": fingerprint,
                "computation": computation,
                "sha256": {path.name: _digest(path) for path in sorted(temporary.iterdir())},
            }
            write_json(temporary / STATE_FILE, content)
    if accelerator.is_main_process:
        for other in run_directory.states():
            if other != target:
                remove(other)
    return target


def load_state(
    accelerator: Accelerator,
    state: Path,
    schedule: LRScheduler,
    fingerprint: dict[str, Any],
    average: WeightAverage | None = None,
    shards: ModelShards | None = None,
) -> TrainingProgress:
    """Restore what `save_state` wrote into the prepared objects of `accelerator` and the schedule.

    Nothing that is loaded can run code: the schedule is JSON, the rest safetensors, and tensors and numbers only.

    Raises:
        ValueError: The state is of a run with other options, data or number of processes, or damaged in any part.
    """
    saved = read_state(state)
    if differences := [
        f"{name} was {saved['fingerprint'].get(name)!r} and is {value!r}"
        for name, value in fingerprint.items()
        if saved["fingerprint"].get(name) != value
    ]:
        raise UserError(f"cannot resume from {state}, the run would not be the same: {'; '.join(differences)}.")
    _require_whole(state, saved["sha256"])
    try:
        accelerator.load_state(str(state))
        if shards is not None:
            shards.load(state)
            shards.gather()
        if average is not None:
            average.load(state)
        _require_restored_random_state(state / f"random_states_{accelerator.process_index}.pkl")
        schedule.load_state_dict(saved["schedule"])
        return TrainingProgress.from_dict(saved["progress"])
    except Exception as error:  # each part has its own
        raise _damaged(state, f"{type(error).__name__}: {one_line(error)}") from error


def read_state(state: Path) -> dict[str, Any]:
    """The content of a training state's JSON file.

    Raises:
        ValueError: It is damaged, or of a version whose states hold code.
    """
    try:
        saved = json.loads((state / STATE_FILE).read_text(encoding="utf-8"))
        complete = {"progress", "schedule", "fingerprint", "computation", "sha256"} <= saved.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(state, f"{STATE_FILE}: {one_line(error)}") from error
    if not complete and (state / PICKLED_SCHEDULE).is_file():
        raise UserError(
            f"cannot resume from {state}: it was written by an earlier version of this package, whose states could "
            f"run code when they are loaded. Finish the run with that version, or start a new one from its best model "
            f"by --model."
        )
    if not complete:
        raise _damaged(state, f"{STATE_FILE} lacks a part")
    return saved


def _require_whole(state: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        path = state / name
        if not path.is_file():
            raise _damaged(state, f"{name} is missing")
        if _digest(path) != digest:
            raise _damaged(state, f"{name} is not what was written")
    if others := sorted({path.name for path in state.iterdir()} - {*digests, STATE_FILE}):
        raise _damaged(state, f"{others[0]} does not belong to it")


def _require_restored_random_state(path: Path) -> None:
    """accelerate passes over random numbers that it cannot restore; here they must be those of the file."""
    saved = load(path)
    same = [
        random.getstate() == saved["random_state"],
        all(np.array_equal(*pair) for pair in zip(np.random.get_state(), saved["numpy_random_seed"], strict=True)),
        torch.equal(torch.get_rng_state(), saved["torch_manual_seed"]),
    ]
    if torch.cuda.is_available():
        pairs = zip(torch.cuda.get_rng_state_all(), saved["torch_cuda_manual_seed"], strict=True)
        same += [torch.equal(*pair) for pair in pairs]
    if not all(same):
        raise ValueError(f"the random state in {path.name} could not be restored")


def _damaged(state: Path, reason: str) -> UserError:
    return UserError(
        f"cannot resume from {state}, it is damaged: {reason}. Copy it anew or resume from another state; a new run "
        "can start from one of the saved models by --model."
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_resumed_state(options: TrainingOptions, run_directory: RunDirectory) -> Path | None:
    """The state that a run goes on from, or `None` for a new run.

    Raises:
        FileNotFoundError: `options.resume` is a path that holds no complete state.
        FileExistsError: A new run is to write to a directory that is not empty, or that holds a finished one.
        OSError: The output directory cannot be made or written to.
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
    if not states and run_directory.is_finished:
        raise FileExistsError(
            f"--resume auto: {output_dir} holds a finished run whose training states have been removed. Choose "
            "another --output_dir, or delete it with --overwrite_output_dir."
        )
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
        """Save the model by `save(directory)` if `metrics["ap"]` is among the best; every process must call this.

        An AP of -1, of data without objects, is never among them.
        """
        ap = metrics["ap"]
        nothing_to_find = ap < 0
        if nothing_to_find or self.top_k == 0 or (len(progress.best) >= self.top_k and ap < progress.best[-1].ap):
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
                    remove(path)


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
            remove(temporary)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield temporary
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():
            remove(target)
        os.replace(temporary, target)
    accelerator.wait_for_everyone()
