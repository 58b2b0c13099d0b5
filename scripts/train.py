# SPDX-License-Identifier: Apache-2.0
"""Train a detector: `accelerate launch scripts/train.py --dataset DIR --output_dir DIR`, or plainly with `python`.

Ends with code 2 if the options cannot be carried out, 1 if the loss ceases to be finite, 130 if it was interrupted.
"""

import logging
import sys

from accelerate import PartialState

from deperceiver_hf.training import DetectionTrainer, NonFiniteLossError, parse_arguments


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("deperceiver_hf").setLevel(logging.INFO)
    try:
        trainer = DetectionTrainer(options)
    except (OSError, ValueError, ImportError) as error:
        return fail(error, 2)
    try:
        result = trainer.train()
    except NonFiniteLossError as error:
        return fail(error, 1)
    if trainer.accelerator.is_main_process:
        print(result.summary())
    trainer.accelerator.end_training()
    return 130 if result.interrupted else 0


def fail(error: Exception, code: int) -> int:
    if PartialState().is_main_process:
        print(f"train.py: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
