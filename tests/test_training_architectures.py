# SPDX-License-Identifier: Apache-2.0
"""Every architecture that can be trained: it learns, is saved as transformers' own, and is read back as it was."""

import copy
import math
import re

import pytest
import timm
import torch
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

import deperceiver_hf
from deperceiver_hf.data import load_detection_data
from deperceiver_hf.errors import UserError
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
from deperceiver_hf.training.architectures.backbones import backbone_of
from deperceiver_hf.training.architectures.distribution_loss import _distribution_loss
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


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in GROUPS])
def test_backbone_weights_come_from_a_file_and_early_stages_keep_them(tmp_path, architecture):
    weights = timm.create_model("test_resnet", features_only=True).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    model = make(
        architecture,
        tmp_path,
        no_pretrained_backbone=False,
        pretrained_backbone=str(tmp_path / "weights.safetensors"),
    )
    loaded = {re.sub(r".*\.model\.(_backbone\.)?", "", name): p for name, p in backbone_parameters(model).items()}
    assert loaded.keys() == {name for name in weights if name.endswith(("weight", "bias")) and name in loaded} != set()
    assert all(torch.equal(weights[name], parameter) for name, parameter in loaded.items())
    assert {name for name, p in loaded.items() if p.requires_grad} == {
        name for name in loaded if name.startswith(("layer2", "layer3", "layer4"))
    }
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone_of(model).modules())


@torch.no_grad()
@pytest.mark.parametrize("architecture", GROUPS)
def test_vision_transformer_of_timm_gives_its_features(tmp_path, architecture):
    """Without windows, layers of the weights of a timm model do what timm's do, in LW-DETR without a class token."""
    torch.manual_seed(1)
    source = timm.create_model("test_vit").eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    weights = {"no_pretrained_backbone": False, "pretrained_backbone": str(tmp_path / "weights.safetensors")}
    model = make(architecture, tmp_path, **weights).eval()
    names = {name for name, _ in model.named_parameters() if ".backbone.backbone." in name}
    assert {*backbone_parameters(model)} == names
    assert all(parameter.requires_grad for parameter in model.parameters())

    is_lw, backbone = architecture == "lw_detr", backbone_of(model)
    config = copy.deepcopy(backbone.config)
    config.num_windows, config.window_block_indices = 16 if is_lw else 1, []
    whole = type(backbone)(config).eval()
    whole.load_state_dict(backbone.state_dict())
    cells = 8 if is_lw else 10  # those of LW-DETR are a multiple of its windows
    pixels = torch.randn(2, 3, 16 * cells, 16 * cells)
    of_class, positions = source.pos_embed[:, :1], source.pos_embed[:, 1:]
    positions = positions.transpose(1, 2).unflatten(2, (10, 10))
    positions = torch.nn.functional.interpolate(positions, size=(cells, cells), mode="bicubic", align_corners=False)
    states = (source.patch_embed.proj(pixels) + positions).flatten(2).transpose(1, 2)
    if not is_lw:
        states = torch.cat([(source.cls_token + of_class).expand(2, -1, -1), states], dim=1)
    expected = []
    for layer, block in enumerate(source.blocks):
        states = block(states)
        if layer in (1, 3, 5):
            features = states if is_lw else source.norm(states)[:, 1:]
            expected.append(features.transpose(1, 2).unflatten(2, (cells, cells)))
    for ours, theirs in zip(whole(pixels).feature_maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(backbone(pixels).feature_maps[-1], expected[-1], atol=1e-4)  # windows make a difference


@pytest.mark.parametrize("architecture", GROUPS)
@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("test_resnet", "test_resnet is no plain vision transformer .* backbone of its own"),
        ("test_vit2", "test_vit2 is no plain vision transformer with a class token"),
        ("vit_gigantic", "timm has no model 'vit_gigantic'"),
    ],
)
def test_backbones_that_are_no_plain_vision_transformers_are_refused(tmp_path, architecture, backbone, message):
    with pytest.raises(UserError, match=message):
        make(architecture, tmp_path, backbone=backbone)


