# SPDX-License-Identifier: Apache-2.0
"""Recipes: files with the options of a training run, whose header says what they need and what came out.

A recipe is a YAML file of `option: value`. Its values are read as if they stood on the command line before all others,
so they are checked alike, and whatever is given beside the recipe wins.
"""

import argparse
import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .arguments import TrainingOptions, make_parser

SUFFIX = ".yaml"
OF_ONE_COMMAND = ("resume", "overwrite_output_dir")  # options that say how to begin, and nothing of the run


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
        content = yaml.safe_load(text)
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


def recipe_arguments(name: str) -> list[str]:
    """A recipe as arguments of a command line; see [`read_recipe`]."""
    arguments = []
    for key, value in read_recipe(name).items():
        if value is None:
            continue
        if isinstance(value, dict):
            raise UserError(f"the recipe {name}: {key} is a mapping; expected a value or a list.")
        values = value if isinstance(value, list) else [value]
        # As one word where it can be, so that a value that begins with a dash is no option.
        words = [str(item).lower() if isinstance(item, bool) else str(item) for item in values]
        arguments += [f"--{key}={words[0]}"] if not isinstance(value, list) else [f"--{key}", *words]
    return arguments


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """A command line whose `--recipe`, if it has one, is followed by the recipe's options and then by all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", nargs="?")
    known, _ = parser.parse_known_args(list(arguments))
    return [*(recipe_arguments(known.recipe) if known.recipe else []), *arguments]


def recipe_options(name: str, **overrides: Any) -> TrainingOptions:
    """The options of a run by a recipe; `overrides` win.

    Raises:
        UserError: See [`read_recipe`]; or a value is impossible.
    """
    parser = make_parser(exit_on_error=False)
    try:
        namespace = parser.parse_args(recipe_arguments(name))
    except argparse.ArgumentError as error:
        raise UserError(f"the recipe {name}: {error}") from error
    return TrainingOptions(**{**vars(namespace), **overrides})


def write_options(path: Path, options: TrainingOptions) -> None:
    """Write options as a recipe that repeats the run."""
    values = {name: value for name, value in vars(options).items() if value is not None and name not in OF_ONE_COMMAND}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    path.write_text(f"# deperceiver train --recipe {path} --output_dir ANOTHER\n{text}", encoding="utf-8")


def _own_recipes() -> Any:
    return files(__package__.split(".")[0]) / "recipes"


def _read(name: str) -> str:
    own = _own_recipes() / f"{name}{SUFFIX}"
    path = Path(name).expanduser()
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
