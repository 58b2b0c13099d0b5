# SPDX-License-Identifier: Apache-2.0
"""Saved models: what is wrong with a directory is said in a line, and training keeps all that a processor does."""

import copy
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForObjectDetection

from coco_samples import annotation, write_coco
from deperceiver_hf import DePerceiverV2ImageProcessor
from deperceiver_hf.cli import main
from deperceiver_hf.data.transforms import AUGMENTATIONS
from deperceiver_hf.errors import UserError
from deperceiver_hf.saved_models import load_detector
from deperceiver_hf.training import DetectionTrainer, build_image_processor, build_model
from deperceiver_hf.training.architectures.backbones import backbone_of
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
    "a variance below 0": edit_weights(lambda w: w[first(w, "running_var")][:1].fill_(-1e-6)),
    "weights that are integers": edit_weights(lambda w: w.update({first(w, "weight"): torch.zeros(2, 24).int()})),
    "a weight too many": edit_weights(lambda w: w.update({"model.another.weight": torch.zeros(3)})),
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
    "config of fewer classes": edit_json("config.json", id2label={"0": "a"}),
    "config of another number of classes": edit_json("config.json", num_labels=5),
    "config of labels in words": edit_json("config.json", id2label={"a": "cat", "b": "dog"}),
    "config of labels without names": edit_json("config.json", id2label={"0": "cat", "1": None}),
    "config with fewer layers": edit_json("config.json", decoder_layers=1),
    "config with remote code": edit_json("config.json", model_type="mine", auto_map={"AutoConfig": "code.Config"}),
    "config without backbone": edit_json("config.json", backbone_config=None),
    "config with an unknown backbone": edit_json("config.json", backbone_config={"model_type": "no_such_backbone"}),
    "processor empty": lambda directory: (directory / "preprocessor_config.json").write_bytes(b""),
    "processor of no field": lambda d: (d / "preprocessor_config.json").write_text("{}", encoding="utf-8"),
    "processor that is the configuration": lambda d: shutil.copy(d / "config.json", d / "preprocessor_config.json"),
    "processor is a list": lambda d: (d / "preprocessor_config.json").write_text("[1]", encoding="utf-8"),
    "processor of another kind": edit_json("preprocessor_config.json", image_processor_type="NoSuchProcessor"),
    "processor with a size that is none": edit_json("preprocessor_config.json", size={"radius": 7}),
    "processor with a size of text": edit_json("preprocessor_config.json", size="large"),
    "processor of images alone": edit_json("preprocessor_config.json", image_processor_type="ViTImageProcessor"),
    "processor of many crops": edit_json("preprocessor_config.json", image_processor_type="LlavaNextImageProcessor"),
    "processor of another detector": edit_json("preprocessor_config.json", image_processor_type="DetrImageProcessor"),
    "processor with a size of nothing": edit_json("preprocessor_config.json", size={"shortest_edge": 0}),
    "processor with a size below nothing": edit_json("preprocessor_config.json", size={"height": -4, "width": 4}),
    "processor with a size in letters": edit_json("preprocessor_config.json", size={"shortest_edge": "64"}),
    "processor with a size that it does not know": edit_json("preprocessor_config.json", size={"longest_edge": 64}),
    "processor that pads to less than its size": edit_json(
        "preprocessor_config.json", pad_size={"height": 32, "width": 32}
    ),
    "processor with a switch of text": edit_json("preprocessor_config.json", do_normalize="no"),
    "processor that makes all black": edit_json("preprocessor_config.json", rescale_factor=0),
    "processor that divides by 0": edit_json("preprocessor_config.json", image_std=[0, 0, 0]),
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


def test_a_file_of_a_model_is_no_model_but_its_directory_is(cat_and_dog):
    with pytest.raises(UserError, match=f"give the directory that it is in, {cat_and_dog}"):
        load_detector(str(cat_and_dog / WEIGHTS))


@pytest.mark.parametrize("field", [{"d_model": 32}, {"id2label": {"0": "a", "1": "b", "2": "c"}}])
def test_training_starts_from_no_weights_of_another_shape(cat_and_dog, tmp_path, field):
    directory = shutil.copytree(cat_and_dog, tmp_path / "changed")
    edit_json("config.json", **field)(directory)
    with pytest.raises(UserError, match=rf"{directory} lacks .* weights"):
        build_model(tiny_options(tmp_path, {"model": str(directory)}), ["cat", "dog"])


