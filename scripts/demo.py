# SPDX-License-Identifier: Apache-2.0
"""Train on synthetic scenes for a few minutes, evaluate, reload through the pipeline and draw a contact sheet.

A second run in the same directory keeps the model that the first one trained.
"""

import argparse
import logging
import sys

from deperceiver_hf.demo import run_demo


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", default="outputs/demo", help="Where everything is written (%(default)s).")
    parser.add_argument("--max_minutes", type=float, default=4.0, help="Limit of the training (%(default)s).")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("deperceiver_hf").setLevel(logging.INFO)
    try:
        print(run_demo(arguments.output_dir, arguments.max_minutes).summary())
    except (OSError, ValueError, ImportError) as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; another run goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
