# SPDX-License-Identifier: Apache-2.0
"""AP against training time, as a picture; needs matplotlib."""

from pathlib import Path

import numpy as np

from ..output_files import atomic_path
from .report import ComparisonReport, budget_title
from .results import RunResult

METRICS = {"ap": "AP", "ap_small": "AP of small objects"}
GRID_POINTS = 200


def draw_curves(report: ComparisonReport, path: Path) -> None:
    """Write a PNG with AP and AP of small objects against training time, a row for each budget.

    Every run is a thin line; a model with several also has a thick one, their mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    budgets = report.budgets
    figure = Figure(figsize=(11, 0.6 + 4 * max(1, len(budgets))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(budgets)), len(METRICS), squeeze=False)
    colors = {name: f"C{index % 10}" for index, name in enumerate(report.models)}
    for row, budget in zip(axes, budgets, strict=False):
        runs = report.runs_of(budget)
        longest = max((run.seconds for run in runs), default=0.0)
        unit, divisor = ("minutes", 60.0) if longest >= 120 else ("seconds", 1.0)
        for axis, (metric, label) in zip(row, METRICS.items(), strict=True):
            for model, color in colors.items():
                curves = [curve_of(run, metric) for run in runs if run.model == model]
                curves = [(seconds / divisor, 100 * values) for seconds, values in curves if len(seconds)]
                if not curves:
                    continue
                for seconds, values in curves:
                    single = len(curves) == 1
                    axis.plot(
                        *(seconds, values),
                        color=color,
                        linewidth=2 if single else 0.8,
                        alpha=1 if single else 0.4,
                        marker="o",
                        markersize=4 if single else 2,
                        label=model if single else None,
                    )
                if len(curves) > 1:
                    axis.plot(*mean_curve(curves), color=color, linewidth=2, label=f"{model} (mean of {len(curves)})")
            axis.set_xlabel(f"training time ({unit}, evaluation excluded)")
            axis.set_ylabel(f"{label} (%)")
            axis.set_title(f"{label} ({budget_title(budget).lower()})")
            axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize="small")
            else:
                axis.text(0.5, 0.5, "nothing to show", transform=axis.transAxes, ha="center")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def curve_of(run: RunResult, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Seconds (n,) and values (n,) of the evaluations of a run, without those that had no such objects."""
    points = [(point.seconds, getattr(point, metric)) for point in run.curve if getattr(point, metric) >= 0]
    seconds, values = np.array(points, dtype=float).reshape(-1, 2).T
    return seconds, values


def mean_curve(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
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
