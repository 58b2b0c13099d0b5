# SPDX-License-Identifier: Apache-2.0
"""A data set is written whole, under a temporary name until it is complete, and never over another."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import UserError
from ...output_files import as_path, require_writable_directory
from ..classes import with_labels_of
from ..records import DetectionData
from .pictures import file_names, write_images
from .writers import CANNOT_CARRY, WRITERS, SplitToWrite


@dataclass(frozen=True)
class WrittenDataSet:
    """What was written, and what the format could not carry.

    Attributes:
        directory: the data set.
        format: key of `WRITERS`.
        splits: images and objects of each.
        classes: names.
        lost: how much of each key of `CANNOT_CARRY`.
        remarks: what else is to be known.
    """

    directory: Path
    format: str
    splits: dict[str, dict[str, int]]
    classes: list[str]
    lost: dict[str, int]
    remarks: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The same in words."""
        title = WRITERS[self.format].title
        lines = [f"Written in {title}'s format to {self.directory}, {len(self.classes)} classes:"]
        lines += [
            f"  {name}: {count['images']:,} images, {count['objects']:,} objects"
            for name, count in self.splits.items()
        ]
        if self.lost:
            lines.append("What it does not carry, of what was read:")
            lines += [f"  {count:,} {CANNOT_CARRY[key]}" for key, count in self.lost.items()]
        return "\n".join([*lines, *self.remarks])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "directory": self.directory,
            "format": self.format,
            "splits": self.splits,
            "classes": self.classes,
            "not_carried": self.lost,
            "remarks": self.remarks,
        }


def require_new_directory(path: str | os.PathLike) -> Path:
    """A directory to be made.

    Raises:
        OSError: there is something of that name already, or it could not be made.
    """
    path = as_path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already, and nothing is overwritten. Give a new directory.")
    require_writable_directory(path.absolute().parent)
    return path


def write_data_set(
    splits: dict[str, DetectionData],
    directory: str | os.PathLike,
    to: str,
    *,
    link: bool = False,
    remarks: list[str] | None = None,
) -> WrittenDataSet:
    """Write splits as a data set of a format.

    Args:
        splits: by their names. Classes are those of the first, and belong together by name.
        directory: that is not there yet, or is empty.
        to: key of `WRITERS`.
        link: make links to the image files instead of copies.
        remarks: to be repeated in what is returned.

    Raises:
        OSError: the directory is in use, or a file cannot be read or written.
        ValueError: the splits have classes that do not go together, or a name that the format cannot hold.
    """
    target, writer = require_new_directory(directory), WRITERS[to]
    first, *others = splits
    splits = {first: splits[first]} | {name: with_labels_of(splits[first], splits[name]) for name in others}
    taken: set[str] | None = set() if writer.flat else None
    with _directory_when_complete(target) as temporary:
        bar = tqdm(total=sum(len(data.dataset) for data in splits.values()), desc="images", disable=None)
        written = {}
        with bar:
            for name, data in splits.items():
                files = file_names(data, flat=writer.flat, own_stems=writer.one_file_each, taken=taken)
                place = temporary / writer.images.format(split=name)
                place.mkdir(parents=True, exist_ok=True)
                write_images(data, files, place, link, bar.update)
                written[name] = SplitToWrite(data, files)
        lost: Counter = writer.write(written, temporary)
    return WrittenDataSet(
        directory=target,
        format=to,
        splits={
            name: {"images": data.report.num_images, "objects": data.report.num_objects}
            for name, data in splits.items()
        },
        classes=list(splits[first].label_names),
        lost={key: int(lost[key]) for key in CANNOT_CARRY if lost[key]},
        remarks=list(remarks or []),
    )


@contextlib.contextmanager
def _directory_when_complete(target: Path) -> Iterator[Path]:
    """A directory beside the target, which takes its place if no error occurs and is removed if one does."""
    temporary = target.absolute().parent / f".{os.getpid()}.{target.name}.incomplete"
    try:
        temporary.mkdir()
        yield temporary
        if target.is_dir():
            target.rmdir()  # empty
        os.replace(temporary, target)
    except FileExistsError as error:
        raise UserError(f"{error.filename} is there already, and nothing is overwritten.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
