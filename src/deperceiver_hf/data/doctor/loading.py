# SPDX-License-Identifier: Apache-2.0
"""The splits of a data set as far as they can be loaded, and what their loading says."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...errors import FOREIGN_USER_ERRORS, one_line
from ...output_files import as_path
from ..plausibility import ImplausibleBoxesError
from ..records import ISSUES, DetectionData, LoadingReport, MissingSplitError
from ..sources import load_detection_data, split_options
from .findings import Example, Finding
from .objects import ObjectTable


@dataclass
class LoadedSplits:
    """What could be loaded.

    Attributes:
        tables: By the name of the split; those with images.
        findings: What loading says, and why the others could not be loaded.
        box_format: In which those to train on are read, since they are plainly not in the one that was asked for.
    """

    tables: dict[str, ObjectTable] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    box_format: str | None = None


def load_splits(
    dataset: str,
    train: str,
    evaluation: str | None,
    others: tuple[str, ...] = (),
    *,
    of_split: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> LoadedSplits:
    """Load the splits of a data set; what stops a loader becomes a finding.

    Args:
        dataset: As [`load_detection_data`] takes it.
        train: The split to train on.
        evaluation: The split to evaluate on; `None` if there need not be one.
        others: More that are looked at if they are there.
        of_split: By the name of a split, arguments of [`load_detection_data`] for it alone, also `dataset`.
        options: Of [`load_detection_data`] for all.

    Raises:
        OSError: There is no such data set, or nothing of it can be read.
        ValueError: Its name or the options make no sense.
    """
    loaded = LoadedSplits()
    for split in dict.fromkeys((train, *filter(None, (evaluation,)), *others)):
        own = {"dataset": dataset, **(of_split or {}).get(split, {})}
        load = partial(load_detection_data, split=split, **own)
        try:
            with _silent_loading():
                data, box_format = _load(load, split, options, loaded.findings)
        except MissingSplitError as error:
            if split == train:
                loaded.findings.append(Finding("cannot_be_loaded", split, one_line(error)))
            elif split == evaluation:
                what = f"There is no split {split!r} to evaluate on: {one_line(error)}"
                loaded.findings.append(Finding("no_validation", split, what))
            continue
        except FOREIGN_USER_ERRORS as error:
            if not _has_files(own["dataset"]):
                raise
            if split != train and any(f.what == one_line(error) and f.split == train for f in loaded.findings):
                raise  # it is not the split, but all of it
            name = "resized_images" if isinstance(error, ImplausibleBoxesError) else "cannot_be_loaded"
            loaded.findings.append(Finding(name, split, one_line(error)))
            continue
        if split == train:
            loaded.box_format = box_format
        loaded.tables[split] = ObjectTable.of(data, split)
        loaded.findings += loading_findings(data.report, split)
    return loaded


def loading_findings(report: LoadingReport, split: str) -> list[Finding]:
    """What a loader left out or repaired, and its remarks."""
    found = []
    for name, count in report.counts.items():
        examples = tuple(Example(text=case, split=split) for case in report.cases[name])
        found.append(Finding(name, split, f"{count} {ISSUES[name]}.", count, examples))
    return [*found, *(Finding("doubtful_boxes", split, remark) for remark in report.remarks)]


def _load(
    load: partial[DetectionData], split: str, options: dict[str, Any], findings: list[Finding]
) -> tuple[DetectionData, str | None]:
    """The data; if their boxes are plainly in another format, read as that, with its name."""
    try:
        return load(**options), None
    except ImplausibleBoxesError as error:
        if not error.formats:
            raise
        fitting = error.formats[0]
        what = f"{one_line(error)} All that follows reads them as {fitting}."
        findings.append(Finding("box_format", split, what))
        return load(**options | {"bbox_format": fitting}), fitting


def _has_files(dataset: str) -> bool:
    """Whether a data set is a file, or a directory that is not empty."""
    path = as_path(split_options(dataset)[0])
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


@contextlib.contextmanager
def _silent_loading() -> Iterator[None]:
    """Within, loaders log no warnings: they become findings."""
    logger = logging.getLogger(__name__.rpartition(".")[0].rpartition(".")[0])
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
