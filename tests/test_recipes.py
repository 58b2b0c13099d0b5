# SPDX-License-Identifier: Apache-2.0
"""Recipes: each can be run, is checked as the command line is, and gives way to it."""

import dataclasses
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from deperceiver_hf.cli import main
from deperceiver_hf.errors import UserError
from deperceiver_hf.training import DetectionTrainer, TrainingOptions, parse_arguments
from deperceiver_hf.training.recipes import (
    read_recipe,
    recipe_arguments,
    recipe_names,
    recipe_options,
    with_recipe,
)

SMALL = {
    "dataset": "synthetic:image_size=64,num_samples=8",
    "max_train_samples": 8,
    "max_eval_samples": 2,
    "shortest_edge": 64,
    "longest_edge": 64,
    "num_workers": 0,
    "batch_size": 2,
    "max_steps": 2,
    "epochs": 1,
    "warmup_steps": 1,
    "eval_every": 0,
    "mixed_precision": "no",
}


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_recipes_are_those_promised():
    assert set(recipe_names()) == {
        *("coco-v2-base", "coco-v2-large", "coco-deperceiver"),
        *("own-data-gpu", "own-data-cpu", "own-data-cpu-imagenet", "own-data-from-coco"),
        *("blood-cells", "blood-cells-nano", "demo"),
    }


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_its_header_has_command_and_result(name):
    options = recipe_options(name)
    for key, value in read_recipe(name).items():
        assert str(getattr(options, key)) == str(value) or float(getattr(options, key)) == float(value)
    text = (Path(sys.modules["deperceiver_hf"].__file__).parent / "recipes" / f"{name}.yaml").read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert re.search(rf"--recipe {name}\b|deperceiver {name}\b", header)
    assert "not run by us" in header or "Measured" in header


@pytest.mark.parametrize("name", recipe_names())
def test_the_first_steps_of_every_recipe_run(name, tmp_path):
    changes = dict(SMALL, output_dir=str(tmp_path / "run"), amp=False, max_minutes=None)
    options = recipe_options(name, **changes)
    if not options.no_pretrained_backbone:
        options = recipe_options(name, **changes, no_pretrained_backbone=True)
    options.backbone, options.num_queries = "test_resnet", 12
    if options.num_latents is not None:
        options.num_latents = 8
    result = DetectionTrainer(options).train()
    assert result.step == 2
    saved = tmp_path / "run" / "options.yaml"
    again = recipe_options(str(saved), output_dir=options.output_dir)
    assert vars(again) == vars(options)


def test_what_stands_beside_a_recipe_wins_in_any_order():
    for line in ("--recipe demo --lr 1", "--lr 1 --recipe demo", "--lr=1 --recipe=demo"):
        arguments = line.split()
        expanded = with_recipe(arguments)
        assert expanded[-len(arguments) :] == arguments
        assert expanded[: -len(arguments)] == recipe_arguments("demo")
    assert with_recipe(["--lr", "1"]) == ["--lr", "1"]
    assert recipe_options("demo", lr=1.0).lr == 1.0
    assert recipe_options("demo").lr == 4e-3


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--recipe coco-deperceiver --lr_scheduler wsd", {"lr_scheduler": "wsd", "lr_drop": None}),
        ("--recipe coco-deperceiver --lr_scheduler step", {"lr_drop": 33}),
        ("--recipe coco-deperceiver --mixed_precision no", {"mixed_precision": "no", "amp": False}),
        ("--recipe coco-deperceiver --multiscale", {"multiscale": True, "downsample_factor": None}),
        ("--recipe coco-deperceiver --dec_layers 2", {"dec_layers": 2, "no_aux_loss": False}),
        ("--recipe coco-deperceiver --architecture detr", {"num_latents": None, "downsample_factor": 16}),
        ("--recipe coco-deperceiver --architecture rt_detr_v2 --amp false", {"no_aux_loss": False, "amp": False}),
        ("--recipe blood-cells-nano --pretrained_backbone FILE", {"no_pretrained_backbone": False, "preset": "nano"}),
        ("--recipe blood-cells-nano --eval_steps 7", {"eval_steps": 7, "eval_every": 1}),
        ("--recipe blood-cells-nano --model DIR --lr 1e-3", {"preset": None, "lr": 1e-3, "max_minutes": 20}),
    ],
)
def test_what_stands_beside_a_recipe_wins_over_what_would_contradict_it(line, expected):
    arguments = line.split()
    options = parse_arguments(with_recipe(arguments)[: -len(arguments)] + arguments[2:])
    assert {name: getattr(options, name) for name in expected} == expected


def test_contradictions_beside_a_recipe_are_still_refused(capsys):
    arguments = ["--recipe", "coco-deperceiver", "--lr_scheduler", "wsd", "--lr_drop", "3"]
    with pytest.raises(SystemExit):
        parse_arguments(with_recipe(arguments)[: -len(arguments)] + arguments[2:])
    assert "--lr_drop" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "did you mean lr"),
        ("wings: 2", "unknown option 'wings'"),
        ("- lr", "holds list"),
        ("lr: [", "is not YAML"),
        ("lr: {a: 1}", "mapping"),
        ("lr: fast", "invalid float value"),
        ("lr_scheduler: never", "invalid choice"),
        ("epochs: 0", "at least 1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipe_options(written(tmp_path / "own.yaml", text))


def test_words_that_older_yaml_takes_for_booleans_are_words(tmp_path):
    path = written(tmp_path / "own.yaml", "mixed_precision: no\nmultiscale: true\narchitecture: deperceiver_v2\n")
    options = recipe_options(path)
    assert (options.mixed_precision, options.multiscale) == ("no", True)


def test_a_recipe_that_is_not_there_lists_those_that_are():
    with pytest.raises(UserError, match="blood-cells"):
        read_recipe("coco")


def test_the_command_takes_a_recipe(tmp_path, capsys):
    path = written(
        tmp_path / "own.yaml",
        yaml.safe_dump({**SMALL, "architecture": "deperceiver_v2", "preset": "nano", "num_queries": 12}),
    )
    run = tmp_path / "run"
    arguments = ["train", "--recipe", path, "--no_pretrained_backbone", "--output_dir", str(run), "--max_steps", "1"]
    assert main(arguments) == 0
    assert recipe_options(str(run / "options.yaml"), output_dir="x").max_steps == 1
    assert main(["train", "--recipe", str(tmp_path / "none.yaml")]) == 2
    assert "there is no recipe" in capsys.readouterr().err


def test_options_are_the_run_s_own_file(tmp_path):
    model = {"architecture": "deperceiver_v2", "preset": "nano", "no_pretrained_backbone": True}
    options = TrainingOptions(**SMALL, **model, output_dir=str(tmp_path))
    DetectionTrainer(options).train()
    DetectionTrainer(dataclasses.replace(options, overwrite_output_dir=True, lr=1e-5))
    assert yaml.safe_load((tmp_path / "options.yaml").read_text())["lr"] == 1e-5


@pytest.mark.slow
def test_recipes_travel_in_the_wheel(tmp_path):
    root = Path(__file__).parents[1]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, root],
        capture_output=True,
        text=True,
    )
    if built.returncode:
        pytest.skip(f"no wheel can be built here: {built.stderr[-200:]}")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {f"deperceiver_hf/recipes/{name}.yaml" for name in recipe_names()} <= names
    assert "deperceiver_hf/py.typed" in names
