# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison: a table for each budget, as Markdown and as JSON."""

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ..errors import FAILURE_CODE
from ..jobs import markdown_table
from ..output_files import atomic_path, write_json
from .arguments import ComparisonOptions
from .results import RunResult, read_runs

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
SEARCH = "search"


@dataclass(frozen=True)
class ComparisonReport:
    """All runs in the output directory of a comparison that are finished or have failed.

    Attributes:
        models: Names in the order of the rows.
        runs: With trials of learning rates.
    """

    models: list[str]
    runs: list[RunResult]

    @property
    def budgets(self) -> list[str]:
        """Names of the sets of runs, equal times first."""
        return sorted({run.budget for run in self.runs} - {SEARCH})

    @property
    def failures(self) -> list[RunResult]:
        """Failed runs, and for models without a learning rate that works, their trials."""
        failed = [run for run in self.runs if run.failure is not None]
        works = {run.model for run in self.runs if run.failure is None}
        return [run for run in failed if run.budget != SEARCH or run.model not in works]

    def runs_of(self, budget: str, model: str | None = None) -> list[RunResult]:
        """Finished runs of a budget."""
        runs = [run for run in self.runs if run.budget == budget and run.failure is None]
        return [run for run in runs if model in (None, run.model)]

    def rows(self, budget: str) -> dict[str, dict[str, Any]]:
        """By model: its size, and means over its seeds; a metric without objects to find is `None`."""
        rows = {}
        for model in self.models:
            runs = sorted(self.runs_of(budget, model), key=lambda run: run.seed)
            if not runs:
                continue
            rows[model] = {
                "parameters": runs[0].facts["parameters"],
                "flops": runs[0].facts["flops"],
                "lr": runs[0].lr,
                "steps": mean(run.step for run in runs),
                "seconds": mean(run.seconds for run in runs),
                "images_per_second": sum(run.images for run in runs) / sum(run.seconds for run in runs),
                **{name: _mean_metric([run.metrics[name] for run in runs]) for name in METRICS},
                "ap_without_ema": _mean_metric([run.curve_without_ema[-1].ap for run in runs])
                if all(run.curve_without_ema for run in runs)
                else None,
                "ap_by_seed": {run.seed: _mean_metric([run.metrics["ap"]]) for run in runs},
            }
        return rows

    @property
    def commands(self) -> list[str]:
        """The command lines that did the runs, in the order in which they began."""
        runs = sorted(self.runs, key=lambda run: run.facts["started"])
        return list(dict.fromkeys(run.facts["command"] for run in runs))

    def machines(self, budget: str | None = None) -> list[dict[str, Any]]:
        """What the runs of a budget, or all, ran on: hardware, threads, versions of the software."""
        machines: list[dict[str, Any]] = []
        for run in self.runs:
            if budget in (None, run.budget) and run.facts["machine"] not in machines:
                machines.append(run.facts["machine"])
        return machines

    @property
    def exit_code(self) -> int:
        """Of the command."""
        return FAILURE_CODE if self.failures else 0

    def summary(self) -> str:
        """The report as text."""
        return self.markdown()

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain units (FLOPs, seconds, metrics as fractions)."""
        return {
            "commands": self.commands,
            "date": _today(),
            "machines": self.machines(),
            "tables": {budget: self.rows(budget) for budget in self.budgets},
            "failures": [{"run": _name(run), "error": run.failure} for run in self.failures],
            "runs": [dataclasses.asdict(run) | {"final_loss": _finite(run.final_loss)} for run in self.runs],
        }

    def markdown(self) -> str:
        """The report as text, with percentages."""
        lines = ["# Comparison", ""]
        for budget in self.budgets:
            lines += [f"## {budget_title(budget)}", "", self._table(budget), ""]
            if budget.startswith("minutes") and len(self.machines(budget)) > 1:
                lines += ["These runs did not have the same machine, threads or software; see below.", ""]
        if self.failures:
            lines += [
                "## Failed",
                "",
                *[f"- {_name(run)}: {' '.join((run.failure or '').split())}" for run in self.failures],
                "",
            ]
        if trials := [run for run in self.runs if run.budget == SEARCH]:
            lines += ["## Search for the learning rate", "", self._search_table(trials), ""]
        return "\n".join([*lines, "## How", "", *self._how()])

    def write(self, output_dir: Path) -> None:
        """Write `report.json` and `report.md`."""
        write_json(output_dir / "report.json", self.to_dict())
        with atomic_path(output_dir / "report.md") as temporary:
            picture = "![AP and AP of small objects against training time and steps](comparison.png)"
            temporary.write_text(f"{self.markdown()}\n\n{picture}\n", encoding="utf-8")

    def _table(self, budget: str) -> str:
        columns: dict[str, Callable[[dict[str, Any]], str]] = {
            "parameters (M)": lambda row: f"{row['parameters'] / 1e6:.2f}",
            "GFLOPs": lambda row: f"{row['flops'] / 1e9:.2f}",
            "lr": lambda row: f"{row['lr']:g}",
            "steps": lambda row: f"{row['steps']:.0f}",
            "seconds": lambda row: f"{row['seconds']:.0f}",
            "images/s": lambda row: f"{row['images_per_second']:.1f}",
            "AP": lambda row: _percent(row["ap"]),
            "AP without EMA": lambda row: _percent(row["ap_without_ema"]),
            "AP50": lambda row: _percent(row["ap50"]),
            "AP75": lambda row: _percent(row["ap75"]),
            "AP small": lambda row: _percent(row["ap_small"]),
            "AP medium": lambda row: _percent(row["ap_medium"]),
            "AP large": lambda row: _percent(row["ap_large"]),
            "AP by seed": lambda row: ", ".join(f"{seed}: {_percent(ap)}" for seed, ap in row["ap_by_seed"].items()),
        }
        if all(row["ap_without_ema"] is None for row in self.rows(budget).values()):
            del columns["AP without EMA"]
        rows = [[name, *(show(row) for show in columns.values())] for name, row in self.rows(budget).items()]
        return markdown_table(["model", *columns], rows)

    def _search_table(self, trials: list[RunResult]) -> str:
        rows, at_end = [], []
        for model in self.models:
            tried = sorted((run for run in trials if run.model == model), key=lambda run: run.lr)
            best = min((run for run in tried if run.failure is None), key=lambda run: run.rank, default=None)
            if best is not None and best in (tried[0], tried[-1]):
                at_end.append(model)
            for run in tried:
                if run.failure is not None:
                    rows.append([model, f"{run.lr:g}", str(run.seed), "", "", "failed", ""])
                    continue
                result = [f"{run.step}", f"{run.seconds:.0f}", _percent(run.metrics["ap"]), f"{run.final_loss:.3f}"]
                rate = f"**{run.lr:g}**" if run is best else f"{run.lr:g}"
                rows.append([model, rate, str(run.seed), *result])
        table = markdown_table(["model", "lr", "seed", "steps", "seconds", "AP", "final loss"], rows)
        notes = "By AP on the evaluation data; of equal APs, the one with the lower loss (mean of the last fifth)."
        if at_end:
            notes += f" The rate taken is the lowest or highest that was tried for {', '.join(at_end)}: try more."
        return f"{table}\n\n{notes}"

    def _how(self) -> list[str]:
        described = [run for run in self.runs if "training_images" in run.facts]
        lines = [*(f"    {command}" for command in self.commands), ""]
        for run in described[:1]:
            facts, settings = run.facts, run.facts["settings"]
            height = facts["image_size"]
            width = facts.get("image_width", height)
            fixed = settings.get("fixed_size") is not None
            size = f"all {height} x {width} pixels" if fixed else f"shortest edge {height}"
            ema = settings.get("ema_decay")
            lines += [
                f"- Data: {settings.get('annotations') or settings['dataset']}, {facts['training_images']} images of "
                f"{settings['train_split']} for training, {facts['evaluation_images']} of {_evaluated(settings)} for "
                "evaluation.",
                f"- Images: {settings['batch_size']} in a batch, {size}, augmentation {settings['augmentation']}.",
                f"- Learning rate: {settings['lr_scheduler']}, {settings['warmup_steps']} warm-up steps.",
                f"- Small, medium and large objects are divided at "
                f"{' and '.join(f'{edge:g}' for edge in settings['size_boundaries'])} pixels (the square root of the "
                f"area).",
                f"- GFLOPs: of matrix products and convolutions for one image of {height} x {width} pixels; a "
                f"multiplication with its addition is 2.",
                *([] if ema is None else [f"- Weights: their average, of which {ema:g} is kept in a step."]),
            ]
        seeds = sorted({run.seed for run in self.runs if run.budget != SEARCH})
        lines += [
            f"- Metrics: of the model at the end of training, in percent, means over the seeds "
            f"({', '.join(map(str, seeds))}). Times are those of training, without evaluations.",
            *[
                f"- Machine: {', '.join(f'{name} {value}' for name, value in machine.items() if value is not None)}."
                for machine in self.machines()
            ],
            f"- Date: {_today()}.",
        ]
        return lines


def make_report(options: ComparisonOptions) -> ComparisonReport:
    """Report on all that is in the output directory; models that are not in `options` come last."""
    runs = read_runs(options.output_dir)
    models = [model.name for model in options.models]
    return ComparisonReport([*models, *sorted({run.model for run in runs} - set(models))], runs)


def _mean_metric(values: list[float]) -> float | None:
    """Mean of a metric, which is -1 where there was nothing to find."""
    return None if min(values) < 0 else mean(values)


def _percent(value: float | None) -> str:
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def budget_title(budget: str) -> str:
    kind, _, amount = budget.partition("-")
    return {"minutes": f"Equal time: {amount} minutes", "steps": f"Equal steps: {amount}"}[kind]


def _name(run: RunResult) -> str:
    which = f"lr {run.lr:g}" if run.budget == SEARCH else f"seed {run.seed}"
    return f"{run.model}, {run.budget}, {which}"


def _today() -> str:
    return datetime.date.today().isoformat()


def _evaluated(settings: Mapping[str, Any]) -> str:
    """What was evaluated on, in words: a split of its own, or a part of the one that was trained on."""
    if settings.get("val_fraction") is not None:
        return f"the same split (a part of {settings['val_fraction']:g})"
    if settings.get("val_list") or settings.get("train_list"):
        return "the same split (by a list)"
    return str(settings.get("val_annotations") or settings["eval_split"])
