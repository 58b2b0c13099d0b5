# SPDX-License-Identifier: Apache-2.0
"""All commands have one shape: help with an example, one line for a mistake, JSON for machines, honest exit codes."""

import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import StrictDataclassFieldValidationError

from deperceiver_hf import cli
from deperceiver_hf.cli import COMMANDS, main
from deperceiver_hf.errors import FailedRunError, UserError
from deperceiver_hf.evaluation import job as evaluation_job

SCRIPTS = Path(__file__).parents[1] / "scripts"
SCRIPT_OF = {"convert": "convert_original_checkpoint.py", "cards": "make_model_cards.py"}
MISTAKES = {
    "train": ["--dataset", "/no/such/directory"],
    "evaluate": ["--model", "/no/such/model", "--dataset", "synthetic", "--output", "x.json"],
    "predict": ["--model", "/no/such/model", "--output_dir", "out", "--no_draw", "x.jpg"],
    "compare": ["--output_dir", "out", "--models", "no_such_model", "--steps", "1"],
    "benchmark": ["cost", "--models", "no_such_model"],
    "convert": ["/no/such/checkpoint", "out"],
    "cards": ["--metrics", "v2-nano=/no/such/file", "--output_dir", "cards"],
    "demo": ["--output_dir", "file/in/the/way"],
    "data check": ["/no/such/directory"],
    "data convert": ["/no/such/directory", "out", "--to", "yolo"],
    "data split": ["/no/such/directory", "out", "--val_fraction", "0.1"],
}


class Ended:
    """A job that ends as it is told."""

    exit_code = 0

    def __init__(self, error: BaseException | None = None):
        self.error = error

    def run(self) -> "Ended":
        if self.error is not None:
            raise self.error
        print("what a library prints")
        return self

    def summary(self) -> str:
        return "done"

    def to_dict(self) -> dict:
        return {"path": Path("somewhere")}


@pytest.fixture
def ended(monkeypatch):
    """The command `evaluate`, whose job raises the given error."""

    def run(error: BaseException | None, *flags: str) -> int:
        monkeypatch.setattr(evaluation_job, "prepare", lambda arguments: Ended(error))
        return main(["evaluate", *flags, "--model", "m", "--dataset", "d", "--output", "o"])

    return run


def command(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False, **options
    )


def test_overview_names_the_commands_and_imports_none_of_them():
    code = "import sys; from deperceiver_hf.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    shown = command("-c", code)
    assert (shown.returncode, shown.stderr) == (0, "")
    overview, modules = shown.stdout.strip().rsplit("\n", 1)
    for name, entry in COMMANDS.items():
        assert f" {name} " in overview.replace("\n", " ")
        assert f"deperceiver_hf.{entry.module}" not in modules.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as shown:
        main([*name.split(), "--help"])
    assert shown.value.code == 0
    text = capsys.readouterr().out
    assert f"\n  deperceiver {name} " in text
    assert "--json" in text
    assert "--debug" in text


def test_a_group_names_its_commands(capsys):
    for group in cli.GROUPS:
        with pytest.raises(SystemExit) as shown:
            main([group, "--help"])
        assert shown.value.code == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"usage: deperceiver {group} ")
        names = [name.split()[1] for name in COMMANDS if name.split()[0] == group]
        assert names
        assert all(f"\n    {name} " in printed for name in names)


@pytest.mark.parametrize(
    "arguments",
    [[], ["paint"], ["data"], ["data", "paint"], ["evaluate"], ["demo", "--max_steps", "x"], ["demo", "--color"]],
)
def test_an_unreadable_command_line_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_line_and_code_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main([*name.split(), *MISTAKES[name]]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"deperceiver {name}: error: ")
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("arguments", [["--debug", "convert"], ["convert", "--debug"]])
def test_debug_shows_where_an_error_comes_from(arguments, capsys):
    assert main([*arguments, *MISTAKES["convert"]]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert errors.splitlines()[-1].startswith("deperceiver convert: error: there is no checkpoint file")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("too\n   few"), 2, "deperceiver evaluate: error: too few"),
        (FileNotFoundError("nothing there"), 2, "deperceiver evaluate: error: nothing there"),
        (ImportError("needs paint"), 2, "deperceiver evaluate: error: needs paint"),
        (StrictDataclassFieldValidationError("depth", TypeError("not int")), 2, "deperceiver evaluate: error: "),
        (FailedRunError("the loss is gone"), 1, "deperceiver evaluate: error: the loss is gone"),
        (ValueError(), 2, "deperceiver evaluate: error: ValueError"),
        (
            OSError(
                "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                "  x\nOSError: image 5 is torn"
            ),
            2,
            "deperceiver evaluate: error: image 5 is torn",
        ),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)  # fmt: skip
