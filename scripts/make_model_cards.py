# SPDX-License-Identifier: Apache-2.0
"""Write the model cards of the documented configurations, with what was measured and nothing else.

What the cards take from the evaluations is kept beside them in `measured.json` and used again the next time.
"""

import argparse
import sys

from deperceiver_hf.model_cards import CARDS, write_model_cards


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--metrics",
        action="append",
        default=[],
        type=split_pair,
        metavar="NAME=FILE",
        help=f"JSON of scripts/evaluate.py for one of {', '.join(CARDS)}; may be given several times.",
    )
    parser.add_argument("--output_dir", default="model_cards", help="Directory of the cards (%(default)s).")
    arguments = parser.parse_args()
    try:
        arguments.files = write_model_cards(arguments.output_dir, dict(arguments.metrics))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return arguments


def split_pair(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, not {text!r}")
    return name, path


def main() -> int:
    for file in parse_arguments().files:
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
