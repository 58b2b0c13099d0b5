# SPDX-License-Identifier: Apache-2.0
"""What the script for original checkpoints writes can be used at once; what it refuses, it refuses clearly."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from transformers import pipeline

from deperceiver_hf import load_original
from deperceiver_hf.conversion.job import PUBLISHED, convert_checkpoint
from test_conversion import resnet_state_dict

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_original_checkpoint.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small checkpoint in the form of the authors' code."""
    path = tmp_path_factory.mktemp("original") / "epoch=49.ckpt"
    torch.save({"state_dict": resnet_state_dict("resnet18", [16], layers=2), "epoch": 49}, path)
    return path


def run(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def test_converted_directory_is_ready_for_use(checkpoint, tmp_path):
    output_dir = tmp_path / "converted"
    command = [sys.executable, SCRIPT, checkpoint, output_dir, "--num_blocks", "2"]
    finished = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "2 x 2 layers" in finished.stdout
    assert str(output_dir) in finished.stdout
    written = {file.name for file in output_dir.iterdir()}
    assert {"README.md", "config.json", "preprocessor_config.json", "modeling_deperceiver.py"} <= written
    assert all(any(Path(name).match(pattern) for pattern in PUBLISHED) for name in written if name != "__pycache__")

    detector = pipeline("object-detection", model=str(output_dir), threshold=0.0)
    expected = load_original(checkpoint, num_blocks=2).state_dict()
    saved = detector.model.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert len(detector(Image.new("RGB", (64, 48)))) == 5

    card = ModelCard.load(output_dir / "README.md")
    assert card.data.eval_results is None
    assert "`epoch=49.ckpt`" in card.text
    assert str(tmp_path) not in card.text


def test_existing_files_are_kept_unless_told_otherwise(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(monkeypatch, checkpoint, tmp_path) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert run(monkeypatch, checkpoint, tmp_path, "--overwrite") == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "there is no checkpoint file"),
        ("text", [], "cannot be read"),
        ({"transformer.encoder.layers.0.linear1.weight": torch.ones(2, 2)}, [], "looks like DETR"),
        ("original", ["--position_embedding_type", "learned"], "sine positions"),
        ("original", ["--num_blocks", "0"], "num_blocks"),
        ("original", ["--push_to_hub", "not a name"], "no name of a repository"),
        ("original", ["--num_blocks", "two"], "invalid int value"),
    ],
)
def test_refusals_say_why_and_write_nothing(checkpoint, tmp_path, monkeypatch, capsys, content, arguments, message):
    source, output_dir = tmp_path / "source.ckpt", tmp_path / "converted"
    if content == "original":
        source = checkpoint
    elif content == "text":
        source.write_text("hello")
    elif content is not None:
        torch.save(content, source)
    assert run(monkeypatch, source, output_dir, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("deperceiver convert: error: ")
    assert message in error
    assert not output_dir.exists()


def test_a_file_in_place_of_the_directory_is_refused(checkpoint, monkeypatch, capsys):
    assert run(monkeypatch, checkpoint, checkpoint) == 2
    assert "is a file" in capsys.readouterr().err


def test_only_the_model_is_published(checkpoint, tmp_path, monkeypatch):
    calls = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: f"https://hub.example/{repo_id}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.update(options))
    conversion = convert_checkpoint(checkpoint, tmp_path / "converted", push_to_hub="someone/detector")
    assert conversion.url == "https://hub.example/someone/detector"
    assert calls["repo_id"] == "someone/detector"
    assert calls["allow_patterns"] == list(PUBLISHED)
    assert 'model="someone/detector"' in (tmp_path / "converted" / "README.md").read_text()


def test_a_failed_publication_names_the_finished_directory(checkpoint, tmp_path, monkeypatch, capsys):
    def refuse(self, repo_id, **options):
        raise ConnectionError("the Hub is far away")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert run(monkeypatch, checkpoint, tmp_path / "converted", "--push_to_hub", "someone/detector") == 2
    errors = capsys.readouterr().err
    assert f"was converted to {tmp_path / 'converted'}" in errors
    assert "the Hub is far away" in errors
