# SPDX-License-Identifier: Apache-2.0
"""Paths that users give to commands, and files that are written: on every file system, in every locale."""

import argparse
import ast
import errno
import importlib
import json
import os
import unicodedata
from pathlib import Path

import pytest

import deperceiver_hf
from deperceiver_hf import cli, demo
from deperceiver_hf.benchmarks.report import BenchmarkReport, check_output
from deperceiver_hf.benchmarks.scaling import check_figure
from deperceiver_hf.comparison.arguments import ComparisonOptions, ModelSpec
from deperceiver_hf.conversion.job import convert_checkpoint
from deperceiver_hf.data import load_detection_data
from deperceiver_hf.data.splitting import find_listed
from deperceiver_hf.evaluation.job import prepare_evaluation
from deperceiver_hf.model_cards import write_model_cards, writing
from deperceiver_hf.output_files import (
    as_path,
    atomic_path,
    is_temporary,
    require_writable_directory,
    require_writable_file,
    unique_names,
    write_json,
)
from deperceiver_hf.prediction import prepare_prediction
from deperceiver_hf.saved_models import load_detector
from deperceiver_hf.training import TrainingOptions
from deperceiver_hf.training.recipes import read_recipe

PACKAGE = Path(deperceiver_hf.__file__).parent

# --- the home directory ------------------------------------------------------------------------------------------

SOURCES = ("annotations", "images", "val_annotations", "val_images", "train_list", "val_list")
PATHS = {  # of each command; the test below has each of them begin with ~
    "train": {"output_dir", "model", "start_from", "resume", "recipe", "pretrained_backbone", *SOURCES},
    "evaluate": {"output", "predictions", "model", "annotations", "images", "image_list"},
    "predict": {"inputs", "output_dir", "model"},
    "compare": {"output_dir", "models"},
    "benchmark": {"output", "figure"},
    "convert": {"checkpoint", "output_dir"},
    "cards": {"output_dir", "metrics"},
    "data convert": {"output"},
    "data split": {"output", "train_list", "val_list"},
    "demo": {"output_dir"},
}
PATHS["data check"] = {*PATHS["train"], "report"}
NO_PATHS = {
    *("amp", "use_bfloat", "cache_images", "dilation", "gradient_checkpointing", "group_by_aspect_ratio"),
    *(
        "cache_features",
        "eval_without_ema",
        "multiscale",
        "no_aux_loss",
        "no_pretrained_backbone",
        "overwrite_output_dir",
    ),
    *("architecture", "attn_implementation", "augmentation", "backbone", "downsample_factor", "lr_scheduler"),
    *("mixed_precision", "on_bad_image", "position_embedding", "preset", "config", "device", "timed"),
    *("eval_split", "train_split", "split", "splits", "project", "run_name", "report_to", "push_to_hub"),
    "batch_size",  # a number or auto
    *("dataset", "data"),  # tests/test_data_coco.py
}


def texts_of(parser: argparse.ArgumentParser) -> set[str]:
    """The arguments of a parser that may be any text."""
    found = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(texts_of, action.choices.values()))
        elif action.nargs != 0 and not action.choices and action.type not in (int, float, bool):
            found.add(action.dest)
    return found


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_path_of_a_command_is_known_here(command):
    module = importlib.import_module(f"deperceiver_hf.{cli.COMMANDS[command].module}")
    parser = argparse.ArgumentParser(parents=module.parents() if hasattr(module, "parents") else [], add_help=False)
    module.add_arguments(parser)
    others = PATHS[command] | (set() if command != "benchmark" else {"model", "models"})
    assert texts_of(parser) - NO_PATHS == others


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home directory that is not the working directory, in which no `~` may be left."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    yield home
    assert not any(work.iterdir())


