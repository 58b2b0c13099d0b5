# SPDX-License-Identifier: Apache-2.0
"""Saved models: what is wrong with a directory is said in a line, and training keeps all that a processor does."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deperceiver_hf import DePerceiverV2ImageProcessor
from deperceiver_hf.cli import main
from deperceiver_hf.saved_models import load_detector
from deperceiver_hf.training import DetectionTrainer, build_model
from deperceiver_hf.training.building import training_mode
from training_runs import TINY_ARCHITECTURES, tiny_options

WEIGHTS = "model.safetensors"


def edit_json(name, **changes):
    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text(encoding="utf-8"))
        content |= changes
        (directory / name).write_text(json.dumps(content), encoding="utf-8")

    return edit


def edit_weights(change):
    def edit(directory: Path) -> None:
        weights = load_file(directory / WEIGHTS)
        change(weights)
        save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})

    return edit


def replace_weights(content: bytes, name: str = WEIGHTS):
    def edit(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        (directory / name).write_bytes(content)

    return edit


def cut_off(directory: Path) -> None:
    file = directory / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    torch.save(Payload(str(directory / "EXECUTED")), directory / "pytorch_model.bin")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def shard_missing(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")


def first(weights, kind: str) -> str:
    return next(name for name in weights if name.endswith(kind) and weights[name].is_floating_point())


DAMAGES = {
    "weights cut off": cut_off,
    "weights empty": replace_weights(b""),
    "weights of zeros": replace_weights(bytes(4096)),
    "weights are text": replace_weights(b"<html>404</html>"),
    "weights are a pointer": replace_weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "weights missing": lambda directory: (directory / WEIGHTS).unlink(),
    "weights are a directory": lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()),
    "a pickle with code": pickled,
    "a pickle of something else": replace_weights(pickle.dumps({"a": [1]}), "pytorch_model.bin"),
    "a pickle cut off": replace_weights(b"PK\x03\x04 and no more", "pytorch_model.bin"),
    "a shard missing": shard_missing,
    "an index that is none": replace_weights(b"{", f"{WEIGHTS}.index.json"),
    "a weight missing": edit_weights(lambda w: w.pop(first(w, "weight"))),
    "a weight of another shape": edit_weights(lambda w: w.update({first(w, "bias"): torch.zeros(3)})),
    "a weight that is not a number": edit_weights(lambda w: w[first(w, "weight")].view(-1)[:1].fill_(torch.nan)),
    "an infinite variance": edit_weights(lambda w: w[first(w, "running_var")].fill_(torch.inf)),
    "config empty": lambda directory: (directory / "config.json").write_bytes(b""),
    "config is a list": lambda directory: (directory / "config.json").write_text("[]", encoding="utf-8"),
    "config is a number": lambda directory: (directory / "config.json").write_text("7", encoding="utf-8"),
    "config is no text": lambda directory: (directory / "config.json").write_bytes(b"\xff\xfe\x00"),
    "config of another kind": edit_json("config.json", model_type="no_such_model"),
    "config of a text model": lambda d: (d / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8"),
    "config of a type": edit_json("config.json", model_type=None),
    "config with a number as text": edit_json("config.json", d_model="many"),
    "config with another width": edit_json("config.json", d_model=32),
    "config of more classes": edit_json("config.json", id2label={"0": "a", "1": "b", "2": "c"}),
    "config of labels with gaps": edit_json("config.json", id2label={"0": "a", "5": "b"}),
    "config of labels that are a list": edit_json("config.json", id2label=["a", "b"]),
    "config without backbone": edit_json("config.json", backbone_config=None),
    "config with an unknown backbone": edit_json("config.json", backbone_config={"model_type": "no_such_backbone"}),
    "processor empty": lambda directory: (directory / "preprocessor_config.json").write_bytes(b""),
    "processor is a list": lambda d: (d / "preprocessor_config.json").write_text("[1]", encoding="utf-8"),
    "processor of another kind": edit_json("preprocessor_config.json", image_processor_type="NoSuchProcessor"),
    "processor with a size that is none": edit_json("preprocessor_config.json", size={"radius": 7}),
    "processor with a size of text": edit_json("preprocessor_config.json", size="large"),
    "processor missing": lambda directory: (directory / "preprocessor_config.json").unlink(),
    "config missing": lambda directory: (directory / "config.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_directory_is_said_in_a_line(cat_and_dog, tmp_path, damage):
    directory = shutil.copytree(cat_and_dog, tmp_path / "damaged")
    DAMAGES[damage](directory)
    with pytest.raises((OSError, ValueError), match=str(directory)) as raised:
        load_detector(str(directory))
    assert str(raised.value).count("\n") == 0
    assert not (directory / "EXECUTED").exists()


@pytest.mark.parametrize("damage", ["weights cut off", "config is a list", "processor is a list"])
@pytest.mark.parametrize("command", ["predict", "evaluate", "train"])
def test_commands_end_in_one_line_with_2(cat_and_dog, tmp_path, capsys, damage, command):
    directory = shutil.copytree(cat_and_dog, tmp_path / "damaged")
    DAMAGES[damage](directory)
    arguments = {
        "predict": [str(cat_and_dog.parent), "--output_dir", str(tmp_path / "out"), "--no_draw"],
        "evaluate": ["--dataset", "synthetic", "--max_samples", "1", "--output", str(tmp_path / "e.json")],
        "train": ["--dataset", "synthetic", "--max_train_samples", "4", "--output_dir", str(tmp_path / "run")],
    }[command]
    if command == "predict":
        (tmp_path / "x.png").write_bytes(b"")
        arguments[0] = str(tmp_path / "x.png")
    assert main([command, "--model", str(directory), *arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert str(directory) in said.splitlines()[-1]


@pytest.mark.heavy
def test_bytes_changed_at_random_are_refused_or_harmless(cat_and_dog, tmp_path):
    """Whatever is done to the files of a model: it is refused in a line, or loads with finite weights."""
    names = [WEIGHTS, "config.json", "preprocessor_config.json"]
    for seed in range(120):
        generator = random.Random(seed)
        directory = shutil.copytree(cat_and_dog, tmp_path / str(seed))
        file = directory / generator.choice(names)
        content = bytearray(file.read_bytes())
        for _ in range(generator.choice([1, 1, 3, 20])):
            content[generator.randrange(min(len(content), 3000))] = generator.randrange(256)
        if generator.random() < 0.3:
            del content[generator.randrange(len(content)) :]
        file.write_bytes(content)
        refusal = f"{directory}"
        try:
            model, _ = load_detector(str(directory))
        except (OSError, ValueError) as error:
            refusal = str(error)
        else:
            assert all(p.isfinite().all() for p in model.parameters())
        assert str(directory) in refusal
        assert "\n" not in refusal
        shutil.rmtree(directory)


def test_a_directory_that_holds_models_says_which(cat_and_dog, tmp_path):
    shutil.copytree(cat_and_dog, tmp_path / "run" / "best")
    with pytest.raises(FileNotFoundError, match=r"There are models in .*best"):
        load_detector(str(tmp_path / "run"))


OTHER_FIELDS = {
    "size": [
        {"height": 48, "width": 80},
        {"max_height": 70, "max_width": 90},
        {"shortest_edge": 40, "longest_edge": 60},
        {"shortest_edge": 40},
    ],
    "pad_size": [{"height": 128, "width": 160}],
    "do_normalize": [False],
    "do_rescale": [False],
    "rescale_factor": [1 / 127.5],
    "image_mean": [[0.1, 0.2, 0.3]],
    "image_std": [[0.5, 0.6, 0.7]],
    "resample": [0, 3],
    "do_convert_annotations": [False],
    "do_convert_rgb": [False],
    "do_pad": [False],
    "default_to_square": [True],
}
CASES = [(name, value) for name, values in OTHER_FIELDS.items() for value in values]


def test_every_field_of_the_processor_is_looked_at():
    fields = DePerceiverV2ImageProcessor().to_dict().keys()
    no_choice = {"image_processor_type", "data_format", "do_resize", "auto_map", "image_processor_class"}
    assert {name for name in fields if not name.startswith("_")} - no_choice <= OTHER_FIELDS.keys()


@pytest.mark.parametrize(("name", "value"), CASES)
def test_training_keeps_and_uses_every_field_of_a_saved_processor(cat_and_dog, tmp_path, name, value):
    directory = shutil.copytree(cat_and_dog, tmp_path / "saved")
    processor = DePerceiverV2ImageProcessor.from_pretrained(cat_and_dog)
    settings = {key: setting for key, setting in processor.to_dict().items() if not key.startswith("_")}
    if name == "do_pad":
        settings["size"] = {"height": 64, "width": 64}  # images of one size need no padding
    DePerceiverV2ImageProcessor(**settings | {name: value}).save_pretrained(directory)
    options = {"model": str(directory), "shortest_edge": None, "augmentation": "none", "batch_size": 2}
    run = DetectionTrainer(tiny_options(tmp_path / "run", options, max_steps=1))
    batch = next(iter(run.data.loader(0, 0, num_workers=0, pin_memory=False)))
    run.train()

    written = json.loads((tmp_path / "run" / "last" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert written[name] == value
    expected = DePerceiverV2ImageProcessor.from_pretrained(directory)
    dataset = run.data.dataset
    rows = [int(label["image_id"]) for label in batch["labels"]]
    images = [
        dataset.data.dataset[ids.index(row)]["image"] for ids in [dataset.data.dataset["image_id"]] for row in rows
    ]
    prepared = expected(images, return_tensors="pt")
    assert batch["pixel_values"].shape == prepared["pixel_values"].shape
    # The same pixels, but for the rounding of an image that is resized as bytes.
    scale = prepared["pixel_values"].std()
    assert (batch["pixel_values"] - prepared["pixel_values"]).abs().mean() < 0.05 * scale
    assert all(((label["boxes"] >= 0) & (label["boxes"] <= 1)).all() for label in batch["labels"])


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_a_frozen_backbone_has_no_moving_statistic(tmp_path, name):
    options = tiny_options(tmp_path, TINY_ARCHITECTURES[name], lr_backbone=0)
    model = build_model(options, ["a", "b"])
    training_mode(model)
    backbone = next(module for part, module in model.named_modules() if part.split(".")[-1] == "backbone")
    before = {key: buffer.clone() for key, buffer in backbone.named_buffers()}
    assert not any(module.training for module in backbone.modules() if list(module.parameters()))
    assert model.training
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    labels = [{"class_labels": torch.tensor([0]), "boxes": box} for _ in range(2)]
    model(pixel_values=torch.rand(2, 3, 64, 64), pixel_mask=torch.ones(2, 64, 64).long(), labels=labels)
    assert all(torch.equal(buffer, before[key]) for key, buffer in backbone.named_buffers())
