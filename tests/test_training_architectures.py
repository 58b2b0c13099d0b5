# SPDX-License-Identifier: Apache-2.0
"""Every architecture that can be trained: it learns, is saved as transformers' own, and is read back as it was."""

import pytest
import timm
import torch
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

import deperceiver_hf
from deperceiver_hf.data import load_detection_data
from deperceiver_hf.evaluation.evaluator import evaluate_detector
from deperceiver_hf.saved_models import load_detector
from deperceiver_hf.training import (
    ARCHITECTURES,
    DetectionTrainer,
    TrainingOptions,
    build_image_processor,
    build_model,
)
from deperceiver_hf.training.architectures import deformable_detr
from deperceiver_hf.training.building import backbone_parameters, pretrained_backbone_name
from training_runs import TINY_ARCHITECTURES, read_log, tiny_options

NAMES = ["disc", "square", "star"]
SCENES = "synthetic:image_size=64"
HYBRID = ("rt_detr_v2", "d_fine", "deimv2")
DISTRIBUTIONS = ("d_fine", "deimv2")
GROUPS = ("lw_detr", "rf_detr")
TRANSFORMERS_OWN = ("detr", "deformable_detr", *HYBRID, *GROUPS)
SIGMOID = ("deperceiver_v2", *TRANSFORMERS_OWN[1:])


def make(architecture, tmp_path, **options):
    """A tiny new model of the architecture for three classes."""
    torch.manual_seed(0)
    return build_model(tiny_options(tmp_path, {**TINY_ARCHITECTURES[architecture], **options}), NAMES)


def save(model, options, directory):
    model.save_pretrained(directory)
    build_image_processor(options).save_pretrained(directory)
    return str(directory)


def targets():
    return [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.2, 0.3, 0.1, 0.1]])},
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]


