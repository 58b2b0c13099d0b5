# SPDX-License-Identifier: Apache-2.0
"""The command that writes the model cards."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..jobs import FunctionJob
from .writing import CARDS, write_model_cards


@dataclass(frozen=True)
class WrittenCards:
    """The files of the cards that were written."""

    files: list[Path]

    def summary(self) -> str:
        """The files, one a line."""
        return "\n".join(map(str, self.files))

    def to_dict(self) -> dict[str, Any]:
        """The files, for JSON."""
        return {"files": self.files}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make the parser that of this command."""
    parser.description = (
        "Write the model cards of the documented configurations, with what was measured and nothing else.\n\n"
        "What the cards take from the evaluations is kept beside them in `measured.json` and used again the next time."
    )
    parser.epilog = "example:\n  deperceiver cards --metrics v2-nano=outputs/nano/eval.json"
    parser.add_argument(
        "--metrics",
        action="append",
        default=[],
        type=_split_pair,
        metavar="NAME=FILE",
        help=f"JSON of `deperceiver evaluate` for one of {', '.join(CARDS)}; may be given several times.",
    )
    parser.add_argument("--output_dir", default="model_cards", help="Directory of the cards (%(default)s).")


def prepare(arguments: argparse.Namespace) -> FunctionJob[WrittenCards]:
    """Writing the cards that were asked for."""
    return FunctionJob(_write, {"output_dir": arguments.output_dir, "evaluations": dict(arguments.metrics)})


def _write(**options: Any) -> WrittenCards:
    return WrittenCards(write_model_cards(**options))


def _split_pair(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, not {text!r}")
    return name, path
