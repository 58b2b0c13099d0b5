# SPDX-License-Identifier: Apache-2.0
"""The command that trains a detector."""

import argparse
from dataclasses import dataclass

from ..errors import FailedRunError
from .arguments import TrainingOptions, make_parser
from .reporting import TrainingResult
from .trainer import DetectionTrainer, NonFiniteLossError

EXAMPLE = """example:
  deperceiver train --architecture deperceiver_v2 --preset nano --dataset path/to/coco --output_dir outputs/nano

Several processes start by `accelerate launch scripts/train.py` with the same options. The exit code is 1 if the loss
ceases to be finite, and 130 if the run was interrupted."""


@dataclass(frozen=True)
class TrainingJob:
    """A run whose options, data and model have been checked and loaded."""

    trainer: DetectionTrainer

    def run(self) -> TrainingResult:
        """Train.

        Raises:
            FailedRunError: The loss or its gradient is not finite.
        """
        try:
            return self.trainer.train()
        except NonFiniteLossError as error:
            raise FailedRunError(str(error)) from error


def parents() -> list[argparse.ArgumentParser]:
    """All options of a training run."""
    return [make_parser(add_help=False)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make the parser, which has the options from `parents`, that of this command."""
    options = make_parser()
    parser.description, parser.usage, parser.epilog = options.description, options.usage, EXAMPLE
    parser.formatter_class = options.formatter_class


def prepare(arguments: argparse.Namespace) -> TrainingJob:
    """Check and load what a run needs; raises what [`DetectionTrainer`] raises."""
    return TrainingJob(DetectionTrainer(TrainingOptions(**vars(arguments))))
