# SPDX-License-Identifier: Apache-2.0
"""Compare DePerceiver with DETR: `cost` counts FLOPs, activations and parameters, `time` measures forward passes."""

import argparse
import sys

from deperceiver_hf.benchmark import (
    DTYPES,
    TIMED_BY_DEFAULT,
    BenchmarkReport,
    check_output,
    compare_costs,
    compare_times,
)
from deperceiver_hf.variants import DEFAULT_NUM_LATENTS, VARIANT_NAMES


def make_parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--height", type=int, default=800, help="Of the image, in pixels (%(default)s).")
    shared.add_argument("--width", type=int, default=800, help="Of the image, in pixels (%(default)s).")
    shared.add_argument("--num_latents", type=int, default=DEFAULT_NUM_LATENTS, help="Of DePerceiver (%(default)s).")
    shared.add_argument("--backbone", default="resnet50", help="Name of a timm model, for all (%(default)s).")
    shared.add_argument("--output", help="Write the report to this .json or .md file, too.")

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{cost,time}")
    names = f"Any of {', '.join(VARIANT_NAMES)}"
    cost = modes.add_parser(
        "cost",
        parents=[shared],
        allow_abbrev=False,
        help="count for one image, without weights and in seconds",
        description="Count FLOPs (a multiplication with its addition is 2), activations and parameters.",
    )
    cost.add_argument("--models", nargs="+", default=list(VARIANT_NAMES), metavar="NAME", help=f"{names} (all).")
    timing = modes.add_parser(
        "time",
        parents=[shared],
        allow_abbrev=False,
        help="measure latency and, on CUDA, peak memory",
        description="Measure forward passes with random weights. The models take turns, so that noise hits all alike.",
    )
    timing.add_argument(
        "--models",
        nargs="+",
        default=list(TIMED_BY_DEFAULT),
        metavar="NAME",
        help=f"{names}; the others are compared with the first ({' '.join(TIMED_BY_DEFAULT)}).",
    )
    timing.add_argument("--batch_size", type=int, default=1, help="Images in a pass (%(default)s).")
    timing.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s).")
    timing.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="Of weights and images (%(default)s)."
    )
    timing.add_argument("--attn_implementation", default="sdpa", help="sdpa, eager, ... (%(default)s).")
    timing.add_argument("--compile", action="store_true", help="Compile the models with torch.compile.")
    timing.add_argument("--warmup", type=int, default=2, help="Passes that do not count (%(default)s).")
    timing.add_argument("--repeats", type=int, default=10, help="Passes that count (%(default)s).")
    return parser


def make_report(parser: argparse.ArgumentParser) -> BenchmarkReport:
    options = vars(parser.parse_args())
    compare = {"cost": compare_costs, "time": compare_times}[options.pop("mode")]
    output = options.pop("output")
    try:
        if output is not None:
            check_output(output)
        report = compare(**options)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if output is not None:
        report.write(output)
    return report


def main() -> int:
    print(make_report(make_parser()).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
