# SPDX-License-Identifier: Apache-2.0
"""Compare DePerceiver with DETR: `cost` counts FLOPs, activations, memory and parameters, `time` measures forward
passes, `scaling` shows what follows the backbone against the number of tokens."""

import argparse
import sys

from deperceiver_hf.benchmarks import cost, scaling
from deperceiver_hf.benchmarks import timing as forward_timing
from deperceiver_hf.benchmarks.report import BenchmarkReport, check_output
from deperceiver_hf.benchmarks.variants import DEFAULT_NUM_LATENTS, VARIANT_NAMES


def make_parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument(
        "--num_latents", type=int, default=DEFAULT_NUM_LATENTS, help="Of the first DePerceiver (%(default)s)."
    )
    shared.add_argument(
        "--backbone", help="Name of a timm model, for all (resnet50, and each preset of DePerceiver v2 its own)."
    )
    shared.add_argument("--output", help="Write the report to this .json or .md file, too.")
    image = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    image.add_argument("--height", type=int, default=800, help="Of the image, in pixels (%(default)s).")
    image.add_argument("--width", type=int, default=800, help="Of the image, in pixels (%(default)s).")

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{cost,time,scaling}")
    names = f"Any of {', '.join(VARIANT_NAMES)}"
    cost = modes.add_parser(
        "cost",
        parents=[image, shared],
        allow_abbrev=False,
        help="count for one image, without weights and in seconds",
        description="Count FLOPs (a multiplication with its addition is 2), activations, memory and parameters.",
    )
    cost.add_argument("--models", nargs="+", default=list(VARIANT_NAMES), metavar="NAME", help=f"{names} (all).")
    timing = modes.add_parser(
        "time",
        parents=[image, shared],
        allow_abbrev=False,
        help="measure latency and, on CUDA, peak memory",
        description="Measure forward passes with random weights. The models take turns, so that noise hits all alike.",
    )
    timed = forward_timing.TIMED_BY_DEFAULT
    timing.add_argument(
        "--models",
        nargs="+",
        default=list(timed),
        metavar="NAME",
        help=f"{names}; the others are compared with the first ({' '.join(timed)}).",
    )
    timing.add_argument("--batch_size", type=int, default=1, help="Images in a pass (%(default)s).")
    timing.add_argument(
        "--dtype", choices=list(forward_timing.DTYPES), default="float32", help="Of weights and images (%(default)s)."
    )
    timing.add_argument("--attn_implementation", default="sdpa", help="sdpa, eager, ... (%(default)s).")
    timing.add_argument("--compile", action="store_true", help="Compile the models with torch.compile.")
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
    for mode, warmup, repeats in ((timing, 2, 10), (growth, 1, 3)):
        mode.add_argument("--device", default="cpu", help="auto, cpu, cuda:1, mps, ... (%(default)s).")
        mode.add_argument("--warmup", type=int, default=warmup, help="Passes that do not count (%(default)s).")
        mode.add_argument("--repeats", type=int, default=repeats, help="Passes that count (%(default)s).")
    return parser


def make_report(parser: argparse.ArgumentParser) -> BenchmarkReport:
    options = vars(parser.parse_args())
    modes = {"cost": cost.compare_costs, "time": forward_timing.compare_times, "scaling": scaling.compare_scaling}
    compare = modes[options.pop("mode")]
    output, figure = options.pop("output"), options.pop("figure", None)
    try:
        if output is not None:
            check_output(output)
        if figure is not None:
            scaling.check_figure(figure)
        report = compare(**options)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if output is not None:
        report.write(output)
    if figure is not None:
        scaling.draw_scaling(report, figure)
    return report


def main() -> int:
    print(make_report(make_parser()).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
