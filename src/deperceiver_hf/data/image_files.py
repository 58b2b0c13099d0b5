# SPDX-License-Identifier: Apache-2.0
"""Image files that a user names: by their paths, by directories and by patterns."""

import difflib
import fnmatch
import glob
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..output_files import expand_home, folded_name

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
"""What is taken for an image in a directory or by a pattern. A file that is named itself may have any suffix."""

HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
VIDEO_SUFFIXES = frozenset(
    (
        *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".mts", ".m2ts"),
        *(".ogv", ".vob"),
    )
)
OTHER_PICTURE_SUFFIXES = frozenset(
    (
        *(".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".svg", ".eps", ".pdf", ".ico", ".tga", ".exr", ".hdr", ".dcm"),
        *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    )
)
HOW_TO_HEIF = "convert to JPEG, or pip install pillow-heif"
HOW_TO_VIDEO = "take pictures out of videos, for example by ffmpeg -i VIDEO frames/%06d.png"
HOW_TO_OTHERS = "convert to JPEG or PNG"


@dataclass
class FoundImages:
    """What the inputs of a user stand for.

    Attributes:
        files: image files, each once, in the order of the inputs and sorted within each.
        refused: why something that was named, or lay in the way, cannot be read; by its path.
        left_out: pictures and videos of kinds that cannot be read, in directories and among the matches of patterns.
    """

    files: list[Path] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    @property
    def counts_left_out(self) -> dict[str, int]:
        """How many files of each suffix were left out."""
        return dict(sorted(Counter(Path(path).suffix.lower() for path in self.left_out).items()))


def describe_left_out(counts: Mapping[str, int]) -> str:
    """The files that were left out by their suffixes, and what to do: `3 .heic (convert to JPEG, or ...)`."""
    kinds = {
        HOW_TO_HEIF: HEIF_SUFFIXES,
        HOW_TO_VIDEO: VIDEO_SUFFIXES,
        HOW_TO_OTHERS: counts.keys() - HEIF_SUFFIXES - VIDEO_SUFFIXES,
    }
    parts = []
    for how, suffixes in kinds.items():
        if listed := [f"{count} {suffix}" for suffix, count in counts.items() if suffix in suffixes]:
            parts.append(f"{', '.join(listed)} ({how})")
    return "; ".join(parts)


def find_images(inputs: Sequence[str | os.PathLike], leave_out: str | os.PathLike | None = None) -> list[Path]:
    """The files of [`search_images`]."""
    return search_images(inputs, leave_out).files


def search_images(inputs: Sequence[str | os.PathLike], leave_out: str | os.PathLike | None = None) -> FoundImages:
    """The image files that the inputs stand for.

    A name that is there as it stands is never a pattern (`photos[1]`). Where nothing is found, backslashes are taken
    for slashes, and accents in the other form of Unicode are looked for.

    Args:
        inputs: files, directories (searched recursively, links followed) or glob patterns (`**` for any directories);
            each may begin with `~`. Hidden files in directories are left out.
        leave_out: directory whose files are not taken from directories and patterns: pictures of an earlier run.

    Raises:
        FileNotFoundError: an input is not there, or stands for no images.
        ValueError: an input is a URL, or all are files of which it is known that they cannot be read.
    """
    search = _Search(None if leave_out is None else os.path.realpath(expand_home(leave_out)))
    for entry in inputs:
        search.add(os.fspath(entry))
    found = search.found
    if not found.files and not found.refused:
        raise FileNotFoundError("No inputs were given.")
    if not found.files:
        first, *others = found.refused.items()
        more = f" ({len(others)} more cannot be read either.)" if others else ""
        raise UserError(f"{first[0]}: {first[1]}.{more}")
    return found


class _Search:
    """Goes through inputs, and keeps what it finds.

    Args:
        excluded: real path of the directory to leave out.
    """

    def __init__(self, excluded: str | None):
        self.excluded = excluded
        self.found = FoundImages()
        self.known: set[tuple] = set()
        self.num_reached = self.num_excluded = 0  # by the input at hand

    def add(self, entry: str) -> None:
        """Take the files of an input."""
        if re.match(r"(?:[a-z][a-z0-9+.-]+:/|data:)", entry, re.IGNORECASE):
            shown = entry if len(entry) <= 200 else f"{entry[:200]}..."
            raise UserError(f"{shown} is a URL, and only files are read: download it, and give the file.")
        entry = _as_spelled(expand_home(entry))
        self.num_reached = self.num_excluded = 0
        if os.path.isdir(entry):
            self._take_all_below(entry)
        elif os.path.lexists(entry):
            self._take_named(entry)
        elif glob.has_magic(entry):
            self._take_matches(entry)
        else:
            raise FileNotFoundError(f"There is no file or directory {entry or repr(entry)}.{_hint(entry)}")
        if not self.num_reached:
            reasons = [f"looked for files ending in {' '.join(sorted(IMAGE_SUFFIXES))}"]
            if self.num_excluded:
                reasons.append(f"pictures of an earlier run in {self.excluded} are left out")
            if counts := self.found.counts_left_out:
                reasons.append(f"left out: {describe_left_out(counts)}")
            raise FileNotFoundError(f"No images in {entry}; {'; '.join(reasons)}.{_hint(entry)}")

    def _take_named(self, path: str) -> None:
        suffix = Path(path).suffix.lower()
        if reason := _not_a_file(path):
            self._refuse(path, reason)
        elif suffix in VIDEO_SUFFIXES:
            self._refuse(path, f"it is a video, and only images are read: {HOW_TO_VIDEO}")
        elif suffix in HEIF_SUFFIXES and not _is_heif_readable():
            self._refuse(path, f"HEIF pictures cannot be read here: {HOW_TO_HEIF}")
        else:
            self._take(path)

    def _take_matches(self, pattern: str) -> None:
        pattern = _literal_where_there(pattern)
        matches = sorted(glob.glob(pattern, recursive=True))
        directories = [match for match in matches if os.path.isdir(match)]
        for path in matches:
            if path not in directories:
                self._take_if_wanted(path)
        # `**` brings the directories' files by itself
        if not self.num_reached:
            for directory in directories:
                self._take_all_below(directory)

    def _take_all_below(self, directory: str) -> None:
        entered, paths = set(), []

        def unreadable(error: OSError) -> None:
            self._refuse(str(error.filename), f"the directory cannot be read: {error.strerror}")

        for at, directories, names in os.walk(directory, onerror=unreadable, followlinks=True):
            directories[:] = [name for name in directories if not name.startswith(".")]
            real = os.path.realpath(at)
            if real in entered:  # by another link, or in a circle
                directories.clear()
                continue
            entered.add(real)
            paths += [Path(at, name) for name in names if not name.startswith(".")]
        for path in sorted(paths):
            self._take_if_wanted(str(path))

    def _take_if_wanted(self, path: str) -> None:
        suffix = Path(path).suffix.lower()
        if suffix in IMAGE_SUFFIXES or (suffix in HEIF_SUFFIXES and _is_heif_readable()):
            if self._is_excluded(path):
                self.num_excluded += 1
            elif os.path.islink(path) and not os.path.exists(path):
                self._refuse(path, _not_a_file(path))
            elif os.path.isfile(path):
                self._take(path)
        elif suffix in HEIF_SUFFIXES | VIDEO_SUFFIXES | OTHER_PICTURE_SUFFIXES:
            self.found.left_out.add(os.path.realpath(path))

    def _take(self, path: str) -> None:
        self.num_reached += 1
        key = _identity(path)
        if key not in self.known:
            self.known.add(key)
            self.found.files.append(Path(path))

    def _refuse(self, path: str, reason: str) -> None:
        self.num_reached += 1
        self.found.refused[path] = reason

    def _is_excluded(self, path: str) -> bool:
        return self.excluded is not None and Path(os.path.realpath(path)).is_relative_to(self.excluded)


def _not_a_file(path: str) -> str:
    """Why a path that is there is no file with content; empty if it is one."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return ""
    except OSError as error:
        if os.path.islink(path):
            return f"it is a link to {os.readlink(path)}, which is not there"
        return f"it cannot be read: {error.strerror}"
    return "it is neither a file nor a directory"


def _identity(path: str) -> tuple:
    """Equal for two paths of one file, by whichever directories and capitals; links to files are files themselves."""
    place = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
    status = os.stat(path)
    return status.st_dev, status.st_ino, folded_name(place)


def _is_heif_readable() -> bool:
    return ".heic" in Image.registered_extensions()


def _as_spelled(entry: str) -> str:
    """A path or pattern in the spelling in which there is something, or as it is if there is none."""
    spellings = [entry, *(unicodedata.normalize(form, entry) for form in ("NFC", "NFD"))]
    if os.sep == "/":
        spellings += [spelling.replace("\\", "/") for spelling in spellings]
    for spelling in dict.fromkeys(spellings):
        if os.path.lexists(spelling) or (glob.has_magic(spelling) and _has_match(spelling)):
            return spelling
    return entry


def _has_match(pattern: str) -> bool:
    return next(glob.iglob(_literal_where_there(pattern), recursive=True), None) is not None


def _literal_where_there(pattern: str) -> str:
    """A pattern in which the directories that are there as they stand match themselves only."""
    place, parts = "", []
    for part in Path(pattern).parts:
        place = os.path.join(place, part)
        parts.append(glob.escape(part) if os.path.lexists(place) else part)
    return os.path.join(*parts)


def _hint(entry: str) -> str:
    """What may have been meant by a name or pattern that leads to nothing."""
    directory, name = os.path.split(entry)
    try:
        there = sorted(os.listdir(directory or "."))
    except OSError:
        return ""
    if glob.has_magic(name):
        near = [other for other in there if re.match(fnmatch.translate(name), other, re.IGNORECASE)]
    else:
        near = [other for other in there if other.casefold() == name.casefold()]
        near = near or difflib.get_close_matches(name, there, n=1)
    return f" Did you mean {os.path.join(directory, near[0])}?" if near else ""