def test_a_model_that_picks_its_queries_takes_any_number_of_them(cat_and_dog, tmp_path, images):
    """The queries that it had before are among them, their logits what they were before the blocks saw the others."""
    before, _ = load_detector(str(cat_and_dog))
    after, _ = load_detector(str(cat_and_dog), num_queries=30)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    with torch.no_grad():
        few, many = before(images), after(images)
        assert many.logits.shape == (2, 30, 2)
        torch.testing.assert_close(many.selection_logits[:, :9], few.selection_logits)
        everything = load_detector(str(cat_and_dog), num_queries=1000)[0](images)
    assert everything.logits.shape == (2, 8 * 12 + 4 * 6, 2)
    after.save_pretrained(tmp_path)
    again = type(after).from_pretrained(tmp_path).eval()
    assert again.config.num_queries == 30
    assert type(after).from_pretrained(cat_and_dog, num_queries=30).config.num_queries == 30
    with torch.no_grad():
        assert torch.equal(again(images).logits, many.logits)


@pytest.mark.parametrize("name", ["deperceiver_v2", "deperceiver", "detr"])
def test_learned_queries_are_as_many_as_they_are(tmp_path, name):
    options = tiny_options(tmp_path, TINY_ARCHITECTURES[name])
    model = build_model(options, ["cat", "dog"])
    if name == "deperceiver_v2":
        model = type(model)(type(model.config)(**{**model.config.to_dict(), "query_selection": False}))
    model.save_pretrained(tmp_path / "saved")
    build_image_processor(options).save_pretrained(tmp_path / "saved")
    queries = model.config.num_queries
    with pytest.raises(UserError, match=f"has {queries} object queries that it has learned, and cannot have 30"):
        load_detector(str(tmp_path / "saved"), num_queries=30)
    assert load_detector(str(tmp_path / "saved"), num_queries=queries)[0].config.num_queries == queries
    for number in (0, -1):
        with pytest.raises(UserError, match="num_queries must be at least 1"):
            load_detector(str(tmp_path / "saved"), num_queries=number)


@pytest.mark.parametrize("name", ["deperceiver", "detr"])  # with weights for each query
def test_another_number_of_queries_is_said(tmp_path, name, caplog):
    options = tiny_options(tmp_path, TINY_ARCHITECTURES[name])
    before = build_model(options, ["cat", "dog"])
    before.save_pretrained(tmp_path / "saved")
    build_image_processor(options).save_pretrained(tmp_path / "saved")
    with caplog.at_level(logging.WARNING, logger="deperceiver_hf"):
        model = build_model(tiny_options(tmp_path, {"model": str(tmp_path / "saved")}, num_queries=7), ["cat", "dog"])
    assert "has 12 object queries and 7 are asked for: 1 weights are new" in caplog.text
    after = model.state_dict()
    assert [name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])] == [
        name for name, tensor in after.items() if tensor.shape[:1] == (7,)
    ]


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_every_architecture_loads_with_its_own_processor(tmp_path, name):
    options = tiny_options(tmp_path, TINY_ARCHITECTURES[name])
    build_model(options, ["cat", "dog"]).save_pretrained(tmp_path / "saved")
    build_image_processor(options).save_pretrained(tmp_path / "saved")
    model, processor = load_detector(str(tmp_path / "saved"))
    assert not model.training
    assert hasattr(processor, "post_process_object_detection")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precisions_are_whole(cat_and_dog, tmp_path, dtype):
    model, processor = load_detector(str(cat_and_dog))
    model.to(dtype).save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert load_detector(str(tmp_path / "saved"))[0].dtype == dtype
    trained = build_model(tiny_options(tmp_path, {"model": str(tmp_path / "saved")}), ["cat", "dog"])
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}


@pytest.mark.parametrize("part", [[], ["backbone_config"]])
def test_models_that_return_tuples_elsewhere_detect_here(cat_and_dog, tmp_path, part):
    directory = shutil.copytree(cat_and_dog, tmp_path / "saved")
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    changed = content
    for name in part:
        changed = changed[name]
    changed["return_dict"] = False
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    model, _ = load_detector(str(directory))
    assert model(pixel_values=torch.zeros(1, 3, 64, 64)).logits.isfinite().all()


