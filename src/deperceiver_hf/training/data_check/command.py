# SPDX-License-Identifier: Apache-2.0
"""The command `deperceiver data check`: the doctor at the size that a training gives the images, and a recipe."""

import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...data.doctor.findings import Finding
from ...data.doctor.loading import load_splits
from ...data.doctor.objects import ObjectTable, TrainedSize
from ...data.doctor.page import check_page, write_page
from ...data.doctor.pictures import check_pictures
from ...data.doctor.quick import quick_check
from ...data.doctor.report import DataReport, Recommendation
from ...data.doctor.splits import unlisted_images
from ...data.images import limit_pixels
from ...data.synthetic.scenes import is_synthetic
from ...errors import FOREIGN_USER_ERRORS, UserError, one_line
from ...evaluation.coco_metric import COCO_MAX_DETECTIONS
from ...machine import find_device
from ...saved_models import load_config
from ..architectures import ARCHITECTURES, ModelOptions
from ..arguments import TrainingOptions, make_parser
from ..building import build_image_processor
from ..recipes import recipe_options, with_recipe
from ..setup import trained_size
from .recommendation import RECIPES, Choice, recommend
from .timing import measure_step

logger = logging.get_logger(__name__)

# Options that decide what the images become; if none is given, the recommendation decides.
OF_THE_MODEL = (*ModelOptions.facts(), "shortest_edge", "longest_edge", "fixed_size")
# Options that say how the data are read, which the recommended command repeats.
OF_THE_DATA = (
    *("dataset", "annotations", "images", "val_annotations", "val_images", "format", "box_format"),
    *("train_split", "eval_split", "val_fraction", "val_seed", "train_list", "val_list"),
    *("max_image_pixels", "max_train_samples", "max_eval_samples"),
)
OTHER_SPLIT = "test"
EXAMPLE = """\
Options that say how the data are read and what images become are those of `deperceiver train`, such as --recipe,
--preset, --model, --shortest_edge, --fixed_size, --num_queries, --box_format, --train_split or --eval_split. If none
says what images become, those of the recommended recipe are taken.

Ends with code 1 if there are errors, and with 0 if there are warnings and notes alone.

examples:
  deperceiver data check path/to/data --report outputs/data-report
  deperceiver data check path/to/data --quick --recipe own-data-gpu --json"""


@dataclass(frozen=True)
class DataCheckJob:
    """A data set that is to be looked over.

    Attributes:
        options: Of the training that it is for.
        options_are_given: Whether they say what the images become.
        quick: Leave pixels alone, and measure nothing.
        page: The HTML page to write; `None` for none.
    """

    options: TrainingOptions
    options_are_given: bool
    quick: bool
    page: Path | None

    @property
    def dataset(self) -> str:
        """What it is called."""
        return self.options.annotations or self.options.dataset

    def run(self) -> DataReport:
        """Load, check, recommend, and write the page.

        Raises:
            OSError: There is no such data set.
        """
        begin = time.perf_counter()
        options = self.options
        limit_pixels(options.max_image_pixels)
        train, evaluation = options.train_split, options.eval_split
        apart = options.annotations is not None
        of_split: dict[str, dict[str, Any]] = {
            evaluation: {"max_samples": options.max_eval_samples},
            train: {"max_samples": None if options.divides_a_split else options.max_train_samples},
        }
        if apart:
            of_split[train] |= {"dataset": options.annotations, "images": options.images, "alone": True}
        if options.val_annotations is not None:
            of_split[evaluation] |= {"dataset": options.val_annotations, "images": options.val_images, "alone": True}
        has_own_split = not options.divides_a_split and (not apart or options.val_annotations is not None)
        loaded = load_splits(
            options.dataset,
            train,
            evaluation if has_own_split else None,
            () if apart or is_synthetic(options.dataset) else (OTHER_SPLIT,),
            of_split=of_split,
            format=options.format,
            bbox_format=options.box_format,
        )
        tables, findings = loaded.tables, loaded.findings
        if not has_own_split and not options.divides_a_split:
            what = "There are no --val_annotations to evaluate on."
            findings.append(Finding("no_validation", evaluation, what))
        choice = self._choose(tables, loaded.box_format)
        decisive = options if self.options_are_given or choice is None else choice.options
        trained = _trained_size(decisive)
        findings += quick_check(tables, train, evaluation, trained, max_detections=COCO_MAX_DETECTIONS[-1])
        if not self.quick:
            count = sum(table.num_images for table in tables.values())
            logger.info(f"Looking at the pixels of {count:,} images (--quick leaves that out).")
            findings += check_pictures(tables)
            findings += unlisted_images(tables)
        report = DataReport(
            dataset=self.dataset,
            tables=tables,
            findings=findings,
            trained=trained,
            trained_by="as asked for" if decisive is options else "as recommended below",
            recommendation=None if choice is None else self._recommendation(choice, tables[train]),
            quick=self.quick,
            seconds=time.perf_counter() - begin,
            page=self.page,
        )
        if self.page is not None:
            logger.info("Drawing.")
            write_page(report, self.page)
        return report

    def _choose(self, tables: dict[str, ObjectTable], box_format: str | None) -> Choice | None:
        """The recipe for the data, if they have something to learn.

        Args:
            tables: The splits.
            box_format: In which boxes had to be read, if another one than was asked for.
        """
        train = self.options.train_split
        if train not in tables or not len(tables[train].ordinary):
            return None
        device = find_device()
        named = () if self.options.annotations is not None else ("dataset",)
        given = {name: getattr(self.options, name) for name in (*named, *self.options.given(OF_THE_DATA[1:]))}
        if box_format is not None:
            given["box_format"] = box_format
        recipe = RECIPES["cpu" if device.type == "cpu" else "cuda"]
        return recommend(
            tables[train],
            given | {"output_dir": f"outputs/{_name_of(self.dataset)}"},
            _trained_size(recipe_options(recipe)),
            device,
            has_validation=self.options.divides_a_split or self.options.eval_split in tables,
        )

    def _recommendation(self, choice: Choice, table: ObjectTable) -> Recommendation:
        """With the time that it takes, unless that is not to be measured or cannot be."""
        if self.quick:
            return Recommendation(choice.command, choice.reasons)
        try:
            measured = measure_step(choice.options, table.data, build_image_processor(choice.options))
        except (RuntimeError, *FOREIGN_USER_ERRORS) as error:
            return Recommendation(choice.command, choice.reasons, f"The time could not be measured: {one_line(error)}")
        minutes = measured.minutes(choice.options, table.num_images)
        return Recommendation(
            choice.command, choice.reasons, measured.sentence(choice.options, table.num_images), round(minutes, 1)
        )


