# SPDX-License-Identifier: Apache-2.0
"""Model directories that are damaged at random: refused in a line that names them, or as good as undamaged."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deperceiver_hf.cli import main
from deperceiver_hf.errors import UserError
from deperceiver_hf.saved_models import load_detector
from deperceiver_hf.training import build_image_processor, build_model
from training_runs import tiny_options

WEIGHTS = "model.safetensors"
JSON_FILES = ("config.json", "preprocessor_config.json")
NAMES = ["cat", "dog"]
NO_COLLECTIONS: list[Any] = [None, True, False, -1, 0, 3, 1.5, 1e308, "", "text", "64"]
ODD_VALUES: list[Any] = [*NO_COLLECTIONS, [], [1], ["a", None], {}, {"a": 1}, [[1]]]


def change_bytes(directory: Path, generator: random.Random) -> None:
    """Some bytes are others, or the end is missing."""
    file = directory / generator.choice([WEIGHTS, *JSON_FILES])
    content = bytearray(file.read_bytes())
    for _ in range(generator.choice([1, 1, 3, 20])):
        content[generator.randrange(min(len(content), 3000))] = generator.randrange(256)
    if generator.random() < 0.3:
        del content[generator.randrange(len(content)) :]
    file.write_bytes(content)


def change_field(directory: Path, generator: random.Random) -> None:
    """A field of a JSON file, at any depth, is missing or has a value of any type."""
    file = directory / generator.choice(JSON_FILES)
    content = part = json.loads(file.read_text(encoding="utf-8"))
    key = generator.choice(sorted(part))
    while isinstance(part[key], dict) and part[key] and generator.random() < 0.7:
        part = part[key]
        key = generator.choice(sorted(part))
    if generator.random() < 0.2:
        del part[key]
    else:
        part[key] = generator.choice(ODD_VALUES)
    file.write_text(json.dumps(content), encoding="utf-8")


def change_weights(directory: Path, generator: random.Random) -> None:
    """A tensor is missing, of another name, shape or type, or holds what is no number."""
    weights = load_file(directory / WEIGHTS)
    name = generator.choice(sorted(weights))
    tensor = weights.pop(name)
    place = generator.randrange(max(1, tensor.numel()))
    changes: list[Callable[[], dict[str, torch.Tensor]]] = [
        lambda: {},
        lambda: {f"{name}.other": tensor},
        lambda: {name: tensor, f"{name}.other": tensor.clone()},
        lambda: {name: torch.cat([tensor.reshape(-1), tensor.reshape(-1)])},
        lambda: {name: tensor.reshape(-1)[:-1].clone()},
        lambda: {name: tensor.to(generator.choice([torch.int32, torch.int64, torch.uint8, torch.bool]))},
        lambda: {name: tensor.to(generator.choice([torch.float16, torch.bfloat16, torch.float64]))},
        lambda: {name: _with_one(tensor, place, generator.choice([torch.nan, torch.inf, -torch.inf, -1e30]))},
    ]
    save_file(weights | generator.choice(changes)(), directory / WEIGHTS, metadata={"format": "pt"})


def _with_one(tensor: torch.Tensor, place: int, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    if tensor.is_floating_point():
        tensor.view(-1)[place] = value
    return tensor


def change_files(directory: Path, generator: random.Random) -> None:
    """A file is missing, empty, a directory, another of the files, or a link to nowhere."""
    names = [WEIGHTS, *JSON_FILES]
    file = directory / generator.choice(names)
    other = (directory / generator.choice([name for name in names if name != file.name])).read_bytes()
    file.unlink()
    what = generator.randrange(5)
    if what == 1:
        file.write_bytes(b"")
    elif what == 2:
        file.mkdir()
    elif what == 3:
        file.write_bytes(other)
    elif what == 4:
        file.symlink_to(directory / "nowhere")


CHANGES = (change_bytes, change_field, change_field, change_weights, change_files)


def damaged(saved: Path, directory: Path, seed: int) -> Path:
    generator = random.Random(seed)
    shutil.copytree(saved, directory)
    CHANGES[seed % len(CHANGES)](directory, generator)
    return directory


def is_refused_or_works(directory: Path, tmp_path: Path) -> bool:
    """Whether a directory is refused; if it is not, what is loaded must detect, and training must start from it."""
    try:
        model, processor = load_detector(str(directory))
    except (UserError, OSError) as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert str(directory) in message
        assert "\n" not in message
        return True
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    with torch.no_grad():
        outputs = model(**processor(images=[image], return_tensors="pt"))
    assert outputs.pred_boxes.isfinite().all()
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(50, 70)])
    assert set(found["labels"].tolist()) <= model.config.id2label.keys()
    assert all(p.isfinite().all() for p in model.parameters())
    options = tiny_options(tmp_path, {"model": str(directory), "shortest_edge": None})
    build_image_processor(options)
    assert list(build_model(options, NAMES).config.id2label.values()) == NAMES
    return False


@pytest.mark.parametrize("seed", range(40))
def test_damaged_models_are_refused_in_a_line_or_work(cat_and_dog, tmp_path, seed):
    is_refused_or_works(damaged(cat_and_dog, tmp_path / "damaged", seed), tmp_path)


@pytest.mark.heavy
def test_many_damaged_models_are_refused_in_a_line_or_work(cat_and_dog, tmp_path):
    refused = 0
    for seed in range(40, 340):
        directory = damaged(cat_and_dog, tmp_path / f"damaged{seed}", seed)
        refused += is_refused_or_works(directory, tmp_path)
        shutil.rmtree(directory)
    assert refused > 100


@pytest.mark.parametrize("command", ["predict", "evaluate", "train", "compare"])
@pytest.mark.parametrize("seed", [3, 4, 9])
def test_commands_end_in_one_line_on_damaged_models(cat_and_dog, tmp_path, capsys, command, seed):
    directory = damaged(cat_and_dog, tmp_path / "damaged", seed)
    with pytest.raises((UserError, OSError)):
        load_detector(str(directory))
    (tmp_path / "x.png").write_bytes(b"")
    arguments = {
        "predict": [str(tmp_path / "x.png"), "--model", str(directory), "--output_dir", str(tmp_path / "out")],
        "evaluate": ["--model", str(directory), "--dataset", "synthetic", "--output", str(tmp_path / "e.json")],
        "train": ["--model", str(directory), "--dataset", "synthetic", "--output_dir", str(tmp_path / "run")],
        "compare": [
            *("--models", f"mine=deperceiver_v2,model={directory}", "--steps", "1", "--dataset", "synthetic"),
            *("--output_dir", str(tmp_path / "all")),
        ],
    }[command]
    assert main([command, *arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert str(directory) in said.splitlines()[-1]
    assert not (tmp_path / "all" / "runs").exists()
