# SPDX-License-Identifier: Apache-2.0
"""Parity with the authors' code, and what happens to files that are not theirs."""

import numpy as np
import pytest
import torch

from deperceiver_hf import DePerceiverForObjectDetection, load_original
from deperceiver_hf.conversion.original_checkpoint import _convert_names, _read_state_dict
from deperceiver_hf.data.coco_categories import COCO_CATEGORIES
from deperceiver_hf.models.matching_deperceiver import hungarian_match, pad_targets
from golden import GOLDEN_NAMES, golden_inputs, golden_record, golden_state_dict, golden_targets, golden_weight


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def golden(request):
    """Name of a golden record, the converted model, and its output with labels and gradients."""
    record, arrays = golden_record(request.param)
    model = load_original(golden_state_dict(request.param), num_blocks=record["args"]["enc_blocks"])
    outputs = model(*golden_inputs(), labels=golden_targets())
    outputs.loss.backward()
    return request.param, record, arrays, model, outputs


def assert_close(actual: torch.Tensor, expected: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=atol)


def test_outputs_equal_the_authors(golden):
    _, record, arrays, _, outputs = golden
    assert_close(outputs.logits, arrays["logits"], 1e-4)
    assert_close(outputs.pred_boxes, arrays["boxes"], 1e-4)
    assert_close(outputs.encoder_last_hidden_state, arrays["latents"], 1e-4)
    auxiliary = outputs.auxiliary_outputs or []
    assert len(auxiliary) == (record["args"]["dec_layers"] - 1 if record["args"]["aux_loss"] else 0)
    for index, layer in enumerate(auxiliary):
        assert_close(layer["logits"], arrays[f"aux{index}_logits"], 1e-4)
        assert_close(layer["pred_boxes"], arrays[f"aux{index}_boxes"], 1e-4)


def test_losses_equal_the_authors(golden):
    _, record, _, _, outputs = golden
    assert outputs.loss_dict.keys() == record["losses"].keys()
    for name, expected in record["losses"].items():
        assert outputs.loss_dict[name].item() == pytest.approx(expected, rel=1e-4), name
    assert outputs.loss.item() == pytest.approx(record["total"], rel=1e-4)


def test_losses_without_objects_in_the_second_image_equal_the_authors(golden):
    _, record, _, model, _ = golden
    targets = golden_targets()
    targets[1] = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    with torch.no_grad():
        outputs = model(*golden_inputs(), labels=targets)
    for name, expected in record["losses_empty_second"].items():
        assert outputs.loss_dict[name].item() == pytest.approx(expected, rel=1e-4), name
    assert outputs.loss.item() == pytest.approx(record["total_empty_second"], rel=1e-4)


def test_matching_equals_the_authors(golden):
    _, record, _, model, outputs = golden
    targets = pad_targets(golden_targets(), outputs.logits.device)
    pairs = hungarian_match(outputs.logits[None], outputs.pred_boxes[None], targets, model.config)
    for image, (queries, objects) in enumerate(record["matcher"]):
        of_image = pairs.image == image
        assert pairs.query[of_image].tolist() == queries
        assert pairs.target[of_image].tolist() == objects


def test_gradients_equal_the_authors(golden):
    _, record, _, model, _ = golden
    parameters = dict(model.named_parameters())
    compared = 0
    for name, expected in record["grad_norms"].items():
        if name.startswith("scale_embedding."):
            level = int(name.split(".")[1])
            actual = parameters["model.input_adapter.level_embedding.weight"].grad[level].norm().item()
        else:
            (converted,) = _convert_names({name: torch.empty(0)})
            gradient = parameters[converted].grad
            assert (gradient is None) == (expected is None), name
            actual = None if gradient is None else gradient.norm().item()
        if expected is not None:
            # The bias of keys shifts all scores of a query alike: its true gradient is zero, what is left is rounding.
            assert actual == pytest.approx(expected, rel=1e-3, abs=1e-4), name
            compared += 1
    assert compared > 60


def test_post_processing_equals_the_authors(golden):
    from deperceiver_hf import DePerceiverImageProcessor

    _, _, arrays, _, outputs = golden
    results = DePerceiverImageProcessor().post_process_object_detection(
        outputs, threshold=0.0, target_sizes=[(480, 640), (500, 333)]
    )
    for index, result in enumerate(results):
        assert_close(result["scores"], arrays[f"post{index}_scores"], 1e-4)
        assert_close(result["boxes"], arrays[f"post{index}_boxes"], 1e-3)
        assert result["labels"].tolist() == arrays[f"post{index}_labels"].tolist()