def parents() -> list[argparse.ArgumentParser]:
    """All options of a training run, which the help does not repeat."""
    parser = make_parser(add_help=False)
    for action in parser._actions:
        action.help = argparse.SUPPRESS
    return [parser]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make the parser, which has the options from `parents`, that of this command."""
    parser.description = (
        "Look a data set over before it trains: what is wrong with it, how large its objects are for the model, and\n"
        "which recipe fits it."
    )
    parser.usage = "%(prog)s DATASET [--report DIR] [--quick] [options of `deperceiver train`]"
    parser.epilog = EXAMPLE
    parser.add_argument(
        "data",
        metavar="DATASET",
        nargs="?",
        help="As `deperceiver train --dataset` takes it; or --annotations FILE --images DIR instead, as there.",
    )
    parser.add_argument("--report", metavar="DIR", help="Write a page with pictures there, index.html.")
    parser.add_argument(
        "--quick", action="store_true", help="Do not look at pixels, and measure no time: a second or less."
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help="The recipe that the data are to be trained by.")


def expand(arguments: list[str]) -> list[str]:
    """The command line with the options of its recipe.

    Raises:
        ValueError: A data set is named as an option.
    """
    if any(argument.split("=")[0] == "--dataset" for argument in arguments):
        raise UserError("--dataset: name the data set as it is, `deperceiver data check DATASET`.")
    return with_recipe(arguments)


def prepare(arguments: argparse.Namespace) -> DataCheckJob:
    """The data set with the options of its training; raises what [`TrainingOptions`] and [`check_page`] raise."""
    values = dict(vars(arguments))
    report, quick, recipe = (values.pop(name) for name in ("report", "quick", "recipe"))
    defaults = TrainingOptions.defaults()
    data = values.pop("data")
    if (data is None) == (values["annotations"] is None):
        raise UserError("give a data set to look over, as DATASET or by --annotations.")
    values["dataset"] = defaults["dataset"] if data is None else data
    return DataCheckJob(
        options=TrainingOptions(**values),
        options_are_given=recipe is not None or any(values[name] != defaults[name] for name in OF_THE_MODEL),
        quick=quick,
        page=None if report is None else check_page(report),
    )


def _trained_size(options: TrainingOptions) -> TrainedSize:
    """What images become by the options, and what the model makes of them."""
    if options.model is not None:
        config = load_config(options.model)
    else:
        config = ARCHITECTURES[options.chosen_architecture].make_config(options, ["object"])
    return trained_size(build_image_processor(options), config)


def _name_of(dataset: str) -> str:
    """A name for the directory of a run."""
    name = re.split(r"[/\\:]", re.sub(r":[^/]*=.*$", "", dataset).rstrip("/\\"))[-1]
    name = re.sub(r"\.(json|ya?ml|csv)(\.gz)?$", "", name)
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "mine"