def test_training_and_comparison_take_the_home_directory(home):
    options = TrainingOptions(output_dir="~/runs", model="~/model", resume="~/old")
    assert [options.output_dir, options.model, options.resume] == [str(home / x) for x in ("runs", "model", "old")]
    options = TrainingOptions(**dict.fromkeys(("annotations", "images", "val_annotations", "val_images"), "~/x"))
    assert {options.annotations, options.images, options.val_annotations, options.val_images} == {str(home / "x")}
    options = TrainingOptions(train_list="~/x", val_list="~/x")
    assert options.train_list == options.val_list == str(home / "x")
    assert TrainingOptions(pretrained_backbone="~/a.pth").pretrained_backbone == str(home / "a.pth")
    assert TrainingOptions(model="some/model", resume="auto").model == "some/model"
    (home / "mine.yaml").write_text("lr: 0.5\n", encoding="utf-8")
    assert read_recipe("~/mine.yaml") == {"lr": 0.5}
    specs = [ModelSpec.parse("a=deperceiver_v2,preset=nano")]
    comparison = ComparisonOptions(output_dir=Path("~/both"), models=specs, steps=1)
    assert comparison.output_dir == home / "both"
    of_run = comparison.training_options(ModelSpec.parse("detr,pretrained_backbone=~/b.pth"), Path("x"), 1e-4, 0)
    assert of_run.pretrained_backbone == str(home / "b.pth")


def test_models_and_results_are_found_in_the_home_directory(home, monkeypatch):
    for call in (
        lambda: load_detector("~/none"),
        lambda: prepare_evaluation("~/none", "synthetic", output="~/x.json"),
        lambda: load_detection_data("~/none", "train", format="yolo"),
        lambda: load_detection_data("synthetic.json", "train", images="~/none"),
        lambda: find_listed(load_detection_data("synthetic", "val", max_samples=1), "~/none"),
        lambda: prepare_prediction("~/none", ["~/a.png"], output_dir="~/out"),
        lambda: write_model_cards("~/cards", {"v2-nano": "~/none"}),
        lambda: convert_checkpoint("~/none", "~/out"),
    ):
        with pytest.raises(OSError, match=r"home.none"):
            call()
    (home / "model.ckpt").write_text("no checkpoint", encoding="utf-8")
    (home / "out").write_text("in the way", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match=r"home.out is a file"):
        convert_checkpoint("~/model.ckpt", "~/out")
    monkeypatch.setattr(writing, "CARDS", {"v2-nano": writing.CARDS["v2-nano"]})
    assert write_model_cards("~/cards")[0].parent == home / "cards"
    with pytest.raises(OSError, match=r"home.out"):
        prepare_evaluation_into(home, "~/out/metrics.json")


def prepare_evaluation_into(home: Path, output: str) -> None:
    model = home / "model"
    model.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (model / name).write_text("{}", encoding="utf-8")
    prepare_evaluation("~/model", "synthetic", output="~/metrics.json", predictions=output)


def test_reports_are_written_to_the_home_directory(home):
    report = BenchmarkReport("cost", {}, {}, {})
    for name in ("~/costs/x.json", "~/costs/x.md"):
        check_output(name)
        report.write(name)
    pytest.importorskip("matplotlib")
    assert check_figure("~/costs/x.png") == home / "costs" / "x.png"
    assert {path.name for path in (home / "costs").iterdir()} == {"x.json", "x.md"}


def test_demonstration_takes_the_home_directory(home, monkeypatch):
    monkeypatch.setattr(demo, "require_supervision", lambda: None)
    monkeypatch.setattr(demo, "DetectionTrainer", lambda options: pytest.fail(options.output_dir))
    with pytest.raises(pytest.fail.Exception, match=r"home.demo.training"):
        demo.run_demo("~/demo")


def test_tilde_that_is_no_home_directory(home, tmp_path):
    with pytest.raises(ValueError, match=r"write \./~nobody-of-that-name/x"):
        as_path("~nobody-of-that-name/x")
    Path("~draft.json").touch()
    assert as_path("~draft.json") == Path("~draft.json")
    Path("~draft.json").unlink()
    assert as_path("a~/~") == Path("a~/~")
    assert as_path("~") == home


