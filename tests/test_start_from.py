# SPDX-License-Identifier: Apache-2.0
"""Models that start from another detector's backbone and encoder: equal features, new classes, its preparation."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    PreTrainedModel,
    RTDetrImageProcessor,
    pipeline,
)
from transformers.models.rf_detr.image_processing_rf_detr import RfDetrImageProcessor

from conftest import tiny_v2_config
from deperceiver_hf import (
    DePerceiverV2Config,
    DePerceiverV2ForObjectDetection,
    DePerceiverV2ImageProcessor,
    create_model,
    detector_preprocessing,
)
from deperceiver_hf.comparison.arguments import ModelSpec
from deperceiver_hf.errors import UserError
from deperceiver_hf.model_cards import make_model_card
from deperceiver_hf.models.detector_features_deperceiver_v2 import DETECTOR_FAMILIES
from deperceiver_hf.saved_models import license_of, load_detector
from deperceiver_hf.training import DetectionTrainer, TrainingOptions, build_image_processor, build_model
from deperceiver_hf.training.building import backbone_parameters
from deperceiver_hf.training.recipes import recipe_options
from training_runs import assert_equal_weights, kill, stop_at, tiny_options, weights_of

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "layer_type": "basic"}
HGNET = {
    "model_type": "hgnet_v2",
    "embedding_size": 8,
    "stem_channels": [3, 8, 8],
    "hidden_sizes": [8, 8, 16, 16],
    "stage_in_channels": [8, 8, 8, 16],
    "stage_mid_channels": [4] * 4,
    "stage_out_channels": [8, 8, 16, 16],
    "stage_num_blocks": [1] * 4,
    "stage_numb_of_layers": [2] * 4,
    "depths": [1] * 4,
    "out_indices": [2, 3, 4],
}
DINOV3 = {
    "model_type": "dinov3_vit",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 16,
    "out_indices": [1, 2, 3],
    "apply_layernorm": False,
    "reshape_hidden_states": True,
}
HYBRID = {
    "encoder_in_channels": [8, 16, 16],
    "encoder_hidden_dim": 16,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 24,  # not the encoder's, so that it is projected for the decoder
    "decoder_in_channels": [16] * 3,
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_queries": 6,
    "num_denoising": 4,
}
PROJECTOR = {
    "d_model": 16,
    "decoder_ffn_dim": 16,
    "decoder_layers": 1,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 4,
    "group_detr": 2,
}
# As on the Hub: the features leave out the last layer.
PLAIN_VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "out_indices": [1, 3]}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 4,
}
RT_RESNET = {**RESNET, "model_type": "rt_detr_resnet", "out_indices": [2, 3, 4]}
TIMM = {"model_type": "timm_backbone", "backbone": "test_resnet", "features_only": True}

# By name: fields of the configuration, strides, side of an image, processor.
DETECTORS = {
    "rt_detr": ({"backbone_config": RT_RESNET, **HYBRID}, [8, 16, 32], 64, RTDetrImageProcessor),
    "rt_detr_v2": ({"backbone_config": RT_RESNET, **HYBRID}, [8, 16, 32], 64, RTDetrImageProcessor),
    "d_fine": ({"backbone_config": HGNET, **HYBRID}, [8, 16, 32], 64, RTDetrImageProcessor),
    "deimv2": ({"backbone_config": HGNET, **HYBRID}, [8, 16, 32], 64, RTDetrImageProcessor),
    "deimv2 on a ViT": (
        {"backbone_config": DINOV3, "spatial_tuning_adapter_inplanes": 4, **HYBRID},
        *([8, 16, 32], 64, RTDetrImageProcessor),
    ),
    "lw_detr": (
        {
            "backbone_config": {
                **PLAIN_VIT,
                "model_type": "lw_detr_vit",
                "window_block_indices": [0],
                "image_size": 64,
                "pretrain_image_size": 32,
                "patch_size": 8,
                "num_windows": 4,
            },
            "projector_scale_factors": [2.0, 0.5],
            **PROJECTOR,
        },
        *([4, 16], 64, DeformableDetrImageProcessor),
    ),
    "rf_detr": (
        {
            "backbone_config": {
                **PLAIN_VIT,
                "model_type": "rf_detr_dinov2",
                "image_size": 28,
                "patch_size": 14,
                "num_windows": 2,
            },
            **PROJECTOR,
        },
        *([14], 56, RfDetrImageProcessor),
    ),
    "deformable_detr": (
        {"backbone_config": {**TIMM, "out_indices": [2, 3]}, "num_feature_levels": 4, **DETR},
        *([8, 16, 32, 64], 64, DeformableDetrImageProcessor),
    ),
    "detr": ({"backbone_config": {**TIMM, "out_indices": [2, 3, 4]}, **DETR}, [32], 64, DetrImageProcessor),
}
FAMILIES = pytest.mark.parametrize("name", DETECTORS)
NEW = {"preset": "nano", "d_model": 16, "num_attention_heads": 2, "decoder_layers": 1, "num_queries": 6}
NAMES = ["disc", "square", "star"]
SCENES = "synthetic:image_size=64,num_samples=8"


def new_detector(name: str) -> PreTrainedModel:
    """A tiny detector with random weights, as if it had been trained: no two numbers are alike."""
    torch.manual_seed(0)
    fields, *_ = DETECTORS[name]
    names = {label: f"thing {label}" for label in range(7)}
    labels = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    config = AutoConfig.for_model(name.split()[0], **labels, **copy.deepcopy(fields))
    model = MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of saved detectors, by name; each is made once. Copy one before changing it."""
    directory = tmp_path_factory.mktemp("detectors")

    def save(name: str) -> Path:
        path = directory / name.replace(" ", "-")
        if not path.exists():
            *_, side, processor_class = DETECTORS[name]
            new_detector(name).save_pretrained(path)
            processor_class(size={"height": side, "width": side}).save_pretrained(path)
            (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A detector\n", encoding="utf-8")
        return path

    return save


def images_for(name: str, batch: int = 2) -> torch.Tensor:
    side = DETECTORS[name][2]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def what_its_decoder_reads(detector: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
    """`(B, N, D)` of all levels, one after another."""
    seen = {}
    hook = detector.model.decoder.register_forward_pre_hook(lambda _, args, kw: seen.update(kw), with_kwargs=True)
    with torch.no_grad():
        detector(*inputs)
    hook.remove()
    return seen["encoder_hidden_states"]


def tokens_of(model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([features.flatten(2).transpose(1, 2) for features, _ in model.model.backbone(*inputs)], dim=1)


def test_every_family_is_tested():
    assert {name.split()[0] for name in DETECTORS} == DETECTOR_FAMILIES.keys()


@FAMILIES
def test_features_are_to_the_digit_what_the_detector_s_decoder_reads(name, saved):
    detector = AutoModelForObjectDetection.from_pretrained(saved(name)).eval()
    model = create_model(start_from=saved(name), num_labels=3, **NEW).eval()
    images = images_for(name)
    with torch.no_grad():
        maps = model.model.backbone(images)
    strides, side = DETECTORS[name][1:3]
    assert model.model.backbone.strides == strides
    assert [features.shape[1:] for features, _ in maps] == [
        (channels, side // stride, side // stride)
        for channels, stride in zip(model.model.backbone.channels, strides, strict=True)
    ]
    assert torch.equal(tokens_of(model, images), what_its_decoder_reads(detector, images))


@FAMILIES
def test_saved_models_are_what_they_were_and_hold_nothing_else_of_the_detector(name, saved, tmp_path):
    model = create_model(start_from=saved(name), num_labels=3, **NEW).eval()
    model.save_pretrained(tmp_path)
    again, report = DePerceiverV2ForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_equal_weights(model.state_dict(), again.state_dict())
    images = images_for(name)
    again.eval()
    assert torch.equal(tokens_of(model, images), tokens_of(again, images))
    with torch.no_grad():  # weights that lie elsewhere in memory may be multiplied in another order
        assert torch.allclose(model(images).logits, again(images).logits, atol=1e-5)
    assert frozen_in(model) == frozen_in(again)
    names = [part for key in model.state_dict() for part in key.split(".")[2:4] if key.startswith("model.backbone.")]
    assert not {"decoder", "enc_score_head", "class_embed", "query_feat"} & set(names)
    text = (tmp_path / "config.json").read_text()
    assert "thing" not in text
    assert str(saved(name).parent) not in text


@FAMILIES
def test_every_weight_that_is_not_frozen_learns(name, saved):
    model = create_model(start_from=saved(name), num_labels=5, **NEW).train()
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    labels = [{"class_labels": torch.tensor([4]), "boxes": boxes}] * 2
    model(images_for(name), labels=labels).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    allowed = ("mask_token",) if "detr" not in name.split("_")[0] else ("mask_token", "backbone.backbone.model.")
    if name in ("lw_detr", "rf_detr"):
        allowed = (*allowed, "backbone.backbone.encoder.layer.3.")  # behind the features
    assert all(any(part in n for part in allowed) for n in frozen_in(model))


def frozen_in(model: PreTrainedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
def test_padding_is_hidden_as_the_detector_hides_it(name, saved):
    detector = AutoModelForObjectDetection.from_pretrained(saved(name)).eval()
    model = create_model(start_from=saved(name), num_labels=3, **NEW).eval()
    images = torch.randn(2, 3, 107, 153)
    mask = torch.ones(2, 107, 153, dtype=torch.long)
    mask[0, 70:], mask[1, :, 90:] = 0, 0
    assert torch.equal(tokens_of(model, images, mask), what_its_decoder_reads(detector, images, mask))
    cells = [real for _, real in model.model.backbone(images, mask)]
    assert all(real.any(dim=(1, 2)).all() for real in cells)
    assert not all(real.all() for real in cells)
    assert model(images, mask).logits.shape == (2, 6, 3)


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr"])
def test_padding_and_odd_sizes_are_refused_where_the_encoder_cannot_take_them(name, saved):
    model = create_model(start_from=saved(name), num_labels=3, **NEW).eval()
    images = images_for(name)
    mask = torch.ones(images.shape[0], *images.shape[2:], dtype=torch.long)
    with torch.no_grad():
        assert torch.allclose(model(images, mask).logits, model(images).logits, atol=1e-5)
    mask[0, -20:] = 0
    with pytest.raises(ValueError, match="sees padding as if it were image"):
        model(images, mask)
    with pytest.raises(ValueError, match=r"takes sides that are multiples of (16|28|32) only"):
        model(images[..., :-3])


def test_an_rf_detr_takes_squares_only_unless_it_has_one_window(saved):
    model = create_model(start_from=saved("rf_detr"), num_labels=3, **NEW).eval()
    with pytest.raises(ValueError, match="56 x 84 pixels, but the backbone of this rf_detr takes square images only"):
        model(torch.zeros(1, 3, 56, 84))
    config = copy.deepcopy(model.config)
    config.backbone_config.backbone_config.num_windows = 1
    assert DePerceiverV2ForObjectDetection(config).eval()(torch.zeros(1, 3, 56, 84)).logits.shape == (1, 6, 3)


@FAMILIES
def test_images_are_prepared_as_the_detector_does(name, saved, tmp_path):
    source = AutoImageProcessor.from_pretrained(saved(name))
    ours = DePerceiverV2ImageProcessor(**detector_preprocessing(saved(name)))
    height, width = (56, 56) if name == "rf_detr" else (90, 70)  # not resized: see `detector_preprocessing`
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    theirs = source(photo, return_tensors="pt")["pixel_values"]
    found = ours(photo, return_tensors="pt")
    assert found["pixel_values"].shape == theirs.shape
    if source.do_normalize:  # one multiplication there, two here
        assert torch.allclose(found["pixel_values"], theirs, rtol=0, atol=1e-6)
    else:
        assert torch.equal(found["pixel_values"], theirs)
    assert found["pixel_mask"].all()
    ours.save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).size == source.size


def test_sizes_that_keep_the_ratio_are_carried_over_too(saved, tmp_path):
    directory = tmp_path / "detr"
    new_detector("detr").save_pretrained(directory)
    source = DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 80}, resample=3, image_mean=[0.1, 0.2, 0.3])
    source.save_pretrained(directory)
    ours = DePerceiverV2ImageProcessor(**detector_preprocessing(directory))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    pixels = [processor(photo, return_tensors="pt")["pixel_values"] for processor in (ours, source)]
    assert torch.allclose(*pixels, rtol=0, atol=1e-6)


def test_classes_are_those_given_or_plain_ones_never_the_detector_s(saved):
    source = saved("rt_detr")
    plain = create_model(start_from=source, num_labels=2, **NEW)
    assert plain.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    named = create_model(start_from=source, id2label={0: "cat"}, label2id={"cat": 0}, **NEW)
    assert named.config.id2label == {0: "cat"}
    assert named(images_for("rt_detr")).logits.shape[-1] == 1
    assert AutoConfig.from_pretrained(source).num_labels == 7


def test_a_configuration_can_be_made_first_and_random_weights_be_asked_for(saved):
    source = AutoConfig.from_pretrained(saved("d_fine"))
    config = DePerceiverV2Config.from_detector(source, num_labels=3, freeze_backbone=True, **NEW)
    assert config.start_from is None
    assert source.num_labels == 7  # it is not changed
    model = create_model(config, start_from=saved("d_fine"))
    weights = AutoModelForObjectDetection.from_pretrained(saved("d_fine")).state_dict()
    assert all(torch.equal(t, weights[f"model.{n}"]) for n, t in model.model.backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.model.backbone.parameters())
    model.train()
    assert not any(module.training for module in model.model.backbone.modules())
    random = create_model(config, None)
    assert random.state_dict().keys() == model.state_dict().keys()


def test_batch_norms_learn_or_not_as_the_detector_s_configuration_says(saved):
    for name, freezes in (("rt_detr", True), ("rt_detr", False)):
        source = AutoConfig.from_pretrained(saved(name))
        source.freeze_backbone_batch_norms = freezes
        model = DePerceiverV2ForObjectDetection(DePerceiverV2Config.from_detector(source, num_labels=3, **NEW)).train()
        features = model.model.backbone
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in features.backbone.modules()) is not freezes
        assert all(m.training for m in features.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["rt_detr", "d_fine", "lw_detr"])
def test_attention_of_the_latents_can_be_chosen(name, saved, tmp_path):
    model = create_model(start_from=saved(name), num_labels=3, **NEW).eval()
    model.save_pretrained(tmp_path)
    outputs = []
    for choice in ("eager", "sdpa"):
        model.set_attn_implementation(choice)
        assert model.config._attn_implementation == choice
        again = DePerceiverV2ForObjectDetection.from_pretrained(tmp_path, attn_implementation=choice).eval()
        with torch.no_grad():
            outputs += [each(images_for(name)).logits for each in (model, again)]
    assert all(torch.allclose(outputs[0], other, atol=1e-5) for other in outputs[1:])
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")


def test_hidden_states_and_attentions_are_those_of_the_latents_alone(saved):
    model = create_model(start_from=saved("rt_detr"), num_labels=3, attention_dropout=0.0, **NEW).eval()
    outputs = model(images_for("rt_detr"), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 6, 16)] * 2
    assert len(outputs.attentions) == len(outputs.cross_attentions) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_strides": [8, 16]}, r"gives feature maps of strides \[8, 16, 32\]"),
        ({"feature_strides": [8, 12, 32]}, "ascending multiples of the first"),
        ({"frozen_backbone_stages": 1}, "decides what is frozen in it"),
        ({"dilation": True}, "dilation"),
        ({"num_channels": 4}, "`num_channels` is 4"),
        ({"backbone": "resnet18"}, "needs the configuration of a detector"),
    ],
)
def test_configurations_that_contradict_the_detector_are_refused(fields, message, saved):
    source = AutoConfig.from_pretrained(saved("rt_detr"))
    with pytest.raises(ValueError, match=message):
        DePerceiverV2Config.from_detector(source, **fields)


