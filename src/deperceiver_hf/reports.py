# SPDX-License-Identifier: Apache-2.0
"""What reports of all kinds share: tables, pictures, and the name of the machine that they were made on."""

import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]], labelled: bool = True) -> str:
    """A Markdown table of numbers, the first column of which are labels."""
    alignment = ["---" if labelled and not column else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, alignment, *rows))


def require_matplotlib() -> None:
    """Raise `ImportError` if there is no matplotlib to draw a picture with."""
    if find_spec("matplotlib") is None:
        raise ImportError("the picture needs matplotlib; try `pip install deperceiver-hf[comparison]`.")


def cpu_name() -> str:
    """What the processor calls itself, or its kind where it does not say."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()