# --- names of files that are written -----------------------------------------------------------------------------


def folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def test_most_names_stay_as_they_are():
    names = ["a.png", "d/a.png", "d/b c (1).jpg", "Zürich/ß.png", ".hidden.png", "d/e/f.tar.png", "红/1.png"]
    assert unique_names(names) == names


@pytest.mark.parametrize(
    "names",
    [
        ["a.webp.png", "a.webp.png"],
        ["a.png", "A.png", "a.PNG"],
        ["Zu\u0308rich.png", "Zürich.png", "ZÜRICH.png"],
        ["straße.png", "STRASSE.png"],
        ["x.png", "X.png/y.png", "x.png/z.png"],
        ["a?.png", "a*.png", "a_.png"],
        [f"{'x' * 260}{number}.png" for number in range(3)],
        ["é" * 200 + ".png", "é" * 201 + ".png"],
        ["aux.png", "_aux.png", "AUX.png"],
        ["d./a.png", "d_/a.png"],
    ],
)
def test_names_never_meet(names, tmp_path):
    chosen = unique_names(names)
    files = {folded(name) for name in chosen}
    assert len(files) == len(names)
    parents = {folded(str(parent)) for name in chosen for parent in Path(name).parents}
    assert not files & parents
    assert all(Path(name).suffix.lower() == ".png" for name in chosen)
    assert unique_names(names) == chosen
    for name in chosen:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            temporary.touch()
        assert target.is_file()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CON/aux.png", "_CON/_aux.png"),
        ("com1", "_com1"),
        ("console.png", "console.png"),
        ("a:b|c\n.png", "a_b_c_.png"),
        ("trailing./dots ", "trailing_/dots_"),
        (os.fsdecode(b"caf\xe9.png"), "caf_.png" if os.name != "nt" else "café.png"),
    ],
)
def test_names_that_another_system_would_refuse(name, expected):
    assert unique_names([name]) == [expected]


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "y" * 255, "a." + "z" * 253, "短" * 80 + ".json"])
def test_files_with_the_longest_names_are_written(tmp_path, name):
    path = tmp_path / name
    with atomic_path(path) as temporary:
        assert temporary.suffix == path.suffix or len(path.suffix) not in range(1, 10)  # Pillow goes by it
        assert is_temporary(temporary, of=path)
        temporary.write_text("whole", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "whole"
    assert list(tmp_path.iterdir()) == [path]


# --- content of files that are written ---------------------------------------------------------------------------


def test_json_of_any_text_is_read_as_it_was_written(tmp_path):
    content = {"红": "\x1b[31m", "file": "caf\udce9.png", "path": "C:\\x", "emoji": "👩\u200d🚀"}
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_bytes()) == content
    assert "红" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_full_disk_is_said_with_the_name_of_the_file(tmp_path):
    def fill_the_disk() -> None:
        with atomic_path(tmp_path / "a.json") as temporary:
            temporary.touch()
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device.*a\.json"):
        fill_the_disk()
    assert not any(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "directory.json").mkdir()
    with pytest.raises(OSError, match="file"):
        require_writable_directory(tmp_path / "file" / "below")
    with pytest.raises(IsADirectoryError, match=r"directory\.json"):
        require_writable_file(tmp_path / "directory.json")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_text_files_are_utf_8_whatever_the_locale(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function, keywords = node.func, {keyword.arg for keyword in node.keywords}
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        if name in ("read_text", "write_text"):
            encoded = len(node.args) > (name == "write_text")
        elif name == "open":
            of_library = isinstance(function, ast.Attribute) and ast.unparse(function.value).endswith(("Image", "os"))
            modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            encoded = of_library or any("b" in str(mode) for mode in modes)
        elif name in ("run", "Popen", "check_output") and keywords & {"text", "universal_newlines"}:
            encoded = False
        else:
            continue
        assert encoded or "encoding" in keywords, f"{path.name}:{node.lineno} {ast.unparse(node)}"
