# SPDX-License-Identifier: Apache-2.0
"""Training of several models on equal terms, and a report of what each has learned."""

from .arguments import ComparisonOptions, ModelSpec, parse_arguments
from .report import ComparisonReport
from .runs import run_comparison

__all__ = ["ComparisonOptions", "ComparisonReport", "ModelSpec", "parse_arguments", "run_comparison"]
