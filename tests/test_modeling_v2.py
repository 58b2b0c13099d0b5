# SPDX-License-Identifier: Apache-2.0
"""The second architecture keeps the same promises: shapes, attention, masks, precision, saving, compiling."""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection

from conftest import tiny_v2_config, tiny_v2_model
from deperceiver_hf import DePerceiverV2Config, DePerceiverV2ForObjectDetection, DePerceiverV2Model, create_model
from deperceiver_hf.models.backbone_deperceiver import DePerceiverFrozenBatchNorm2d
from deperceiver_hf.models.configuration_deperceiver_v2 import FIRST_EDITION, PRESETS
from deperceiver_hf.models.layers_deperceiver_v2 import FIRST_RADIUS
from test_modeling import equal_state, padding_below_and_right

VARIANTS = {
    "default": {},
    "first_edition": FIRST_EDITION,
    "stride4": {"feature_strides": [4, 8, 16]},
    "single": {"feature_strides": 16},
    "dilation": {"feature_strides": [8, 32], "dilation": True, "backbone": "resnet18"},
    "learned": {"query_selection": False},
    "no_position_bias": {"position_bias": False},
    "no_offsets": {"read_offsets": False, "edge_votes": False},
    "positions": {"edge_votes": False},
    "shared": {"share_key_values": True},
    "one_block": {"decoder_layers": 1},
    "no_denoising": {"num_denoising_queries": 0},
    "focal": {"classification_loss": "focal"},
    "mal": {"classification_loss": "mal"},
}
ARCHITECTURES = [name for name in VARIANTS if name not in ("focal", "mal")]


def trained_losses(model, images, labels, **inputs):
    """Loss in training mode with the same noise at every call."""
    torch.manual_seed(3)
    return model.train()(images, labels=labels, **inputs)