def test_weights_of_a_larger_vision_transformer_are_refused(tmp_path):
    weights = timm.create_model("test_vit", embed_dim=32).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="do not fit the backbone of 6 layers"):
        make(
            "rf_detr",
            tmp_path,
            no_pretrained_backbone=False,
            pretrained_backbone=str(tmp_path / "weights.safetensors"),
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fine_tuning_with_other_classes(tmp_path, architecture):
    tiny = TINY_ARCHITECTURES[architecture]
    saved = make(architecture, tmp_path)
    source = save(saved, tiny_options(tmp_path, tiny), tmp_path / "saved")
    options = tiny_options(tmp_path, {"model": source}, num_queries=14, bbox_loss_coef=4.0)
    model = build_model(options, ["one", "two"])
    assert type(model) is type(saved)
    assert (model.config.num_labels, model.config.num_queries) == (2, 14)
    build_model(tiny_options(tmp_path, {"model": source, "architecture": architecture}), NAMES)
    other = "detr" if architecture != "detr" else "d_fine"
    with pytest.raises(ValueError, match=f"is a {architecture}, not a {other}"):
        build_model(tiny_options(tmp_path, {"model": source, "architecture": other}), NAMES)
    before, after = saved.state_dict(), model.state_dict()
    fresh = {name for name in before.keys() & after.keys() if before[name].shape != after[name].shape}
    assert fresh
    of_classes_or_queries = ("class", "score", "label", "quer", "reference_point")
    assert all(any(part in name for part in of_classes_or_queries) for name in fresh)
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


@pytest.mark.parametrize("architecture", [name for name in TRANSFORMERS_OWN[1:] if name not in DISTRIBUTIONS])
def test_loss_is_that_of_transformers(tmp_path, architecture):
    model = make(architecture, tmp_path).train()
    own = getattr(transformers, type(model).__name__)(model.config)
    if architecture not in GROUPS:
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


@pytest.mark.parametrize("architecture", DISTRIBUTIONS)
def test_every_prediction_learns_from_its_own_box(tmp_path, architecture):
    """Of three layers the second has found the box: its distribution alone is taught where the edges are, and the
    first prediction, which has none, does not shift that to another layer."""
    kind = ARCHITECTURES[architecture]
    config = make(architecture, tmp_path, dec_layers=3, config=["weight_loss_ddf=0"]).config
    logits, box = torch.zeros(1, 4, 5, 3), torch.tensor([0.5, 0.5, 0.2, 0.2])
    boxes = torch.full((1, 4, 5, 4), 0.05)
    boxes[:, 2] = 1.01 * box
    references = box.repeat(1, 3, 5, 1) * torch.tensor([1, 1, 0.9, 0.9])
    corners = torch.zeros(1, 3, 5, 4 * (config.max_num_bins + 1), requires_grad=True)
    for part in (logits, boxes):
        part.requires_grad_()
    labels = [{"class_labels": torch.tensor([1]), "boxes": box[None]}]

    def loss_of(denoising, classes=logits, coordinates=boxes):
        return _distribution_loss(
            kind.model_class.criterion_class,
            classes[:, -1],
            labels,
            torch.device("cpu"),
            coordinates[:, -1],
            config,
            classes,
            coordinates,
            torch.zeros(1, 5, 3),
            torch.full((1, 5, 4), 0.05),
            denoising,
            corners,
            references,
        )

    loss_of(None)[0].backward()
    assert [bool(gradient.any()) for gradient in corners.grad[0]] == [False, True, False]
    assert all(gradient.any() for part in (logits, boxes) for gradient in part.grad[0])
    # With two denoising queries before three others, every prediction for both has its terms.
    for part in (logits, boxes, corners):
        part.grad = None
    split = {"dn_positive_idx": [torch.tensor([0])], "dn_num_group": 1, "dn_num_split": [2, 3]}
    loss, terms, _ = loss_of(split)
    loss.backward()
    restored = {name for name in terms if "_dn_" in name}
    assert {name.rsplit("_", 1)[1] for name in restored} == {"0", "1", "2", "3"}
    assert logits.grad[0, :, :2].flatten(1).any(1).all()
    assert boxes.grad[0, :, 0].any(1).all()
    assert [bool(gradient.any()) for gradient in corners.grad[0, :, 0]] == [False, True, False]


@pytest.mark.parametrize("architecture", DISTRIBUTIONS)
def test_predictions_are_the_same_as_transformers(tmp_path, architecture):
    model = make(architecture, tmp_path).eval()
    outputs = model(pixel_values=torch.randn(1, 3, 64, 64), labels=targets()[:1])
    assert outputs.loss.isfinite()
    assert {"loss_bbox", "loss_giou"} < outputs.loss_dict.keys()


@pytest.mark.parametrize("architecture", GROUPS)
def test_groups_of_queries_are_of_training_only(tmp_path, architecture):
    model, pixels = make(architecture, tmp_path), torch.randn(1, 3, 64, 64)
    queries = {mode: model.train(mode)(pixel_values=pixels).logits.shape[1] for mode in (True, False)}
    assert queries == {True: 13 * 12, False: 12}
    with torch.no_grad():
        alone = model.eval()(pixel_values=pixels, labels=targets()[:1])
        assert alone.loss.isfinite()
        # All groups alike have the loss of one.
        for embedding in (model.model.query_feat, model.model.reference_point_embed):
            embedding.weight.copy_(embedding.weight[:12].repeat(13, 1))
        for part in (model.model.enc_output, model.model.enc_output_norm):
            for each in part:
                each.load_state_dict(part[0].state_dict())
        together = model.train()
        for module in together.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        torch.testing.assert_close(together(pixel_values=pixels, labels=targets()[:1]).loss, alone.loss)


@pytest.mark.parametrize("architecture", GROUPS)
def test_layers_behind_the_features_of_a_saved_model_are_frozen(tmp_path, architecture):
    model = make(architecture, tmp_path).train()
    model.config.backbone_config.out_indices = [2, 4]  # of six layers, as of a detector that counts the embeddings
    model = type(model)(model.config).train()
    ARCHITECTURES[architecture].prepare_saved(model)
    model(pixel_values=torch.randn(2, 3, 64, 64), labels=targets()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(".layer.3." in name for name in trained)
    assert not any(f".layer.{layer}." in name for layer in (4, 5) for name in trained)


@pytest.mark.parametrize("architecture", GROUPS)
def test_certain_scores_have_a_finite_loss(tmp_path, architecture):
    model = make(architecture, tmp_path).train()
    with torch.no_grad():
        model.class_embed.bias[:] = torch.tensor([120.0, -120.0, 20.0])
    outputs = model(pixel_values=torch.randn(2, 3, 64, 64), labels=targets())
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("architecture", GROUPS)
def test_groups_start_as_the_authors_let_them(tmp_path, architecture):
    model = make(architecture, tmp_path, hidden_dim=64)
    assert not model.bbox_embed.layers[-1].weight.any()
    assert (model.class_embed.bias == -math.log(99)).all()
    for one, others in (
        (model.class_embed, model.model.enc_out_class_embed),
        (model.bbox_embed, model.model.enc_out_bbox_embed),
    ):
        assert len(others) == 13
        for name, tensor in one.state_dict().items():
            assert all(torch.equal(tensor, other.state_dict()[name]) for other in others)
    assert not model.model.reference_point_embed.weight.any()
    assert 0.9 < model.model.query_feat.weight.std() < 1.1
    layer = model.model.decoder.layers[0]
    for linear, spread in (
        (layer.mlp.fc1, (2 / sum(layer.mlp.fc1.weight.shape)) ** 0.5),
        (layer.self_attn.q_proj, (1 / 128) ** 0.5),
        (layer.self_attn.o_proj, (2 / 128) ** 0.5),
        (model.model.enc_output[5], (2 / 128) ** 0.5),
    ):
        assert 0.9 < linear.weight.std() / spread < 1.1
    convolutions = [m for n, m in model.named_modules() if ".projector." in n and isinstance(m, torch.nn.Conv2d)]
    for convolution in convolutions:  # uniform in +-1/sqrt(inputs)
        assert convolution.weight.abs().max() > 0.8 * convolution.weight[0].numel() ** -0.5
    norms = [each for each in model.modules() if "Norm" in type(each).__name__ and hasattr(each, "weight")]
    assert norms
    assert all((norm.weight == 1).all() for norm in norms)


@pytest.mark.parametrize("architecture", GROUPS)
def test_boxes_start_on_the_cells_of_the_image_without_its_padding(tmp_path, architecture):
    model = make(architecture, tmp_path).eval()
    pixels, mask = torch.randn(1, 3, 128, 128), torch.zeros(1, 128, 128)
    mask[:, :96, :64] = 1  # 6 x 4 cells of 16 pixels
    boxes = model(pixel_values=pixels, pixel_mask=mask).pred_boxes[0]
    cells = boxes[:, :2] * torch.tensor([4, 6]) - 0.5
    torch.testing.assert_close(cells, cells.round())
    assert torch.equal(cells.round().long().amax(0) <= torch.tensor([3, 5]), torch.tensor([True, True]))


@pytest.mark.parametrize(
    ("architecture", "size", "queries", "message"),
    [
        ("lw_detr", (64, 96), 12, "64 x 96 pixels.* takes images with sides that are multiples of 64"),
        ("rf_detr", (64, 96), 12, "64 x 96 pixels.* takes square images with sides that are multiples of 32"),
        ("rf_detr", (80, 80), 12, "multiples of 32"),
        ("lw_detr", (64, 64), 17, "16 cells to pick 17 queries"),
        ("rf_detr", (64, 64), 17, "16 cells to pick 17 queries"),
    ],
)
def test_images_that_windows_do_not_divide_are_refused(tmp_path, architecture, size, queries, message):
    model = make(architecture, tmp_path, num_queries=queries)
    with pytest.raises(UserError, match=message):
        model(pixel_values=torch.randn(1, 3, *size), labels=targets()[:1])


@pytest.mark.parametrize(("architecture", "side"), [("lw_detr", 128), ("rf_detr", 96)])
def test_images_of_any_shape_are_padded_to_what_windows_divide(tmp_path, architecture, side):
    fixed = {"shortest_edge": None, "fixed_size": [60, 90]}
    processor = build_image_processor(tiny_options(tmp_path, TINY_ARCHITECTURES[architecture], **fixed))
    assert dict(processor.pad_size) == {"height": 64 if architecture == "lw_detr" else side, "width": side}
    options = tiny_options(tmp_path, TINY_ARCHITECTURES[architecture], shortest_edge=60, longest_edge=90)
    processor = build_image_processor(options)
    assert dict(processor.pad_size) == {"height": side, "width": side}
    batch = processor(images=[torch.zeros(3, 40, 60, dtype=torch.uint8)], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, side, side)
    model = make(architecture, tmp_path)
    outputs = model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], labels=targets()[:1])
    assert outputs.loss.isfinite()
    # A saved one is given the padding of the size that it is trained on with.
    source = save(model, options, tmp_path / "saved")
    larger = build_image_processor(tiny_options(tmp_path, {"model": source}, shortest_edge=130, longest_edge=130))
    assert dict(larger.pad_size) == {"height": 192 if architecture == "lw_detr" else 160} | {
        "width": 192 if architecture == "lw_detr" else 160
    }


