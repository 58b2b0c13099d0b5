# SPDX-License-Identifier: Apache-2.0
"""The command that writes a data set in another format."""

import argparse
from typing import Any

from ...jobs import FunctionJob
from ..boxes import BOX_FORMATS
from ..formats import FORMATS
from ..records import DetectionData, LoadingReport
from ..sources import dataset_splits, load_detection_data
from .data_set import WrittenDataSet, require_new_directory, write_data_set
from .writers import WRITERS

ONLY_BOXES = "Boxes and classes are what is carried over: masks, keypoints and licences stay where they are."


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is read and where it is written to."""
    parser.add_argument("dataset", metavar="IN", help="Data set in any format that is read, or Hub id.")
    parser.add_argument("output", metavar="OUT", help="Directory to write; it must not be there, or be empty.")
    parser.add_argument("--format", choices=FORMATS, help="Format of IN, if its content does not tell.")
    parser.add_argument(
        "--box_format", choices=BOX_FORMATS, metavar="FORMAT", help="How IN writes boxes, if unusually."
    )
    parser.add_argument("--link", action="store_true", help="Make links to the image files instead of copies.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of the command."""
    parser.description = (
        "Write a data set in another format, with its images. What the format cannot carry is counted; what is\n"
        f"broken is left out or repaired as in training. {ONLY_BOXES}"
    )
    parser.epilog = "example:\n  deperceiver data convert path/to/data path/to/yolo --to yolo"
    add_source_arguments(parser)
    parser.add_argument("--to", choices=WRITERS, required=True, help="Format of OUT.")
    parser.add_argument(
        "--splits",
        nargs="+",
        metavar="SPLIT",
        help="Splits to convert; train, val and test, as far as they are there.",
    )


def prepare(arguments: argparse.Namespace) -> FunctionJob[WrittenDataSet]:
    """Check what can be checked before the data are read."""
    require_new_directory(arguments.output)
    return FunctionJob(convert, vars(arguments))


def convert(
    dataset: str,
    output: str,
    *,
    to: str,
    splits: list[str] | None = None,
    format: str | None = None,
    box_format: str | None = None,
    link: bool = False,
) -> WrittenDataSet:
    """Write the splits of a data set in another format.

    Args:
        dataset: what `load_detection_data` takes.
        output: directory that is not there yet, or is empty.
        to: key of `WRITERS`.
        splits: names; all of `train`, `val` and `test` that are there if not given.
        format, box_format, link: see the command's help.

    Raises:
        OSError, ValueError: as of `load_detection_data` and `write_data_set`.
    """
    reading: dict[str, Any] = {"format": format, "bbox_format": box_format}
    named = f"{dataset}:format={format}" if format is not None else dataset
    loaded = {
        split: load_detection_data(dataset, split, **reading)
        for split in (splits or dataset_splits(named) or ["train"])
    }
    return write_data_set(loaded, output, to, link=link, remarks=remarks_on(loaded.values()))


def remarks_on(data: Any) -> list[str]:
    """What loading left out or repaired, a sentence for each split in which there was something."""
    reports: list[LoadingReport] = [one.report for one in data if isinstance(one, DetectionData)]
    return [f"While {report.source} was read: {report.sentence()}." for report in reports if report.counts]
