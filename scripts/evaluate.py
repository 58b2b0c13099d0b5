# SPDX-License-Identifier: Apache-2.0
"""Evaluate a saved detector: print the COCO numbers, write them as JSON, and the detections in COCO's result format.

Starts plainly, by `accelerate launch` or by `torchrun`, with the same figures. Ends with code 2 and nothing done if
the arguments make no sense.
"""

import argparse

from deperceiver_hf.evaluation.job import prepare_evaluation


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--model", required=True, help="Directory of a saved model with its image processor, or Hub id."
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="Directory in COCO's layout, Hub id or local `datasets` directory, or `synthetic`, also with options: "
        "`synthetic:image_size=128,min_objects=2,max_objects=6,num_samples=500,seed=3`.",
    )
    parser.add_argument("--split", default="val", help="Split of the data set (%(default)s).")
    parser.add_argument("--output", required=True, help="JSON file for the results.")
    parser.add_argument("--predictions", help="JSON file for the detections (OUTPUT with `_predictions`).")
    parser.add_argument("--batch_size", type=int, default=8, help="Images of a process in memory (%(default)s).")
    parser.add_argument("--num_workers", type=int, default=2, help="Loading processes per process (%(default)s).")
    parser.add_argument("--max_samples", type=int, help="Evaluate the first images only.")
    parser.add_argument(
        "--mixed_precision",
        choices=("auto", "no", "fp16", "bf16"),
        default="auto",
        help="auto: what is fast here (%(default)s).",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:1, mps, ... (%(default)s).")
    parser.add_argument(
        "--max_detections",
        type=int,
        nargs="+",
        default=[1, 10, 100],
        help="Detections per image and class to score; AP at the last number (1 10 100).",
    )
    parser.add_argument(
        "--size_boundaries",
        type=float,
        nargs=2,
        metavar=("SMALL", "MEDIUM"),
        default=[32, 96],
        help="Sides of squares, in pixels of the data, whose areas part small, medium and large objects (32 96).",
    )
    parser.add_argument(
        "--batched_forward",
        action="store_true",
        help="Images of one size go through the model together: faster for small models on a GPU, but the last digits "
        "may then depend on the batch size.",
    )
    arguments = parser.parse_args()
    try:
        arguments.job = prepare_evaluation(**vars(arguments))
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return arguments


def main() -> None:
    job = parse_arguments().job
    result = job.run()
    if job.accelerator.is_main_process:
        print(result.summary())
        print(f"Results: {job.output}\nDetections: {job.predictions}")
    job.accelerator.end_training()


if __name__ == "__main__":
    main()
