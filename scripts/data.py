# SPDX-License-Identifier: Apache-2.0
"""The command `deperceiver data` as a file, for launchers that start files."""

import os
import sys

if __name__ == "__main__":
    # Python looks for modules beside this file first, where evaluate.py would be taken for the library of that name.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != here]
    from deperceiver_hf.cli import main

    sys.exit(main(["data", *sys.argv[1:]]))
