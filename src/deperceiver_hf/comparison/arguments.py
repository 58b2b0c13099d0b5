# SPDX-License-Identifier: Apache-2.0
"""What is compared: models, seeds, budgets, learning rates, and the training options that all models share."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..output_files import as_path
from ..training import TrainingOptions
from ..training.architectures import ModelOptions
from ..training.arguments import AUTOMATIC, make_parser

DEFAULT_LR = 1e-4
MANY_EPOCHS = 1_000_000  # more than steps or time allow
NAME_PATTERN = re.compile(r"\w[\w.+-]*")

# Options of a training run that the comparison decides, and what is given instead.
DECIDED_HERE = {
    name: facts.comparison_hint for name, facts in TrainingOptions.facts().items() if facts.comparison_hint is not None
}
MODEL_FIELDS = {*ModelOptions.facts()} - {"architecture"}
RATE_FIELDS = {"lr", "lr_backbone"}
TRAINING_FIELDS = {*TrainingOptions.facts()}


@dataclass(frozen=True)
class ModelSpec:
    """A model of the comparison.

    Attributes:
        name: Of its row in the report and of its directory.
        options: Training options that this model alone has, `architecture` among them. They include `lr` if it is
            not to be searched, and may include `lr_backbone`.
    """

    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "ModelSpec":
        """Read `[NAME=]ARCHITECTURE[,OPTION=VALUE...]`.

        An option is a model option of a training run, `lr`, `lr_backbone`, or `config.FIELD` for a `--config` value.
        A comma separates options only where another one follows.

        Raises:
            ValueError: It cannot be read.
        """
        head, *parts = re.split(r",(?=\s*[A-Za-z_][\w.]*=)", text)
        name, _, architecture = head.rpartition("=")
        arguments, config = [f"--architecture={architecture}"], []
        for part in parts:
            option, _, value = part.strip().partition("=")
            if option.startswith("config."):
                config.append(f"{option.removeprefix('config.')}={value}")
            elif option in MODEL_FIELDS | RATE_FIELDS:
                arguments.append(f"--{option}={value}")
            elif option in TRAINING_FIELDS:
                raise UserError(f"--models {text}: {option} is the same for all models; give --{option} once.")
            else:
                raise UserError(f"--models {text}: there is no model option {option}.")
        if config:
            arguments += ["--config", *config]
        name = name or architecture
        if not NAME_PATTERN.fullmatch(name):
            raise UserError(f"--models {text}: {name!r} cannot be a name; write [NAME=]ARCHITECTURE[,OPTION=VALUE].")
        try:
            return cls(name, parse_training_options(arguments))
        except ValueError as error:
            raise UserError(f"--models {text}: {error}") from error


@dataclass(frozen=True)
class ComparisonOptions:
    """A comparison; one that makes no sense raises `ValueError` when it is made.

    Attributes:
        output_dir: Where everything is written.
        models: What is compared.
        seeds: Every model is trained once with each.
        minutes: Time that every run trains for, evaluations excluded. With `steps` too there are two sets of runs.
        steps: Optimizer steps that every run trains for.
        lrs: Learning rates that are tried for each model; a single one is taken as it is.
        search_minutes, search_steps: Length of a trial, one of the two.
        shared: Training options that are given for all models.
        command: The command line, for the report.
    """

    output_dir: Path
    models: list[ModelSpec]
    seeds: list[int] = field(default_factory=lambda: [0])
    minutes: float | None = None
    steps: int | None = None
    lrs: list[float] = field(default_factory=lambda: [DEFAULT_LR])
    search_minutes: float | None = None
    search_steps: int | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", as_path(self.output_dir))
        if self.minutes is None and self.steps is None:
            raise UserError("give --minutes, --steps or both: how long every model is trained.")
        names = [model.name for model in self.models]
        lists: dict[str, Sequence[Any]] = {"--models": names, "--seeds": self.seeds, "--lrs": self.lrs}
        for option, values in lists.items():
            if not values:
                raise UserError(f"{option} is empty.")
            if twice := sorted({value for value in values if values.count(value) > 1}):
                hint = "; write NAME=ARCHITECTURE to give another name" if values is names else ""
                raise UserError(f"{option} has {', '.join(map(str, twice))} twice{hint}.")
        searches = (self.search_minutes, self.search_steps)
        if len(self.lrs) > 1 and searches.count(None) != 1:
            raise UserError(
                "several --lrs are tried out: give --search_minutes or --search_steps, the length of a trial."
            )
        if len(self.lrs) == 1 and searches.count(None) != 2:
            raise UserError("--search_minutes and --search_steps need several --lrs to search among.")
        for name in DECIDED_HERE:
            if name in self.shared:
                raise UserError(f"--{name} is no option of a comparison: {DECIDED_HERE[name]}.")
        if self.shared.get("batch_size") == AUTOMATIC:
            raise UserError("--batch_size auto would give each model another batch; give a number.")
        if self.shared.get("eval_every") == 0:
            raise UserError("--eval_every 0: a comparison needs evaluations.")
        for model in self.models:
            for minutes, steps in (*self.budgets.values(), searches):
                if (minutes, steps) != (None, None):
                    self.training_options(model, self.output_dir, self.lrs[0], self.seeds[0], minutes, steps)

    @property
    def budgets(self) -> dict[str, tuple[float | None, int | None]]:
        """(minutes, steps) of each set of runs, by the name of its directory."""
        budgets: dict[str, tuple[float | None, int | None]] = {}
        if self.minutes is not None:
            budgets[f"minutes-{self.minutes:g}"] = (self.minutes, None)
        if self.steps is not None:
            budgets[f"steps-{self.steps}"] = (None, self.steps)
        return budgets

    def fixed_lr(self, model: ModelSpec) -> float | None:
        """The learning rate of a model for which none is searched."""
        return model.options.get("lr", self.lrs[0] if len(self.lrs) == 1 else None)

    def training_options(
        self,
        model: ModelSpec,
        output_dir: Path,
        lr: float,
        seed: int,
        minutes: float | None = None,
        steps: int | None = None,
    ) -> TrainingOptions:
        """Options of one run.

        The backbone's learning rate is `lr` if it starts from random weights, and a tenth of it otherwise; given
        options come before that, and those of the model before shared ones.

        Raises:
            ValueError: They do not fit together; the message names the model.
        """
        given = {"lr_scheduler": "wsd", **self.shared, "lr": lr, **model.options}
        if config := [*self.shared.get("config", []), *model.options.get("config", [])]:
            given["config"] = config
        from_scratch = given.get("no_pretrained_backbone", False)
        given.setdefault("lr_backbone", given["lr"] if from_scratch else given["lr"] / 10)
        decided: dict[str, Any] = {
            "output_dir": str(output_dir),
            "run_name": f"{model.name}-seed-{seed}",
            "seed": seed,
            "epochs": MANY_EPOCHS,
            "max_minutes": minutes,
            "max_steps": steps,
            "save_top_k": 0,
            "pictures": 0,
        }
        try:
            return TrainingOptions(**given, **decided)
        except ValueError as error:
            shared = ", ".join(f"--{name}" for name in self.shared if name in MODEL_FIELDS)
            hint = (
                f" Of what is given for all models ({shared}), write in --models what not all know." if shared else ""
            )
            raise UserError(f"model {model.name}: {error}{hint}") from error


def parse_training_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Those options of a training command that are given, by name.

    Raises:
        ValueError: An option is unknown or has an impossible value.
    """
    parser = make_parser()
    parser.exit_on_error = False
    parser.set_defaults(**dict.fromkeys(TRAINING_FIELDS))
    try:
        namespace, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if unknown:
        raise UserError(f"unknown: {' '.join(unknown)}")
    return {name: value for name, value in vars(namespace).items() if value is not None}


