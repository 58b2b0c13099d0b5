# SPDX-License-Identifier: Apache-2.0
"""The numbers of a training run: averaged over steps and processes, to a file, to trackers and to the progress bar."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import INTERRUPTED_CODE
from ..output_files import atomic_path
from .checkpoints import TrainingProgress

SHOWN = ("loss", "loss_ce", "loss_class", "loss_vfl", "loss_bbox", "loss_giou")  # by the progress bar


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        interrupted: It was asked to stop and can be resumed from `state`.
        state: Directory of the newest training state.
        step: Optimizer steps done.
        epoch: Epochs done.
        best_ap: The highest AP of all evaluations; `None` if there was none.
        best_model: Directory of the model that reached it; `None` if none was kept.
        last_model: Directory of the model at the end; `None` if interrupted.
        metrics: Of the last evaluation.
        seconds: Spent training, over all resumptions.
        stopped_early: The AP had ceased to improve, see `--early_stopping_patience`.
    """

    interrupted: bool
    state: str
    step: int
    epoch: int
    best_ap: float | None
    best_model: str | None
    last_model: str | None
    metrics: dict[str, float]
    seconds: float
    stopped_early: bool = False

    @property
    def exit_code(self) -> int:
        """Of the command."""
        return INTERRUPTED_CODE if self.interrupted else 0

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """A few lines for the user."""
        done = f"{self.step} steps ({self.epoch} epochs) in {self.seconds:.0f} s"
        if self.interrupted:
            return f"Interrupted after {done}. The state is in {self.state}: go on with --resume auto."
        why = ", fewer than allowed because the AP had ceased to improve" if self.stopped_early else ""
        lines = [f"Trained {done}{why}."]
        if self.best_ap is not None:
            lines.append(f"Best AP {100 * self.best_ap:.2f}: {self.best_model}")
        elif self.metrics:
            lines.append("No best model: there was no object to evaluate on, or none is kept.")
        return "\n".join([*lines, f"Last model: {self.last_model}"])


class TrainingLog:
    """Collects numbers on the device and fetches them once for each line of the log.

    The file has two kinds of lines. `"kind": "train"`: `step` (optimizer steps done), `epoch` (a fraction),
    `loss` and its terms, `grad_norm` (before clipping), learning rates, `images_per_second` and `seconds` of training;
    the losses and the norm are means since the line before, over all processes. `"kind": "eval"`: `step`, `epoch`,
    `seconds` of training and the COCO metrics; of the weights without their average in lines of the kind
    `"eval_without_ema"`, if asked for.

    Args:
        accelerator: With trackers, if there are any.
        path: Of the file.
        resumed_from: What a resumed run starts from; later lines of the file are taken back.

    Attributes:
        shown: What the progress bar shows of the last line.
    """

    def __init__(self, accelerator: Accelerator, path: Path, resumed_from: TrainingProgress | None = None):
        self.accelerator = accelerator
        self.path = path
        self.shown: dict[str, str] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._images = 0
        self._since = time.perf_counter()
        if resumed_from is not None and accelerator.is_main_process and self.path.exists():
            self._take_back(resumed_from)

    def add(self, values: dict[str, torch.Tensor], images: int = 0) -> None:
        """Add numbers of this process, without waiting for the device; those that are not finite do not count."""
        for name, value in values.items():
            value = value.detach().float()
            finite = value.isfinite()
            zero = torch.zeros_like(value)
            self._sums[name] = self._sums.get(name, zero) + torch.where(finite, value, zero)
            self._counts[name] = self._counts.get(name, zero) + finite
        self._images += images

    def write_training(self, progress: TrainingProgress, epoch: float, rates: dict[str, float]) -> None:
        """Write the means since the last line; every process must call this."""
        if not self._sums:
            return
        names = sorted(self._sums)
        sums = torch.stack([torch.stack([self._sums[name], self._counts[name]]) for name in names])
        sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        means = {name: total / count if count else None for name, (total, count) in zip(names, sums, strict=True)}
        now = time.perf_counter()
        speed = self._images * self.accelerator.num_processes / max(now - self._since, 1e-9)
        self._sums, self._counts, self._images, self._since = {}, {}, 0, now
        self._write(
            "train",
            progress,
            {"epoch": round(epoch, 4), **means, **rates, "images_per_second": speed, "seconds": progress.seconds},
        )
        shown = {name: means[name] for name in SHOWN if name in means} | rates | {"images/s": speed}
        self.shown = {name: f"{value:.3g}" for name, value in shown.items() if value is not None}

    def write_evaluation(
        self, progress: TrainingProgress, epoch: float, metrics: dict[str, float], kind: str = "eval"
    ) -> None:
        """Write the metrics of an evaluation."""
        self._write(kind, progress, {"epoch": epoch, "seconds": progress.seconds, **metrics})
        self._since = time.perf_counter()

    def _write(self, kind: str, progress: TrainingProgress, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": progress.step, **values}) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        self.accelerator.log(numbers, step=progress.step)

    def _take_back(self, progress: TrainingProgress) -> None:
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written when the run was killed
                continue
            if entry["step"] <= (progress.step if entry["kind"] == "train" else progress.closed_step):
                kept.append(line + "\n")
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
