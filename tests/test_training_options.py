# SPDX-License-Identifier: Apache-2.0
"""From flags to the model, the image processor and the data of a training run."""

import re
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

import deperceiver_hf
from deperceiver_hf import DePerceiverV2ForObjectDetection, backbone_preprocessing
from deperceiver_hf.backbone_weights import IMAGENET_PREPROCESSING
from deperceiver_hf.errors import UserError
from deperceiver_hf.training import (
    DetrForObjectDetection,
    TrainingOptions,
    build_image_processor,
    build_model,
    parse_arguments,
)
from deperceiver_hf.training.architectures import ARCHITECTURES
from deperceiver_hf.training.architectures.options import WITH_ENCODER
from deperceiver_hf.training.arguments import make_parser
from deperceiver_hf.training.building import backbone_parameters, pretrained_backbone_name
from training_runs import TINY_DEPERCEIVER, TINY_DETR, tiny_options

NAMES = ["disc", "square", "star"]

# Flags of the original, and the field of the configuration that each decides.
CONFIGURATIONS = {
    "--downsample_factor 8": {"feature_strides": [8]},
    "--multiscale": {"feature_strides": [8, 16, 32]},
    "--dilation": {"dilation": True},
    "--position_embedding learned": {"position_embedding_type": "learned", "num_position_embeddings": 50},
    "--position_embedding learned --multiscale": {"num_position_embeddings": 167},
    "--position_embedding learned --downsample_factor 16 --shortest_edge 1000": {"num_position_embeddings": 105},
    "--num_latents 7": {"num_latents": 7},
    "--enc_blocks 2": {"num_blocks": 2},
    "--enc_layers_per_block 4": {"num_self_attends_per_block": 4},
    "--dec_layers 5": {"decoder_layers": 5, "decoder_type": "layered", "auxiliary_loss": True},
    "--no_aux_loss": {"decoder_type": "cross_attention", "auxiliary_loss": False},
    "--hidden_dim 32": {"d_model": 32, "d_latents": 32},
    "--nheads 4": {"num_self_attention_heads": 4, "num_cross_attention_heads": 1},
    "--dropout 0.2": {"dropout": 0.2, "decoder_dropout": 0.2, "decoder_attention_dropout": 0.2},
    "--dropout 0.2 --no_aux_loss": {"decoder_dropout": 0.2, "decoder_attention_dropout": 0.0},
    "--num_queries 9": {"num_queries": 9},
    "--set_cost_class 3": {"class_cost": 3},
    "--set_cost_bbox 3.5": {"bbox_cost": 3.5},
    "--set_cost_giou 4": {"giou_cost": 4},
    "--bbox_loss_coef 6": {"bbox_loss_coefficient": 6},
    "--giou_loss_coef 7": {"giou_loss_coefficient": 7},
    "--eos_coef 0.3": {"eos_coefficient": 0.3},
    "--lr_backbone 0": {"freeze_backbone": True},
    "--no_pretrained_backbone": {"freeze_batch_norm": False, "frozen_backbone_stages": -1},
    "": {
        "feature_strides": [32],
        "num_latents": 1024,
        "num_blocks": 3,
        "num_self_attends_per_block": 6,
        "decoder_layers": 3,
        "decoder_type": "layered",
        "num_queries": 100,
        "d_model": 256,
        "class_cost": 1,
        "bbox_cost": 5,
        "giou_cost": 2,
        "bbox_loss_coefficient": 5,
        "giou_loss_coefficient": 2,
        "eos_coefficient": 0.1,
        "freeze_batch_norm": True,
        "frozen_backbone_stages": 1,
        "freeze_backbone": False,
        "id2label": {0: "disc", 1: "square", 2: "star"},
    },
}


@pytest.mark.parametrize("flags", CONFIGURATIONS)
def test_flags_reach_the_configuration(flags):
    options = parse_arguments(["--architecture", "deperceiver", *flags.split()])
    config = ARCHITECTURES["deperceiver"].make_config(options, NAMES)
    expected = CONFIGURATIONS[flags]
    assert {name: getattr(config, name) for name in expected} == expected