@pytest.mark.parametrize("architecture", HYBRID)
def test_layers_without_a_special_start_begin_as_those_of_torch(tmp_path, architecture):
    model = make(architecture, tmp_path)
    hidden = model.model.decoder.layers[0].fc1 if hasattr(model.model.decoder.layers[0], "fc1") else None
    layers = [hidden] if hidden is not None else []
    layers += [m for n, m in model.model.decoder.named_modules() if n == "query_pos_head.layers.1"]
    assert layers
    for layer in layers:  # uniform in +-1/sqrt(inputs)
        assert layer.weight.abs().max() > 0.8 * layer.in_features**-0.5
    for head in [*model.model.decoder.bbox_embed, model.model.enc_bbox_head]:
        assert not head.layers[-1].weight.any()
    if architecture in DISTRIBUTIONS:
        assert not model.model.decoder.pre_bbox_head.layers[-1].weight.any()
    classes = model.model.denoising_class_embed.weight
    assert 0.7 < classes[:-1].std() < 1.3
    assert not classes[-1].any()
    for head in [*model.model.decoder.class_embed, model.model.enc_score_head]:
        assert (head.bias == -math.log(99)).all()


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
    with torch.no_grad():
        for parameter in model.parameters():  # a new model leaves boxes on anchors, which are round numbers
            if not parameter.any():
                parameter.normal_(std=0.1)
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
GROUP_FIELDS = {
    **{"d_model": 32, "decoder_layers": 3, "decoder_ffn_dim": 2048, "decoder_n_points": 2, "num_labels": 3},
    **{"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 8, "group_detr": 13, "num_queries": 9},
    **{"num_feature_levels": 1, "dropout": 0.3, "bbox_cost": 3, "auxiliary_loss": True, "focal_alpha": 0.25},
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
    "deimv2": {**HYBRID_FIELDS, "focal_loss_gamma": 1.5},
    "lw_detr": GROUP_FIELDS,
    "rf_detr": GROUP_FIELDS,
}


@pytest.mark.parametrize("architecture", FIELDS)
def test_options_reach_the_configuration(tmp_path, architecture):
    options = tiny_options(tmp_path, TINY_ARCHITECTURES[architecture], **COMMON)
    config = ARCHITECTURES[architecture].make_config(options, NAMES)
    assert {name: getattr(config, name) for name in FIELDS[architecture]} == FIELDS[architecture]
    backbone = config.backbone_config
    assert backbone.out_indices == ([2, 4, 6] if architecture in GROUPS else [2, 3, 4])
    if architecture in GROUPS:
        measures = (backbone.hidden_size, backbone.num_attention_heads, backbone.mlp_ratio, backbone.patch_size)
        assert measures == (64, 2, 3, 16)


@pytest.mark.parametrize("architecture", FIELDS)
def test_what_is_not_given_is_the_default(tmp_path, architecture):
    options = tiny_options(tmp_path, {"architecture": architecture, "no_pretrained_backbone": True})
    config = ARCHITECTURES[architecture].make_config(options, NAMES)
    defaults = ARCHITECTURES[architecture].model_class.config_class()
    ours = {"with_box_refine", "auxiliary_loss", "freeze_batch_norm", "frozen_backbone_stages", "_commit_hash"}
    ours |= {"freeze_backbone_batch_norms", "id2label", "label2id", "backbone_config", "dtype"}
    of_papers = {
        **{"deformable_detr": {"class_cost"}, "deimv2": {"focal_loss_gamma"}},
        **{"lw_detr": {"projector_scale_factors", "decoder_n_points", "num_feature_levels", "projector_in_channels"}},
        **{"rf_detr": {"decoder_n_points", "dropout"}, "deperceiver_v2": {"min_token_share"}},  # of the preset
    }
    ours |= of_papers.get(architecture, set())
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
        ({"architecture": "deimv2", "no_aux_loss": True}, "--no_aux_loss"),
        ({"architecture": "lw_detr", "enc_layers": 2}, "--enc_layers"),
        ({"architecture": "rf_detr", "position_embedding": "sine"}, "--position_embedding"),
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
    config = kind.plain_config(7, backbone=TINY_ARCHITECTURES[architecture]["backbone"], num_queries=12)
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


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine", "deimv2"])
def test_a_backbone_whose_norms_activate_keeps_its_activations(tmp_path, name):
    """In training, in a saved model of transformers' own class, and in one that is trained on; norms are frozen."""
    source = timm.create_model("test_efficientnet").eval()
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    weights = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), weights)
    extractor = timm.create_model("test_efficientnet", features_only=True, out_indices=(2, 3, 4)).eval()
    extractor.load_state_dict(source.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    expected = extractor(images)

    options = {**TINY_ARCHITECTURES[name], "backbone": "test_efficientnet", "no_pretrained_backbone": False}
    options["pretrained_backbone"] = str(weights)
    same = {"lr_backbone": 0.0, "dataset": SCENES, "augmentation": "flip"}
    run = DetectionTrainer(tiny_options(tmp_path / "run", options, epochs=1, **same))
    run.train()
    again = tiny_options(tmp_path / "again", {"model": str(tmp_path / "run" / "last")}, **same)
    plain = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "run" / "last")
    for model in (run.model, DetectionTrainer(again).model, plain):
        encoder = getattr(model.model, "conv_encoder", None) or model.model.backbone
        for found, wanted in zip(encoder.model(images).feature_maps, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
def test_a_backbone_that_would_lose_its_activations_is_refused(tmp_path, name):
    options = {**TINY_ARCHITECTURES[name], "backbone": "test_efficientnet"}
    with pytest.raises(UserError, match="holds its activations in its batch norms"):
        build_model(tiny_options(tmp_path, options), ["disc"])
