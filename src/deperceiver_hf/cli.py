# SPDX-License-Identifier: Apache-2.0
"""The command `deperceiver`: it finds the module of a subcommand, runs its job, and says how that ended.

A subcommand has one word or, in a group such as `data`, two. Its module has

- `add_arguments(parser)`: description, arguments and an example;
- `prepare(arguments) -> Job`: checks the parsed arguments and makes the job of them (see `jobs.py`);
- `parents() -> list`, if it needs it: parsers whose arguments are taken over, as `argparse` means it;
- `TAKES_OTHER_OPTIONS = True`, if it needs it: what its parser does not know is no mistake but comes as
  `arguments.others`, and the whole command line as `arguments.command_line`;
- `expand(arguments) -> list`, if some arguments stand for others: the command line in full;
- `INTERRUPTED`, if there is more to say: what is printed after Ctrl-C.

Exit codes: 0, done; 1, the work failed, in whole or in part; 2, the arguments do not fit, or not what they name;
130, interrupted, by SIGINT or SIGTERM. Whatever goes wrong is said in one line; `--debug` shows the traceback.
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType, ModuleType

import torch

from .errors import INTERRUPTED_CODE, explain
from .jobs import Result, printable

PROGRAM = "deperceiver"


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: Its module, within the package; imported only when the command is called.
        help: What it does, in a line.
    """

    module: str
    help: str


COMMANDS = {
    "train": Command("training.command", "train a detector"),
    "evaluate": Command("evaluation.job", "COCO metrics of a saved detector"),
    "predict": Command("prediction", "detect objects on images"),
    "compare": Command("comparison.command", "train several models on equal terms and compare them"),
    "benchmark": Command("benchmarks.command", "count or measure what models cost"),
    "convert": Command("conversion.job", "convert a checkpoint of the authors' code"),
    "cards": Command("model_cards.command", "write the model cards of the documented configurations"),
    "data check": Command("training.data_check.command", "find what is wrong with a data set, and a recipe for it"),
    "data convert": Command("data.writing.convert", "write a data set in another format"),
    "data split": Command("data.writing.split", "divide a data set into training and validation images"),
    "demo": Command("demo", "train, evaluate and draw on synthetic scenes in a few minutes"),
}
GROUPS = {
    "data": "Look data sets over, and write them in another format or with other splits."
}  # what commands of two words begin with


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line, without the program's name (`sys.argv` by default), and return its exit code.

    Raises:
        SystemExit: After `--help`, and with code 2 if the command line cannot be read.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that cannot show a letter gets an escape
            stream.reconfigure(errors="backslashreplace")
    shared, arguments = _shared_options().parse_known_args(arguments)
    name, arguments = _find_command(arguments)
    as_json, debug = hasattr(shared, "json"), hasattr(shared, "debug")
    module = None
    try:
        module = importlib.import_module(f".{COMMANDS[name].module}", __package__)
        parsed = _parse(name, module, arguments)
        with (
            _interrupted_by_sigterm(),
            _shown_log(),
            contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(),
        ):
            result = module.prepare(parsed).run()
    except KeyboardInterrupt:
        _say(getattr(module, "INTERRUPTED", "Interrupted."))
        return INTERRUPTED_CODE
    except Exception as error:
        failure = explain(error)
        if debug:
            traceback.print_exc()
        _say(f"{PROGRAM} {name}: error: {failure.message}")
        return failure.code
    if _is_main_process():
        _print(_as_json(result) if as_json else printable(result.summary(), keep="\n\t"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # Launchers end all processes as soon as one of them fails: the first one speaks for all.
    return getattr(result, "exit_code", 0) if _is_main_process() else 0


def _find_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The name of a command and what follows it; where there is none, the program ends with an overview."""
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name, arguments[words:]
    group = arguments[0] if arguments and arguments[0] in GROUPS else None
    _overview(group).parse_args(arguments if group is None else arguments[1:])
    raise AssertionError("the parser of the overview knows no command")


def _print(text: str) -> None:
    """Print to stdout; whoever reads it there may have had enough of it, as `head` has."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end


class _PrintableFormatter(logging.Formatter):
    """Escapes what a terminal would obey, which names of files and classes may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM does what Ctrl-C does, so that a command stops its processes and says how far it came."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    """Within, what the package logs is seen on stderr. Libraries show their own; a handler for all would repeat it."""
    logger, handler = logging.getLogger(__package__), logging.StreamHandler()
    level = logger.level
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _parse(name: str, module: ModuleType, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        parents=[_shared_options(), *(module.parents() if hasattr(module, "parents") else [])],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    expanded = module.expand(arguments) if hasattr(module, "expand") else arguments
    parsed, others = parser.parse_known_args(expanded)
    if getattr(module, "TAKES_OTHER_OPTIONS", False):
        parsed.others, parsed.command_line = others, shlex.join([PROGRAM, name, *arguments])
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return parsed


def _shared_options() -> argparse.ArgumentParser:
    """What all commands take, at any place. What is not given is not in the namespace, which is the command's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("every command")
    group.add_argument("--json", action="store_true", help="Print the result as JSON, and nothing else to stdout.")
    group.add_argument("--debug", action="store_true", help="Show where an error comes from.")
    return parser


def _overview(group: str | None = None) -> argparse.ArgumentParser:
    """The parser that explains all commands, or those of a group, and runs none."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {group}" if group else PROGRAM,
        description=GROUPS[group] if group else "Train, evaluate and use DePerceiver detectors.",
        epilog=f"Example: {PROGRAM} demo\n`{PROGRAM} COMMAND --help` explains a command."
        if group is None
        else f"`{PROGRAM} {group} COMMAND --help` explains a command.",
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        if group is None:
            commands.add_parser(name, help=command.help, add_help=False)
        elif name.startswith(f"{group} "):
            commands.add_parser(name.removeprefix(f"{group} "), help=command.help, add_help=False)
    return parser


def _as_json(result: Result) -> str:
    return json.dumps(result.to_dict(), indent=2, allow_nan=False, default=str)


def _say(line: str) -> None:
    if _is_main_process():
        print(line, file=sys.stderr)


def _is_main_process() -> bool:
    """Launchers number their processes; what all of them find is said by the first."""
    return os.environ.get("RANK", "0") == "0"
