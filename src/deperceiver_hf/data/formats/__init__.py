# SPDX-License-Identifier: Apache-2.0
"""The formats of data sets that can be read: one module each, and the one list of them.

The module of a format of files has

- `recognise(path) -> str | None`: what a directory or file has of the format, in a few words, without reading it all;
- `splits(path) -> list[str]`: which of `train`, `val` and `test` are there;
- `read(request) -> AnnotatedImages`: images and objects of a split as they are written, or an error that says what was
  looked for. What follows, from file names to records, is the same for all: see [`load_records`].
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from ..records import SPLIT_NAMES, DetectionData
from . import coco, hub, table, voc, yolo
from .annotated_images import AnnotatedImages, Request, load_records
from .layouts import ANNOTATION_DIRECTORIES, describe_directory, describe_file, entries_of, is_saved


@dataclass(frozen=True)
class Format:
    """A format of data sets.

    Attributes:
        title: what it is called.
        recognise: see above.
        splits: see above.
        load: the records of a split.
    """

    title: str
    recognise: Callable[[Path], str | None]
    splits: Callable[[Path], list[str]]
    load: Callable[[Request], DetectionData]

    @classmethod
    def of_files(
        cls,
        title: str,
        recognise: Callable[[Path], str | None],
        splits: Callable[[Path], list[str]],
        read: Callable[[Request], AnnotatedImages],
    ) -> "Format":
        """A format of files, by what its module has."""

        def load(request: Request) -> DetectionData:
            if request.config is not None or request.streaming:
                option = "streaming=true" if request.streaming else f"config={request.config}"
                raise UserError(
                    f"{request.source} is in the format of {title}: {option} is for data sets of `datasets`."
                )
            found = read(request)
            found.report.recognised = f"{title} ({found.evidence})"
            return load_records(found, request)

        return cls(title, recognise, splits, load)


FORMATS = {
    "coco": Format.of_files("COCO", coco.recognise, coco.splits, coco.read),
    "yolo": Format.of_files("YOLO", yolo.recognise, yolo.splits, yolo.read),
    "voc": Format.of_files("Pascal VOC", voc.recognise, voc.splits, voc.read),
    "csv": Format.of_files("CSV", table.recognise, table.splits, table.read),
    "datasets": Format("datasets", hub.recognise, hub.splits, hub.load),
}
"""By the name that `--format` takes."""

_NEVER_A_DATA_SET = {
    *(*ANNOTATION_DIRECTORIES, "images", "jpegimages"),
    *(name for names in SPLIT_NAMES.values() for name in names),
}


def recognised_formats(path: Path) -> dict[str, str]:
    """What a directory or file has of each format that it has something of, in words; by the format's name."""
    if path.is_dir() and is_saved(path):
        return {"datasets": hub.recognise(path) or ""}
    found = {
        name: evidence for name, entry in FORMATS.items() if name != "datasets" and (evidence := entry.recognise(path))
    }
    if not found and (evidence := hub.recognise(path)):
        found["datasets"] = evidence
    return found


def choose_format(path: Path, alone: bool = False) -> str:
    """The format of a directory or file, by its content.

    Args:
        path: of the directory or file.
        alone: a directory may hold annotation files without their images.

    Raises:
        FileNotFoundError: it is no data set; the message says what it is.
        ValueError: it may be of several formats.
    """
    found = recognised_formats(path)
    if not found and alone and path.is_dir():
        kinds = {"voc": ".xml", "yolo": ".txt"}
        found = {name: suffix for name, suffix in kinds.items() if any(path.glob(f"*{suffix}"))}
    if len(found) == 1:
        return next(iter(found))
    if found:
        listed = ", ".join(f"{FORMATS[name].title} ({evidence})" for name, evidence in found.items())
        raise UserError(
            f"{path} has annotations in several formats: {listed}. Say which are meant by --format "
            f"{' or '.join(found)}, or load NAME:format={next(iter(found))}."
        )
    if path.is_file():
        raise UserError(describe_file(path) or f"{path} holds no data set known here.")
    if (path / "annotations").is_dir():
        return "coco"  # whose reader says what it lacks
    if problem := describe_directory(path):
        raise FileNotFoundError(problem)
    return "datasets"


def data_directory(root: Path) -> Path:
    """The directory itself, or the one in it that is the data set: archives often hold a single directory."""
    inner = root
    for _ in range(3):
        folders = [path for path in entries_of(inner) if path.is_dir()]
        files = [path for path in entries_of(inner) if path.is_file()]
        described = is_saved(inner) or coco.recognise(inner) or any(map(yolo.recognise, files))
        if described or len(folders) != 1 or folders[0].name.lower() in _NEVER_A_DATA_SET:
            break
        inner = folders[0]
    # `datasets` looks for what describes its tables in the directory above them.
    found = recognised_formats(inner).keys() - (set() if is_saved(inner) else {"datasets"})
    return inner if found else root


__all__ = [
    "FORMATS",
    "AnnotatedImages",
    "Format",
    "Request",
    "choose_format",
    "data_directory",
    "load_records",
    "recognised_formats",
]