def test_errors_and_their_codes(ended, capsys, error, code, line):
    assert ended(error) == code
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(line)


ERRORS_OF_LIBRARIES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "the memory is not enough"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "the memory is not enough"),
    (MemoryError(), 1, "the memory is not enough"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "a process that loads images"),
    (RuntimeError("PytorchStreamWriter failed writing file data/3"), 2, "the disk is full"),
    (RuntimeError("PytorchStreamReader failed reading zip archive"), 2, "RuntimeError: PytorchStreamReader"),
    (pickle.UnpicklingError("Weights only load failed"), 2, "UnpicklingError: Weights only"),
    (DatasetGenerationError("no rows"), 2, "DatasetGenerationError: no rows"),
    (FloatingPointError("predictions are not finite"), 1, "predictions are not finite"),
]


@pytest.mark.parametrize(("error", "code", "line"), ERRORS_OF_LIBRARIES, ids=lambda value: type(value).__name__)
def test_errors_of_libraries_are_a_line_with_a_remedy(ended, capsys, error, code, line):
    assert ended(error) == code
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"deperceiver evaluate: error: {line}")


@pytest.mark.parametrize(
    "error", [RuntimeError("a mistake"), ImportError("no such name", name="deperceiver_hf.evaluation.job")]
)
def test_mistakes_of_the_program_are_one_line_too_and_debug_shows_them(ended, capsys, error):
    assert ended(error) == 1
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"deperceiver evaluate: error: unexpected {type(error).__name__}: ")
    assert ended(error, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_interrupts_a_command(ended, monkeypatch, capsys):
    def terminated(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(Ended, "run", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert ended(None) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_the_first_process_speaks(ended, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert ended(UserError("twice")) == 2
    assert capsys.readouterr().err == ""


def test_json_is_all_there_is_on_stdout(ended, capsys):
    assert ended(None, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"path": "somewhere"}
    assert "what a library prints" in printed.err
    assert ended(None) == 0
    assert capsys.readouterr().out == "what a library prints\ndone\n"


def test_json_of_a_command_is_its_report(capsys):
    arguments = ["cost", "--models", "detr-32", "--backbone", "resnet18", "--width", "64", "--height", "64"]
    assert main(["benchmark", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["models"]["detr-32"]["tokens"]) == ("cost", 4)


@pytest.mark.parametrize("name", dict.fromkeys(name.split()[0] for name in COMMANDS))
def test_scripts_are_the_commands(name, monkeypatch):
    called, path = [], sys.path[:]
    monkeypatch.setattr(cli, "main", lambda arguments: called.append(arguments) or 7)
    monkeypatch.setattr(sys, "path", [*path, str(SCRIPTS)])
    monkeypatch.setattr(sys, "argv", ["script", "--an_option", "1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / SCRIPT_OF.get(name, f"{name}.py")), run_name="__main__")
    assert ended.value.code == 7
    assert called == [[name, "--an_option", "1"]]
    assert sys.path == path  # without the directory in which evaluate.py hides the library of that name
    scripts = {SCRIPT_OF.get(name.split()[0], f"{name.split()[0]}.py") for name in COMMANDS}
    assert {file.name for file in SCRIPTS.glob("*.py")} == scripts


def test_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["deperceiver_hf", "convert", *MISTAKES["convert"]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("deperceiver_hf", run_name="__main__")
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("deperceiver convert: error: there is no checkpoint file /no/such/checkpoint")
    assert len(printed.splitlines()) == 1


def test_processes_that_a_script_spawns_find_the_library_evaluate(tmp_path):
    """Those take their path from the script and run its file again, under another name."""
    script = tmp_path / "evaluate.py"
    script.write_text((SCRIPTS / "evaluate.py").read_text())
    package = tmp_path / "stand_in" / "deperceiver_hf"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(
        "import multiprocessing\n"
        "def find(_):\n"
        "    import evaluate\n"
        "    return evaluate.__file__\n"
        "def main(arguments):\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(*pool.map(find, range(1)))\n"
    )
    found = command(script, env={**os.environ, "PYTHONPATH": str(package.parent)})
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).parent.name == "evaluate"
    assert tmp_path not in Path(found.stdout.strip()).parents
