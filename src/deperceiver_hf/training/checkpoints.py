# SPDX-License-Identifier: Apache-2.0
"""What a training run leaves on disk, written so that a kill at any moment leaves the previous state whole.

    output_dir/
        state-00000400-0003/    newest training state (after 400 steps, 3 epochs), to go on from as if never stopped
        epoch-003-step-400/     one of the best models: weights, configuration, image processor, metrics
        best -> epoch-003-step-400
        last/                   the model at the end of training
        metrics.jsonl           one line for each log interval and each evaluation
        summary.json            written at the end

A directory is written under a temporary name and renamed when it is complete.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..output_files import write_json
from .arguments import TrainingOptions

STATE_FILE = "training_state.json"
STATE_PATTERN = re.compile(r"state-(\d{8,})-(\d{4,})")
MODEL_PATTERN = re.compile(r"epoch-(\d{3,})-step-(\d+)")
TEMPORARY_SUFFIX = ".incomplete"
OWN_FILES = ("metrics.jsonl", "summary.json")


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
    accelerator: Accelerator, output_dir: Path, progress: TrainingProgress, fingerprint: dict[str, Any]
) -> Path:
    """Write the training state of all processes, then remove older ones; every process must call this.

    Args:
        fingerprint: What must be the same when the run is resumed.
    """
    target = output_dir / f"state-{progress.step:08d}-{progress.epoch:04d}"
    if target.exists():  # the run has not moved since
        return target
    with _written_by_all(accelerator, target) as temporary:
        accelerator.save_state(str(temporary))
        if accelerator.is_main_process:
            write_json(temporary / STATE_FILE, {"progress": progress.to_dict(), "fingerprint": fingerprint})
    if accelerator.is_main_process:
        for older in find_states(output_dir)[:-1]:
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
        raise ValueError(f"cannot resume from {state}, the run would not be the same: {'; '.join(differences)}.")
    accelerator.load_state(str(state))
    return TrainingProgress.from_dict(saved["progress"])


def find_states(output_dir: Path) -> list[Path]:
    """Complete training states in a directory, oldest first."""
    if not output_dir.is_dir():
        return []
    numbered = {path: STATE_PATTERN.fullmatch(path.name) for path in output_dir.iterdir()}
    found = {path: match for path, match in numbered.items() if match and (path / STATE_FILE).is_file()}
    return sorted(found, key=lambda path: [int(number) for number in found[path].groups()])


def find_resumed_state(options: TrainingOptions, output_dir: Path) -> Path | None:
    """The state that a run goes on from, or `None` for a new run.

    Raises:
        FileNotFoundError: `options.resume` is a path that holds no complete state.
        FileExistsError: A new run is to write to a directory that is not empty.
        NotADirectoryError: The output directory is a file.
    """
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
    if (directory / STATE_FILE).is_file():
        return directory
    states = find_states(directory)
    if not states and options.resume != "auto":
        raise FileNotFoundError(f"--resume {directory}: no complete training state (state-*/{STATE_FILE}) there.")
    return states[-1] if states else None


def clear_output_dir(output_dir: Path, *, keep_run: bool) -> None:
    """Make the directory and remove what a killed run left half-written, or all of an earlier run."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for entry in output_dir.iterdir():
        if entry.name.endswith(TEMPORARY_SUFFIX) or (_is_ours(entry) and not keep_run):
            remove(entry)


class BestModels:
    """Keeps the `top_k` models of the highest AP; of equal ones the later, which has learned longer."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, top_k: int):
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.top_k = top_k

    def offer(
        self, progress: TrainingProgress, epoch: int, metrics: dict[str, float], save: Callable[[Path], None]
    ) -> None:
        """Save the model by `save(directory)` if `metrics["ap"]` is among the best; every process must call this."""
        ap = metrics["ap"]
        if self.top_k == 0 or (len(progress.best) >= self.top_k and ap < progress.best[-1].ap):
            return
        saved = SavedModel(f"epoch-{epoch:03d}-step-{progress.step}", ap, epoch, progress.step)
        save_model(
            self.accelerator, self.output_dir / saved.path, save, {"epoch": epoch, "step": saved.step, **metrics}
        )
        others = [model for model in progress.best if model.path != saved.path]
        progress.best = sorted([*others, saved], key=lambda model: (-model.ap, -model.step))[: self.top_k]
        if self.accelerator.is_main_process:
            point_to(self.output_dir / "best", progress.best[0].path)

    def remove_others(self, progress: TrainingProgress) -> None:
        """Delete the models that are no longer among the best, once a state has been saved that knows it."""
        kept = {model.path for model in progress.best}
        if self.accelerator.is_main_process:
            for path in self.output_dir.iterdir():
                if MODEL_PATTERN.fullmatch(path.name) and path.name not in kept:
                    shutil.rmtree(path)


def save_model(
    accelerator: Accelerator, target: Path, save: Callable[[Path], None], metrics: dict[str, float]
) -> None:
    """Write a model directory by `save(directory)`, with `metrics.json` beside it; every process must call this."""
    with _written_by_all(accelerator, target) as temporary:
        if accelerator.is_main_process:
            save(temporary)
            write_json(temporary / "metrics.json", metrics)


def point_to(link: Path, target: str) -> None:
    """Make `link` a symbolic link to its sibling `target`, replacing an earlier one in one move."""
    temporary = link.with_name(link.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, link)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def _written_by_all(accelerator: Accelerator, target: Path) -> Iterator[Path]:
    """A temporary directory for all processes that becomes `target` when all have written."""
    temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
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


def _is_ours(path: Path) -> bool:
    patterns = (STATE_PATTERN, MODEL_PATTERN)
    return path.name in ("best", "last", *OWN_FILES) or any(pattern.fullmatch(path.name) for pattern in patterns)
