# SPDX-License-Identifier: Apache-2.0
"""Result files: their places are checked before the work that fills them, and they appear whole or not at all.

All paths may begin with `~`, the user's home directory: see [`expand_home`].
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import UserError

PROBE = "probe"  # a file that is made and removed at once
MAX_NAME_BYTES = 255  # of a file or directory, on nearly every file system
_NO_PART_OF_A_NAME = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f\ud800-\udfff]')  # on Windows; the last are bytes of no text
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?", re.IGNORECASE)


def expand_home(path: str | os.PathLike) -> str:
    """A path that a user gave, whose `~` or `~name` at the beginning is a home directory.

    Shells leave the tilde of `--output_dir=~/runs` to the program, as do files with options. A file `~name` that is
    there is taken as it is.

    Raises:
        ValueError: there is no such home directory.
    """
    path = os.fspath(path)
    if not path.startswith("~") or (re.match(r"~[^/\\]", path) and os.path.lexists(path)):
        return path
    expanded = os.path.expanduser(path)
    if expanded == path:
        raise UserError(f"{path}: there is no such home directory; write ./{path} for a name that begins with ~.")
    return expanded


def as_path(path: str | os.PathLike) -> Path:
    """[`expand_home`] as a `Path`."""
    return Path(expand_home(path))


def require_writable_file(path: str | os.PathLike) -> Path:
    """Make the directory of a file that is to be written later.

    Raises:
        OSError: the file could not be written.
    """
    path = as_path(path)
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
    path = as_path(path)
    probe = path / f".{os.getpid()}.{PROBE}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror
        raise type(error)(f"Cannot write to the directory {path}: {reason}.") from error
    return path


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON by way of a temporary file beside it; an interrupted writer leaves the old file as it was.

    Names of files that are no UTF-8 can be written: their bytes become escapes that Python reads as it was given them.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path with the suffix of `path`, which takes the place of `path` if no error occurs.

    An `OSError` within that names no file, such as that of a full disk, gets the name of this one.
    """
    path = as_path(path)
    temporary = path.with_name(f".{os.getpid()}.{_name_within_temporary(path)}")  # see `is_temporary`
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # that of the writing is the one to be said
            temporary.unlink(missing_ok=True)


def is_temporary(path: Path, *, of: Path) -> bool:
    """Whether a path is one of `atomic_path`, which a killed writer of the file `of` has left."""
    name = re.escape(_name_within_temporary(of))
    return path.parent == of.parent and re.fullmatch(rf"\.\d+\.{name}", path.name) is not None


def file_state(path: Path) -> tuple[int, int] | tuple[()]:
    """Size of a file and time of its last change, which tell whether it is still the same; nothing without a file."""
    try:
        facts = path.stat()
    except OSError:
        return ()
    return facts.st_size, facts.st_mtime_ns


class Journal:
    """What has been found so far, in files beside the one that all of it will be in, so that a later run can go on.

    A result has a key, which says of what it is, and is a line of JSON. Each process writes to a file of its own,
    `NAME.partial-INDEX.jsonl`; a line that a killed writer has left half-written is passed over.

    Args:
        target: File that all results will be in.
        index: Of this process.
    """

    def __init__(self, target: str | os.PathLike, index: int = 0):
        self._target = as_path(target)
        self._file = self._target.with_name(f"{self._target.stem}.partial-{index}.jsonl")

    def files(self) -> list[Path]:
        """Those that are there, of all processes."""
        return sorted(self._target.parent.glob(f"{glob.escape(self._target.stem)}.partial-*.jsonl"))

    def read(self, keys: Collection[str]) -> dict[str, Any]:
        """The results of these keys that are there."""
        results: dict[str, Any] = {}
        for file in self.files():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    key, result = json.loads(line)
                    results[key] = result
        return {key: results[key] for key in keys if key in results}

    def start(self, results: dict[str, Any]) -> None:
        """Begin with these results, and without all files that are there."""
        with atomic_path(self._file) as temporary:
            temporary.write_text("".join(_line(*result) for result in results.items()), encoding="utf-8")
        for file in self.files():
            if file != self._file:
                file.unlink()

    def add(self, key: str, result: Any) -> None:
        """Write a result behind the others."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(_line(key, result))

    def remove(self) -> None:
        """Delete all files."""
        for file in self.files():
            file.unlink()


def _line(key: str, result: Any) -> str:
    return json.dumps([key, result], allow_nan=False) + "\n"


def unique_names(names: Sequence[str]) -> list[str]:
    """File names, in directories below each other parted by `/`, for files that are all to be written to one place.

    They are names on every common file system and are different files on each, also where capitals or the two forms of
    accents make no difference: what is no name there is replaced, what is too long is cut, and what would meet another
    gets a hash of the name given. Most stay as they are.
    """
    portable = ["/".join(_portable(part) for part in name.split("/")) for name in names]
    directories = {folded_name(str(parent)) for name in portable for parent in PurePosixPath(name).parents}
    taken, chosen = set(directories), []
    for given, name in zip(names, portable, strict=True):
        directory, slash, last = name.rpartition("/")
        hashed = given
        while folded_name(name) in taken:
            name = f"{directory}{slash}{_with_hash(last, hashed)}"
            hashed += "'"
        taken.add(folded_name(name))
        chosen.append(name)
    return chosen


def folded_name(name: str) -> str:
    """The same for all names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _portable(name: str) -> str:
    name = _NO_PART_OF_A_NAME.sub("_", name)
    if _DEVICE.fullmatch(name):
        name = f"_{name}"
    return _within_limit(f"{name[:-1]}_" if name.endswith((".", " ")) else name)


def _name_within_temporary(path: Path) -> str:
    return _within_limit(path.name, MAX_NAME_BYTES - len(".4294967295."))  # the largest number of a process


def _within_limit(name: str, limit: int = MAX_NAME_BYTES) -> str:
    return name if len(os.fsencode(name)) <= limit else _with_hash(name, name, limit)


def _with_hash(name: str, of: str, limit: int = MAX_NAME_BYTES) -> str:
    """A name with a hash of another one before its suffix, cut to a number of bytes."""
    stem, suffix = os.path.splitext(name)
    suffix = suffix if len(os.fsencode(suffix)) <= 16 else ""
    ending = f"-{hashlib.sha256(os.fsencode(of)).hexdigest()[:8]}{suffix}"
    kept = os.fsencode(stem)[: limit - len(os.fsencode(ending))]
    return kept.decode("utf-8", "ignore") + ending
