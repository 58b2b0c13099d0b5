# SPDX-License-Identifier: Apache-2.0
"""The model keeps its promises: shapes, attention, masks, precision, saving, freezing, compiling."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection, ResNetConfig

from conftest import tiny_config, tiny_model
from deperceiver_hf import DePerceiverConfig, DePerceiverForObjectDetection, DePerceiverModel, create_model
from deperceiver_hf.models.attention_deperceiver import DePerceiverSinePositionEmbedding
from deperceiver_hf.models.backbone_deperceiver import DePerceiverFrozenBatchNorm2d, mask_of_cells
from deperceiver_hf.models.layers_deperceiver import DePerceiverLearnedPositionEmbedding

VARIANTS = {
    "single": {},
    "stride4": {"feature_strides": 4},
    "dilation": {"feature_strides": 32, "dilation": True, "backbone": "resnet18"},
    "multiscale": {"feature_strides": [8, 16, 32]},
    "learned": {"position_embedding_type": "learned"},
    "learned_multiscale": {"position_embedding_type": "learned", "feature_strides": [8, 16, 32]},
    "layered": {"decoder_type": "layered", "decoder_layers": 2},
    "layered_multiscale": {
        "decoder_type": "layered",
        "feature_strides": [16, 32],
        "num_decoder_self_attention_heads": 4,
    },
    "resnet_d": {"backbone": "test_resnet", "feature_strides": [8, 32]},  # average-pools in its shortcuts
    "wide": {"self_attention_widening_factor": 2, "cross_attention_widening_factor": 3},
}


def equal_state(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def padding_below_and_right(images: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    padded = torch.zeros(*images.shape[:2], height, width)
    padded[..., : images.shape[-2], : images.shape[-1]] = images
    mask = torch.zeros(len(images), height, width, dtype=torch.long)
    mask[:, : images.shape[-2], : images.shape[-1]] = 1
    return padded, mask


# --- shapes and outputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_shapes(variant, images):
    model = tiny_model(**VARIANTS[variant])
    config = model.config
    with torch.no_grad():
        outputs = model(images, output_attentions=True, output_hidden_states=True)
    assert outputs.logits.shape == (2, 7, 6)
    assert outputs.pred_boxes.shape == (2, 7, 4)
    assert ((outputs.pred_boxes > 0) & (outputs.pred_boxes < 1)).all()
    assert outputs.encoder_last_hidden_state.shape == (2, 12, 24)
    assert outputs.last_hidden_state.shape == (2, 7, 20)
    strides = [16 if config.dilation else stride for stride in config.feature_strides]
    tokens = sum((64 // stride) * (96 // stride) for stride in strides)
    (reading,) = outputs.encoder_cross_attentions
    assert reading.shape == (2, 2, 12, tokens)
    # The stack of 3 layers is shared by 2 blocks, and every pass through it is recorded.
    assert len(outputs.encoder_hidden_states) == 2 * 3 + 1 == config.num_hidden_layers + 1
    assert [a.shape for a in outputs.encoder_attentions] == [(2, 4, 12, 12)] * 6
    layers = config.decoder_layers if config.decoder_type == "layered" else 1
    assert [a.shape for a in outputs.cross_attentions] == [(2, 2, 7, 12)] * layers
    assert len(outputs.decoder_hidden_states) == layers + 1
    assert len(outputs.decoder_attentions) == (layers if config.decoder_type == "layered" else 0)
    for weights in (reading, *outputs.encoder_attentions, *outputs.cross_attentions, *outputs.decoder_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    if config.auxiliary_loss:
        assert len(outputs.auxiliary_outputs) == layers - 1
        assert outputs.intermediate_hidden_states.shape == (layers, 2, 7, 20)
        torch.testing.assert_close(outputs.intermediate_hidden_states[-1], outputs.last_hidden_state)
    else:
        assert outputs.auxiliary_outputs is None


def test_base_model_is_the_trunk_of_the_detector(images):
    detector = tiny_model(decoder_type="layered")
    trunk = DePerceiverModel(detector.config).eval()
    trunk.load_state_dict(detector.model.state_dict())
    with torch.no_grad():
        expected, outputs = detector(images), trunk(images)
        as_tuple = detector(images, return_dict=False)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], expected.logits)


def test_layered_decoder_without_auxiliary_loss_has_one_output(images, labels):
    model = tiny_model(decoder_type="layered", auxiliary_loss=False)
    outputs = model(images, labels=labels)
    assert outputs.auxiliary_outputs is None
    assert set(outputs.loss_dict) == {"loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error"}


# --- attention backends and masks


@pytest.mark.parametrize("variant", VARIANTS)
def test_sdpa_equals_eager(variant, images):
    model = tiny_model(**VARIANTS[variant])
    padded, mask = padding_below_and_right(images, 96, 128)
    results = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results[implementation] = model(padded, mask)
    for name in ("logits", "pred_boxes", "encoder_last_hidden_state"):
        torch.testing.assert_close(results["eager"][name], results["sdpa"][name], rtol=0, atol=1e-5)


def test_only_tested_attention_backends_are_advertised():
    model = tiny_model()
    assert model._supports_sdpa
    for implementation in ("flash_attention_2", "flex_attention"):
        with pytest.raises((ValueError, ImportError)):
            DePerceiverForObjectDetection._from_config(tiny_config(), attn_implementation=implementation)


def test_attention_weights_come_from_sdpa_models_too(images):
    model = tiny_model()
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        plain, with_weights = model(images), model(images, output_attentions=True)
    assert plain.encoder_attentions is None
    assert all(weights is not None for weights in with_weights.encoder_attentions)
    torch.testing.assert_close(plain.logits, with_weights.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_mask_of_ones_changes_nothing(images, dtype):
    model = tiny_model(feature_strides=[8, 16, 32])
    with torch.no_grad():
        expected = model(images)
        outputs = model(images, torch.ones(2, 64, 96, dtype=dtype))
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)


def test_no_mask_is_built_without_a_pixel_mask(images):
    model = tiny_model()
    seen = []
    model.model.encoder.cross_attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model(images)
        model(*padding_below_and_right(images, 96, 96))
    assert seen[0] is None
    assert seen[1] is not None


@pytest.mark.parametrize("size", [(64, 96), (50, 71), (33, 40)])
@pytest.mark.parametrize("variant", ["single", "stride4", "dilation", "multiscale", "learned", "layered", "resnet_d"])
def test_prediction_and_loss_do_not_depend_on_the_neighbour(variant, size, images, labels):
    """The same image alone, beside a larger one, and in the loss."""
    model = tiny_model(**{"backbone": "resnet18", **VARIANTS[variant]})
    image = images[:1, :, : size[0], : size[1]]
    padded, mask = padding_below_and_right(image, 107, 130)
    larger = torch.randn(1, 3, 107, 130, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone = model(image, labels=labels[:1])
        beside = model(torch.cat((padded, larger)), torch.cat((mask, torch.ones_like(mask))))
        in_padding = model(padded, mask, labels=labels[:1])
    torch.testing.assert_close(beside.logits[:1], alone.logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(beside.pred_boxes[:1], alone.pred_boxes, rtol=0, atol=2e-5)
    torch.testing.assert_close(in_padding.loss, alone.loss, rtol=1e-5, atol=1e-5)


def test_the_original_treatment_of_padding_depends_on_it(images):
    """Shows that the test above can fail: without `mask_padding` borders change."""
    model = tiny_model(backbone="resnet18", mask_padding=False)
    padded, mask = padding_below_and_right(images, 107, 130)
    with torch.no_grad():
        assert (model(padded, mask).logits - model(images).logits).abs().max() > 1e-3


@pytest.mark.parametrize("side", range(1, 70))
def test_cells_of_a_padded_image_are_those_of_the_image_alone(side):
    for stride in (4, 8, 16, 32):
        canvas = torch.zeros(1, 75, 70)
        canvas[:, :side, :side] = 1
        cells = mask_of_cells(canvas, -(-75 // stride), -(-70 // stride))
        assert cells.shape == (1, -(-75 // stride), -(-70 // stride))
        assert cells[0, :, 0].sum() == cells[0, 0].sum() == -(-side // stride)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_only_what_the_mask_calls_real_is_read(images, mask_padding):
    """Polarity of the mask: 1 is a real pixel, 0 is padding."""
    model = tiny_model(feature_strides=32, mask_padding=mask_padding)
    padded, mask = padding_below_and_right(images, 128, 192)
    with torch.no_grad():
        (attention,) = model(padded, mask, output_attentions=True).encoder_cross_attentions
    weights = attention.unflatten(-1, (4, 6))
    assert (weights[..., 2:, :] == 0).all()
    assert (weights[..., 3:] == 0).all()
    assert (weights[..., :2, :3] > 0).all()


def test_what_stands_in_the_padding_plays_no_part(images):
    model = tiny_model()
    padded, mask = padding_below_and_right(images, 96, 128)
    other = torch.where(mask[:, None] == 1, padded, 7.0)
    with torch.no_grad():
        torch.testing.assert_close(model(other, mask).logits, model(padded, mask).logits)


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
        tiny_model()(pixel_values, pixel_mask)


# --- positions


def test_sine_positions_span_the_real_part_of_each_axis():
    encoding = DePerceiverSinePositionEmbedding(16)
    features = torch.zeros(1, 16, 6, 8)
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[:, :3, :4] = True
    padded, alone = encoding(features, mask), encoding(torch.zeros(1, 16, 3, 4), None)
    torch.testing.assert_close(padded[..., :3, :4], alone)
    full = encoding(features, torch.ones(1, 6, 8, dtype=torch.bool))
    torch.testing.assert_close(full, encoding(features, None))


def test_learned_positions_start_uniform_in_0_to_1_as_in_the_original():
    model = tiny_model(position_embedding_type="learned")
    positions = model.model.input_adapter.position_embedding
    for table in (positions.row_embedding.weight, positions.column_embedding.weight):
        assert 0 <= table.min() < 0.1
        assert 0.9 < table.max() < 1


def test_learned_positions_end_with_their_tables():
    encoding = DePerceiverLearnedPositionEmbedding(8, 5)
    within = encoding(torch.zeros(1, 8, 3, 5), None)
    torch.testing.assert_close(within[0, :4, 0].T, encoding.column_embedding.weight)
    torch.testing.assert_close(within[0, 4:, :, 0].T, encoding.row_embedding.weight[:3])
    model = tiny_model(position_embedding_type="learned", num_position_embeddings=5)
    assert model(torch.randn(1, 3, 80, 48)).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"6 x 3 cells .*num_position_embeddings"):
        model(torch.randn(1, 3, 96, 48))


# --- configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_strides": 7}, "feature_strides"),
        ({"feature_strides": [16, 8]}, "feature_strides"),
        ({"feature_strides": []}, "feature_strides"),
        ({"feature_strides": [8, 8]}, "feature_strides"),
        ({"num_latents": 0}, "num_latents"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_queries": 0}, "num_queries"),
        ({"d_latents": 30}, "d_latents"),
        ({"d_model": 18, "num_cross_attention_heads": 1}, "multiple of 4"),
        ({"d_model": 4, "feature_strides": [8, 16]}, "level embedding"),
        ({"num_decoder_self_attention_heads": 3}, "self-attention of the queries"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"auxiliary_loss": True}, "decoder_type='layered'"),
        ({"decoder_attention_dropout": 0.1}, "decoder_type='layered'"),
        ({"num_hidden_layers": 3}, "num_self_attends_per_block"),
        ({"num_channels": 1, "backbone": None, "backbone_config": ResNetConfig(out_indices=[3])}, "num_channels"),
        (
            {
                "backbone": None,
                "backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [4]},
            },
            r"strides \[32\]",
        ),
        ({"dilation": True}, "dilation"),
        ({"frozen_backbone_stages": -2}, "frozen_backbone_stages"),
        ({"eos_coefficient": -1}, "eos_coefficient"),
        ({"class_cost": 0, "bbox_cost": 0, "giou_cost": 0}, "nothing would decide"),
        ({"backbone": "no_such_model"}, "no_such_model"),
        ({"backbone": "convnext_atto", "feature_strides": 4, "backbone_config": {}}, "not both"),
        ({"backbone": None, "backbone_config": {"out_indices": [1]}}, "model_type"),
        (
            {"backbone": None, "backbone_config": {"model_type": "timm_backbone", "out_indices": [2, 3]}},
            "2 feature maps",
        ),
        (
            {"backbone": None, "feature_strides": 32, "dilation": True, "backbone_config": {"model_type": "resnet"}},
            "output_stride",
        ),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    "fields", [{"position_embedding_type": "rotary"}, {"decoder_type": "deep"}, {"num_latents": "many"}]
)
def test_wrong_types_are_refused(fields):
    with pytest.raises(StrictDataclassError, match=next(iter(fields))):
        tiny_config(**fields)


def test_a_configuration_changed_for_the_worse_is_refused_by_the_model():
    config = tiny_config()
    config.auxiliary_loss = True
    with pytest.raises(ValueError, match="layered"):
        DePerceiverModel(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_configuration_round_trips(variant, tmp_path):
    config = tiny_config(**VARIANTS[variant])
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(reloaded, DePerceiverConfig)
    ours, theirs = ({**c.to_dict(), "auto_map": None, "_name_or_path": None} for c in (config, reloaded))
    assert ours == theirs


def test_defaults_are_the_original_single_scale_model():
    config = DePerceiverConfig()
    assert config.feature_strides == [32]
    assert (config.num_latents, config.d_latents, config.num_queries) == (1024, 256, 100)
    assert (config.num_blocks, config.num_self_attends_per_block, config.num_self_attention_heads) == (3, 6, 8)
    assert config.backbone_config.backbone == "resnet50"
    assert (config.decoder_type, config.decoder_dropout, config.decoder_attention_dropout) == ("cross_attention", 0, 0)
    layered = DePerceiverConfig(decoder_type="layered")
    assert (layered.decoder_dropout, layered.decoder_attention_dropout) == (0.1, 0.1)


# --- backbone


def trained_stages(model: DePerceiverForObjectDetection) -> set[str]:
    return {n.split(".")[4] for n, p in model.named_parameters() if ".backbone." in n and p.requires_grad}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"frozen_backbone_stages": -1}, {"conv1", "bn1", "layer1", "layer2", "layer3"}),
        ({"frozen_backbone_stages": 0}, {"layer1", "layer2", "layer3"}),
        ({"frozen_backbone_stages": 1}, {"layer2", "layer3"}),
        ({"frozen_backbone_stages": 2}, {"layer3"}),
        ({"freeze_backbone": True}, set()),
    ],
)
def test_frozen_stages(fields, expected):
    model = tiny_model(backbone="resnet18", freeze_batch_norm=False, **fields)
    assert trained_stages(model) == expected


@pytest.mark.parametrize("fields", [{}, {"freeze_backbone": True}, {"frozen_backbone_stages": -1}])
def test_what_is_frozen_stays_frozen_after_loading(fields, tmp_path):
    model = tiny_model(backbone="resnet18", **fields)
    model.save_pretrained(tmp_path)
    reloaded = DePerceiverForObjectDetection.from_pretrained(tmp_path)
    frozen, again = ({n for n, p in m.named_parameters() if not p.requires_grad} for m in (model, reloaded))
    assert again == frozen
    assert bool(frozen) == (fields.get("frozen_backbone_stages") != -1)


def test_frozen_batch_norm_does_not_move(images, labels):
    model = tiny_model(backbone="resnet18").train()
    norms = [module for module in model.modules() if isinstance(module, DePerceiverFrozenBatchNorm2d)]
    assert len(norms) > 10
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    before = copy.deepcopy([norm.state_dict() for norm in norms])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images, labels=labels).loss.backward()
    optimizer.step()
    for norm, state in zip(norms, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in norm.state_dict().items())
        assert norm.weight.all()


def test_frozen_batch_norm_equals_batch_norm_in_evaluation():
    reference = torch.nn.BatchNorm2d(5).eval()
    for tensor in reference.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    frozen = DePerceiverFrozenBatchNorm2d(5)
    frozen.load_state_dict(reference.state_dict(), strict=False)
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(frozen.train()(x), reference(x))


@pytest.mark.parametrize(
    ("backbone", "strides"),
    [
        ("convnext_atto", [4, 8]),
        ("mobilenetv3_small_050", [16, 32]),
        ("tf_efficientnet_b0", [8, 32]),
        ("resnet18", [8]),
    ],
)
def test_timm_backbones(backbone, strides, images, tmp_path):
    """Frozen norms keep the names that pretrained weights have, and padded batches go through."""
    import timm

    weights = timm.create_model(backbone)
    torch.save(weights.state_dict(), tmp_path / "weights.pth")
    model = create_model(tiny_config(backbone=backbone, feature_strides=strides), tmp_path / "weights.pth").eval()
    padded, mask = padding_below_and_right(images, 96, 130)
    with torch.no_grad():
        assert model(padded, mask).logits.isfinite().all()
        reference = timm.create_model(backbone, features_only=True).eval()
        reference.load_state_dict(model.model.backbone.model._backbone.state_dict(), strict=False)
        features = model.model.backbone(images)[0][0]
        expected = next(f for f in reference(images) if f.shape == features.shape)
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


def test_transformers_backbone(images, tmp_path):
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], out_features=["stage2", "stage3"]
    )
    model = tiny_model(backbone=None, backbone_config=backbone, feature_strides=[8, 16])
    with torch.no_grad():
        assert model(images).logits.shape == (2, 7, 6)
    frozen = {n for n, p in model.named_parameters() if ".backbone." in n and not p.requires_grad}
    assert any("embedder" in name for name in frozen)
    assert any("stages.0" in name for name in frozen)
    assert not any("stages.1" in name for name in frozen)
    model.save_pretrained(tmp_path)
    assert equal_state(model, DePerceiverForObjectDetection.from_pretrained(tmp_path))


def test_a_backbone_of_another_stride_is_refused(images):
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage4"])
    model = tiny_model(backbone=None, backbone_config=backbone, feature_strides=16)
    with pytest.raises(ValueError, match="stride of 16"):
        model(images)


# --- pretrained backbones


def test_pretrained_backbone_weights_are_loaded_once_and_explicitly(tmp_path):
    import timm

    weights = timm.create_model("test_resnet")
    for module in weights.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_()
            module.weight.data.uniform_()
    torch.save(weights.state_dict(), tmp_path / "backbone.pth")
    model = create_model(tiny_config(), tmp_path / "backbone.pth")
    expected = weights.state_dict()
    loaded = model.model.backbone.model._backbone.state_dict()
    assert len(loaded) > 20
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    # What is saved is what comes back, without another look at the pretrained weights.
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "backbone.pth").unlink()
    assert equal_state(model, DePerceiverForObjectDetection.from_pretrained(tmp_path / "model"))


def test_pretrained_names_of_another_layout_are_loaded(tmp_path):
    import timm

    weights = timm.create_model("convnext_atto")
    torch.save({"state_dict": weights.state_dict()}, tmp_path / "backbone.pth")
    model = create_model(tiny_config(backbone="convnext_atto", feature_strides=16), tmp_path / "backbone.pth")
    loaded = model.model.backbone.model._backbone.stages_1.blocks[0].conv_dw.weight
    assert torch.equal(loaded, weights.stages[1].blocks[0].conv_dw.weight)


def test_backbone_weights_that_are_not_finite_are_refused(tmp_path):
    import timm

    weights = timm.create_model("test_resnet", pretrained=False).state_dict()
    weights["conv1.0.weight"].view(-1)[0] = torch.nan
    torch.save(weights, tmp_path / "weights.pth")
    config = tiny_config(backbone="test_resnet")
    with pytest.raises(ValueError, match=r"1 of the weights of .*weights.pth.*conv1.0.weight, are not finite"):
        create_model(config, tmp_path / "weights.pth")


def test_missing_or_unfit_backbone_weights_are_clear(tmp_path):
    import timm

    with pytest.raises(OSError, match=r"resnet50\.tv_in1k.*could not be had"):
        create_model(DePerceiverConfig(num_latents=4), "resnet50.tv_in1k")  # offline in tests
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        create_model(tiny_config(), tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="neither a file nor a model"):
        create_model(tiny_config(), "no_such_model")
    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="do not fit the backbone 'test_resnet'"):
        create_model(tiny_config(), tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    with pytest.raises(OSError, match=r"broken\.pth"):
        create_model(tiny_config(), tmp_path / "broken.pth")


# --- saving and loading


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_model_comes_back_bit_exact(variant, tmp_path, images):
    model = tiny_model(**VARIANTS[variant])
    with torch.no_grad():  # not the initial values, which a silent re-initialisation would bring back
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.01).add_(0.001)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    reloaded, report = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert equal_state(model, reloaded)
    with torch.no_grad():
        assert torch.equal(model(images).logits, reloaded(images).logits)
    trunk, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(trunk, DePerceiverModel)
    assert not report["missing_keys"]
    assert equal_state(model.model, trunk)


def test_other_numbers_of_classes_and_queries(tmp_path, images):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    changed = {"num_labels": 9, "num_queries": 11}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        DePerceiverForObjectDetection.from_pretrained(tmp_path, **changed)
    tuned, report = DePerceiverForObjectDetection.from_pretrained(
        tmp_path, **changed, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key[0] for key in report["mismatched_keys"]} == {
        "class_labels_classifier.weight",
        "class_labels_classifier.bias",
        "model.query_embedding.weight",
    }
    assert tuned(images).logits.shape == (2, 11, 10)
    assert torch.equal(tuned.model.encoder.latents, model.model.encoder.latents)
    assert tuned.class_labels_classifier.weight.isfinite().all()


def test_labels_are_kept(tmp_path):
    names = {0: "cell", 1: "platelet"}
    config = tiny_config()
    config.id2label, config.label2id = names, {name: index for index, name in names.items()}
    model = DePerceiverForObjectDetection(config)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.id2label == names
    assert model.class_labels_classifier.out_features == 3


# --- precision, memory, compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["single", "multiscale", "learned", "layered"])
def test_half_precision(variant, dtype, tmp_path, images):
    model = tiny_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    half = DePerceiverForObjectDetection.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in half.parameters()} == {dtype}
    padded, mask = padding_below_and_right(images, 64, 128)
    with torch.no_grad():
        expected, outputs = model(padded, mask), half(padded.to(dtype), mask)
    assert outputs.logits.dtype == dtype
    torch.testing.assert_close(outputs.pred_boxes.float(), expected.pred_boxes, rtol=0, atol=0.05)


def test_loss_is_float32_under_autocast(images, labels):
    model = tiny_model(decoder_type="layered").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images, labels=labels)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in outputs.loss_dict.values())
    outputs.loss.backward()


def test_loading_on_meta_and_device_map(tmp_path, images):
    model = tiny_model(feature_strides=[8, 16, 32])
    model.save_pretrained(tmp_path)
    mapped = DePerceiverForObjectDetection.from_pretrained(tmp_path, device_map="auto").eval()
    with torch.no_grad():
        torch.testing.assert_close(mapped(images).logits.cpu(), model(images).logits)


def test_offloading_splits_at_the_named_modules(tmp_path, images):
    from accelerate import cpu_offload

    model = tiny_model(feature_strides=[8, 16, 32], position_embedding_type="learned")
    with torch.no_grad():
        expected = model(images).logits
        offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        torch.testing.assert_close(offloaded(images).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("variant", ["single", "layered"])
def test_gradient_checkpointing_gives_equal_gradients(variant, use_reentrant, images, labels):
    fields = {**VARIANTS[variant], "decoder_dropout": 0.0, "decoder_attention_dropout": 0.0}
    plain, checkpointed = tiny_model(**fields).train(), tiny_model(**fields).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_gradient_checkpointing
    for model in (plain, checkpointed):
        model(images, labels=labels).loss.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in checkpointed.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_every_trained_parameter_gets_a_gradient(images, labels):
    model = tiny_model(decoder_type="layered", feature_strides=[8, 16, 32]).train()
    model(images, labels=labels).loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    ("decoder_type", "dropout"),
    [
        ("cross_attention", "dropout"),
        ("cross_attention", "attention_dropout"),
        ("cross_attention", "decoder_dropout"),
        ("layered", "decoder_dropout"),
        ("layered", "decoder_attention_dropout"),
    ],
)
def test_every_dropout_acts_in_training_only(decoder_type, dropout, images):
    none = {"decoder_dropout": 0.0, "decoder_attention_dropout": 0.0}
    still, model = (tiny_model(decoder_type=decoder_type, **{**none, **p}).train() for p in ({}, {dropout: 0.5}))
    with torch.no_grad():
        assert torch.equal(still(images).logits, still(images).logits)
        assert not torch.equal(model(images).logits, model(images).logits)
        assert torch.equal(model.eval()(images).logits, still.eval()(images).logits)


def test_layered_decoder_drops_what_the_original_drops():
    """The authors' layer: 0.1 on the weights of self-attention, on the output of cross-attention and on the MLP."""
    layer = tiny_model(decoder_type="layered").model.decoder.layers[0]
    assert layer.self_attention.attention_dropout == 0.1
    assert layer.cross_attention.attention.attention_dropout == 0.0
    assert layer.cross_attention.dropout.p == 0.1


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"), reason="torch 2.9 bakes in whether the example's sides are odd"
)
def test_forward_exports_with_dynamic_batch_and_size(images):
    model = tiny_model(feature_strides=[8, 16, 32])
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
@pytest.mark.parametrize("variant", ["multiscale", pytest.param("layered", marks=pytest.mark.heavy)])
def test_forward_compiles_without_graph_breaks(variant, images):
    torch.compiler.reset()
    model = tiny_model(**VARIANTS[variant])
    padded, mask = padding_below_and_right(images, 64, 128)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(compiled(padded, mask).logits, model(padded, mask).logits, rtol=0, atol=1e-5)


def test_new_models_are_not_degenerate(images):
    """Initial weights: different images give different predictions, different queries different boxes."""
    model = tiny_model(num_queries=20)
    with torch.no_grad():
        outputs = model(images)
    assert (outputs.logits[0] - outputs.logits[1]).abs().max() > 1e-4
    assert torch.pdist(outputs.pred_boxes[0]).min() > 1e-5
    assert outputs.logits.std() < 10
