# SPDX-License-Identifier: Apache-2.0
"""The token encoder of the second edition, its box steps, and the dials of what a prediction costs."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from conftest import tiny_v2_config, tiny_v2_model
from deperceiver_hf import DePerceiverV2ForObjectDetection
from deperceiver_hf.benchmarks.cost import count_cost
from deperceiver_hf.models import token_encoder_deperceiver_v2 as encoder
from deperceiver_hf.models.tokens_deperceiver_v2 import (
    POOLED_AROUND,
    locate_tokens,
    logit_step,
    pool_tokens,
    rank_tokens,
    relative_step,
)
from test_modeling import padding_below_and_right

DIALS = {"half the tokens": {"token_share": 0.5}, "one block": {"num_blocks": 1}, "four queries": {"num_queries": 4}}


def with_statistics(model: nn.Module) -> nn.Module:
    """The same model with batch norms as after a training."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


# --- token encoder


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_an_image_means_the_same_alone_and_padded(share):
    """With a fusion that has learned, and with tokens left out: at most as many as in the image alone."""
    model = with_statistics(tiny_v2_model(feature_strides=[8, 16, 32], token_share=share))
    image = torch.randn(1, 3, 97, 130, generator=torch.Generator().manual_seed(2))
    padded, mask = padding_below_and_right(image, 150, 200)
    other = torch.randn(1, 3, 150, 200, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        alone = model(image)
        batch = model(torch.cat((padded, other)), torch.cat((mask, torch.ones_like(mask))))
    torch.testing.assert_close(batch.logits[:1], alone.logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(batch.pred_boxes[:1], alone.pred_boxes, rtol=0, atol=2e-5)


def test_every_map_hears_of_every_other():
    """Of a change in one cell of any level, all levels know, and the coarsest in every cell."""
    config = tiny_v2_config(feature_strides=[8, 16, 32])
    torch.manual_seed(0)
    fusion = encoder.DePerceiverV2Fusion(config, [4, 6, 8], [8, 16, 32])
    for module in fusion.modules():  # `PreTrainedModel` starts them in a model
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    fusion = with_statistics(fusion).eval()
    maps = [torch.randn(1, channels, 32 // stride, 32 // stride) for channels, stride in ((4, 1), (6, 2), (8, 4))]
    with torch.no_grad():
        before = fusion([(features, None) for features in maps])
        assert [features.shape for features, _ in before] == [(1, 16, side, side) for side in (32, 16, 8)]
        for level in range(3):
            changed = [features.clone() for features in maps]
            changed[level][..., 0, 0] += 1
            after = fusion([(features, None) for features in changed])
            for (one, _), (other, _) in zip(before, after, strict=True):
                assert not torch.equal(one, other)
        assert ((after[-1][0] - before[-1][0]).abs().amax(1) > 0).all()


@pytest.mark.parametrize(
    "fields",
    [{"feature_strides": [8, 32]}, {"feature_strides": [8, 16, 32], "dilation": True, "backbone": "resnet18"}],
    ids=["a level left out", "dilation"],
)
def test_levels_that_are_not_half_of_one_another_stay_in_place(fields):
    """What is shrunk has the size of the map that it is fused with."""
    model = tiny_v2_model(**fields)
    sizes = []
    for block in model.model.token_encoder.bottom_up:
        block.register_forward_pre_hook(lambda _, args: sizes.append((args[0].shape[-2:], args[1].shape[-2:])))
    uncut = []
    for shrink in model.model.token_encoder.shrink:
        shrink.register_forward_hook(lambda _, args, output: uncut.append(output.shape[-2:]))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96))
    assert [one for one, _ in sizes] == [other for _, other in sizes] == uncut


def test_sides_that_a_backbone_rounds_down_fit():
    fusion = encoder.DePerceiverV2Fusion(tiny_v2_config(), [4, 6], [8, 16]).eval()
    maps = [(torch.randn(2, 4, 9, 7), None), (torch.randn(2, 6, 4, 3), None)]
    assert [features.shape[-2:] for features, _ in fusion(maps)] == [(9, 7), (4, 3)]


@pytest.mark.parametrize("masked", [False, True])
def test_above_its_ceiling_attention_reads_means_of_squares(monkeypatch, masked):
    """As many as fit, and of real cells only; squares of one cell are the cells themselves."""
    attention = encoder.DePerceiverV2CellAttention(tiny_v2_config()).eval()
    features = torch.randn(1, 16, 12, 10)
    mask = torch.ones(1, 12, 10, dtype=torch.bool)
    if masked:
        mask[:, 7:], mask[:, :, 9:] = False, False
    given = mask if masked else None
    seen = []
    attention.attention.register_forward_pre_hook(lambda _, args: seen.append(args[1].shape[1]))
    with torch.no_grad():
        full = attention(features, given)
        monkeypatch.setattr(encoder, "MOST_CELLS", 119)
        few = attention(features, given)
    assert seen == [120, 30]
    assert full.shape == few.shape
    assert 0 < (full - few).abs().max() < 1

    means, real = encoder.mean_cells(features, given, 2)
    rows = features[0].permute(1, 2, 0)
    for place, mean in enumerate(means[0]):
        y, x = 2 * (place // 5), 2 * (place % 5)
        cells = rows[y : y + 2, x : x + 2][mask[0, y : y + 2, x : x + 2]]
        assert (real is None) or bool(real[0, place]) == bool(len(cells))
        if len(cells):
            torch.testing.assert_close(mean, cells.mean(0))


def test_cost_of_the_fusion_has_a_ceiling(monkeypatch):
    """Four times the image costs at most four times as much, once the ceiling is reached."""
    monkeypatch.setattr(encoder, "MOST_CELLS", 64)

    def make():
        return DePerceiverV2ForObjectDetection._from_config(
            tiny_v2_config(feature_strides=[8, 16, 32]), attn_implementation="eager"
        )

    small, large = (count_cost(make, 32 * side, 32 * side).flops_after_backbone for side in (16, 32))
    assert large <= 4 * small


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion_dim": 18}, "`fusion_dim` .18. must be a multiple of 4"),
        ({"fusion_dim": 0}, "`fusion_dim`"),
        ({"token_encoder": "pan"}, "token_encoder"),
        ({"box_steps": "absolute"}, "box_steps"),
        ({"num_blocks": 3}, "`num_blocks` must be from 1 to the number of blocks, 2, not 3"),
        ({"num_blocks": 0}, "`num_blocks` must be"),
        ({"token_share": 0.0}, "`token_share` must be more than 0"),
        ({"token_share": 1.5}, "`token_share` must be more than 0"),
        ({"min_token_share": -0.1}, "`min_token_share` must be more than 0"),
        ({"token_share": 0.5, "query_selection": False}, "`query_selection=False`"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_v2_config(**fields)


# --- box steps


def test_relative_steps_are_parts_of_the_sides():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.1], [0.1, 0.9, 0.001, 0.4]])
    steps = torch.tensor([[0.5, -1.0, math.log(2), 0.0], [1.0, 0.25, 0.0, math.log(0.5)]])
    expected = torch.tensor([[0.6, 0.4, 0.4, 0.1], [0.101, 1.0, 0.001, 0.2]])
    torch.testing.assert_close(relative_step(boxes, steps), expected)
    assert torch.equal(relative_step(boxes, torch.zeros_like(steps)), boxes)
    torch.testing.assert_close(logit_step(boxes, torch.zeros_like(steps)), boxes)
    wild = relative_step(boxes, 1e4 * torch.randn(2, 4))
    assert ((wild >= 0) & (wild <= 1)).all()
    assert (wild[:, 2:] > 0).all()
    outside = torch.tensor([[9.0, -9.0, 9.0, 0.0]], requires_grad=True)
    relative_step(boxes[:1], outside)[..., :2].sum().backward()
    torch.testing.assert_close(outside.grad, torch.tensor([[0.2, 0.1, 0.0, 0.0]]))


# --- dials


def test_ranks_are_those_of_a_loop():
    shapes = [(6, 9), (3, 5), (2, 3)]
    scores = torch.randn(2, sum(height * width for height, width in shapes))
    ranks = rank_tokens(scores, shapes)
    maps = [
        part.view(2, *shape)
        for part, shape in zip(scores.split([math.prod(shape) for shape in shapes], 1), shapes, strict=True)
    ]
    reach = POOLED_AROUND // 2

    def rank(level: int, image: int, y: int, x: int) -> float:
        around = maps[level][image, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        here = around.max() + 0.01 * maps[level][image, y, x]
        return here + (rank(level + 1, image, y // 2, x // 2) if level < 2 else 0)

    for level, (height, width) in enumerate(shapes):
        expected = [[rank(level, i, y, x) for y in range(height) for x in range(width)] for i in range(2)]
        torch.testing.assert_close(ranks[level], torch.tensor(expected))


def test_the_nearest_tokens_are_kept_with_their_places():
    maps = [(torch.zeros(1, 4, side, side), None) for side in (8, 4)]
    geometry = locate_tokens(maps, [8, 16], (64, 64), None)
    tokens = torch.arange(80.0)[None, :, None].expand(1, -1, 3)
    scores = torch.full((1, 80), -5.0)
    scores[0, 9] = 3.0  # row 1, column 1 of the finest level
    kept, positions, pooled = pool_tokens(tokens, tokens, geometry, scores, 0.25)
    assert kept.shape == (1, 16 + 16, 3)
    assert torch.equal(kept, positions)
    fine = kept[0, :16, 0].long()
    assert {(int(row) // 8, int(row) % 8) for row in fine} == {(y, x) for y in range(4) for x in range(4)}
    assert set(kept[0, 16:, 0].tolist()) == set(range(64, 80))
    rows = kept[..., 0].long()
    for name in ("centers", "cells", "grid"):
        assert torch.equal(getattr(pooled, name)[0], getattr(geometry, name)[0, rows[0]])
    assert pooled.levels.tolist() == [[0] * 16 + [1] * 16]
    assert pooled.mask is None


def test_all_tokens_read_in_another_order_are_the_same(images):
    """A share of 1 leaves the pool out; one that keeps all by rounding gives the same numbers through it."""
    model = tiny_v2_model()
    with torch.no_grad():
        expected, pooled = model(images), model(images, token_share=0.9999)
        half = model(images, token_share=0.5)
    torch.testing.assert_close(pooled.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)
    assert (half.pred_boxes - expected.pred_boxes).abs().max() > 1e-4
    assert torch.equal(half.selection_boxes, expected.selection_boxes)


@pytest.mark.parametrize("name", DIALS)
def test_a_dial_is_turned_in_a_call_in_the_configuration_and_when_loading(tmp_path, images, name):
    model = tiny_v2_model(share_key_values=True)
    model.save_pretrained(tmp_path / "full")
    with torch.no_grad():
        expected, full = model(images, **DIALS[name]), model(images)
        loaded = DePerceiverV2ForObjectDetection.from_pretrained(tmp_path / "full", **DIALS[name])
        assert torch.equal(loaded(images).logits, expected.logits)
        loaded.save_pretrained(tmp_path / "turned")
        again = DePerceiverV2ForObjectDetection.from_pretrained(tmp_path / "turned")
        assert torch.equal(again(images).logits, expected.logits)
        assert torch.equal(again(images, num_queries=9, num_blocks=2, token_share=1.0).logits, full.logits)
    assert expected.logits.shape != full.logits.shape or not torch.equal(expected.logits, full.logits)


def test_fewer_blocks_predict_what_the_blocks_said_before(images):
    model = tiny_v2_model()
    with torch.no_grad():
        all_blocks = model(images, labels=[{"class_labels": torch.tensor([0]), "boxes": torch.ones(1, 4) / 2}] * 2)
        first = model(images, num_blocks=1)
    assert torch.equal(first.pred_boxes, all_blocks.auxiliary_outputs[0]["pred_boxes"])
    assert torch.equal(first.logits, all_blocks.auxiliary_outputs[0]["logits"])


@pytest.mark.parametrize(
    ("variant", "dial", "message"),
    [
        ({}, {"num_blocks": 3}, "from 1 to the number of blocks, 2, not 3"),
        ({}, {"num_queries": 0}, "`num_queries` must be at least 1"),
        ({}, {"token_share": 0}, "more than 0 and at most 1"),
        ({"query_selection": False}, {"token_share": 0.5}, "object latents are learned"),
        ({"query_selection": False}, {"num_queries": 5}, "object latents are learned"),
    ],
)
def test_dials_that_a_model_does_not_have_are_refused(images, variant, dial, message):
    with pytest.raises(ValueError, match=message):
        tiny_v2_model(**variant)(images, **dial)


def test_training_draws_the_share_and_trains_all_blocks(images, labels):
    model = tiny_v2_model(num_blocks=1, token_share=0.5, min_token_share=0.25).train()
    tokens = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: tokens.append(args[3].shape[1]))
    for seed in range(6):
        torch.manual_seed(seed)
        loss = model(images, labels=labels).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    finest, coarsest = 8 * 12, 4 * 6
    assert len(set(tokens)) > 3
    assert all(0.25 * finest + coarsest <= count <= finest + coarsest for count in tokens)
    model.eval()(images)
    assert tokens[-1] == finest // 2 + coarsest


def test_dials_survive_export(images):
    model = tiny_v2_model(num_blocks=1, token_share=0.4, num_queries=5)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"pixel_values": {0: dynamic, 2: dynamic, 3: dynamic}}
    with torch.no_grad():
        inputs = {"pixel_values": torch.randn(2, 3, 96, 128)}
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
        for shape in ((1, 3, 64, 160), (3, 3, 130, 97)):
            pixel_values = torch.randn(shape)
            exported = program(pixel_values=pixel_values)
            torch.testing.assert_close(exported.logits, model(pixel_values).logits, rtol=0, atol=1e-5)
            assert exported.logits.shape[1] == 5