# --- shapes and outputs


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_output_shapes(variant, images, labels):
    model = tiny_v2_model(**VARIANTS[variant])
    config = model.config
    layers = config.decoder_layers
    with torch.no_grad():
        outputs = model(images, labels=labels, output_attentions=True, output_hidden_states=True)
    assert outputs.loss.shape == ()
    assert outputs.logits.shape == (2, 9, 5)
    assert outputs.pred_boxes.shape == outputs.selection_boxes.shape == (2, 9, 4)
    assert ((outputs.pred_boxes >= 0) & (outputs.pred_boxes <= 1)).all()
    assert outputs.last_hidden_state.shape == (2, 9, 24)
    assert outputs.intermediate_hidden_states.shape == (2, layers, 9, 24)
    assert outputs.intermediate_boxes.shape == (2, layers, 9, 4)
    assert torch.equal(outputs.intermediate_hidden_states[:, -1], outputs.last_hidden_state)
    assert torch.equal(outputs.intermediate_boxes[:, -1], outputs.pred_boxes)
    # What does not begin with the images cannot be taken apart by `pipeline`.
    assert all(len(value) == 2 for value in outputs.values() if isinstance(value, torch.Tensor) and value.ndim)
    assert outputs.query_mask is None
    if config.query_selection:
        assert outputs.selection_logits.shape == (2, 9, 5)
    else:
        assert outputs.selection_logits is None
    auxiliary = [(one["logits"].shape, one["pred_boxes"].shape) for one in outputs.auxiliary_outputs]
    assert auxiliary == [((2, 9, 5), (2, 9, 4))] * (layers - 1)
    strides = [16 if config.dilation and stride == 32 else stride for stride in config.feature_strides]
    tokens = sum((64 // stride) * (96 // stride) for stride in strides)
    assert [states.shape for states in outputs.hidden_states] == [(2, 9, 24)] * (layers + 1)
    assert [weights.shape for weights in outputs.attentions] == [(2, 2, 9, 9)] * layers
    assert [weights.shape for weights in outputs.cross_attentions] == [(2, 2, 9, tokens)] * layers
    for weights in (*outputs.attentions, *outputs.cross_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_latents_in_training_are_denoising_queries_too(images, labels):
    outputs = trained_losses(tiny_v2_model(), images, labels, output_hidden_states=True, output_attentions=True)
    assert outputs.logits.shape == (2, 9, 5)
    assert outputs.intermediate_boxes.shape == (2, 2, 9, 4)
    # Room for 12 gives two groups of a positive and a negative copy of three objects.
    assert [states.shape for states in outputs.hidden_states] == [(2, 12 + 9, 24)] * 3
    assert not any(name.startswith("denoising_") for name in outputs)


def test_base_model_is_the_trunk_of_the_detector(images):
    detector = tiny_v2_model()
    trunk = DePerceiverV2Model(detector.config).eval()
    trunk.load_state_dict(detector.model.state_dict())
    with torch.no_grad():
        expected, outputs = detector(images), trunk(images)
        as_tuple = detector(images, return_dict=False)
        trunk_as_tuple = trunk(images, return_dict=False)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert isinstance(as_tuple, tuple)
    assert isinstance(trunk_as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected.logits)
    assert torch.equal(as_tuple[1], expected.pred_boxes)
    assert torch.equal(trunk_as_tuple[0], expected.last_hidden_state)


def test_loss_comes_first_in_the_tuple(images, labels):
    model = tiny_v2_model()
    with torch.no_grad():
        assert torch.equal(model(images, labels=labels, return_dict=False)[0], model(images, labels=labels).loss)


def test_a_new_model_moves_no_box_and_believes_in_no_class(images):
    """Initial weights of parts that consist of several layers."""
    torch.manual_seed(0)
    model = DePerceiverV2ForObjectDetection(tiny_v2_config(num_queries=20)).eval()
    with torch.no_grad():
        outputs = model(images)
    for boxes in (outputs.intermediate_boxes[:, 0], outputs.pred_boxes):
        torch.testing.assert_close(boxes, outputs.selection_boxes, rtol=0, atol=1e-3)
    # The boxes are the cells of the chosen tokens, of different strides.
    sides = outputs.selection_boxes[..., 2:] * torch.tensor([96, 64])
    assert all(min(abs(side - 16), abs(side - 32)) < 0.1 for side in sides.flatten().tolist())
    for logits in (outputs.logits, outputs.selection_logits):
        assert logits.sigmoid().median() < 0.05
    for layer in model.model.layers:
        predictor = layer.cross_attention.position_bias.predictor
        assert not predictor.weight.any()
        offsets = predictor.bias.detach().view(2, -1)[:, :2]
        assert offsets.norm(dim=-1).tolist() == pytest.approx([FIRST_RADIUS] * 2)
    # Different images give different predictions, different queries different boxes.
    assert (outputs.logits[0] - outputs.logits[1]).abs().max() > 1e-4
    assert torch.pdist(outputs.pred_boxes[0]).min() > 1e-5


def test_new_learned_boxes_are_spread_over_the_image():
    torch.manual_seed(0)
    model = DePerceiverV2ForObjectDetection(tiny_v2_config(query_selection=False, num_queries=200))
    boxes = model.model.queries.boxes.weight.sigmoid()
    assert boxes.min() < 0.2
    assert boxes.max() > 0.8
    assert model.model.queries.content.weight.std().item() == pytest.approx(1, abs=0.1)


# --- attention backends and masks


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_sdpa_equals_eager(variant, training, images, labels):
    model = tiny_v2_model(**VARIANTS[variant])
    padded, mask = padding_below_and_right(images, 96, 128)
    results = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            torch.manual_seed(3)
            results[implementation] = model.train(training)(padded, mask, labels=labels)
    for name in ("loss", "logits", "pred_boxes"):
        torch.testing.assert_close(results["eager"][name], results["sdpa"][name], rtol=1e-5, atol=2e-5)


def test_only_tested_attention_backends_are_advertised():
    assert tiny_v2_model()._supports_sdpa
    for implementation in ("flash_attention_2", "flex_attention"):
        with pytest.raises((ValueError, ImportError)):
            DePerceiverV2ForObjectDetection._from_config(tiny_v2_config(), attn_implementation=implementation)


def test_attention_weights_come_from_sdpa_models_too(images):
    model = tiny_v2_model()
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        plain, with_weights = model(images), model(images, output_attentions=True)
    assert plain.cross_attentions is None
    assert all(weights is not None for weights in (*with_weights.attentions, *with_weights.cross_attentions))
    torch.testing.assert_close(plain.logits, with_weights.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_mask_of_ones_changes_nothing(images, dtype):
    model = tiny_v2_model()
    with torch.no_grad():
        expected = model(images)
        outputs = model(images, torch.ones(2, 64, 96, dtype=dtype))
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)
    assert outputs.query_mask.all()


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("position_bias", [True, False])
def test_only_what_the_mask_calls_real_is_read(images, position_bias, mask_padding):
    """Polarity of the mask: 1 is a real pixel, 0 is padding."""
    model = tiny_v2_model(feature_strides=16, position_bias=position_bias, mask_padding=mask_padding)
    padded, mask = padding_below_and_right(images, 128, 192)
    with torch.no_grad():
        outputs = model(padded, mask, output_attentions=True)
    for weights in outputs.cross_attentions:
        weights = weights.unflatten(-1, (8, 12))
        assert (weights[..., 4:, :] == 0).all()
        assert (weights[..., 6:] == 0).all()
        if not position_bias:  # everything is read from everywhere
            assert (weights[..., :4, :6] > 0).all()
    assert outputs.query_mask.all()


def test_what_stands_in_the_padding_plays_no_part(images):
    model = tiny_v2_model()
    padded, mask = padding_below_and_right(images, 96, 128)
    other = torch.where(mask[:, None] == 1, padded, 7.0)
    with torch.no_grad():
        torch.testing.assert_close(model(other, mask).logits, model(padded, mask).logits)


def compare_alone_and_beside(model, image, target, size=(107, 130)):
    """The same image alone, padded in a batch of its own, and beside a larger one."""
    padded, mask = padding_below_and_right(image, *size)
    larger = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    nothing = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    with torch.no_grad():
        alone = model(image, labels=[target])
        in_padding = model(padded, mask, labels=[target])
        pair, pair_mask = torch.cat((padded, larger)), torch.cat((mask, torch.ones_like(mask)))
        beside = model(pair, pair_mask, labels=[target, nothing])
    return alone, in_padding, beside


@pytest.mark.parametrize("size", [(64, 96), (50, 71), (33, 40)])
@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18"])
@pytest.mark.parametrize(
    "variant",
    [
        "default",
        "stride4",
        "single",
        "learned",
        "no_position_bias",
        "no_offsets",
        "shared",
    ],
)
def test_prediction_and_loss_do_not_depend_on_the_neighbour(variant, backbone, size, images, labels):
    model = tiny_v2_model(**{"backbone": backbone, "num_queries": 5, **VARIANTS[variant]})
    alone, in_padding, beside = compare_alone_and_beside(model, images[:1, :, : size[0], : size[1]], labels[0])
    for outputs in (in_padding, beside):
        for name in ("selection_boxes", "logits", "pred_boxes"):
            torch.testing.assert_close(outputs[name][:1], alone[name], rtol=0, atol=5e-5)
    torch.testing.assert_close(in_padding.loss, alone.loss, rtol=1e-5, atol=1e-4)
    for name, value in alone.loss_dict.items():
        torch.testing.assert_close(in_padding.loss_dict[name], value, rtol=1e-4, atol=1e-4)


def test_the_original_treatment_of_padding_depends_on_it(images, labels):
    """Shows that the test above can fail."""
    model = tiny_v2_model(backbone="resnet18", mask_padding=False)
    alone, in_padding, _ = compare_alone_and_beside(model, images[:1], labels[0])
    assert (alone.logits - in_padding.logits).abs().max() > 1e-3


@pytest.mark.parametrize("classification_loss", ["focal", "varifocal", "mal"])
@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18"])
@pytest.mark.parametrize(("size", "tokens"), [((33, 20), 3 * 2), ((16, 7), 1), ((1, 1), 1), ((1, 60), 4)])
def test_images_of_fewer_tokens_than_queries(size, tokens, backbone, classification_loss, images, labels):
    """Alone such an image has fewer latents; beside a larger one the latents that it has no token for do not count."""
    model = tiny_v2_model(feature_strides=16, backbone=backbone, classification_loss=classification_loss)
    target = {name: values[:1] for name, values in labels[0].items()}  # no more objects than there are tokens
    alone, in_padding, beside = compare_alone_and_beside(model, images[:1, :, : size[0], : size[1]], target)
    assert alone.logits.shape[1] == tokens
    assert beside.query_mask.sum(1).tolist() == [tokens, 9]
    for outputs in (in_padding, beside):
        shown = outputs.query_mask[0].bool()
        assert (outputs.logits[0, ~shown] < -1000).all()
        torch.testing.assert_close(outputs.logits[:1, shown], alone.logits, rtol=0, atol=5e-5)
        torch.testing.assert_close(outputs.pred_boxes[:1, shown], alone.pred_boxes, rtol=0, atol=5e-5)
    torch.testing.assert_close(in_padding.loss, alone.loss, rtol=1e-5, atol=1e-4)


def test_more_objects_than_tokens_leave_objects_unmatched(images, labels):
    model = tiny_v2_model(feature_strides=16)
    alone, in_padding, _ = compare_alone_and_beside(model, images[:1, :, :16, :30], labels[0])
    assert alone.logits.shape[1] == 2 < len(labels[0]["boxes"])
    torch.testing.assert_close(in_padding.loss, alone.loss, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 3)])
def test_images_of_a_pixel_are_read(size, dtype):
    """Also where a latent looks at a point of no extent."""
    model = tiny_v2_model(feature_strides=[8, 32]).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.cross_attention.position_bias.predictor.bias.view(2, -1)[:, 2:4] = -4
        outputs = model(torch.randn(1, 3, *size).to(dtype))
    assert outputs.logits.isfinite().all()
    assert outputs.pred_boxes.isfinite().all()


@pytest.mark.parametrize("position_bias", [True, False])
def test_selected_tokens_are_never_padding(position_bias, images):
    """Even if padding looks more like an object than anything else."""
    model = tiny_v2_model(feature_strides=16, mask_padding=False, position_bias=position_bias)
    padded, mask = padding_below_and_right(images * 1e-3, 128, 192)
    padded = torch.where(mask[:, None] == 1, padded, 50.0)
    with torch.no_grad():
        outputs = model(padded, mask)
        boxes = DePerceiverV2ForObjectDetection(tiny_v2_config(feature_strides=16)).eval()(padded, mask)
    assert outputs.query_mask.all()
    assert (boxes.selection_boxes[..., :2] < 1).all()
    assert len({tuple(center) for center in boxes.selection_boxes[0, :, :2].tolist()}) == 9


@pytest.mark.parametrize(
    ("pixel_values", "pixel_mask", "message"),
    [
        (torch.zeros(1, 4, 32, 32), None, "pixel_values"),
        (torch.zeros(3, 32, 32), None, "pixel_values"),
        (torch.zeros(1, 3, 32, 32), torch.ones(1, 32, 31), "pixel_mask"),
        (torch.zeros(2, 3, 32, 32), torch.ones(1, 32, 32), "pixel_mask"),
    ],
)
def test_misshapen_inputs_are_refused(pixel_values, pixel_mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_v2_model()(pixel_values, pixel_mask)


# --- configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_strides": 7}, "feature_strides"),
        ({"feature_strides": [16, 8]}, "feature_strides"),
        ({"feature_strides": []}, "feature_strides"),
        ({"num_channels": 0}, "num_channels"),
        ({"d_model": 0}, "d_model"),
        ({"d_model": 18}, "multiple of 4"),
        ({"d_model": 20, "num_attention_heads": 3}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_queries": 0}, "num_queries"),
        ({"decoder_layers": 0}, "decoder_layers"),
        ({"widening_factor": 0}, "widening_factor"),
        ({"num_denoising_queries": -1}, "num_denoising_queries"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"label_noise_ratio": 1.1}, "label_noise_ratio"),
        ({"label_noise_ratio": -0.1}, "label_noise_ratio"),
        ({"focal_alpha": 2}, "focal_alpha"),
        ({"focal_gamma": -1}, "focal_gamma"),
        ({"mal_gamma": -1}, "mal_gamma"),
        ({"box_noise_scale": -1}, "box_noise_scale"),
        ({"giou_cost": -1}, "giou_cost"),
        ({"bbox_loss_coefficient": -1}, "bbox_loss_coefficient"),
        ({"class_cost": 0, "bbox_cost": 0, "giou_cost": 0}, "nothing would decide"),
        ({"dilation": True}, "dilation"),
        ({"frozen_backbone_stages": -2}, "frozen_backbone_stages"),
        ({"backbone": "no_such_model"}, "no_such_model"),
        ({"backbone_config": {}}, "not both"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_v2_config(**fields)


@pytest.mark.parametrize("fields", [{"classification_loss": "softmax"}, {"num_queries": "many"}])
def test_wrong_types_are_refused(fields):
    with pytest.raises(StrictDataclassError, match=next(iter(fields))):
        tiny_v2_config(**fields)


def test_a_configuration_changed_for_the_worse_is_refused_by_the_model():
    config = tiny_v2_config()
    config.d_model = 30
    with pytest.raises(ValueError, match="multiple of 4"):
        DePerceiverV2Model(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_configuration_round_trips(variant, tmp_path):
    config = tiny_v2_config(**VARIANTS[variant])
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(reloaded, DePerceiverV2Config)
    ours, theirs = ({**c.to_dict(), "auto_map": None, "_name_or_path": None} for c in (config, reloaded))
    assert ours == theirs
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "deperceiver_v2"


def test_fields_of_version_0_2_0_are_read_where_they_change_nothing(tmp_path):
    tiny_v2_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    old = {"num_context_latents": 0, "box_refinement": True, "selection_matches": 1}
    file.write_text(json.dumps({**json.loads(file.read_text()), **old}))
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert not old.keys() & reloaded.to_dict().keys()


@pytest.mark.parametrize("fields", [{"num_context_latents": 8}, {"box_refinement": False}, {"selection_matches": 3}])
def test_fields_of_version_0_2_0_are_refused_where_they_would_build_another_model(fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}` no longer exists"):
        tiny_v2_config(**fields)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = DePerceiverV2Config.from_preset(name, num_labels=7)
    with torch.device("meta"):
        model = DePerceiverV2ForObjectDetection(config)
    assert model.class_labels_classifiers[-1].out_features == 7
    assert len(model.model.layers) == config.num_hidden_layers == PRESETS[name].get("decoder_layers", 6)
    for field, value in PRESETS[name].items():
        assert (config.backbone_config.backbone if field == "backbone" else getattr(config, field)) == value
    overridden = DePerceiverV2Config.from_preset(name, backbone="test_resnet", num_queries=3)
    assert (overridden.backbone_config.backbone, overridden.num_queries) == ("test_resnet", 3)
    own = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [2, 3, 4]}
    with_own = DePerceiverV2Config.from_preset(name, backbone_config=own, feature_strides=[8, 16, 32])
    assert with_own.backbone_config.backbone == "resnet18"


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match=r"no preset 'huge'.*nano.*large"):
        DePerceiverV2Config.from_preset("huge")


# --- backbone


@pytest.mark.parametrize("fields", [{}, {"freeze_backbone": True}, {"frozen_backbone_stages": -1}])
def test_what_is_frozen_stays_frozen_after_loading(fields, tmp_path):
    model = tiny_v2_model(backbone="resnet18", **fields)
    model.save_pretrained(tmp_path)
    reloaded = DePerceiverV2ForObjectDetection.from_pretrained(tmp_path)
    frozen, again = ({n for n, p in m.named_parameters() if not p.requires_grad} for m in (model, reloaded))
    assert again == frozen
    assert bool(frozen) == (fields.get("frozen_backbone_stages") != -1)
    assert all(".backbone." in name for name in frozen)


@pytest.mark.parametrize("freeze_batch_norm", [True, False])
def test_frozen_batch_norm_does_not_move(freeze_batch_norm, images, labels):
    model = tiny_v2_model(backbone="resnet18", freeze_batch_norm=freeze_batch_norm)
    kind = DePerceiverFrozenBatchNorm2d if freeze_batch_norm else torch.nn.BatchNorm2d
    norms = [module for module in model.modules() if isinstance(module, kind)]
    assert len(norms) > 10
    before = [norm.running_mean.clone() for norm in norms]
    trained_losses(model, images, labels).loss.backward()
    moved = [not torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True)]
    assert any(moved) != freeze_batch_norm
    assert any(norm.weight.requires_grad for norm in norms) != freeze_batch_norm


def test_pretrained_backbone_weights_are_loaded_explicitly(tmp_path):
    import timm

    weights = timm.create_model("test_resnet")
    torch.save(weights.state_dict(), tmp_path / "backbone.pth")
    model = create_model(tiny_v2_config(), tmp_path / "backbone.pth")
    expected = weights.state_dict()
    loaded = model.model.backbone.model._backbone.state_dict()
    assert len(loaded) > 20
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    assert model.class_labels_classifiers[0].bias.tolist() == pytest.approx([-4.6] * 5)


# --- saving and loading


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_saved_model_comes_back_bit_exact(variant, tmp_path, images):
    model = tiny_v2_model(**VARIANTS[variant])
    with torch.no_grad():  # not the initial values, which a silent re-initialisation would bring back
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.01).add_(0.001)
    model.save_pretrained(tmp_path)
    reloaded, report = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert type(reloaded) is DePerceiverV2ForObjectDetection
    assert not any(report.values())
    assert equal_state(model, reloaded)
    with torch.no_grad():
        assert torch.equal(model(images).logits, reloaded(images).logits)
    trunk, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(trunk) is DePerceiverV2Model
    assert not report["missing_keys"]
    assert equal_state(model.model, trunk)


@pytest.mark.parametrize("query_selection", [True, False])
def test_other_numbers_of_classes_and_queries(query_selection, tmp_path, images):
    model = tiny_v2_model(query_selection=query_selection)
    model.save_pretrained(tmp_path)
    changed = {"num_labels": 8, "num_queries": 11}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        DePerceiverV2ForObjectDetection.from_pretrained(tmp_path, **changed)
    tuned, report = DePerceiverV2ForObjectDetection.from_pretrained(
        tmp_path, **changed, ignore_mismatched_sizes=True, output_loading_info=True
    )
    by_classes = {f"class_labels_classifiers.{i}.{name}" for i in range(2) for name in ("weight", "bias")}
    by_classes.add("model.denoising_classes.weight")
    selection = {f"model.queries.class_labels_classifier.{name}" for name in ("weight", "bias")}
    by_queries = {"model.queries.content.weight", "model.queries.boxes.weight"}
    mismatched = by_classes | (selection if query_selection else by_queries)
    assert {key[0] for key in report["mismatched_keys"]} == mismatched
    assert tuned.eval()(images).logits.shape == (2, 11, 8)
    kept = dict(model.named_parameters())
    for name, parameter in tuned.named_parameters():
        if name not in mismatched:
            assert torch.equal(parameter, kept[name]), name
    for classifier in tuned.class_labels_classifiers:  # as in a new model
        assert classifier.bias.tolist() == pytest.approx([-4.6] * 8)


def test_a_selecting_model_takes_any_number_of_queries(tmp_path, images):
    model = tiny_v2_model()
    model.save_pretrained(tmp_path)
    more = DePerceiverV2ForObjectDetection.from_pretrained(tmp_path, num_queries=30).eval()
    with torch.no_grad():
        assert more(images).logits.shape == (2, 30, 5)
        torch.testing.assert_close(more(images).selection_logits[:, :9], model(images).selection_logits)


def test_labels_are_kept(tmp_path):
    model = DePerceiverV2ForObjectDetection(tiny_v2_config(num_labels=2, id2label={0: "cell", 1: "platelet"}))
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).id2label == {0: "cell", 1: "platelet"}
    assert model.class_labels_classifiers[0].out_features == 2


# --- precision, memory, compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["default", "stride4", "learned", "no_position_bias", "shared"])
def test_half_precision(variant, dtype, tmp_path, images):
    model = tiny_v2_model(**VARIANTS[variant], num_queries=100)
    model.save_pretrained(tmp_path)
    half = DePerceiverV2ForObjectDetection.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in half.parameters()} == {dtype}
    padded, mask = padding_below_and_right(images[..., :48, :64], 64, 80)
    with torch.no_grad():
        expected, outputs = model(padded, mask), half(padded.to(dtype), mask)
    assert outputs.logits.dtype == dtype
    assert outputs.pred_boxes.isfinite().all()
    # Rounding changes the order in which tokens are chosen, so each box is compared with its nearest.
    apart = torch.cdist(outputs.pred_boxes.float(), expected.pred_boxes, p=float("inf")).min(-1).values
    shown = (
        torch.ones(2, apart.shape[1], dtype=torch.bool) if outputs.query_mask is None else outputs.query_mask.bool()
    )
    assert apart[shown].quantile(0.9) < 0.05
    assert apart[shown].quantile(0.98) < 0.2  # now and then another token is chosen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(dtype, images, labels):
    model = tiny_v2_model()
    padded, mask = padding_below_and_right(images, 96, 128)
    with torch.autocast("cpu", dtype=dtype):
        outputs = trained_losses(model, padded, labels, pixel_mask=mask)
    assert outputs.logits.dtype == dtype
    assert outputs.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in outputs.loss_dict.values())
    outputs.loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.isfinite().all() for parameter in trained)
    with torch.no_grad():
        expected = trained_losses(model, padded, labels, pixel_mask=mask)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=0.05, atol=0)


def test_loading_on_meta_and_device_map(tmp_path, images):
    model = tiny_v2_model()
    model.save_pretrained(tmp_path)
    mapped = DePerceiverV2ForObjectDetection.from_pretrained(tmp_path, device_map="auto").eval()
    with torch.no_grad():
        torch.testing.assert_close(mapped(images).logits.cpu(), model(images).logits)


@pytest.mark.parametrize("variant", ["default", "learned", "shared"])
def test_offloading_splits_at_the_named_modules(variant, images):
    from accelerate import cpu_offload

    model = tiny_v2_model(**VARIANTS[variant])
    with torch.no_grad():
        expected = model(images).logits
        offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        torch.testing.assert_close(offloaded(images).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("variant", ["default", "learned", "shared"])
def test_gradient_checkpointing_gives_equal_gradients(variant, use_reentrant, images, labels):
    plain, checkpointed = tiny_v2_model(**VARIANTS[variant]), tiny_v2_model(**VARIANTS[variant])
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_gradient_checkpointing
    for model in (plain, checkpointed):
        trained_losses(model, images, labels).loss.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in checkpointed.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("dropout", ["dropout", "attention_dropout"])
def test_every_dropout_acts_in_training_only(dropout, images):
    still, model = tiny_v2_model(), tiny_v2_model(**{dropout: 0.5})
    with torch.no_grad():
        assert torch.equal(model(images).logits, still(images).logits)
        still.train(), model.train()
        assert torch.equal(still(images).logits, still(images).logits)
        assert not torch.equal(model(images).logits, model(images).logits)


@pytest.mark.slow
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"), reason="torch 2.9 bakes in whether the example's sides are odd"
)
@pytest.mark.parametrize("variant", ["default", "learned"])
def test_forward_exports_with_dynamic_batch_and_size(variant, images):
    model = tiny_v2_model(**VARIANTS[variant])
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"pixel_values": {0: dynamic, 2: dynamic, 3: dynamic}, "pixel_mask": dict.fromkeys(range(3), dynamic)}
    padded, mask = padding_below_and_right(images, 96, 128)
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"pixel_values": padded, "pixel_mask": mask}, dynamic_shapes=shapes, strict=False
        ).module()
        for batch, height, width in ((1, 64, 160), (3, 130, 97)):
            image = torch.randn(batch, 3, height - 10, width - 20)
            padded, mask = padding_below_and_right(image, height, width)
            exported = program(pixel_values=padded, pixel_mask=mask)
            torch.testing.assert_close(exported.logits, model(padded, mask).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["default", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("learned", "shared"))]
)
def test_forward_compiles_without_graph_breaks(variant, images):
    torch.compiler.reset()
    model = tiny_v2_model(**VARIANTS[variant])
    padded, mask = padding_below_and_right(images, 64, 128)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(compiled(padded, mask).logits, model(padded, mask).logits, rtol=0, atol=1e-5)
