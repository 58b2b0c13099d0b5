# SPDX-License-Identifier: Apache-2.0
"""The command that divides a data set into training, validation and test images."""

import argparse

from ...errors import UserError
from ...jobs import FunctionJob
from ..sources import dataset_format, dataset_splits, load_detection_data
from ..splitting import draw_parts, listed_parts, part_of
from .convert import add_source_arguments, remarks_on
from .data_set import WrittenDataSet, require_new_directory, write_data_set
from .writers import WRITERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of the command."""
    parser.description = (
        "Divide the images of one split into train, val and, if asked for, test, and write them as a data set.\n"
        "Images that are nearly the same picture stay together. Training does the same by itself with --val_fraction."
    )
    parser.epilog = "example:\n  deperceiver data split path/to/data path/to/divided --val_fraction 0.1"
    add_source_arguments(parser)
    parser.add_argument("--to", choices=WRITERS, help="Format of OUT; that of IN if it can be written, else coco.")
    parser.add_argument("--split", help="Split of IN to divide; train if it is the only one.")
    parser.add_argument("--val_fraction", type=float, help="Part of the images for validation, e.g. 0.1.")
    parser.add_argument("--test_fraction", type=float, help="Part of the images for a test.")
    parser.add_argument("--seed", type=int, default=42, help="Of the drawing (%(default)s).")
    parser.add_argument("--train_list", metavar="FILE", help="Text file with the names of the images for training.")
    parser.add_argument(
        "--val_list", metavar="FILE", help="The same for validation. Of one list, the rest is the other."
    )


def prepare(arguments: argparse.Namespace) -> FunctionJob[WrittenDataSet]:
    """Check what can be checked before the data are read."""
    lists = [file for file in (arguments.train_list, arguments.val_list) if file is not None]
    if lists and (arguments.val_fraction is not None or arguments.test_fraction is not None):
        raise UserError("--train_list and --val_list say which images are for what; give no fractions with them.")
    if not lists and arguments.val_fraction is None:
        raise UserError("Say how to divide: --val_fraction 0.1, or --train_list FILE and --val_list FILE.")
    require_new_directory(arguments.output)
    return FunctionJob(divide, vars(arguments))


def divide(
    dataset: str,
    output: str,
    *,
    to: str | None = None,
    split: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 42,
    train_list: str | None = None,
    val_list: str | None = None,
    format: str | None = None,
    box_format: str | None = None,
    link: bool = False,
) -> WrittenDataSet:
    """Write the images of a split as several, see the command's help for the arguments.

    Raises:
        OSError, ValueError: as of `load_detection_data`, `draw_parts`, `listed_parts` and `write_data_set`.
    """
    named = f"{dataset}:format={format}" if format is not None else dataset
    if split is None and len(there := dataset_splits(named)) > 1:
        raise UserError(f"{dataset} has splits already: {', '.join(there)}. --split says which one to divide.")
    data = load_detection_data(dataset, split or "train", format=format, bbox_format=box_format)
    if val_fraction is None:
        train, val = listed_parts(data, train_list, val_list)
        parts = {"train": train, "val": val}
    else:
        fractions = [fraction for fraction in (val_fraction, test_fraction) if fraction is not None]
        *drawn, train = draw_parts(data, fractions, seed)
        parts = {"train": train} | dict(zip(("val", "test"), drawn, strict=False))
    target = to or dataset_format(named)
    return write_data_set(
        {name: part_of(data, indices, name) for name, indices in parts.items()},
        output,
        target if target in WRITERS else "coco",
        link=link,
        remarks=remarks_on([data]),
    )