def test_other_models_are_no_start(saved, cat_and_dog, tmp_path):
    with pytest.raises(UserError, match=r"the features of a deperceiver_v2 cannot be taken over; those of rt_detr, "):
        create_model(start_from=cat_and_dog, num_labels=2)
    with pytest.raises(FileNotFoundError, match="There is no directory"):
        create_model(start_from=tmp_path / "none", num_labels=2)
    with pytest.raises(UserError, match="give the `config` of a new model, or `start_from`"):
        create_model()
    with pytest.raises(UserError, match="brings a backbone and an encoder, but `config` has others"):
        create_model(tiny_v2_config(), start_from=saved("rt_detr"))
    config = DePerceiverV2Config.from_detector(AutoConfig.from_pretrained(saved("rt_detr")), **NEW)
    with pytest.raises(UserError, match="num_labels have no place"):
        create_model(config, start_from=saved("rt_detr"), num_labels=3)
    with pytest.raises(UserError, match="say by `start_from` where its weights are"):
        create_model(config)
    with pytest.raises(UserError, match=r"is not the rt_detr of the configuration: [1-9]"):
        create_model(config, start_from=saved("d_fine"))
    source = AutoConfig.from_pretrained(saved("rt_detr"))
    source.num_feature_levels = 4
    with pytest.raises(ValueError, match=r"`num_feature_levels` \(4\) are not as many as its"):
        DePerceiverV2Config.from_detector(source)


