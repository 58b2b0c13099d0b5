# SPDX-License-Identifier: Apache-2.0
"""From the file names in annotations to the files: as they are written, in another spelling, and not beyond the data.

Annotations are written on other machines. Their names part folders by backslashes, begin with a folder of that machine
or with the address of a server, have `%20` for spaces, accents in two characters, capitals elsewhere. A file is found
under another spelling if that is what its name below one of the directories would be (or the end of the annotated name
is), and if no other image has a claim to it.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from ..output_files import folded_name


class FoundFile(NamedTuple):
    """Attributes:
    path: absolute path of the file, `None` if it is not there or out of bounds.
    issue: key of `ISSUES`: how it was found or why not; `None` if it is where the name says.
    """

    path: str | None
    issue: str | None


def find_image_files(
    names: Sequence[str], root: Path, directories: Sequence[Path], *, allow_outside: bool = False
) -> list[FoundFile]:
    """Where the files are that annotations name.

    Args:
        names: as annotated; relative to any of the directories, the first of which goes first.
        root: the data directory. Files are to be below it, by their names: a link in it may lead anywhere.
        directories: that are there, at least one.
        allow_outside: take files that are elsewhere, too.

    Returns:
        One for each name.
    """
    bounds = None if allow_outside else os.path.join(os.path.abspath(root), "")
    present = set(os.listdir(directories[0]))  # one call instead of one per image
    exact = [
        os.path.abspath(directories[0] / name)
        if name in present
        else next(_files_of_name(name, directories, bounds), None)
        for name in names
    ]
    lacking = {name for name, path in zip(names, exact, strict=True) if path is None}
    if not lacking:
        return [FoundFile(path, None) for path in exact]
    index = _SpellingIndex(directories)
    respelled = {name: index.find(name) for name in lacking}
    if allow_outside:
        for name in [name for name, path in respelled.items() if path is None]:
            respelled[name] = next(_files_of_name(_slashed(name), directories, None), None)
    claims = Counter([*filter(None, exact), *respelled.values()])

    def found(name: str, path: str | None) -> FoundFile:
        if path is not None:
            return FoundFile(path, None)
        other = respelled[name]
        if other is not None and claims[other] == 1:
            return FoundFile(other, "respelled_image_file")
        outside = _leads_outside(name, directories, bounds)
        return FoundFile(None, "outside_image_file" if outside else "missing_image_file")

    return [found(name, path) for name, path in zip(names, exact, strict=True)]


def _files_of_name(name: str, directories: Sequence[Path], bounds: str | None) -> Iterator[str]:
    """Absolute paths of the files of that name in the directories, those within the bounds."""
    for directory in directories:
        path = os.path.abspath(os.path.join(directory, os.path.expanduser(name)))
        if _is_within(path, bounds) and os.path.isfile(path):
            yield path


def _is_within(path: str, bounds: str | None) -> bool:
    return bounds is None or os.path.normcase(path).startswith(os.path.normcase(bounds))


def _leads_outside(name: str, directories: Sequence[Path], bounds: str | None) -> bool:
    """Whether a name is that of a place beyond the bounds, seen from every directory."""
    name = os.path.expanduser(_slashed(name))
    if os.path.isabs(name):  # a slash may stand before a name that is meant to be relative
        return not _is_within(os.path.abspath(name), bounds) and os.path.exists(name)
    return not any(_is_within(os.path.abspath(os.path.join(d, name)), bounds) for d in directories)


def _slashed(name: str) -> str:
    return name.replace("\\", "/")


class _SpellingIndex:
    """All files below some directories, by how their names could be spelled."""

    def __init__(self, directories: Sequence[Path]):
        self._files: list[dict[str, list[str]]] = []
        for directory in directories:
            files: dict[str, list[str]] = {}
            for path in walk_files(str(directory)):
                files.setdefault(_folded(os.path.relpath(path, directory)), []).append(os.path.abspath(path))
            self._files.append(files)

    def find(self, name: str) -> str | None:
        """The one file that is called like the name, or like the longest possible end of it."""
        for spelling in _spellings(name):
            parts = [part for part in spelling.split("/") if part not in ("", ".", "..")]
            for start in range(len(parts)):
                end = _folded("/".join(parts[start:]))
                for files in self._files:
                    if found := files.get(end):
                        return found[0] if len(found) == 1 else None
        return None


def _spellings(name: str) -> Iterator[str]:
    """What a name may mean as a path: itself, and where it is an address, the path in it."""
    yield _slashed(name)
    if "?" in name or "://" in name:
        address = urlsplit(_slashed(name).replace("#", "%23"))
        yield from parse_qs(address.query).get("d", [])  # of Label Studio's local files
        yield address.path


def _folded(path: str) -> str:
    return folded_name(unquote(_slashed(path)))


def walk_files(directory: str) -> Iterator[str]:
    """Paths of all files below a directory, through links, each directory once."""
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(directory, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (os.path.join(folder, name) for name in files)