def test_flags_reach_the_configuration_of_detr():
    flags = (
        "--architecture detr --downsample_factor 16 --enc_layers 2 --dec_layers 4 --dim_feedforward 48 "
        "--hidden_dim 32 --nheads 4 --dropout 0.3 --num_queries 9 --position_embedding learned "
        "--set_cost_class 3 --bbox_loss_coef 6 --eos_coef 0.3"
    )
    config = ARCHITECTURES["detr"].make_config(parse_arguments(flags.split()), NAMES)
    expected = {
        **{"encoder_layers": 2, "decoder_layers": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.3, "num_queries": 9},
        **{"position_embedding_type": "learned", "class_cost": 3, "bbox_loss_coefficient": 6, "eos_coefficient": 0.3},
        **{"num_labels": 3, "giou_cost": 2},
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.backbone_config.out_indices == [3]


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("", "auto"),
        ("--amp", "fp16"),
        ("--amp --use_bfloat", "bf16"),
        ("--use_bfloat", "bf16"),
        ("--mixed_precision bf16", "bf16"),
        ("--mixed_precision no", "no"),
    ],
)
def test_precision(flags, precision):
    assert parse_arguments(flags.split()).precision == precision


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ("", "resnet50.tv_in1k"),
        ("--backbone resnet18", "resnet18.tv_in1k"),
        ("--backbone convnext_tiny", "convnext_tiny"),
        ("--pretrained_backbone resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("--no_pretrained_backbone", None),
    ],
)
def test_weights_of_the_backbone(flags, weights):
    options = parse_arguments(flags.split())
    config = ARCHITECTURES[options.architecture].make_config(options, NAMES)
    assert pretrained_backbone_name(options, config) == weights


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--downsample_factor 5", "downsample_factor"),
        ("--architecture detr --num_latents 5", "--num_latents"),
        ("--enc_layers 3", "--architecture detr, deformable_detr, rt_detr_v2, d_fine or deimv2 only"),
        ("--model there --multiscale --backbone resnet18", "--backbone, --multiscale"),
        ("--multiscale --downsample_factor 8", "8, 16 and 32"),
        ("--architecture deperceiver --no_aux_loss --dec_layers 4", "single cross-attention"),
        ("--num_latents 5", "the default is deperceiver_v2: add --architecture deperceiver."),
        ("--no_aux_loss", "the default is deperceiver_v2: add --architecture deperceiver, or another of them."),
        ("--architecture deperceiver_v2 --num_latents 5", "is an option of --architecture deperceiver only.\n"),
        ("--pretrained_backbone x --no_pretrained_backbone", "contradicts"),
        ("--lr_scheduler cosine --lr_drop 3", "--lr_scheduler step"),
        ("--lr_scheduler cosine --decay_fraction 0.2", "--lr_scheduler wsd"),
        ("--lr_scheduler wsd --decay_fraction 1.5", "--decay_fraction must be"),
        ("--eval_every 2 --eval_steps 100", "--eval_every: counts epochs"),
        ("--mixed_precision bf16 --amp", "contradicts"),
        ("--lr nan", "--lr"),
        ("--lr 0", "--lr"),
        ("--batch_size 0", "--batch_size must be at least 1"),
        ("--cache_images", "--num_workers 0"),
        ("--size_boundaries 96 32", "--size_boundaries must be two ascending sides in pixels"),
        ("--size_boundaries 32", "got 32"),
        ("--shortest_edge 500 --longest_edge 400", "--longest_edge"),
        ("--report_to wnadb", "wnadb"),
        ("--overwrite_output_dir --resume auto", "--resume"),
        ("--down 8", "--down"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(flags.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines(keepends=True)[-1]


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ("", (800, 1333)),
        ("--shortest_edge 400", (400, 666)),
        ("--longest_edge 900", (800, 900)),
        ("--shortest_edge 64 --longest_edge 64", (64, 64)),
    ],
)
def test_image_processor_has_the_size_of_training(flags, size):
    processor = build_image_processor(parse_arguments(flags.split()))
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == size


HALF = [0.5, 0.5, 0.5]
BILINEAR, BICUBIC = 2, 3