def test_the_licence_is_that_of_the_card(saved, tmp_path):
    assert license_of(str(saved("rt_detr"))) == "apache-2.0"
    assert license_of(str(tmp_path)) == "unknown"
    assert license_of("someone/that-is-not-cached") == "unknown"  # offline in tests
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: own-1\n---\n", encoding="utf-8")
    assert license_of(str(tmp_path)) == "own-1"
    card.write_text("---\n[\n---\n", encoding="utf-8")
    assert license_of(str(tmp_path)) == "unknown"


def test_the_card_of_a_model_says_where_its_weights_are_from(saved):
    model = create_model(start_from=saved("rf_detr"), num_labels=3, **NEW)
    assert model.config.start_from == {"name": "rf_detr", "license": "apache-2.0"}
    model.config.start_from = {"name": "someone/detector", "license": "cc-by-nc-4.0"}
    card = make_model_card(model.config, "mine")
    assert card.data.license == "cc-by-nc-4.0"  # of the weights, not of the code
    assert card.data.base_model == "someone/detector"
    text = " ".join(card.text.split())
    assert "started from the weights of `someone/detector`, whose licence is cc-by-nc-4.0." in text
    assert "644 x 644 pixels" in text  # whole windows of patches


def options_for(output_dir: Path, source: Path, **options) -> TrainingOptions:
    model = {"preset": "nano", "hidden_dim": 16, "nheads": 2, "dec_layers": 1, "num_queries": 6, "batch_size": 2}
    given = {"start_from": str(source), "dataset": SCENES, "shortest_edge": None, "max_steps": 3, **options}
    return tiny_options(output_dir, model, **given)