def parse_arguments(arguments: Sequence[str] | None = None) -> ComparisonOptions:
    """Options from a command line (`sys.argv` by default); ends the program with code 2 if they make no sense."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="deperceiver compare", allow_abbrev=False)
    add_arguments(parser)
    namespace, others = parser.parse_known_args(arguments)
    try:
        return make_options(
            **vars(namespace), others=others, command_line=shlex.join([*parser.prog.split(), *arguments])
        )
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def make_options(models: Sequence[str], others: Sequence[str], command_line: str, **options: Any) -> ComparisonOptions:
    """A comparison from the arguments of its command.

    Args:
        models: As `ModelSpec.parse` reads them.
        others: Options of a training command, which all models share.
        command_line: For the report.
        options: Fields of `ComparisonOptions`.

    Raises:
        ValueError: They make no sense.
    """
    return ComparisonOptions(
        models=[ModelSpec.parse(text) for text in models],
        shared=parse_training_options([argument for argument in others if argument != "--"]),
        command=command_line,
        **options,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of the command."""
    parser.description = (
        "Train several models on equal terms: the same data, image size, augmentation, batches, seeds, and the same\n"
        "time (--minutes) or steps (--steps). Repeat an interrupted command to go on. Ends with code 1 if runs failed."
    )
    parser.usage = "%(prog)s --output_dir DIR --models SPEC [SPEC ...] (--minutes M | --steps N) [options]"
    parser.epilog = """\
All other options are those of `deperceiver train`, given once for all models. Unless --lr_scheduler is
given, it is wsd; unless --lr_backbone is given, it is a tenth of the learning rate, and equal to it with
--no_pretrained_backbone.

example:
  deperceiver compare --output_dir outputs/both --models deperceiver_v2,preset=nano detr --steps 200 --lrs 1e-3"""
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="Where runs and report are written.")
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="SPEC",
        help="[NAME=]ARCHITECTURE[,OPTION=VALUE...]; an option is a model option of `deperceiver train`, lr, "
        "lr_backbone, or config.FIELD for --config FIELD=VALUE. Example: small=detr,enc_layers=3,lr=3e-4",
    )
    add("--seeds", nargs="+", type=int, default=[0], help="Train every model once with each (default: 0).")
    add("--minutes", type=float, help="Train every model for this time, evaluations excluded.")
    add("--steps", type=int, help="Train every model for so many optimizer steps; with --minutes, besides.")
    add(
        "--lrs",
        nargs="+",
        type=float,
        default=[DEFAULT_LR],
        help=f"Learning rates to try for each model, with the first seed; one is not tried (default: {DEFAULT_LR:g}).",
    )
    add("--search_minutes", type=float, help="Length of a trial of a learning rate.")
    add("--search_steps", type=int, help="Length of a trial of a learning rate, in steps.")
