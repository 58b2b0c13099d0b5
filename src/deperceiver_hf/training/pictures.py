# SPDX-License-Identifier: Apache-2.0
"""What a user looks at while a run goes on: curves of losses and AP, and predictions beside the truth.

    curves.png              losses, learning rate and AP by step, from the run's own log
    predictions/latest.jpg  the same validation images as annotated and as detected at the latest evaluation
    predictions/best.jpg    the same at the evaluation of the highest AP

All are drawn on the main process, after each evaluation, and change nothing in the run: what cannot be drawn is a
warning. Trackers that take pictures get the predictions, too.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image

from ..data.records import DetectionData
from ..drawing import contact_sheet_rows, draw_contact_sheet
from ..errors import one_line
from ..evaluation.evaluator import EvaluationResult
from ..output_files import atomic_path
from .run_directory import PREDICTIONS, RunDirectory

logger = get_logger(__name__)

THRESHOLD = 0.3  # least score of a detection that is drawn: lower than usual, to see what is about to be learned
JPEG_QUALITY = 85
LARGEST_LOSSES = 8  # terms in the plot


class RunPictures:
    """Draws a run.

    Args:
        accelerator: With trackers, if there are any.
        run_directory: Where the pictures go.
        data: The evaluations' data; `None` if there are none.
        count: How many of its images are drawn, evenly spaced; 0 draws nothing at all, the curves neither.
    """

    def __init__(self, accelerator: Accelerator, run_directory: RunDirectory, data: DetectionData | None, count: int):
        self.accelerator, self.run_directory = accelerator, run_directory
        self.active = count > 0 and accelerator.is_main_process
        self._shown: DetectionData | None = None
        if self.active and data is not None:
            places = np.unique(np.linspace(0, len(data.dataset) - 1, count).round().astype(int))
            self._shown = replace(data, dataset=data.dataset.select(places.tolist()))
        self._failed: set[str] = set()

    def draw_predictions(self, result: EvaluationResult, step: int, *, best: bool) -> None:
        """Draw what an evaluation found, in `latest.jpg`, and in `best.jpg` if it is the best one."""
        if not self.active or self._shown is None or not result.num_images:
            return
        with self._never_stopping_the_run("predictions"):
            shown = self._shown
            own_ids = [shown.own_image_id(image_id) for image_id in shown.dataset.with_format(None)["image_id"]]
            readable = [place for place, own_id in enumerate(own_ids) if own_id not in result.left_out]
            shown = replace(shown, dataset=shown.dataset.select(readable))
            found = [p for p in result.predictions if p["score"] >= THRESHOLD and p["image_id"] in own_ids]
            rows = contact_sheet_rows(shown, found, threshold=THRESHOLD, max_images=len(shown.dataset))
            sheet = draw_contact_sheet(rows, shown.label_names)
            self.run_directory.predictions.mkdir(exist_ok=True)
            for name in PREDICTIONS if best else PREDICTIONS[:1]:
                with atomic_path(self.run_directory.predictions / name) as temporary:
                    sheet.save(temporary, quality=JPEG_QUALITY)
            for tracker in self.accelerator.trackers:
                _send(sheet, tracker, step)

    def draw_curves(self) -> None:
        """Draw all that the log knows."""
        if not self.active:
            return
        with self._never_stopping_the_run("curves"):
            lines = [json.loads(line) for line in self.run_directory.log.read_text(encoding="utf-8").splitlines()]
            figure = make_curves(lines)
            if figure is not None:
                with atomic_path(self.run_directory.curves) as temporary:
                    figure.savefig(temporary)

    @contextmanager
    def _never_stopping_the_run(self, what: str) -> Iterator[None]:
        """Turn an error into a warning, once for each kind of picture."""
        try:
            yield
        except Exception as error:  # of drawing, fonts, disks and trackers
            if what not in self._failed:
                self._failed.add(what)
                logger.warning(
                    f"The {what} could not be drawn, the training goes on: {type(error).__name__}: {one_line(error)}"
                )


def _send(sheet: Image.Image, tracker: Any, step: int) -> None:
    """Give a picture to a tracker of accelerate's, if it takes any."""
    match tracker.name:
        case "tensorboard":
            tracker.log_images({"predictions": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
        case "mlflow":
            import mlflow

            mlflow.log_image(sheet, key="predictions", step=step)
        case "trackio":
            import trackio

            tracker.log({"predictions": trackio.Image(sheet)}, step=step)
        case _ if hasattr(tracker, "log_images"):
            tracker.log_images({"predictions": [np.asarray(sheet)]}, step=step)


def make_curves(lines: list[dict[str, Any]]) -> Any:
    """A figure of the lines of a log (see `TrainingLog`), or `None` if there is nothing to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    training = [line for line in lines if line["kind"] == "train"]
    if not training:
        return None
    try:
        from matplotlib.figure import Figure  # without pyplot, whose state is the program's
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install deperceiver-hf[drawing]") from error
    figure = Figure(figsize=(10, 7), dpi=100, layout="constrained")
    losses, accuracy, rates, gradient = figure.subplots(2, 2).flat
    # Auxiliary terms (loss_bbox_0, ...) are as many as layers; the last layer's have no number.
    terms = [name for name in training[-1] if name.startswith("loss") and not name.rpartition("_")[2].isdigit()]
    terms.sort(key=lambda name: (name != "loss", -abs(training[-1][name] or 0.0), name))
    for name in terms[:LARGEST_LOSSES]:
        _plot(losses, training, name, linewidth=2 if name == "loss" else 1)
    losses.set_yscale("log")
    for kind, style in (("eval", "-"), ("eval_without_ema", ":")):
        evaluations = [line for line in lines if line["kind"] == kind]
        for number, name in enumerate(("ap", "ap50", "ap75")):
            label = name if kind == "eval" else f"{name} without average"
            _plot(accuracy, evaluations, name, label, linestyle=style, marker=".", color=f"C{number}", scale=100)
    for name in ("lr", "lr_backbone"):
        _plot(rates, training, name)
    _plot(gradient, training, "grad_norm")
    gradient.set_yscale("log")
    titles = ("losses", "AP (%)", "learning rate", "norm of the gradient before clipping")
    for axes, title in zip((losses, accuracy, rates, gradient), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer steps", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7, loc="best")
    return figure


def _plot(
    axes: Any, lines: list[dict[str, Any]], name: str, label: str | None = None, scale: float = 1.0, **style: Any
) -> None:
    """One number of the log by steps; lines that lack it, and APs of -1 for nothing to find, leave a gap out."""
    points = [
        (line["step"], scale * line[name])
        for line in lines
        if line.get(name) is not None and not (name.startswith("ap") and line[name] < 0)
    ]
    if points:
        axes.plot(*zip(*points, strict=True), label=label or name, **style)
