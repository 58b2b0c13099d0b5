# SPDX-License-Identifier: Apache-2.0
"""Detection on image files: JSON and annotated pictures, by way of transformers' `object-detection` pipeline."""

import argparse
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm
from transformers import Pipeline, pipeline

from .data.detections import Detections
from .data.images import open_rgb
from .drawing import Boxes, draw_boxes, require_supervision
from .errors import FAILURE_CODE, INTERRUPTED_CODE, UserError
from .machine import find_device
from .output_files import atomic_path, require_writable_directory, write_json
from .saved_models import load_detector, require_model_source

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif")
)
"""What is taken for an image in a directory or by a pattern. A file that is named itself may have any suffix."""

JSON_NAME, PICTURE_DIRECTORY = "predictions.json", "annotated"
BATCHES_IN_WAITING = 4  # images are read this many batches ahead to find some of equal size


@dataclass
class PredictionReport:
    """What was found on the files, in the order in which they were given; the content of the JSON file.

    Attributes:
        model: where the detector is from.
        threshold: lowest score of a detection.
        complete: whether all files were gone through.
        images: for each file `{"file", "width", "height", "detections", "annotated"}`. Detections are the pipeline's,
            `{"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}}` in pixels of the image as a viewer shows it
            (turned as its EXIF data say); `annotated` is the picture's path relative to the JSON file, or `None`.
        errors: for each file that failed `{"file", "error"}`.
        json_path: the JSON file; not in it.
    """

    model: str
    threshold: float
    complete: bool = False
    images: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    json_path: Path | None = None

    @property
    def exit_code(self) -> int:
        """Of the command."""
        if not self.complete:
            return INTERRUPTED_CODE
        return FAILURE_CODE if self.errors else 0

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {name: value for name, value in vars(self).items() if name != "json_path"}

    def summary(self) -> str:
        """The counts, and the files that failed, one a line."""
        count = sum(len(image["detections"]) for image in self.images)
        lines = [f"{count} detections on {len(self.images)} images, {len(self.errors)} files failed."]
        lines += [f"failed: {error['file']}: {error['error']}" for error in self.errors]
        if not self.complete:
            lines.append("Interrupted: the other files were not looked at.")
        return "\n".join([*lines, f"Results: {self.json_path}"] if self.json_path else lines)


@dataclass(frozen=True)
class PredictionJob:
    """Files, detector and output directory, all checked: what `prepare_prediction` returns and `run` carries out."""

    model: str
    detector: Pipeline
    files: list[Path]
    output_dir: Path
    threshold: float
    batch_size: int
    draw: bool

    @property
    def json_path(self) -> Path:
        return self.output_dir / JSON_NAME

    def run(self, progress: bool = True) -> PredictionReport:
        """Detect on all files, and write JSON and pictures.

        A file that fails is recorded and the others go on. After Ctrl-C, and after an error that ends the run, what is
        done by then is in the JSON file. Files of an earlier run are overwritten where the names are the same;
        nothing else is touched.
        """
        report = PredictionReport(self.model, self.threshold, json_path=self.json_path)
        names = dict(zip(self.files, picture_names(self.files), strict=True))
        try:
            with tqdm(total=len(self.files), desc="Detecting", disable=not progress) as bar:
                for batch in self._batches(report, bar):
                    for path, image, detections in self._detect(batch, report):
                        annotated = self._draw(names[path], image, detections) if self.draw else None
                        report.images.append(
                            {
                                "file": str(path),
                                "width": image.width,
                                "height": image.height,
                                "detections": detections,
                                "annotated": annotated,
                            }
                        )
                    bar.update(len(batch))
            report.complete = True
        except KeyboardInterrupt:
            pass  # the report says that it is not complete
        finally:
            position = {str(path): index for index, path in enumerate(self.files)}
            for entries in (report.images, report.errors):
                entries.sort(key=lambda entry: position[entry["file"]])
            write_json(self.json_path, report.to_dict())
        return report

    def _batches(self, report: PredictionReport, bar: tqdm) -> Iterator[list[tuple[Path, Image.Image]]]:
        """Images of equal size, so that nothing is padded: what is found does not depend on the batch."""
        waiting: dict[tuple[int, int], list[tuple[Path, Image.Image]]] = {}
        for path in self.files:
            try:
                image = open_rgb(path)
            except OSError as error:
                report.errors.append({"file": str(path), "error": f"cannot be read as an image: {error}"})
                bar.update(1)
                continue
            waiting.setdefault(image.size, []).append((path, image))
            if len(waiting[image.size]) == self.batch_size:
                yield waiting.pop(image.size)
            elif sum(map(len, waiting.values())) >= BATCHES_IN_WAITING * self.batch_size:
                yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
        yield from waiting.values()

    def _detect(
        self, batch: list[tuple[Path, Image.Image]], report: PredictionReport
    ) -> list[tuple[Path, Image.Image, list[dict]]]:
        images = [image for _, image in batch]
        try:
            found = self.detector(images, threshold=self.threshold, batch_size=len(images))
        except Exception as error:
            # Whatever a processor or model makes of an odd image must not end the run; the others are tried alone.
            if len(batch) > 1:
                return [result for single in batch for result in self._detect([single], report)]
            report.errors.append({"file": str(batch[0][0]), "error": f"{type(error).__name__}: {error}"})
            return []
        return [(path, image, detections) for (path, image), detections in zip(batch, found, strict=True)]

    def _draw(self, name: str, image: Image.Image, detections: list[dict]) -> str:
        config = self.detector.model.config
        found = Detections.from_pipeline(name, detections, config.label2id)
        picture = draw_boxes(image, Boxes(found.boxes, found.labels, found.scores), config.id2label)
        target = self.output_dir / PICTURE_DIRECTORY / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            picture.save(temporary, quality=92)
        return f"{PICTURE_DIRECTORY}/{name}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of the command."""
    parser.description = (
        "Detect objects on images: one JSON file for all, and a picture with the detections for each.\n\n"
        "Exit codes: 0, all files were looked at; 1, some could not be (they are listed, and in the JSON under\n"
        "`errors`); 2, nothing was done because of the arguments; 130, interrupted (the JSON holds what was done)."
    )
    parser.epilog = (
        "example:\n  deperceiver predict --model outputs/mine/best --output_dir outputs/found photos/ x/*.jpg"
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="Image, directory (recursive) or glob pattern.")
    parser.add_argument(
        "--model", required=True, help="Directory of a saved model with its image processor, or Hub id."
    )
    parser.add_argument("--output_dir", required=True, help="Directory for predictions.json and annotated/.")
    parser.add_argument("--threshold", type=float, default=0.5, help="Lowest score of a detection (%(default)s).")
    parser.add_argument("--batch_size", type=int, default=4, help="Images of one size at a time (%(default)s).")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:1, mps, ... (%(default)s).")
    parser.add_argument("--no_draw", dest="draw", action="store_false", help="Write no pictures.")


