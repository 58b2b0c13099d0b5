# SPDX-License-Identifier: Apache-2.0
"""The command that compares costs: counted, measured, or against the number of tokens or of objects."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import cost, crowds, scaling, timing
from .report import BenchmarkReport, check_output
from .variants import DEFAULT_NUM_LATENTS, VARIANT_NAMES

COMPARISONS: dict[str, Callable[..., BenchmarkReport]] = {
    "cost": cost.compare_costs,
    "time": timing.compare_times,
    "scaling": scaling.compare_scaling,
    "crowds": crowds.compare_crowds,
}
EXAMPLE = """examples:
  deperceiver benchmark cost --height 800 --width 1333
  deperceiver benchmark time --models detr-16 deperceiver-v2-base --device cuda
  deperceiver benchmark scaling --sizes 256 512 --output scaling.md --figure scaling.png
  deperceiver benchmark crowds --objects 50 200 1000"""


@dataclass(frozen=True)
class BenchmarkJob:
    """A comparison whose files can be written.

    Attributes:
        mode: `"cost"`, `"time"`, `"scaling"` or `"crowds"`.
        options: Arguments of the function in [`COMPARISONS`].
        output: File for the report; `None` for none.
        figure: File for a picture of it; `None` for none.
    """

    mode: str
    options: dict[str, Any]
    output: str | None
    figure: str | None

    def run(self) -> BenchmarkReport:
        """Compare, and write the files."""
        report = COMPARISONS[self.mode](**self.options)
        if self.output is not None:
            report.write(self.output)
        if self.figure is not None:
            scaling.draw_scaling(report, self.figure)
        return report


def prepare(arguments: argparse.Namespace) -> BenchmarkJob:
    """The comparison that was asked for; raises what `check_output` and `check_figure` raise."""
    options = dict(vars(arguments))
    job = BenchmarkJob(options.pop("mode"), options, options.pop("output"), options.pop("figure", None))
    if job.output is not None:
        check_output(job.output)
    if job.figure is not None:
        scaling.check_figure(job.figure)
    return job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make the parser that of this command."""
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument(
        "--num_latents", type=int, default=DEFAULT_NUM_LATENTS, help="Of the first DePerceiver (%(default)s)."
    )
    shared.add_argument(
        "--backbone",
        help="Name of a timm model, for all but lw-detr and rf-detr, which have one of their own (resnet50, and each "
        "preset of DePerceiver v2 its own).",
    )
    shared.add_argument("--output", help="Write the report to this .json or .md file, too.")
    image = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    image.add_argument("--height", type=int, default=800, help="Of the image, in pixels (%(default)s).")
    image.add_argument("--width", type=int, default=800, help="Of the image, in pixels (%(default)s).")

    parser.description = (
        "Compare DePerceiver with DETR: `cost` counts FLOPs, activations, memory and parameters, `time` measures\n"
        "forward passes, `scaling` shows what follows the backbone against the number of tokens, and `crowds` what a\n"
        "training step takes against the number of objects."
    )
    parser.epilog = EXAMPLE
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{cost,time,scaling,crowds}")
    names = f"Any of {', '.join(VARIANT_NAMES)}"
    counted = modes.add_parser(
        "cost",
        parents=[image, shared],
        allow_abbrev=False,
        help="count for one image, without weights and in seconds",
        description="Count FLOPs (a multiplication with its addition is 2), activations, memory and parameters.",
    )
    counted.add_argument("--models", nargs="+", metavar="NAME", help=f"{names} (all that take the size).")
    timed = modes.add_parser(
        "time",
        parents=[image, shared],
        allow_abbrev=False,
        help="measure latency and, on CUDA, peak memory",
        description="Measure forward passes with random weights. The models take turns, so that noise hits all alike.",
    )
    timed.add_argument(
        "--models",
        nargs="+",
        default=list(timing.TIMED_BY_DEFAULT),
        metavar="NAME",
        help=f"{names}; the others are compared with the first ({' '.join(timing.TIMED_BY_DEFAULT)}).",
    )
    timed.add_argument("--batch_size", type=int, default=1, help="Images in a pass (%(default)s).")
    timed.add_argument(
        "--dtype", choices=list(timing.DTYPES), default="float32", help="Of weights and images (%(default)s)."
    )
    timed.add_argument("--attn_implementation", default="sdpa", help="sdpa, eager, ... (%(default)s).")
    timed.add_argument("--compile", action="store_true", help="Compile the models with torch.compile.")
    growth = modes.add_parser(
        "scaling",
        parents=[shared],
        allow_abbrev=False,
        help="count and measure what follows the backbone for several image sizes",
        description="FLOPs and memory (counted) and seconds (measured) against the number of tokens.",
    )
    growth.add_argument(
        "--models", nargs="+", default=list(scaling.SCALED_BY_DEFAULT), metavar="NAME", help=f"{names} (%(default)s)."
    )
    growth.add_argument(
        "--timed",
        nargs="*",
        default=list(scaling.TIMED_BY_DEFAULT),
        metavar="NAME",
        help="Those of the models that are timed; none: count only (%(default)s).",
    )
    growth.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=list(scaling.DEFAULT_SIZES),
        metavar="SIDE",
        help="Sides of the square images, in pixels (%(default)s).",
    )
    growth.add_argument("--figure", help="Draw the report in this .png file, too.")
    crowded = modes.add_parser(
        "crowds",
        allow_abbrev=False,
        help="measure a training step for several numbers of objects",
        description="Seconds and peak memory of a training step, and its matching alone, against the objects.",
    )
    crowded.add_argument(
        "--model",
        default=crowds.CROWDED_BY_DEFAULT,
        metavar="NAME",
        help=f"{', '.join(crowds.CROWDED)} (%(default)s).",
    )
    crowded.add_argument(
        "--objects",
        nargs="+",
        type=int,
        default=list(crowds.DEFAULT_OBJECTS),
        metavar="N",
        help="Objects in every image (%(default)s).",
    )
    crowded.add_argument("--height", type=int, default=320, help="Of the images, in pixels (%(default)s).")
    crowded.add_argument("--width", type=int, default=320, help="Of the images, in pixels (%(default)s).")
    crowded.add_argument("--batch_size", type=int, default=4, help="Images in a step (%(default)s).")
    crowded.add_argument("--backbone", help="Name of a timm model (that of the preset).")
    crowded.add_argument("--output", help="Write the report to this .json or .md file, too.")
    for mode, warmup, repeats in ((timed, 2, 10), (growth, 1, 3), (crowded, 1, 3)):
        mode.add_argument("--device", default="cpu", help="auto, cpu, cuda:1, mps, ... (%(default)s).")
        mode.add_argument("--warmup", type=int, default=warmup, help="Passes that do not count (%(default)s).")
        mode.add_argument("--repeats", type=int, default=repeats, help="Passes that count (%(default)s).")