@pytest.mark.parametrize(
    ("flags", "half", "resample"),
    [
        ("", False, BILINEAR),  # as the original
        ("--pretrained_backbone there.pth", False, BILINEAR),
        ("--pretrained_backbone resnet50.a1_in1k", False, BICUBIC),
        ("--backbone tf_efficientnet_lite0", True, BICUBIC),
        ("--backbone tf_efficientnet_lite0 --pretrained_backbone there.pth", True, BICUBIC),
        ("--backbone tf_efficientnet_lite0 --no_pretrained_backbone", False, BILINEAR),
        ("--backbone inception_v4 --pretrained_backbone unknown", True, BICUBIC),
        ("--architecture deperceiver_v2 --preset nano", True, BILINEAR),
        ("--architecture deperceiver_v2 --preset small", False, BILINEAR),
        *((f"--architecture {name} --backbone test_resnet", True, BILINEAR) for name in WITH_ENCODER),
        *((f"--architecture {name}", False, BILINEAR) for name in WITH_ENCODER),
        ("--architecture lw_detr", True, BICUBIC),
        ("--architecture rf_detr", False, BICUBIC),
    ],
)
def test_images_are_prepared_as_the_weights_expect(flags, half, resample):
    processor = build_image_processor(parse_arguments(flags.split()))
    usual = IMAGENET_PREPROCESSING
    mean, std = (HALF, HALF) if half else (usual["image_mean"], usual["image_std"])
    assert (list(processor.image_mean), list(processor.image_std), processor.resample) == (mean, std, resample)


def test_preprocessing_of_weights(tmp_path):
    usual = {name: IMAGENET_PREPROCESSING[name] for name in ("image_mean", "image_std")}
    assert backbone_preprocessing() == backbone_preprocessing(None) == {**usual, "resample": BILINEAR}
    assert backbone_preprocessing("resnet50") == {**usual, "resample": BICUBIC}  # timm's weights, not torchvision's
    half = {"image_mean": HALF, "image_std": HALF}
    assert backbone_preprocessing("tf_efficientnet_lite0.in1k") == {**half, "resample": BICUBIC}
    file = tmp_path / "weights"
    file.touch()
    assert backbone_preprocessing(file, "resnet50") == {**usual, "resample": BILINEAR}
    assert backbone_preprocessing(file, "test_resnet") == {**half, "resample": BILINEAR}
    for unknown in (file, tmp_path / "missing.pth", tmp_path):
        with pytest.raises(UserError, match="name the timm `backbone`"):
            backbone_preprocessing(unknown)
    with pytest.raises(UserError, match=r"no weights 'resnet50\.no_such_tag'"):
        backbone_preprocessing("resnet50.no_such_tag")
    with pytest.raises(OSError, match="could not be had"):
        backbone_preprocessing("hf-hub:timm/no_such_model")  # offline in tests
    deperceiver_hf.DePerceiverImageProcessor(image_mean=HALF, image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    saved = backbone_preprocessing(tmp_path)
    assert saved == {"image_mean": HALF, "image_std": [0.2, 0.3, 0.4], "resample": BILINEAR}


def test_unknown_weights_are_refused_by_the_model(tmp_path):
    options = parse_arguments(
        ["--pretrained_backbone", "no_such_model", "--architecture", "deperceiver", "--num_latents", "4"]
    )
    build_image_processor(options)
    with pytest.raises(UserError, match="neither a file nor a model of timm"):
        build_model(options, NAMES)


@pytest.mark.parametrize("tiny", [TINY_DEPERCEIVER, TINY_DETR], ids=["deperceiver", "detr"])
def test_backbone_starts_from_weights_in_a_file(tmp_path, tiny):
    weights = timm.create_model("test_resnet", features_only=True).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    options = tiny_options(
        tmp_path, {**tiny, "no_pretrained_backbone": False}, pretrained_backbone=str(tmp_path / "weights.safetensors")
    )
    model = build_model(options, NAMES)
    loaded = {name.split(".", 3)[-1].removeprefix("_backbone."): p for name, p in backbone_parameters(model).items()}
    assert loaded
    assert all(torch.equal(weights[name], parameter) for name, parameter in loaded.items())
    trained = {name for name, parameter in loaded.items() if parameter.requires_grad}
    assert trained == {name for name in loaded if re.match(r"layer[234]", name)}
    with pytest.raises(OSError, match="could not be had"):
        build_model(tiny_options(tmp_path, {**tiny, "no_pretrained_backbone": False}), NAMES)


@pytest.mark.parametrize("tiny", [TINY_DEPERCEIVER, TINY_DETR], ids=["deperceiver", "detr"])
def test_fine_tuning_starts_from_a_saved_model(tmp_path, tiny):
    saved = build_model(tiny_options(tmp_path, tiny), NAMES)
    saved.save_pretrained(tmp_path / "saved")
    build_image_processor(tiny_options(tmp_path)).save_pretrained(tmp_path / "saved")
    options = tiny_options(
        tmp_path, {"model": str(tmp_path / "saved")}, num_queries=20, eos_coef=0.5, shortest_edge=None
    )
    model = build_model(options, ["one", "two"])
    assert type(model) is type(saved)
    assert (model.config.num_labels, model.config.num_queries, model.config.eos_coefficient) == (2, 20, 0.5)
    before, after = saved.state_dict(), model.state_dict()
    fresh = {name for name in before if before[name].shape != after[name].shape}
    assert len(fresh) == 3  # weight and bias of the class head, and the queries
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - fresh)
    assert build_image_processor(options).size["shortest_edge"] == 64