def test_models_in_several_files_are_whole(cat_and_dog, tmp_path):
    model, processor = load_detector(str(cat_and_dog))
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    processor.save_pretrained(tmp_path / "saved")
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 2
    loaded, _ = load_detector(str(tmp_path / "saved"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    with pytest.raises((UserError, OSError), match=str(tmp_path / "saved")):
        load_detector(str(tmp_path / "saved"))
    shards[1].unlink()
    with pytest.raises((UserError, OSError), match=str(tmp_path / "saved")):
        load_detector(str(tmp_path / "saved"))


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
        {"shortest_edge": 60, "longest_edge": 40},
    ],
    "do_resize": [False],
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
    no_choice = {"image_processor_type", "data_format", "auto_map", "image_processor_class"}
    assert {name for name in fields if not name.startswith("_")} - no_choice <= OTHER_FIELDS.keys()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """Images of several aspect ratios, with an object each."""
    sizes = [(160, 40), (60, 90), (64, 64), (50, 56)]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)],
        "annotations": [annotation(i + 1, i, 1, [8, 8, 16, 16], area=256.0) for i in range(len(sizes))],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    split = {"annotation_file": "annotations/instances_train.json", "image_dir": "train"}
    return str(write_coco(tmp_path_factory.mktemp("pictures"), content, **split))


def run_from(saved, tmp_path, pictures, fields, **options) -> DetectionTrainer:
    """A run of a step from a saved model whose image processor has other fields."""
    directory = shutil.copytree(saved, tmp_path / "changed")
    processor = DePerceiverV2ImageProcessor.from_pretrained(saved)
    settings = {key: setting for key, setting in processor.to_dict().items() if not key.startswith("_")}
    DePerceiverV2ImageProcessor(**settings | fields).save_pretrained(directory)
    given = {"model": str(directory), "dataset": pictures, "shortest_edge": None, "batch_size": 4} | options
    return DetectionTrainer(tiny_options(tmp_path / "run", given, max_steps=1))