def test_a_run_trains_what_is_pretrained_at_its_own_rate_and_resumes(saved, tmp_path, monkeypatch, caplog):
    source = saved("d_fine")
    weights = AutoModelForObjectDetection.from_pretrained(source).state_dict()
    with caplog.at_level("INFO"):
        run = DetectionTrainer(options_for(tmp_path / "run", source, lr_backbone=1e-5))
    started = [r.getMessage() for r in caplog.records if "start from" in r.getMessage()]
    assert started == [f"Backbone and encoder start from {source}, a d_fine; its licence: apache-2.0."]
    pretrained = backbone_parameters(run.model)
    assert pretrained.keys() == {n for n, _ in run.model.named_parameters() if n.startswith("model.backbone.")}
    assert all(torch.equal(p, weights[n.replace("model.backbone.", "model.", 1)]) for n, p in pretrained.items())
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in pretrained.values() if p.requires_grad} == {1e-5}
    assert {rates[id(p)] for n, p in run.model.named_parameters() if n not in pretrained} == {1e-3}
    result = run.train()
    assert result.step == 3
    model, processor = load_detector(str(tmp_path / "run" / "last"))
    assert dict(processor.size)["height"] == 64
    assert processor.do_normalize is False
    assert model.config.start_from == {"name": "d_fine", "license": "apache-2.0"}
    assert "disc" in model.config.id2label.values()
    card = ModelCard.load(tmp_path / "run" / "last" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "Backbone and encoder started from `d_fine`, the rest from random numbers." in card.text
    final = weights_of(run)

    with monkeypatch.context() as patch:
        stop_at(patch, 2, kill)
        killed = DetectionTrainer(options_for(tmp_path / "again", source, lr_backbone=1e-5, checkpointing_steps=1))
        with pytest.raises(RuntimeError, match="killed"):
            killed.train()
    resumed = DetectionTrainer(
        options_for(tmp_path / "again", source, lr_backbone=1e-5, checkpointing_steps=1, resume="auto")
    )
    resumed.train()
    assert_equal_weights(final, weights_of(resumed))


def test_frozen_features_are_not_trained(saved, tmp_path):
    run = DetectionTrainer(options_for(tmp_path, saved("rf_detr"), lr_backbone=0.0))
    before = {name: tensor for name, tensor in weights_of(run).items() if name.startswith("model.backbone.")}
    run.train()
    after = weights_of(run)
    assert_equal_weights(before, {name: after[name] for name in before})


def test_frozen_features_can_be_kept_and_sizes_be_fixed(saved, tmp_path):
    fixed = {"fixed_size": [96, 64], "augmentation": "none", "lr_backbone": 0.0, "cache_features": True}
    run = DetectionTrainer(options_for(tmp_path, saved("rt_detr"), **fixed))
    run.train()
    _, processor = load_detector(str(tmp_path / "last"))
    assert (processor.size.height, processor.size.width) == (96, 64)


def test_the_image_processor_is_the_detector_s_but_for_a_size_that_is_given(saved, tmp_path):
    own = build_image_processor(options_for(tmp_path, saved("rf_detr")))
    assert {side: value for side, value in dict(own.size).items() if value} == {"height": 56, "width": 56}
    other = build_image_processor(options_for(tmp_path, saved("detr"), shortest_edge=48))
    assert other.size.shortest_edge == 48
    assert other.size.height is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet18"}, "--backbone: --start_from .* brings its own backbone"),
        ({"pretrained_backbone": "resnet18"}, "--pretrained_backbone: --start_from"),
        ({"no_pretrained_backbone": True}, "--no_pretrained_backbone: --start_from"),
        ({"downsample_factor": 16}, "--downsample_factor: --start_from"),
        ({"multiscale": True}, "--multiscale: --start_from"),
        ({"dilation": True}, "--dilation: --start_from"),
        ({"model": "somewhere"}, "--start_from: describes a new model, but --model somewhere"),
        ({"architecture": "detr"}, "--start_from: is an option of --architecture deperceiver_v2 only"),
    ],
)
def test_options_that_contradict_the_start_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        TrainingOptions(output_dir=str(tmp_path), start_from="detector", **options)


