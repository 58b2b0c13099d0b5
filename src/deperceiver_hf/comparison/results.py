# SPDX-License-Identifier: Apache-2.0
"""What a run of a comparison has left in its directory."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.run_directory import RunDirectory

RUN_FILE = "run.json"
FAILURE_FILE = "failure.json"


@dataclass(frozen=True)
class CurvePoint:
    """An evaluation: after how much training, and what came out (as a fraction, -1 without such objects)."""

    step: int
    seconds: float
    ap: float
    ap_small: float


@dataclass(frozen=True)
class RunResult:
    """A finished or failed run.

    Attributes:
        budget: Name of the set of runs it belongs to; `"search"` for a trial of a learning rate.
        facts: What `run.json` holds: settings, size of the model and of the data, machine.
        failure: Why it failed; `None` if it is finished.
        step: Optimizer steps done.
        seconds: Of training, evaluations excluded.
        images: Seen in training.
        metrics: Of the model at the end; empty if it failed.
        final_loss: Mean over the last fifth of the steps.
        curve: All evaluations, in order.
        curve_without_ema: The same of the weights without their average; empty if these were not evaluated.
    """

    budget: str
    model: str
    seed: int
    lr: float
    facts: dict[str, Any]
    failure: str | None = None
    step: int = 0
    seconds: float = 0.0
    images: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    final_loss: float = math.inf
    curve: tuple[CurvePoint, ...] = ()
    curve_without_ema: tuple[CurvePoint, ...] = ()

    @property
    def rank(self) -> tuple[float, float]:
        """Less is better: by AP, and by loss among equals."""
        return -self.metrics["ap"], self.final_loss


def read_run(directory: Path) -> RunResult:
    """The result of a run that is finished or has failed."""
    facts = _read_json(directory / RUN_FILE)
    settings = facts["settings"]
    identity = {
        "budget": directory.parent.parent.name,
        "model": facts["model"],
        "seed": settings["seed"],
        "lr": settings["lr"],
        "facts": facts,
    }
    training = RunDirectory(directory)
    if not training.is_finished:
        return RunResult(**identity, failure=_read_json(directory / FAILURE_FILE)["error"])
    summary = _read_json(training.summary)
    lines = [json.loads(line) for line in training.log.read_text(encoding="utf-8").splitlines()]
    return RunResult(
        **identity,
        step=summary["step"],
        seconds=summary["seconds"],
        images=_count_images(summary["step"], facts["batches_per_epoch"], settings),
        metrics=summary["metrics"],
        final_loss=_final_loss([line for line in lines if line["kind"] == "train"]),
        curve=_curve(lines, "eval"),
        curve_without_ema=_curve(lines, "eval_without_ema"),
    )


def read_runs(output_dir: Path) -> list[RunResult]:
    """Results of all runs of a comparison that are finished or have failed, trials of learning rates included."""
    directories = sorted(path.parent for path in output_dir.glob(f"runs/*/*/*/{RUN_FILE}"))
    return [read_run(path) for path in directories if RunDirectory(path).is_finished or (path / FAILURE_FILE).exists()]


def _curve(lines: list[dict[str, Any]], kind: str) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(line["step"], line["seconds"], line["ap"], line["ap_small"])
        for line in lines
        if line["kind"] == kind
    )


def _count_images(step: int, batches_per_epoch: int, settings: dict[str, Any]) -> int:
    """Images in the first steps; the last step of an epoch may accumulate fewer batches."""
    accumulated = settings["gradient_accumulation_steps"]
    epochs, steps = divmod(step, -(-batches_per_epoch // accumulated))
    return (epochs * batches_per_epoch + steps * accumulated) * settings["batch_size"]


def _final_loss(lines: list[dict[str, Any]]) -> float:
    """Mean loss of the log lines that end in the last fifth of the run, weighted by steps."""
    total = weights = 0.0
    before = 0
    for line in lines:
        if line["step"] > 0.8 * lines[-1]["step"]:
            steps = line["step"] - before
            total += steps * (math.inf if line["loss"] is None else line["loss"])
            weights += steps
        before = line["step"]
    return total / weights if weights else math.inf


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