@pytest.mark.parametrize(("name", "value"), CASES)
def test_training_keeps_and_uses_every_field_of_a_saved_processor(cat_and_dog, tmp_path, pictures, name, value):
    one_size = {"size": {"height": 64, "width": 64}} if name == "do_pad" else {}  # then nothing is to be padded
    run = run_from(cat_and_dog, tmp_path, pictures, one_size | {name: value}, augmentation="none")
    batch = next(iter(run.data.loader(0, 0, num_workers=0, pin_memory=False)))
    run.train()

    written = json.loads((tmp_path / "run" / "last" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert written[name] == value
    rows = run.data.train.dataset
    image_ids = [int(label["image_id"]) for label in batch["labels"]]
    images = [rows[rows["image_id"][:].index(image_id)]["image"] for image_id in image_ids]
    prepared = DePerceiverV2ImageProcessor.from_pretrained(tmp_path / "changed")(images, return_tensors="pt")
    assert batch.keys() - {"labels", "unreadable"} == prepared.keys()
    for key in prepared:
        assert batch[key].shape == prepared[key].shape
    # The same pixels, but for the rounding of an image that is resized as bytes.
    difference = (batch["pixel_values"] - prepared["pixel_values"]).abs().mean()
    assert difference < 0.05 * prepared["pixel_values"].std()
    assert all(((label["boxes"] >= 0) & (label["boxes"] <= 1)).all() for label in batch["labels"])


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize(
    "fields",
    [{"size": {"height": 48, "width": 80}}, {"size": {"max_height": 70, "max_width": 90}}, {"do_resize": False}],
)
def test_augmentation_gives_the_sizes_of_the_processor(cat_and_dog, tmp_path, pictures, augmentation, fields):
    run = run_from(cat_and_dog, tmp_path, pictures, fields, augmentation=augmentation)
    processor, rows = run.data.image_processor, run.data.train.dataset
    for index in range(len(rows)):
        expected = tuple(processor(rows[index]["image"], return_tensors="pt")["pixel_values"].shape[-2:])
        for epoch in range(4):
            run.data.dataset.set_epoch(epoch)
            size = tuple(run.data.dataset[index]["image"].shape[-2:])
            assert size in (expected, expected[::-1] if augmentation == "crop_any_orientation" else expected)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": {"height": 48, "width": 80}}, "not 48 x 80 pixels"),
        ({"do_resize": False}, "not as large as they are"),
    ],
)
def test_an_edge_that_is_asked_for_wins_over_a_size_of_another_kind(
    cat_and_dog, tmp_path, pictures, caplog, fields, said
):
    with caplog.at_level(logging.WARNING, logger="deperceiver_hf"):
        run = run_from(cat_and_dog, tmp_path, pictures, fields, shortest_edge=32, augmentation="none")
    assert said in caplog.text
    assert run.data.image_processor.do_resize
    assert min(run.data.dataset[2]["image"].shape[-2:]) == 32


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_a_frozen_backbone_has_no_moving_statistic(tmp_path, name):
    options = tiny_options(tmp_path, TINY_ARCHITECTURES[name], lr_backbone=0)
    model = build_model(options, ["a", "b"])
    training_mode(model)
    backbone = backbone_of(model)
    before = {key: buffer.clone() for key, buffer in backbone.named_buffers()}
    assert not any(module.training for module in backbone.modules() if list(module.parameters()))
    assert model.training
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    labels = [{"class_labels": torch.tensor([0]), "boxes": box} for _ in range(2)]
    model(pixel_values=torch.rand(2, 3, 64, 64), pixel_mask=torch.ones(2, 64, 64).long(), labels=labels)
    assert all(torch.equal(buffer, before[key]) for key, buffer in backbone.named_buffers())


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_nothing_of_a_frozen_backbone_changes_in_a_run(tmp_path, name):
    size = {"shortest_edge": 96, "longest_edge": 96, "augmentation": "none", "batch_size": 2, "lr_backbone": 0}
    run = DetectionTrainer(tiny_options(tmp_path, TINY_ARCHITECTURES[name], **size, max_steps=2))
    model, backbone = run.model, backbone_of(run.model)
    before, fixed = (copy.deepcopy(module.state_dict()) for module in (model, backbone))
    run.train()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert fixed
    assert all(torch.equal(tensor, fixed[key]) for key, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["deperceiver", "deperceiver_v2"])
@pytest.mark.parametrize("fields", [{"freeze_backbone": True}, {"frozen_backbone_stages": 2}])
def test_frozen_parts_stay_as_they_are_in_whatever_trains_the_model(tmp_path, name, fields):
    config = build_model(tiny_options(tmp_path, TINY_ARCHITECTURES[name]), ["a", "b"]).config
    for field, value in {"freeze_batch_norm": False, **fields}.items():
        setattr(config, field, value)
    model = AutoModelForObjectDetection.from_config(config).train()
    norms = {key: module for key, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    frozen = {key for key, module in norms.items() if not module.weight.requires_grad}
    before = {key: module.running_mean.clone() for key, module in norms.items()}
    model(pixel_values=torch.rand(2, 3, 64, 64))
    still = {key for key, module in norms.items() if torch.equal(module.running_mean, before[key])}
    assert still == frozen
    assert (still == norms.keys()) == ("freeze_backbone" in fields)
    assert still
    assert not any(module.training for module in model.eval().modules())


def test_what_a_prediction_costs_is_chosen_when_it_is_loaded(cat_and_dog, tmp_path):
    model, _ = load_detector(str(cat_and_dog), num_blocks=1, token_share=0.5, num_queries=4)
    assert model.config.dials() == (4, 1, 0.5)
    for dials, message in (
        ({"num_blocks": 7}, "`num_blocks` must be from 1 to the number of blocks, 2, not 7"),
        ({"token_share": 0.0}, "`token_share` must be more than 0 and at most 1"),
    ):
        with pytest.raises(UserError, match=message):
            load_detector(str(cat_and_dog), **dials)
    options = tiny_options(tmp_path, TINY_ARCHITECTURES["detr"])
    build_model(options, ["cat", "dog"]).save_pretrained(tmp_path / "detr")
    build_image_processor(options).save_pretrained(tmp_path / "detr")
    with pytest.raises(UserError, match="is a detr, which has no token_share to change"):
        load_detector(str(tmp_path / "detr"), token_share=0.5)
