# SPDX-License-Identifier: Apache-2.0
"""The command that trains a detector."""

import argparse
from dataclasses import dataclass

from ..errors import FailedRunError
from .arguments import TrainingOptions, make_parser
from .recipes import recipe_names, with_recipe
from .reporting import TrainingResult
from .trainer import DetectionTrainer, NonFiniteLossError

EXAMPLE = """example:
  deperceiver train --recipe own-data-gpu --dataset path/to/data --output_dir outputs/mine --epochs 20

Several processes start by `accelerate launch scripts/train.py` with the same options. The exit code is 1 if the loss
ceases to be finite, and 130 if the run was interrupted."""


@dataclass(frozen=True)
class TrainingJob:
    """A run whose options, data and model have been checked and loaded."""

    trainer: DetectionTrainer

    def run(self) -> TrainingResult:
        """Train.

        Raises:
            FailedRunError: Loss, gradient, model or predictions are not finite.
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
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help=f"Take options from a recipe ({', '.join(recipe_names())}) or a YAML file; those given beside it win.",
    )


def expand(arguments: list[str]) -> list[str]:
    """The command line with the options of its recipe."""
    return with_recipe(arguments)


def prepare(arguments: argparse.Namespace) -> TrainingJob:
    """Check and load what a run needs; raises what [`DetectionTrainer`] raises."""
    options = {name: value for name, value in vars(arguments).items() if name != "recipe"}
    return TrainingJob(DetectionTrainer(TrainingOptions(**options)))
