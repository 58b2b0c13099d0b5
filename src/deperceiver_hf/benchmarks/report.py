# SPDX-License-Identifier: Apache-2.0
"""Reports of measurements: one row per model, as JSON or as a Markdown table; what draws their pictures."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..jobs import markdown_table
from ..output_files import atomic_path, require_writable_file, write_json


def require_matplotlib() -> None:
    """Raise `ImportError` if there is no matplotlib to draw a picture with."""
    if find_spec("matplotlib") is None:
        raise ImportError("the picture needs matplotlib; try `pip install deperceiver-hf[comparison]`.")


@dataclass(frozen=True)
class BenchmarkReport:
    """Rows of figures by name, with what they depend on.

    Attributes:
        kind: `"cost"`, `"time"`, `"scaling"` or `"crowds"`.
        settings: Image size, latents, device and so on.
        rows: Figures by name, in plain units (FLOPs, elements, seconds, bytes).
        columns: Title of each column of the table, and how it reads a row.
        row_name: What each row is of.
    """

    kind: str
    settings: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    columns: dict[str, Callable[[dict[str, Any]], str]]
    row_name: str = "model"

    def markdown(self) -> str:
        """The settings and the table."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        rows = [[name, *(column(row) for column in self.columns.values())] for name, row in self.rows.items()]
        return f"{settings}\n\n{markdown_table([self.row_name, *self.columns], rows)}"

    def summary(self) -> str:
        """The report as text."""
        return self.markdown()

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, without the titles of the table."""
        return {"kind": self.kind, "settings": self.settings, f"{self.row_name}s": self.rows}

    def write(self, path: str | os.PathLike) -> None:
        """Write JSON or Markdown, by the suffix of a path that `check_output` has passed."""
        if Path(path).suffix == ".json":
            write_json(path, self.to_dict())
            return
        with atomic_path(path) as temporary:
            temporary.write_text(f"{self.markdown()}\n", encoding="utf-8")


def check_output(path: str | os.PathLike) -> Path:
    """Refuse a file for a report that cannot be written.

    Raises:
        ValueError: Neither `.json` nor `.md`.
        OSError: It cannot be written.
    """
    if Path(path).suffix not in (".json", ".md"):
        raise UserError(f"the output {path} must end in .json or .md.")
    return require_writable_file(path)