def test_every_architecture_is_known_by_its_model_type():
    assert tuple(ARCHITECTURES) == tuple(TINY_ARCHITECTURES)
    assert all(kind.model_class.config_class.model_type == name for name, kind in ARCHITECTURES.items())
    named = {name for facts in TrainingOptions.facts().values() for name in facts.of or ()}
    assert named <= {*ARCHITECTURES}
    with pytest.raises(ValueError, match="--architecture detr2: choose from deperceiver, "):
        TrainingOptions(architecture="detr2")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_and_reading_back(tmp_path, architecture, precision):
    run = DetectionTrainer(
        tiny_options(
            tmp_path,
            TINY_ARCHITECTURES[architecture],
            dataset=SCENES,
            augmentation="flip",
            longest_edge=64,
            mixed_precision=precision,
            max_steps=2,
            lr_backbone=1e-3,
        )
    )
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train()
    for line in read_log(tmp_path, "train"):
        assert all(torch.tensor(value).isfinite() for value in line.values() if isinstance(value, float))
        assert {"loss", "loss_bbox", "loss_giou"} <= line.keys()
    after = run.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    convolutions = {name for name in changed if "backbone" in name and after[name].ndim == 4}
    assert convolutions >= {name for name in before if "backbone" in name and before[name].ndim == 4}
    if architecture not in GROUPS:
        assert any("running_mean" in name for name in changed)  # from scratch batch normalisation learns
    assert changed - {name for name in changed if "backbone" in name}

    model, processor = load_detector(str(tmp_path / "last"))
    if architecture in TRANSFORMERS_OWN:
        assert type(model).__module__.startswith("transformers.")
        assert type(model).__name__ == type(run.model).__name__
    expected = "DePerceiverV2ImageProcessor" if architecture in SIGMOID else "DePerceiverImageProcessor"
    assert type(processor).__name__ == expected
    data = load_detection_data(SCENES, "val", max_samples=2)
    trained = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    results = [
        evaluate_detector(detector, images, data, mixed_precision="no", progress=False)
        for detector, images in ((trained, run.data.image_processor), (model, processor))
    ]
    assert results[0].predictions
    assert [prediction["category_id"] for prediction in results[0].predictions] == [
        prediction["category_id"] for prediction in results[1].predictions
    ]
    scores = [torch.tensor([prediction["score"] for prediction in result.predictions]) for result in results]
    boxes = [torch.tensor([prediction["bbox"] for prediction in result.predictions]) for result in results]
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(boxes[1], boxes[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resumed_is_as_never_stopped(tmp_path, architecture):
    tiny = {**TINY_ARCHITECTURES[architecture], "config": ["dropout=0.1"], "dataset": SCENES, "longest_edge": 64}
    weights = []
    for name, steps, resume in (("whole", 4, None), ("parts", 2, None), ("parts", 4, "auto")):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = tiny_options(tmp_path / name, tiny, augmentation="flip", max_steps=steps, resume=resume)
        run = DetectionTrainer(options)
        run.train()
        weights.append(run.model.state_dict())
    whole, _, resumed = weights
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backbone_weights_come_from_a_file_and_early_stages_keep_them(tmp_path, architecture):
    weights = timm.create_model("test_resnet", features_only=True).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    model = make(
        architecture,
        tmp_path,
        no_pretrained_backbone=False,
        pretrained_backbone=str(tmp_path / "weights.safetensors"),
    )
    loaded = {name.split(".", 3)[-1].removeprefix("_backbone."): p for name, p in backbone_parameters(model).items()}
    assert loaded
    assert all(torch.equal(weights[name], parameter) for name, parameter in loaded.items())
    assert {name for name, p in loaded.items() if p.requires_grad} == {
        name for name in loaded if name.startswith(("layer2", "layer3", "layer4"))
    }
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.model.backbone.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fine_tuning_with_other_classes(tmp_path, architecture):
    tiny = TINY_ARCHITECTURES[architecture]
    saved = make(architecture, tmp_path)
    source = save(saved, tiny_options(tmp_path, tiny), tmp_path / "saved")
    options = tiny_options(tmp_path, {"model": source}, num_queries=20, bbox_loss_coef=4.0)
    model = build_model(options, ["one", "two"])
    assert type(model) is type(saved)
    assert (model.config.num_labels, model.config.num_queries) == (2, 20)
    build_model(tiny_options(tmp_path, {"model": source, "architecture": architecture}), NAMES)
    other = "detr" if architecture != "detr" else "d_fine"
    with pytest.raises(ValueError, match=f"is a {architecture}, not a {other}"):
        build_model(tiny_options(tmp_path, {"model": source, "architecture": other}), NAMES)
    before, after = saved.state_dict(), model.state_dict()
    fresh = {name for name in before.keys() & after.keys() if before[name].shape != after[name].shape}
    assert fresh
    assert all("class" in name or "score" in name or "quer" in name or "label" in name for name in fresh)
    same = before.keys() & after.keys() - fresh
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert not before.keys() ^ after.keys() or architecture in TRANSFORMERS_OWN
    model.train()
    targets_of_two = [{**target, "class_labels": target["class_labels"].clamp(max=1)} for target in targets()]
    outputs = model(pixel_values=torch.randn(2, 3, 64, 64), pixel_mask=torch.ones(2, 64, 64), labels=targets_of_two)
    assert outputs.loss.isfinite()
    if architecture not in ("deperceiver", "detr"):
        with pytest.raises(ValueError, match="--eos_coef"):
            build_model(tiny_options(tmp_path, {"model": source}, eos_coef=0.2), NAMES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_is_finite_without_objects(tmp_path, architecture):
    model = make(architecture, tmp_path).train()
    empty = [targets()[1]] * 2
    outputs = model(pixel_values=torch.randn(2, 3, 64, 64), pixel_mask=torch.ones(2, 64, 64), labels=empty)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(term.ndim == 0 for term in outputs.loss_dict.values())


@pytest.mark.parametrize("architecture", TRANSFORMERS_OWN[1:])
def test_loss_is_that_of_transformers(tmp_path, architecture):
    model = make(architecture, tmp_path).train()
    own = getattr(transformers, type(model).__name__)(model.config)
    own.model.backbone.model = model.model.backbone.model
    own.load_state_dict(model.state_dict())
    own.train()
    outputs = []
    for detector in (model, own):
        torch.manual_seed(0)  # of denoising and dropout
        pixels = torch.randn(2, 3, 64, 64)
        outputs.append(detector(pixel_values=pixels, pixel_mask=torch.ones(2, 64, 64), labels=targets()))
    expected = outputs[1].loss
    if architecture == "deformable_detr":  # with the paper's weight of the classification, 2 instead of 1
        assert model.config.class_cost == 2
        expected = expected + sum(term for name, term in outputs[1].loss_dict.items() if name.startswith("loss_ce"))
    torch.testing.assert_close(outputs[0].loss, expected)


@pytest.mark.parametrize("architecture", HYBRID)
def test_layers_without_a_special_start_begin_as_those_of_torch(tmp_path, architecture):
    model = make(architecture, tmp_path)
    hidden = model.model.decoder.layers[0].fc1 if hasattr(model.model.decoder.layers[0], "fc1") else None
    layers = [hidden] if hidden is not None else []
    layers += [m for n, m in model.model.decoder.named_modules() if n == "query_pos_head.layers.1"]
    assert layers
    for layer in layers:  # uniform in +-1/sqrt(inputs)
        assert layer.weight.abs().max() > 0.8 * layer.in_features**-0.5
    for head in model.model.decoder.bbox_embed:
        assert not head.layers[-1].weight.any()
    for head in [*model.model.decoder.class_embed, model.model.enc_score_head]:
        assert (head.bias < -1).all()


@pytest.mark.parametrize("architecture", HYBRID)
def test_predictions_that_are_not_finite_are_named(tmp_path, architecture):
    model = make(architecture, tmp_path).train()
    with torch.no_grad():
        model.model.enc_score_head.bias.fill_(torch.nan)
        model.model.decoder.class_embed[0].bias.fill_(torch.nan)
        model.model.decoder.class_embed[-1].bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are not"):
        model(pixel_values=torch.randn(2, 3, 64, 64), pixel_mask=torch.ones(2, 64, 64), labels=targets())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_boxes_are_float32_under_autocast(tmp_path, architecture):
    model = make(architecture, tmp_path).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model(pixel_values=torch.randn(1, 3, 64, 64), pixel_mask=torch.ones(1, 64, 64))
    assert outputs.pred_boxes.dtype == torch.float32
    assert not torch.equal(outputs.pred_boxes, outputs.pred_boxes.bfloat16().float())


@pytest.mark.parametrize("architecture", HYBRID)
@pytest.mark.parametrize(
    ("size", "padded", "queries", "message"),
    [
        ((64, 64), True, 12, "knows no padding"),
        ((64, 80), False, 12, "64 x 80 pixels.*multiples of 32"),
        ((32, 32), False, 40, "21 cells to pick 40 queries"),
    ],
)
def test_images_that_a_hybrid_encoder_cannot_take_are_refused(tmp_path, architecture, size, padded, queries, message):
    model = make(architecture, tmp_path, num_queries=queries)
    mask = torch.ones(2, *size)
    mask[1, -1] = not padded
    with pytest.raises(ValueError, match=message):
        model(pixel_values=torch.randn(2, 3, *size), pixel_mask=mask, labels=targets())


def test_deformable_detr_does_not_depend_on_padding(tmp_path):
    """Boxes are relative to the un-padded image: an image in a larger batch has the same target and almost the same
    loss (its backbone sees the padding)."""
    model = make("deformable_detr", tmp_path).eval()
    image = torch.randn(1, 3, 64, 64)
    padded = torch.nn.functional.pad(image, (0, 64, 0, 64))
    mask = torch.nn.functional.pad(torch.ones(1, 64, 64), (0, 64, 0, 64))
    alone = model(pixel_values=image, pixel_mask=torch.ones(1, 64, 64), labels=targets()[:1])
    beside = model(pixel_values=padded, pixel_mask=mask, labels=targets()[:1])
    torch.testing.assert_close(beside.loss, alone.loss, rtol=0.02, atol=0)


def test_objects_of_all_processes_normalise_the_loss_of_deformable_detr(monkeypatch):
    """Of 2 processes with 6 and 10 objects transformers divides by (6 + 10) / 2 / 2 instead of (6 + 10) / 2."""
    distributed = deformable_detr.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.add_(10))
    assert deformable_detr._correction(6, torch.device("cpu")) == 4 / 8


@pytest.mark.parametrize("architecture", HYBRID)
def test_norms_outside_of_the_backbone_start_as_the_identity(tmp_path, architecture):
    norms = {
        name: module
        for name, module in make(architecture, tmp_path).named_modules()
        if isinstance(module, torch.nn.BatchNorm2d) and "backbone" not in name
    }
    assert norms
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms.values())


COMMON = {"hidden_dim": 32, "nheads": 4, "dec_layers": 3, "num_queries": 9, "dropout": 0.3, "set_cost_bbox": 3}
HYBRID_FIELDS = {
    **{"d_model": 32, "encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3, "decoder_layers": 3},
    **{"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_in_channels": [48, 192, 96], "num_queries": 9, "dropout": 0.3, "matcher_bbox_cost": 3.0},
    **{"num_denoising": 100, "auxiliary_loss": True, "freeze_backbone_batch_norms": False, "num_labels": 3},
}
FIELDS = {
    "deperceiver_v2": {
        **{"d_model": 32, "num_attention_heads": 4, "decoder_layers": 3, "num_queries": 9, "dropout": 0.3},
        **{"bbox_cost": 3, "feature_strides": [8, 16, 32], "freeze_batch_norm": False, "frozen_backbone_stages": -1},
    },
    "deformable_detr": {
        **{"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 3},
        **{"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 9, "dropout": 0.3, "bbox_cost": 3},
        **{"num_feature_levels": 4, "with_box_refine": True, "two_stage": False, "auxiliary_loss": True},
    },
    "rt_detr_v2": HYBRID_FIELDS,
    "d_fine": HYBRID_FIELDS,
}


@pytest.mark.parametrize("architecture", FIELDS)
def test_options_reach_the_configuration(tmp_path, architecture):
    options = tiny_options(tmp_path, TINY_ARCHITECTURES[architecture], **COMMON)
    config = ARCHITECTURES[architecture].make_config(options, NAMES)
    assert {name: getattr(config, name) for name in FIELDS[architecture]} == FIELDS[architecture]
    assert config.backbone_config.out_indices == [2, 3, 4]


@pytest.mark.parametrize("architecture", FIELDS)
def test_what_is_not_given_is_the_default(tmp_path, architecture):
    options = tiny_options(tmp_path, {"architecture": architecture, "no_pretrained_backbone": True})
    config = ARCHITECTURES[architecture].make_config(options, NAMES)
    defaults = ARCHITECTURES[architecture].model_class.config_class()
    ours = {"with_box_refine", "auxiliary_loss", "freeze_batch_norm", "frozen_backbone_stages", "_commit_hash"}
    ours |= {"freeze_backbone_batch_norms", "id2label", "label2id", "backbone_config", "dtype"}
    ours |= {"class_cost"} if architecture == "deformable_detr" else set()  # the paper's
    given, default = (dict(vars(each)) for each in (config, defaults))
    different = {name for name in default if name not in ours and str(given[name]) != str(default[name])}
    assert {name for name in different if not isinstance(default[name], tuple)} == set()


def test_preset_decides_what_is_not_given(tmp_path):
    nano = {"architecture": "deperceiver_v2", "preset": "nano"}
    config = ARCHITECTURES["deperceiver_v2"].make_config(tiny_options(tmp_path, nano), NAMES)
    expected = deperceiver_hf.models.configuration_deperceiver_v2.DePerceiverV2Config.from_preset("nano")
    assert (config.d_model, config.num_queries) == (expected.d_model, expected.num_queries)
    assert pretrained_backbone_name(tiny_options(tmp_path, nano), config) == expected.backbone_config.backbone
    options = tiny_options(tmp_path, nano, downsample_factor=16, hidden_dim=48)
    config = ARCHITECTURES["deperceiver_v2"].make_config(options, NAMES)
    assert (config.feature_strides, config.d_model) == ([16], 48)
    with pytest.raises(ValueError, match="giant"):
        build_model(tiny_options(tmp_path, {**nano, "preset": "giant"}), NAMES)


def test_config_wins_over_other_options(tmp_path):
    settings = ["num_queries=5", "dropout=0", "classification_loss=focal", "init_std=1", "feature_strides=[16, 32]"]
    model = make("deperceiver_v2", tmp_path, config=settings)
    config = model.config
    assert (config.num_queries, config.dropout, config.classification_loss) == (5, 0, "focal")
    assert (config.init_std, config.feature_strides) == (1.0, [16, 32])
    assert make("d_fine", tmp_path, config=["num_denoising=7", "weight_loss_fgl=1"]).config.num_denoising == 7
    assert make("deperceiver", tmp_path, config=["num_latents=3"]).config.num_latents == 3


@pytest.mark.parametrize(
    ("architecture", "setting", "message"),
    [
        ("deperceiver_v2", "num_querys=5", "no field 'num_querys'; did you mean num_queries"),
        ("d_fine", "quux=5", "DFineConfig has no field 'quux'; it has .*reg_scale"),
        ("rt_detr_v2", "num_denoising=many", "num_denoising"),
        ("deperceiver", "num_latents=0", "num_latents"),
        ("detr", "id2label={}", "the labels are those of the data"),
        ("deperceiver_v2", "num_queries", "FIELD=VALUE"),
    ],
)
def test_config_that_makes_no_sense_is_refused(tmp_path, architecture, setting, message):
    with pytest.raises(ValueError, match=message):
        make(architecture, tmp_path, config=[setting])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"architecture": "rt_detr_v2", "downsample_factor": 16},
            "--downsample_factor: .*deperceiver, deperceiver_v2 or detr only",
        ),
        ({"architecture": "d_fine", "no_aux_loss": True}, "--no_aux_loss"),
        ({"architecture": "deformable_detr", "eos_coef": 0.2}, "--eos_coef"),
        ({"architecture": "d_fine", "gradient_checkpointing": True}, "--gradient_checkpointing"),
        ({"architecture": "detr", "multiscale": True}, "--multiscale"),
        ({"architecture": "deperceiver_v2", "enc_layers": 2}, "--enc_layers"),
        ({"architecture": "deperceiver", "preset": "nano"}, "--preset: .*deperceiver_v2 only"),
        ({"model": "there", "config": ["dropout=0"]}, "--config: describes a new model"),
    ],
)
def test_options_of_another_architecture_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_options(tmp_path, options)


def test_width_that_deformable_detr_cannot_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--hidden_dim 48.*multiple of 32"):
        make("deformable_detr", tmp_path, hidden_dim=48)


def test_harmless_options_may_change_when_a_run_is_resumed():
    facts = TrainingOptions.facts().values()
    assert all(each.resume_may_change for each in facts if each.harmless)
    assert not any(each.resume_may_change for each in facts if each.new_model_only)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untrained_models_are_made_from_plain_options(architecture):
    kind = ARCHITECTURES[architecture]
    config = kind.plain_config(7, backbone="test_resnet", num_queries=12)
    assert (config.num_labels, config.num_queries, config.id2label[6]) == (7, 12, "LABEL_6")
    before = config.to_dict()
    with torch.device("meta"):
        model = kind.random_model(config, "eager")
    assert config.to_dict() == before
    assert (type(model), model.training, model.config._attn_implementation) == (kind.model_class, False, "eager")
    outputs = kind.random_model(config)(pixel_values=torch.randn(1, 3, 64, 64))
    assert outputs.pred_boxes.shape == (1, 12, 4)
    with pytest.raises(ValueError, match="is an option of"):
        kind.plain_config(7, **({"enc_layers": 2} if architecture == "deperceiver_v2" else {"preset": "nano"}))