def prepare(arguments: argparse.Namespace) -> PredictionJob:
    """[`prepare_prediction`] with the command's arguments."""
    return prepare_prediction(**vars(arguments))


def prepare_prediction(
    model: str,
    inputs: Sequence[str],
    *,
    output_dir: str,
    threshold: float = 0.5,
    batch_size: int = 4,
    device: str = "auto",
    draw: bool = True,
) -> PredictionJob:
    """Check everything that a run needs before it starts.

    Args:
        model: directory of a saved model with its image processor, or a Hub id.
        inputs: image files, directories (searched recursively) or glob patterns (`**` for any directories).
        output_dir: directory for `predictions.json` and the pictures in `annotated/`, made if need be.
        threshold: lowest score of a detection, in [0, 1].
        batch_size: images that go through the model at a time, if that many are of one size.
        device: see `find_device`.
        draw: write annotated pictures.

    Raises:
        ImportError: pictures were asked for and `supervision` is not installed.
        OSError: model, inputs or output directory are not there or not usable.
        ValueError: an option is out of range.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold must be in [0, 1], got {threshold}.")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}.")
    require_model_source(model)
    if draw:
        require_supervision()
    files = find_images(inputs, leave_out=Path(output_dir) / PICTURE_DIRECTORY)
    directory = require_writable_directory(output_dir)
    chosen = find_device(device)
    detector, image_processor = load_detector(model)
    runner = pipeline("object-detection", model=detector, image_processor=image_processor, device=chosen)
    return PredictionJob(str(model), runner, files, directory, threshold, batch_size, draw)


def find_images(inputs: Sequence[str], leave_out: str | os.PathLike | None = None) -> list[Path]:
    """The image files that the inputs stand for, each once, in the order of the inputs and sorted within each.

    Args:
        inputs: files, directories or glob patterns. Hidden files in directories are left out.
        leave_out: directory whose files are not taken from directories and patterns: pictures of an earlier run.

    Raises:
        FileNotFoundError: an input is not there, or stands for no images.
    """
    excluded = None if leave_out is None else Path(leave_out).resolve()
    found: dict[str, Path] = {}  # by absolute path
    for entry in map(str, inputs):
        if os.path.isfile(entry):
            paths = [Path(entry)]
        elif os.path.isdir(entry):
            paths = _images_below(Path(entry), excluded)
        elif glob.has_magic(entry):
            matches = [Path(match) for match in sorted(glob.glob(entry, recursive=True))]
            paths = [path for path in matches if path.is_file() and _is_wanted(path, excluded)]
            # `**` brings the directories' files by itself
            if not paths:
                paths = [path for match in matches if match.is_dir() for path in _images_below(match, excluded)]
        else:
            raise FileNotFoundError(f"There is no file or directory {entry}.")
        if not paths:
            raise FileNotFoundError(
                f"No images in {entry}; looked for files ending in {' '.join(sorted(IMAGE_SUFFIXES))}."
            )
        for path in paths:
            found.setdefault(os.path.abspath(path), path)
    if not found:
        raise FileNotFoundError("No inputs were given.")
    return list(found.values())


def picture_names(files: Sequence[Path]) -> list[str]:
    """A name for the annotated picture of each file, all different: its path from where the paths part.

    Formats other than JPEG and PNG become PNG (`a.webp` is drawn as `a.webp.png`).
    """
    absolute = [os.path.abspath(path) for path in files]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = [Path(os.path.relpath(path, root)).as_posix() for path in absolute]
    return [name if Path(name).suffix.lower() in (".jpg", ".jpeg", ".png") else f"{name}.png" for name in names]


def _images_below(directory: Path, excluded: Path | None) -> list[Path]:
    return [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
        and _is_wanted(path, excluded)
    ]


def _is_wanted(path: Path, excluded: Path | None) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not (excluded and excluded in path.resolve().parents)
