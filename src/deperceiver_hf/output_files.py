# SPDX-License-Identifier: Apache-2.0
"""Result files: their places are checked before the work that fills them, and they appear whole or not at all."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROBE = "probe"  # a file that is made and removed at once


def require_writable_file(path: str | os.PathLike) -> Path:
    """Make the directory of a file that is to be written later.

    Raises:
        OSError: the file could not be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give the name of a file to write.")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is there and may not be overwritten.")
    require_writable_directory(path.parent)
    return path


def require_writable_directory(path: str | os.PathLike) -> Path:
    """Make a directory that files are to be written to.

    Raises:
        OSError: it cannot be made or written to.
    """
    path = Path(path)
    probe = path / f".{os.getpid()}.{PROBE}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise type(error)(f"Cannot write to the directory {path}: {error.strerror}.") from error
    return path


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON by way of a temporary file beside it; an interrupted writer leaves the old file as it was."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path with the suffix of `path`, which takes the place of `path` if no error occurs."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # see `is_temporary`
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path, *, of: Path) -> bool:
    """Whether a path is one of `atomic_path`, which a killed writer of the file `of` has left."""
    return path.parent == of.parent and re.fullmatch(rf"\.\d+\.{re.escape(of.name)}", path.name) is not None