def test_architecture_is_inferred(golden):
    name, record, _, model, _ = golden
    args, config = record["args"], model.config
    assert config.feature_strides == ([8, 16, 32] if args["multiscale"] else [args["downsample_factor"]])
    assert config.backbone_config.backbone == "resnet50"
    assert config.num_latents == args["num_latents"]
    assert config.num_queries == args["num_queries"]
    assert config.num_self_attends_per_block == args["enc_layers_per_block"]
    assert config.decoder_type == ("layered" if args["aux_loss"] else "cross_attention")
    assert config.num_labels == 91
    assert (config.id2label[1], config.id2label[12], config.id2label[90]) == ("person", "N/A", "toothbrush")
    assert all(config.label2id[category] == index for index, category in COCO_CATEGORIES.items())
    assert config.position_embedding_type == args["position_embedding"] == "sine", name


def resnet_state_dict(
    depth: str,
    strides: list[int],
    *,
    layers: int = 1,
    latents: int = 6,
    queries: int = 5,
    classes: int = 4,
    decoder_layers: int = 0,
    learned: int = 0,
) -> dict[str, torch.Tensor]:
    """A state dict with the names that the authors' code gives to other architectures than the golden ones."""
    import timm

    stages = {4: 1, 8: 2, 16: 3, 32: 4}
    deepest = max(stages[stride] for stride in strides)
    body = timm.create_model(depth, features_only=True, out_indices=(deepest,))
    channels = dict(enumerate(timm.create_model(depth, features_only=True).feature_info.channels()))
    shapes = {f"backbone.backbone.body.{name}": tensor.shape for name, tensor in body.state_dict().items()}
    dim = 256
    token_dim = dim if len(strides) == 1 else dim - 4
    shapes["perceiver.encoder.latents"] = (latents, dim)

    def linear(name: str, out: int = dim, inner: int = dim) -> None:
        shapes.update({f"{name}.weight": (out, inner), f"{name}.bias": (out,)})

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})

    def attention(name: str) -> None:
        for part in ("k", "q", "v", "projection"):
            linear(f"{name}.{part}")

    def layer(name: str, norms: tuple[str, ...]) -> None:
        for part in norms:
            norm(f"{name}.{part}")
        attention(f"{name}.attention")
        linear(f"{name}.mlp.mlp.0")
        linear(f"{name}.mlp.mlp.2")

    cross_norms = ("kv_layer_norm", "q_layer_norm", "qkv_layer_norm")
    layer("perceiver.encoder.cross_attn", cross_norms)
    for index in range(layers):
        layer(f"perceiver.encoder.self_attention_block.{index}", ("layer_norm", "qkv_layer_norm"))
    for index in range(decoder_layers):
        attention(f"perceiver.decoder.layers.{index}.partial_self_attention")
        norm(f"perceiver.decoder.layers.{index}.norm1")
        layer(f"perceiver.decoder.layers.{index}.cross_attention", cross_norms)
    if decoder_layers:
        norm("perceiver.decoder.norm")
    else:
        layer("perceiver.decoder.cross_attention", cross_norms)
    linear("class_embed", out=classes + 1)
    for index, out in enumerate((dim, dim, 4)):
        linear(f"bbox_embed.layers.{index}", out=out)
    shapes["query_embed.weight"] = (queries, dim)
    for index, stride in enumerate(strides):
        name = "input_proj" if len(strides) == 1 else f"input_proj.{index}"
        shapes.update({f"{name}.weight": (token_dim, channels[stages[stride]], 1, 1), f"{name}.bias": (token_dim,)})
        if len(strides) > 1:
            shapes[f"scale_embedding.{index}.weight"] = (1, 4)
    if learned:
        for axis in ("row", "col"):
            shapes[f"backbone.position_embedding.{axis}_embed.weight"] = (learned, token_dim // 2)
    return {
        name: golden_weight(name, list(shape)) for name, shape in shapes.items() if "num_batches_tracked" not in name
    }


@pytest.mark.parametrize(
    ("depth", "strides", "options", "expected"),
    [
        ("resnet18", [4], {}, {"num_latents": 6, "num_queries": 5, "num_labels": 4}),
        ("resnet34", [16], {"layers": 2}, {"num_self_attends_per_block": 2}),
        ("resnet101", [32], {"decoder_layers": 2}, {"decoder_type": "layered", "decoder_layers": 2}),
        ("resnet18", [32], {"learned": 40}, {"position_embedding_type": "learned", "num_position_embeddings": 40}),
        (
            "resnet18",
            [8, 16, 32],
            {"learned": 50, "decoder_layers": 1},
            {"position_embedding_type": "learned", "decoder_layers": 1, "num_feature_levels": 3},
        ),
    ],
)
def test_other_architectures_are_inferred(depth, strides, options, expected):
    state_dict = resnet_state_dict(depth, strides, **options)
    model = load_original(state_dict, num_blocks=1)
    assert model.config.backbone_config.backbone == depth
    assert model.config.feature_strides == strides
    for field, value in expected.items():
        assert getattr(model.config, field) == value, field
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).logits.isfinite().all()