def test_model_that_cannot_be_trained_is_refused(tmp_path):
    config = transformers.YolosConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.YolosForObjectDetection(config).save_pretrained(tmp_path)
    build_image_processor(tiny_options(tmp_path)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="yolos"):
        build_model(tiny_options(tmp_path, {"model": str(tmp_path)}), NAMES)


@pytest.mark.parametrize("tiny", [TINY_DEPERCEIVER, TINY_DETR], ids=["deperceiver", "detr"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, tiny, images, labels):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(tiny_options(tmp_path, tiny, gradient_checkpointing=checkpointing), [*NAMES, "a", "b"])
        model.train()
        torch.manual_seed(1)
        model(pixel_values=images, pixel_mask=torch.ones(2, 64, 96), labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_detr_learns_after_every_layer_and_is_saved_as_transformers_own(tmp_path, images, labels):
    model = build_model(tiny_options(tmp_path, TINY_DETR), [*NAMES, "a", "b"]).eval()
    assert isinstance(model, DetrForObjectDetection)
    mask = torch.ones(2, 64, 96)
    outputs = model(pixel_values=images, pixel_mask=mask, labels=labels)
    layers = {f"loss_ce{suffix}" for suffix in ("", "_0", "_1")}
    assert layers <= outputs.loss_dict.keys()

    # A decoder cut off after its first layer predicts what the first auxiliary loss is computed from.
    decoder, all_layers = model.model.decoder, model.model.decoder.layers
    decoder.layers = all_layers[:1]
    first = model(pixel_values=images, pixel_mask=mask, labels=labels).loss_dict["loss_ce"]
    decoder.layers = all_layers
    torch.testing.assert_close(outputs.loss_dict["loss_ce_0"], first)

    model.use_auxiliary_loss = False
    alone = model(pixel_values=images, pixel_mask=mask, labels=labels)
    assert not {"loss_ce_0", "loss_ce_1"} & alone.loss_dict.keys()
    torch.testing.assert_close(alone.loss_dict["loss_ce"], outputs.loss_dict["loss_ce"])

    model.save_pretrained(tmp_path)
    loaded, report = transformers.DetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(loaded.eval()(images, mask).logits, outputs.logits)


def test_every_documented_flag_exists_and_every_flag_is_documented():
    text = (Path(__file__).parents[1] / "docs" / "original_flags.md").read_text()
    counterparts, new = (
        [row.split("|")[1:3] for row in re.findall(r"^\| `--.*$", table, flags=re.MULTILINE)]
        for table in text.split("## Flags that are new here")
    )
    mentioned = {flag for _, ours in counterparts for flag in re.findall(r"`--(\w+)`", ours)}
    mentioned |= {flag for flags, _ in new for flag in re.findall(r"`--(\w+)`", flags)}
    known = {flag[2:] for action in make_parser()._actions for flag in action.option_strings if "-" not in flag[2:]}
    assert mentioned <= known
    assert set(TrainingOptions.__dataclass_fields__) <= mentioned


def test_the_second_architecture_is_the_default():
    assert TrainingOptions().architecture == "deperceiver_v2"
    tiny = {"preset": "nano", "backbone": "test_resnet", "no_pretrained_backbone": True}
    assert isinstance(build_model(tiny_options(Path("unused"), tiny), NAMES), DePerceiverV2ForObjectDetection)
