# SPDX-License-Identifier: Apache-2.0
"""Train several models on equal terms and report what they have learned; `--help` explains.

Ends with code 2 if the comparison cannot be carried out, 1 if runs failed, 130 if it was interrupted; repeating the
command then goes on.
"""

import logging
import sys

from deperceiver_hf.comparison import parse_arguments, run_comparison


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("deperceiver_hf").setLevel(logging.INFO)
    try:
        report = run_comparison(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        return 130
    print(report.markdown())
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
