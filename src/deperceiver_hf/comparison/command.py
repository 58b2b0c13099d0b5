# SPDX-License-Identifier: Apache-2.0
"""The command that compares models."""

import argparse

from ..jobs import FunctionJob
from .arguments import add_arguments, make_options
from .report import ComparisonReport
from .runs import run_comparison

__all__ = ["INTERRUPTED", "TAKES_OTHER_OPTIONS", "add_arguments", "prepare"]

INTERRUPTED = "Interrupted. The same command goes on."
TAKES_OTHER_OPTIONS = True  # those of training, which all models share


def prepare(arguments: argparse.Namespace) -> FunctionJob[ComparisonReport]:
    """The comparison that was asked for; raises `ValueError` if it makes no sense."""
    return FunctionJob(run_comparison, {"options": make_options(**vars(arguments))})
