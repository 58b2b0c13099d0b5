# SPDX-License-Identifier: Apache-2.0
"""Detect objects on images: one JSON file for all, and a picture with the detections for each.

Exit codes: 0, all files were looked at; 1, some could not be (they are listed, and in the JSON under `errors`);
2, nothing was done because of the arguments; 130, interrupted (the JSON holds what was done).
"""

import argparse
import sys

from deperceiver_hf.prediction import prepare_prediction


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="Image, directory (recursive) or glob pattern.")
    parser.add_argument(
        "--model", required=True, help="Directory of a saved model with its image processor, or Hub id."
    )
    parser.add_argument("--output_dir", required=True, help="Directory for predictions.json and annotated/.")
    parser.add_argument("--threshold", type=float, default=0.5, help="Lowest score of a detection (%(default)s).")
    parser.add_argument("--batch_size", type=int, default=4, help="Images of one size at a time (%(default)s).")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:1, mps, ... (%(default)s).")
    parser.add_argument("--no_draw", dest="draw", action="store_false", help="Write no pictures.")
    arguments = parser.parse_args()
    try:
        arguments.job = prepare_prediction(**vars(arguments))
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return arguments


def main() -> int:
    job = parse_arguments().job
    report = job.run()
    print(report.summary())
    print(f"Results: {job.json_path}")
    if not report.complete:
        return 130
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
