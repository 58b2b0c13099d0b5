# SPDX-License-Identifier: Apache-2.0
"""Detection on image files: JSON and annotated pictures, by way of transformers' `object-detection` pipeline."""

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import Pipeline, pipeline

from .data.detections import Detections
from .data.image_files import IMAGE_SUFFIXES, FoundImages, describe_left_out, find_images, search_images
from .data.images import has_more_frames, limit_pixels, open_rgb
from .drawing import Boxes, draw_boxes, require_supervision
from .errors import FAILURE_CODE, INTERRUPTED_CODE, FailedRunError, UserError, is_out_of_memory, one_line
from .jobs import printable
from .machine import find_device, make_accelerator, processes_launched, versions
from .output_files import (
    Journal,
    as_path,
    atomic_path,
    expand_home,
    file_state,
    require_writable_directory,
    require_writable_file,
    unique_names,
    write_json,
)
from .saved_models import add_dial_arguments, load_detector, require_model_source

__all__ = [
    "IMAGE_SUFFIXES",
    "PredictionJob",
    "PredictionReport",
    "add_arguments",
    "find_images",
    "picture_names",
    "prepare",
    "prepare_prediction",
]

logger = logging.getLogger(__name__)

JSON_NAME, PICTURE_DIRECTORY = "predictions.json", "annotated"
FOUND = ("images", "errors", "first_frames")  # fields of the report that have entries of files
BATCHES_IN_A_PART = 4  # images are read this many batches ahead to find some of equal size
NAMED_IN_SUMMARY = 10  # files that failed for one reason are all named up to this number
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no further picture can be written either


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
        errors: for each file that failed, also if only its picture could not be drawn, `{"file", "error"}`.
        first_frames: files of several frames or pages, of which the first was looked at.
        left_out: how many files of each suffix lay in the directories, or matched, but are of kinds that are not read.
        json_path: the JSON file; not in it.
    """

    model: str
    threshold: float
    complete: bool = False
    images: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    first_frames: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    json_path: Path | None = None

    @property
    def exit_code(self) -> int:
        """Of the command."""
        if not self.complete:
            return INTERRUPTED_CODE
        return FAILURE_CODE if self.errors else 0

    def counts(self) -> dict[str, int]:
        """How many entries there are of what is found file by file."""
        return {name: len(getattr(self, name)) for name in FOUND}

    def since(self, counts: Mapping[str, int] | None = None) -> dict[str, list[Any]]:
        """The entries that have been made since there were so many; all of them by default."""
        return {name: getattr(self, name)[(counts or {}).get(name, 0) :] for name in FOUND}

    def add(self, found: Mapping[str, list[Any]]) -> None:
        """Enter what another report says."""
        for name in FOUND:
            getattr(self, name).extend(found[name])

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {name: value for name, value in vars(self).items() if name != "json_path"}

    def summary(self) -> str:
        """The counts, the files that failed and why, and what else there is to know of the inputs."""
        count = sum(len(image["detections"]) for image in self.images)
        failed: dict[str, list[str]] = {}
        for error in self.errors:
            failed.setdefault(printable(error["error"]), []).append(printable(error["file"]))
        lines = [f"{count} detections on {len(self.images)} images, {sum(map(len, failed.values()))} files failed."]
        for reason, files in failed.items():
            if len(files) <= NAMED_IN_SUMMARY:
                lines += [f"failed: {file}: {reason}" for file in files]
            else:
                all_of_them = "" if self.images or len(failed) > 1 else "all "
                lines.append(f"failed: {all_of_them}{len(files)} files, such as {', '.join(files[:3])}: {reason}")
        if self.first_frames:
            named = ", ".join(map(printable, self.first_frames[:3]))
            more = f" and {len(self.first_frames) - 3} more" if len(self.first_frames) > 3 else ""
            lines.append(f"Of several frames or pages the first was looked at: {named}{more}")
        if self.left_out:
            lines.append(f"Left out: {describe_left_out(self.left_out)}")
        if not self.complete:
            lines.append("Interrupted: the other files were not looked at. The same command goes on.")
        return "\n".join([*lines, f"Results: {printable(str(self.json_path))}"] if self.json_path else lines)


@dataclass(frozen=True)
class PredictionJob:
    """Files, detector and output directory, all checked: what `prepare_prediction` returns and `run` carries out.

    The files are gone through in parts, which the processes share out among themselves and a later run takes over.
    """

    model: str
    detector: Pipeline
    found: FoundImages
    output_dir: Path
    threshold: float
    batch_size: int
    draw: bool
    settings: dict[str, Any] = field(default_factory=dict)  # what else the results depend on, for `_parts`
    accelerator: Accelerator | None = None  # of several processes

    @property
    def files(self) -> list[Path]:
        return self.found.files

    @property
    def json_path(self) -> Path:
        return self.output_dir / JSON_NAME

    def run(self, progress: bool = True) -> PredictionReport:
        """Detect on all files, and write JSON and pictures; to be called on every process.

        A file that fails is recorded and the others go on. After Ctrl-C, and after an error that ends the run, such as
        a full disk, what is done by then is in the JSON file; if that has no place either, in one of the system's
        directory for temporary files, which the error names. A run that was interrupted or killed is gone on with by
        the next one with the same arguments and files. Files of an earlier run are overwritten where the names are the
        same; nothing else is touched.

        Raises:
            OSError: pictures or the JSON file cannot be written.
        """
        report = PredictionReport(
            self.model, self.threshold, left_out=self.found.counts_left_out, json_path=self.json_path
        )
        problem: Exception | None = None
        try:
            self._go_through_files(report, progress)
            report.complete = True
        except KeyboardInterrupt:
            pass  # the report says that it is not complete
        except Exception as error:
            problem = error
        reasons = self._gather(report, problem)
        if self._is_main_process:
            report.errors += [
                {"file": path, "error": f"cannot be read as an image: {reason}"}
                for path, reason in self.found.refused.items()
            ]
            position = {str(path): index for index, path in enumerate(self.files)}
            for entries in (report.images, report.errors):
                entries.sort(key=lambda entry: position.get(entry["file"], len(position)))
            report.first_frames.sort(key=position.__getitem__)
            self._write(report)
            if report.complete:
                with self._keeping():
                    self._journal.remove()
        if problem is not None:
            raise problem
        if reasons:
            raise FailedRunError(f"another process has failed: {reasons[0]}")
        return report

    @property
    def _is_main_process(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    @property
    def _journal(self) -> Journal:
        return Journal(self.json_path, 0 if self.accelerator is None else self.accelerator.process_index)

    def _go_through_files(self, report: PredictionReport, progress: bool) -> None:
        """Enter what is found in the report: on the main process what an earlier run has found, on each its share."""
        names = dict(zip(self.files, picture_names(self.files), strict=True))
        parts = self._parts(names)
        done = self._take_over(parts, report) if self._is_main_process else []
        index, count = 0, 1
        if self.accelerator is not None:
            (done,) = broadcast_object_list([done])
            index, count = self.accelerator.process_index, self.accelerator.num_processes
        share = [part for part in parts.items() if part[0] not in done][index::count]
        show = progress and self._is_main_process
        total = sum(len(files) for _, files in share)
        with _log_above_progress(), tqdm(total=total, desc="Detecting", disable=not show) as bar:
            for key, files in share:
                begun = report.counts()
                for batch in self._batches(files, report, bar):
                    for path, image, detections in self._detect(batch, report):
                        entry: dict[str, Any] = {
                            "file": str(path),
                            "width": image.width,
                            "height": image.height,
                            "detections": detections,
                            "annotated": None,
                        }
                        report.images.append(entry)
                        if self.draw:
                            entry["annotated"] = self._draw(path, names[path], image, detections, report)
                    bar.update(len(batch))
                with self._keeping():
                    self._journal.add(key, report.since(begun))

    def _parts(self, names: Mapping[Path, str]) -> dict[str, list[Path]]:
        """The files in parts of a few batches, by a key of all that decides what is found on them.

        Batches are made within a part, so that what is found does not depend on how many processes there are.
        """
        size = BATCHES_IN_A_PART * self.batch_size
        parts = [self.files[start : start + size] for start in range(0, len(self.files), size)]
        settings = [self.model, self.threshold, self.batch_size, self.draw, self.settings]
        keys = [[settings, [[str(path), names[path], *file_state(path)] for path in part]] for part in parts]
        return {
            hashlib.sha256(json.dumps(key).encode()).hexdigest(): part for key, part in zip(keys, parts, strict=True)
        }

    def _take_over(self, parts: Mapping[str, Any], report: PredictionReport) -> list[str]:
        """Enter in the report what an earlier run has found before it was interrupted; returns the keys of its parts.

        Parts in which something failed, and those whose pictures are gone, are left to this run.
        """
        known = {}
        with self._keeping():
            for key, found in self._journal.read(parts).items():
                drawn = [image["annotated"] for image in found["images"] if image["annotated"] is not None]
                if not found["errors"] and all((self.output_dir / name).is_file() for name in drawn):
                    known[key] = found
            self._journal.start(known)
        for found in known.values():
            report.add(found)
        if known:
            logger.info(
                f"{len(report.images)} of {len(self.files)} images were looked at by an earlier run that was "
                "interrupted; this one goes on from there."
            )
        return list(known)

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Within, what is found so far is written; where it has no place, the run goes on without."""
        try:
            yield
        except OSError as error:
            _warn_once(f"What is found so far cannot be kept for a later run: {one_line(error)}")

    def _gather(self, report: PredictionReport, problem: Exception | None) -> list[str]:
        """Bring what all processes have found into the report of each; returns why others have failed."""
        if self.accelerator is None:
            return []
        own = {**report.since(), "complete": report.complete, "problem": problem and one_line(problem)}
        others = [other for index, other in enumerate(gather_object([own])) if index != self.accelerator.process_index]
        for other in others:
            report.add(other)
            report.complete &= other["complete"]
        return [other["problem"] for other in others if other["problem"] is not None]

    def _write(self, report: PredictionReport) -> None:
        try:
            write_json(self.json_path, report.to_dict())
        except OSError as error:
            rescued = Path(tempfile.mkdtemp(prefix="deperceiver-")) / JSON_NAME
            write_json(rescued, report.to_dict())
            raise OSError(
                f"{self.json_path} cannot be written ({error.strerror}); what was found is in {rescued} instead."
            ) from error

    def _batches(
        self, files: Sequence[Path], report: PredictionReport, bar: tqdm
    ) -> Iterator[list[tuple[Path, Image.Image]]]:
        """Images of equal size, so that nothing is padded: what is found does not depend on the batch."""
        waiting: dict[tuple[int, int], list[tuple[Path, Image.Image]]] = {}
        for path in files:
            try:
                image = open_rgb(path)
            except OSError as error:
                report.errors.append({"file": str(path), "error": f"cannot be read as an image: {error}"})
                bar.update(1)
                continue
            if has_more_frames(path):
                report.first_frames.append(str(path))
            waiting.setdefault(image.size, []).append((path, image))
            if len(waiting[image.size]) == self.batch_size:
                yield waiting.pop(image.size)
        yield from waiting.values()

    def _detect(
        self, batch: list[tuple[Path, Image.Image]], report: PredictionReport
    ) -> list[tuple[Path, Image.Image, list[dict]]]:
        images = [image for _, image in batch]
        try:
            found = self.detector(images, threshold=self.threshold, batch_size=len(images))
        except Exception as error:  # whatever a processor or model makes of an odd image must not end the run
            reason = self._reason(error, batch)
        else:
            for image, detections in zip(images, found, strict=True):
                for detection in detections:
                    detection["box"] = _within(detection["box"], image.size)
            return [(path, image, detections) for (path, image), detections in zip(batch, found, strict=True)]
        # Here, where the error no longer holds what the call took of the memory, the others are tried alone.
        if len(batch) > 1:
            return [result for single in batch for result in self._detect([single], report)]
        report.errors.append({"file": str(batch[0][0]), "error": reason})
        return []

    def _reason(self, error: Exception, batch: list[tuple[Path, Image.Image]]) -> str:
        """What to say of an error of the detector."""
        if is_out_of_memory(error):
            pixels = "{} x {} pixels".format(*batch[0][1].size)
            if len(batch) > 1:
                _warn_once(
                    f"The memory is not enough for {len(batch)} images of {pixels} at a time; they are tried one by "
                    "one. A smaller --batch_size needs less."
                )
            return (
                f"the memory is not enough for an image of {pixels}, even with --batch_size 1; a smaller image, or a "
                "smaller `size` in preprocessor_config.json, needs less"
            )
        return str(error) if isinstance(error, FailedRunError) else f"{type(error).__name__}: {one_line(error)}"

    def _draw(
        self, path: Path, name: str, image: Image.Image, detections: list[dict], report: PredictionReport
    ) -> str | None:
        """Write the picture; its name in the output directory, or `None` if it failed, which is in the report then.

        Raises:
            OSError: no other picture could be written either.
        """
        id2label = self.detector.model.config.id2label
        found = Detections.from_pipeline(name, detections, {text: label for label, text in id2label.items()})
        target = self.output_dir / PICTURE_DIRECTORY / name
        try:
            picture = draw_boxes(image, Boxes(found.boxes, found.labels, found.scores), id2label)
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as temporary:
                picture.save(temporary, quality=92)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_PLACE:
                raise
            reason = f"the picture with detections cannot be written: {type(error).__name__}: {one_line(error)}"
            report.errors.append({"file": str(path), "error": reason})
            return None
        return f"{PICTURE_DIRECTORY}/{name}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of the command."""
    parser.description = (
        "Detect objects on images: one JSON file for all, and a picture with the detections for each.\n\n"
        "Under `accelerate launch` or `torchrun` the processes share the files out, with the same results. A run\n"
        "that was interrupted or killed is gone on with by the same command; to begin anew, delete the files\n"
        "OUTPUT_DIR/predictions.partial-*.jsonl.\n\n"
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
    add_dial_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=4, help="Images of one size at a time (%(default)s).")
    parser.add_argument(
        "--max_image_pixels", type=int, help="Images of more pixels are errors (178956970 if not given)."
    )
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
    num_queries: int | None = None,
    num_blocks: int | None = None,
    token_share: float | None = None,
    batch_size: int = 4,
    max_image_pixels: int | None = None,
    device: str = "auto",
    draw: bool = True,
) -> PredictionJob:
    """Check everything that a run needs before it starts.

    Args:
        model: directory of a saved model with its image processor, or a Hub id.
        inputs: image files, directories (searched recursively) or glob patterns (`**` for any directories); see
            `search_images`.
        output_dir: directory for `predictions.json` and the pictures in `annotated/`, made if need be.
        threshold: lowest score of a detection, in [0, 1].
        num_queries, num_blocks, token_share: see `load_detector`.
        batch_size: images that go through the model at a time, if that many are of one size.
        max_image_pixels: images of more pixels are errors, see `limit_pixels`.
        device: see `find_device`.
        draw: write annotated pictures.

    Raises:
        ImportError: pictures were asked for and `supervision` is not installed.
        OSError: model, inputs or output directory are not there or not usable.
        ValueError: an option is out of range, an input is a URL or a video, or a picture would overwrite an image.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold must be in [0, 1], got {threshold}.")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}.")
    limit_pixels(max_image_pixels)
    require_model_source(model)
    if draw:
        require_supervision()
    directory = as_path(output_dir)
    found = search_images(inputs, leave_out=directory / PICTURE_DIRECTORY)
    require_writable_file(directory / JSON_NAME)
    if draw:
        pictures = require_writable_directory(directory / PICTURE_DIRECTORY)
        _require_other_files(found.files, pictures, picture_names(found.files))
    accelerator = make_accelerator(device) if processes_launched() > 1 else None
    if accelerator is not None:  # all work on the files that the main process sees
        (found,) = broadcast_object_list([found])
    chosen = find_device(device) if accelerator is None else accelerator.device
    dials: dict[str, Any] = {"num_queries": num_queries, "num_blocks": num_blocks, "token_share": token_share}
    detector, image_processor = load_detector(model, **dials)
    runner = pipeline("object-detection", model=detector, image_processor=image_processor, device=chosen)
    runner.model.register_forward_hook(_refuse_not_finite)
    settings = {
        **dials,
        "max_image_pixels": max_image_pixels,
        "device": chosen.type,
        "files": [[file.name, *file_state(file)] for file in sorted(Path(expand_home(model)).glob("*"))],
        "versions": versions(),
    }
    return PredictionJob(
        str(model), runner, found, directory, threshold, batch_size, draw, settings=settings, accelerator=accelerator
    )


def picture_names(files: Sequence[Path]) -> list[str]:
    """A name for the annotated picture of each file, all different: its path from where the paths part.

    Formats other than JPEG and PNG become PNG (`a.webp` is drawn as `a.webp.png`). See [`unique_names`] for names that
    would meet, or that another system would refuse.
    """
    absolute = [os.path.abspath(path) for path in files]
    try:
        root = os.path.commonpath([os.path.dirname(path) for path in absolute])
        relative = [os.path.relpath(path, root) for path in absolute]
    except ValueError:  # on several drives
        drives = [os.path.splitdrive(path) for path in absolute]
        relative = [f"{drive.strip(':')}{rest}".lstrip(os.sep) for drive, rest in drives]
    names = [Path(name).as_posix() for name in relative]
    return unique_names([n if Path(n).suffix.lower() in (".jpg", ".jpeg", ".png") else f"{n}.png" for n in names])


def _require_other_files(files: Sequence[Path], directory: Path, names: Sequence[str]) -> None:
    """Refuse pictures that would take the place of the images that they are drawn on, or of others among them."""
    originals = {os.path.realpath(path) for path in files}
    for name in names:
        if (target := os.path.realpath(directory / name)) in originals:
            raise UserError(f"the picture with detections would overwrite {target}; give another --output_dir.")


def _refuse_not_finite(module: torch.nn.Module, inputs: tuple, outputs: Mapping[str, Any]) -> None:
    """A forward hook: what is compared with a threshold is a number, or nothing would be found without a word."""
    logits, boxes = outputs["logits"], outputs["pred_boxes"]
    # Some models say by a logit of minus infinity that a class is none of theirs.
    if bool(torch.isnan(logits).any() | torch.isposinf(logits).any()) or not bool(torch.isfinite(boxes).all()):
        raise FailedRunError(
            "the model's scores or boxes are not finite (NaN or infinite): its weights are damaged, or from a "
            "training that failed"
        )


def _within(box: Mapping[str, int], size: tuple[int, int]) -> dict[str, int]:
    """A box cut off at the border of its image, of (width, height)."""
    return {side: min(max(value, 0), size[side.startswith("y")]) for side, value in box.items()}


def _log_above_progress() -> contextlib.AbstractContextManager:
    """Within, what is shown of the package's log has its own lines and does not stand behind the progress bar."""
    of_package = logging.getLogger(__package__)
    return logging_redirect_tqdm([of_package]) if of_package.handlers else contextlib.nullcontext()


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