def test_learned_positions_come_in_the_original_order():
    """Columns (x) in the first half of the channels, rows (y) in the second, as in DETR."""
    model = load_original(resnet_state_dict("resnet18", [32], learned=40), num_blocks=1)
    embedding = model.model.input_adapter.position_embedding
    encoded = embedding(torch.zeros(1, 256, 3, 5), None)
    assert encoded.shape == (1, 256, 3, 5)
    x_table = golden_weight("backbone.position_embedding.col_embed.weight", [40, 128])
    y_table = golden_weight("backbone.position_embedding.row_embed.weight", [40, 128])
    torch.testing.assert_close(encoded[0, :128, 2, 4], x_table[4])
    torch.testing.assert_close(encoded[0, 128:, 2, 4], y_table[2])


def test_dilated_backbone_is_that_of_torchvision():
    """The authors used torchvision's ResNet with `replace_stride_with_dilation`; timm's must compute the same."""
    from torchvision.models import resnet50

    state_dict = resnet_state_dict("resnet50", [32])
    body = {name.removeprefix("backbone.backbone.body."): t for name, t in state_dict.items() if ".body." in name}
    reference = resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    reference.load_state_dict(body, strict=False)
    model = load_original(state_dict, num_blocks=1, dilation=True)
    x = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        for stage in (reference.layer1, reference.layer2, reference.layer3, reference.layer4):
            features = stage(features)
        ((ours, _),) = model.model.backbone(x)
    assert ours.shape == (1, 2048, 6, 4)
    torch.testing.assert_close(ours, features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nesting", ["plain", "lightning", "ddp"])
def test_all_forms_of_a_source_are_read(tmp_path, nesting):
    state_dict = resnet_state_dict("resnet18", [32])
    state_dict["criterion.empty_weight"] = torch.ones(5)
    expected = load_original(state_dict, num_blocks=2).state_dict()
    checkpoint = {
        "plain": state_dict,
        "lightning": {"state_dict": state_dict, "epoch": 3, "pytorch-lightning_version": "1.5.4"},
        "ddp": {"state_dict": {f"module.{name}": tensor for name, tensor in state_dict.items()}},
    }[nesting]
    path = tmp_path / "model.ckpt"
    torch.save(checkpoint, path)
    for source in (path, str(path), checkpoint):
        model = load_original(source, num_blocks=2)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        assert not model.training


def test_converted_model_round_trips_through_a_directory(tmp_path):
    model = load_original(resnet_state_dict("resnet18", [16]), num_blocks=2)
    model.save_pretrained(tmp_path)
    reloaded, report = DePerceiverForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert reloaded.config.num_blocks == 2
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"transformer.encoder.layers.0.linear1.weight": torch.ones(2, 2)}, "looks like DETR"),
        (lambda s: {}, "not a checkpoint of a DePerceiver"),
        (lambda s: {**s, "extra.weight": torch.ones(1)}, r"1 are unknown \(such as \['extra.weight'\]"),
        (lambda s: {k: v for k, v in s.items() if k != "class_embed.bias"}, "1 weights are missing"),
        (lambda s: {**s, "class_embed.bias": torch.ones(9)}, "1 have another shape"),
        (lambda s: {**s, "input_proj.weight": torch.ones(256, 33, 1, 1)}, "reads 33 channels"),
        (lambda s: {"state_dict": {"a": 1}}, "holds no state dict"),
    ],
)
def test_other_files_are_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message):
        load_original(change(resnet_state_dict("resnet18", [32])))


def test_arguments_that_contradict_the_weights_are_refused():
    state_dict = resnet_state_dict("resnet18", [32])
    with pytest.raises(ValueError, match="sine positions"):
        load_original(state_dict, position_embedding_type="learned")
    with pytest.raises(ValueError, match="not fields of DePerceiverConfig"):
        load_original(state_dict, number_of_blocks=3)


class NotATensor:
    """Something that only an unsafe load would bring back."""


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        load_original(tmp_path / "nothing.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt cannot be read"):
        load_original(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": NotATensor()}, tmp_path / "unsafe.ckpt")
    with pytest.raises(ValueError, match="weights alone"):
        _read_state_dict(tmp_path / "unsafe.ckpt")


def test_labels_and_backbone_of_the_caller_replace_the_inferred_ones():
    state_dict = resnet_state_dict("resnet18", [32], classes=91)
    names = {index: f"kind {index}" for index in range(91)}
    config = load_original(state_dict, num_blocks=1, id2label=names).config
    assert config.id2label == names
    assert config.label2id["kind 17"] == 17
    assert "person" not in config.label2id
    backbone = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [4]}
    assert load_original(state_dict, num_blocks=1, backbone_config=backbone).config.id2label[1] == "person"