def test_a_run_refuses_other_models_in_one_sentence(cat_and_dog, tmp_path):
    with pytest.raises(UserError, match=r"is no start for a new model: the features of a deperceiver_v2"):
        build_model(options_for(tmp_path, cat_and_dog), NAMES)


def test_recipes_and_comparisons_can_start_from_a_detector(saved, tmp_path):
    options = recipe_options("own-data-from-coco", output_dir="x")
    assert options.start_from == "PekingU/rtdetr_v2_r18vd"
    assert recipe_options("own-data-from-coco", backbone="resnet18").start_from is None
    assert recipe_options("own-data-cpu", start_from="somewhere").no_pretrained_backbone is False
    changes = {
        "dataset": SCENES,
        "num_workers": 0,
        "max_steps": 1,
        "batch_size": 2,
        "eval_every": 0,
        "max_minutes": None,
    }
    changes |= {"start_from": str(saved("rt_detr_v2")), "output_dir": str(tmp_path), "mixed_precision": "no"}
    assert DetectionTrainer(recipe_options("own-data-from-coco", **changes)).train().step == 1
    spec = ModelSpec.parse(f"ours=deperceiver_v2,start_from={saved('rt_detr')},preset=nano")
    assert spec.options == {"architecture": "deperceiver_v2", "start_from": str(saved("rt_detr")), "preset": "nano"}


def test_a_copy_detects_without_the_package(saved, tmp_path):
    directory = tmp_path / "model"
    create_model(start_from=saved("rt_detr_v2"), id2label={0: "cat"}, label2id={"cat": 0}, **NEW).save_pretrained(
        directory
    )
    DePerceiverV2ImageProcessor(**detector_preprocessing(saved("rt_detr_v2"))).save_pretrained(directory)
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(photo)
    expected = pipeline("object-detection", model=str(directory))(str(photo), threshold=0)
    code = f"""
import sys
sys.modules["deperceiver_hf"] = None
import json
from transformers import pipeline
detector = pipeline("object-detection", model={str(directory)!r}, trust_remote_code=True)
print(type(detector.model).__module__.split(".")[0])
print(json.dumps(detector({str(photo)!r}, threshold=0)))
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    *_, module, found = process.stdout.splitlines()
    assert module == "transformers_modules"
    assert {detection["label"] for detection in expected} == {"cat"}
    assert json.loads(found) == expected
