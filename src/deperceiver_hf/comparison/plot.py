# SPDX-License-Identifier: Apache-2.0
"""AP against training time and steps, as a picture; needs matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np

from ..output_files import atomic_path
from .report import ComparisonReport, budget_title
from .results import RunResult

METRICS = {"ap": "AP", "ap_small": "AP of small objects"}
PROGRESS = ("seconds", "step")  # what the curves are drawn against, a row of pictures for each
GRID_POINTS = 200

Curve = tuple[np.ndarray, np.ndarray]


def draw_curves(report: ComparisonReport, path: Path) -> None:
    """Write a PNG with AP and AP of small objects against training time and against steps, for each budget.

    Every run is a thin line; a model with several also has a thick one, their mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [(budget, progress) for budget in report.budgets or [""] for progress in PROGRESS]
    figure = Figure(figsize=(11, 0.6 + 4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (budget, progress) in zip(figure.subplots(len(rows), len(METRICS), squeeze=False), rows, strict=True):
        for axis, metric in zip(axes, METRICS, strict=True):
            _draw(axis, report, budget, progress, metric)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _draw(axis: Any, report: ComparisonReport, budget: str, progress: str, metric: str) -> None:
    """One picture: a metric of all models of a budget."""
    runs, label = report.runs_of(budget), METRICS[metric]
    unit, divisor = "optimizer steps", 1.0
    if progress == "seconds":
        long = max((run.seconds for run in runs), default=0.0) >= 120
        unit = f"training time ({'minutes' if long else 'seconds'}, evaluation excluded)"
        divisor = 60.0 if long else 1.0
    for index, model in enumerate(report.models):
        color = f"C{index % 10}"
        curves = [curve_of(run, metric, progress) for run in runs if run.model == model]
        curves = [(positions / divisor, 100 * values) for positions, values in curves if len(positions)]
        single = len(curves) == 1
        look = {"linewidth": 2, "markersize": 4} if single else {"linewidth": 0.8, "markersize": 2, "alpha": 0.4}
        for curve in curves:
            axis.plot(*curve, color=color, marker="o", label=model if single else None, **look)
        if len(curves) > 1:
            axis.plot(*mean_curve(curves), color=color, linewidth=2, label=f"{model} (mean of {len(curves)})")
    axis.set_xlabel(unit)
    axis.set_ylabel(f"{label} (%)")
    axis.set_title(f"{label} ({budget_title(budget).lower()})" if budget else label)
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize="small")
    else:
        axis.text(0.5, 0.5, "nothing to show", transform=axis.transAxes, ha="center")


def curve_of(run: RunResult, metric: str, progress: str = "seconds") -> Curve:
    """Seconds or steps (n,) and values (n,) of the evaluations of a run, without those that had no such objects."""
    points = [(getattr(point, progress), getattr(point, metric)) for point in run.curve if getattr(point, metric) >= 0]
    positions, values = np.array(points, dtype=float).reshape(-1, 2).T
    return positions, values


def mean_curve(curves: list[Curve]) -> Curve:
    """Times and mean values of several curves.

    Curves of equally many evaluations are averaged one by one, in time too; others are interpolated, from where the
    last begins to where the first ends.
    """
    if len({len(seconds) for seconds, _ in curves}) == 1:
        seconds, values = np.mean(curves, axis=0)
        return seconds, values
    start, end = max(seconds[0] for seconds, _ in curves), min(seconds[-1] for seconds, _ in curves)
    grid = np.linspace(start, max(start, end), GRID_POINTS)
    return grid, np.mean([np.interp(grid, *curve) for curve in curves], axis=0)
