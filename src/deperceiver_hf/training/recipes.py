# SPDX-License-Identifier: Apache-2.0
"""Recipes: files with the options of a training run, whose header says what they need and what came out.

A recipe is a YAML file of `option: value`. Its values are read as if they stood on the command line before all others,
so they are checked alike, and whatever is given beside the recipe wins: it takes the place of the recipe's value, and
of values that would contradict it.
"""

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..output_files import as_path, atomic_path
from .architectures.options import BROUGHT_BY_DETECTOR
from .arguments import AUTOMATIC, TrainingOptions, make_parser

SUFFIX = ".yaml"
# Options that would contradict one that is given beside the recipe.
CONTRADICTED_BY = {
    "annotations": ("dataset",),
    "start_from": BROUGHT_BY_DETECTOR,
    "backbone": ("start_from",),
    "dilation": ("start_from",),
    "multiscale": ("downsample_factor", "start_from"),
    "downsample_factor": ("multiscale", "start_from"),
    "pretrained_backbone": ("no_pretrained_backbone", "start_from"),
    "no_pretrained_backbone": ("pretrained_backbone", "start_from"),
    "no_aux_loss": ("dec_layers",),
    "dec_layers": ("no_aux_loss",),
    "lr_scheduler": ("lr_drop", "decay_fraction"),
    "mixed_precision": ("amp", "use_bfloat"),
    "amp": ("mixed_precision",),
    "use_bfloat": ("mixed_precision",),
    "eval_steps": ("eval_every",),
    "eval_every": ("eval_steps",),
}
OF_ONE_COMMAND = ("resume", "overwrite_output_dir")  # options that say how to begin, and nothing of the run


class _Loader(yaml.SafeLoader):
    """Of YAML 1.2 in that only `true` and `false` are booleans: `mixed_precision: no` is a word."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)$"), list("tf"))


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(Path(entry.name).stem for entry in _own_recipes().iterdir() if entry.name.endswith(SUFFIX))


def read_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe, as they stand there.

    Args:
        name: Of a recipe of the package, or path of a file.

    Raises:
        UserError: There is no such recipe, or it is not a list of options of a training run.
    """
    text = _read(name)
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"the recipe {name} holds {type(content).__name__}; expected lines of `option: value`.")
    known = TrainingOptions.defaults()
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see `deperceiver train --help`."
            raise UserError(f"the recipe {name} has an unknown option {key!r}; {hint}")
    return content


def recipe_arguments(name: str, given: Mapping[str, Any] | None = None) -> list[str]:
    """A recipe as arguments of a command line; see [`read_recipe`].

    Args:
        name: Of a recipe of the package, or path of a file.
        given: Options beside the recipe. What they contradict is left out: with `model`, what the recipe says of a new
            model; with another `architecture`, what that does not take; and see `CONTRADICTED_BY`. With an automatic
            `batch_size`, the images of its step stay those of the recipe.
    """
    values = _with_images_per_step(read_recipe(name), given or {})
    arguments = []
    contradicted = _contradicted(values, given or {})
    for key, value in values.items():
        if key not in contradicted:
            arguments += _as_arguments(name, key, value)
    return arguments


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """A command line whose `--recipe`, if it has one, is followed by the recipe's options and then by all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", nargs="?")
    known, others = parser.parse_known_args(list(arguments))
    return [*(recipe_arguments(known.recipe, _given_options(others)) if known.recipe else []), *arguments]


def recipe_options(name: str, **overrides: Any) -> TrainingOptions:
    """The options of a run by a recipe; `overrides` win, as on a command line.

    Raises:
        UserError: See [`read_recipe`]; or a value is impossible.
    """
    parser = make_parser(exit_on_error=False)
    try:
        namespace = parser.parse_args(recipe_arguments(name, overrides))
    except argparse.ArgumentError as error:
        raise UserError(f"the recipe {name}: {error}") from error
    return TrainingOptions(**{**vars(namespace), **overrides})


def write_options(path: Path, options: TrainingOptions) -> None:
    """Write options as a recipe that repeats the run."""
    values = {name: value for name, value in vars(options).items() if value is not None and name not in OF_ONE_COMMAND}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with atomic_path(path) as temporary:
        temporary.write_text(f"# deperceiver train --recipe {path} --output_dir ANOTHER\n{text}", encoding="utf-8")


def _as_arguments(name: str, key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        raise UserError(f"the recipe {name}: {key} is a mapping; expected a value or a list.")
    values = value if isinstance(value, list) else [value]
    # As one word where it can be, so that a value that begins with a dash is no option.
    words = [str(item).lower() if isinstance(item, bool) else str(item) for item in values]
    return [f"--{key}", *words] if isinstance(value, list) else [f"--{key}={words[0]}"]


def _given_options(arguments: list[str]) -> dict[str, Any]:
    """Those options of a run that stand on a command line; none if it cannot be read, which will be said later."""
    parser, missing = make_parser(add_help=False, exit_on_error=False), object()
    parser.set_defaults(**dict.fromkeys(TrainingOptions.defaults(), missing))
    try:
        namespace, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return {}
    return {name: value for name, value in vars(namespace).items() if value is not missing}


def _contradicted(values: Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    """Options of a recipe that those given beside it leave no room for."""
    asked = {**TrainingOptions.defaults(), **values}
    changed = {name: value for name, value in given.items() if value != asked[name]}
    contradicted = {other for name in changed for other in CONTRADICTED_BY.get(name, ())} - given.keys()
    facts = TrainingOptions.facts()
    if changed.get("model") is not None:
        contradicted |= {name for name in values if facts[name].new_model_only or name == "architecture"}
    if "architecture" in changed:
        takers = {name: facts[name].of for name in values}
        contradicted |= {name for name, of in takers.items() if of is not None and changed["architecture"] not in of}
    return contradicted


def _with_images_per_step(values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose batches, if they are to be chosen anew, make steps of as many images."""
    automatic = given.get("batch_size") == AUTOMATIC
    if "batch_size" not in given or automatic == (values.get("batch_size", AUTOMATIC) == AUTOMATIC):
        return values
    if not automatic:
        return {name: value for name, value in values.items() if name != "images_per_step"}
    others = dict(values)
    images = others.pop("batch_size") * others.pop("gradient_accumulation_steps", 1)
    return others if "images_per_step" in given else {**others, "images_per_step": images}


def _own_recipes() -> Any:
    return files(__package__.split(".")[0]) / "recipes"


def _read(name: str) -> str:
    own = _own_recipes() / f"{name}{SUFFIX}"
    path = as_path(name)
    if name in recipe_names() and not path.is_file():
        return own.read_text(encoding="utf-8")
    if not path.is_file():
        raise UserError(
            f"there is no recipe {name}: neither a file nor one of the package ({', '.join(recipe_names())})."
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {name} cannot be read: {error}") from error
