# SPDX-License-Identifier: Apache-2.0
"""Where a head looks: the inner product of features is the Gaussian that it stands for, in every precision."""

import pytest
import torch

from conftest import tiny_v2_config
from deperceiver_hf.models.layers_deperceiver_v2 import (
    FIRST_RADIUS,
    FIRST_SIGMA,
    HIDDEN_TOKEN,
    LARGEST_OFFSET,
    MIN_SIGMA,
    DePerceiverV2CrossAttention,
    DePerceiverV2EdgeVotes,
    DePerceiverV2KeyValues,
    DePerceiverV2PositionBias,
    PositionBias,
    key_features,
    place_tokens,
    read_offsets,
    wave_features,
)
from deperceiver_hf.models.tokens_deperceiver_v2 import TokenGeometry, locate_tokens

SIZES = [(800, 1333), (1333, 750), (97, 61)]
STRIDES = [[8, 16, 32], [4, 8], [16]]
NEAR = -30.0  # a bias that is lower gives a weight of nothing


def geometry_of(size: tuple[int, int], strides: list[int], padded: tuple[int, int] | None = None) -> TokenGeometry:
    """Geometry of an image, alone or padded to a larger size."""
    canvas = padded or size
    pixel_mask = None
    if padded is not None:
        pixel_mask = torch.zeros(1, *padded)
        pixel_mask[:, : size[0], : size[1]] = 1
    maps = []
    for stride in strides:
        cells = [-(-side // stride) for side in canvas]
        mask = None if pixel_mask is None else pixel_mask[:, ::stride, ::stride].bool()
        maps.append((torch.zeros(1, 1, *cells), mask))
    return locate_tokens(maps, strides, canvas, pixel_mask)


def some_bias(geometry: TokenGeometry, num_levels: int, sigma: float | None, num_latents: int = 40) -> PositionBias:
    """Two heads of latents all over the image, corners included."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(1, 2, num_latents, 2, generator=generator)
    places[:, :, :4] = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    sigmas = torch.rand(places.shape, generator=generator) * 0.3 + MIN_SIGMA
    if sigma is not None:
        sigmas = torch.full_like(sigmas, sigma)
    levels = torch.randn(1, 2, num_latents, num_levels, generator=generator)
    size, origin = geometry.grid_size[:, None, None], geometry.grid_origin[:, None, None]
    return PositionBias(places * size - origin, sigmas * size, levels)


def gaussian_bias(bias: PositionBias, geometry: TokenGeometry) -> torch.Tensor:
    """The bias `(B, H, M, N)` written out, in float64."""
    distance = geometry.grid[:, None, None].double() - bias.centers[..., None, :].double()
    values = -(distance / bias.sigmas[..., None, :].double()).square().sum(-1) / 2
    values = values + bias.levels.double()[..., geometry.levels[0]]
    if geometry.mask is not None:
        values = values + torch.where(geometry.mask, 0.0, HIDDEN_TOKEN)[:, None, None]
    return values


def product(bias: PositionBias, geometry: TokenGeometry, dtype: torch.dtype) -> torch.Tensor:
    """The bias `(B, H, M, N)` as attention computes it: factors of `dtype`, sums in float32."""
    keys = key_features(geometry, bias.levels.shape[-1], dtype)
    queries = bias.query_features(dtype)
    assert keys.dtype == queries.dtype == dtype
    return queries.float() @ keys.float()[:, None].transpose(-2, -1)


@pytest.mark.parametrize("sigma", [MIN_SIGMA, 0.02, None])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("size", SIZES)
def test_product_of_features_is_the_gaussian(size, strides, sigma):
    geometry = geometry_of(size, strides)
    bias = some_bias(geometry, len(strides), sigma)
    expected = gaussian_bias(bias, geometry)
    near = expected > NEAR
    assert near.any()
    found = product(bias, geometry, torch.float32).double()
    # The terms that cancel each other are as large as the bias at the other end of the image.
    torch.testing.assert_close(found[near], expected[near], rtol=0, atol=5e-3)
    assert (found[~near] < NEAR + 0.01).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [MIN_SIGMA, 0.02, None])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("size", SIZES)
def test_half_precision_costs_no_more_than_a_rounded_sigma(size, strides, sigma, dtype):
    geometry = geometry_of(size, strides)
    bias = some_bias(geometry, len(strides), sigma)
    found = product(bias, geometry, dtype).double()
    rounded = PositionBias(
        bias.centers, (-0.5 / (-0.5 / bias.sigmas.square()).to(dtype).double()).sqrt(), bias.levels.to(dtype)
    )
    expected = gaussian_bias(rounded, geometry)
    near = expected > NEAR
    torch.testing.assert_close(found[near], expected[near], rtol=0, atol=0.02)
    assert (found[~near] < NEAR + 0.5).all()
    exact = gaussian_bias(bias, geometry)
    eps = torch.finfo(dtype).eps
    assert (found - exact)[near].abs().max() <= 0.02 + eps * (abs(NEAR) + bias.levels.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strides", STRIDES)
def test_padding_is_hidden_and_changes_nothing_else(strides, dtype):
    alone, padded = geometry_of((200, 333), strides), geometry_of((200, 333), strides, padded=(256, 512))
    real = padded.mask[0]
    assert real.sum() == alone.centers.shape[1]
    for name in ("centers", "cells", "grid"):
        torch.testing.assert_close(getattr(padded, name)[:, real], getattr(alone, name), rtol=0, atol=0)
    bias = some_bias(alone, len(strides), None)
    found = product(bias, padded, dtype)
    torch.testing.assert_close(found[..., real], product(bias, alone, dtype), rtol=0, atol=1e-3)
    assert (found[..., ~real] < found[..., real].amax(-1, keepdim=True) - 1000).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sigma", "sigma_error"), [(MIN_SIGMA, 0.5), (0.02, 0.1), (0.1, 0.03), (0.3, 0.01)])
@pytest.mark.parametrize("strides", STRIDES)
def test_gradients_in_half_precision_are_those_of_float32(strides, sigma, sigma_error, dtype):
    """That of a sigma is a difference of large numbers, which rounding makes noisy where the Gaussian is narrow."""
    geometry = geometry_of((800, 1333), strides)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(geometry.centers.shape[1], 16, generator=generator)
    direction = 100 * torch.randn(1, 2, 60, 16, generator=generator)

    def gradients(precision):
        leaves = [part.clone().requires_grad_() for part in some_bias(geometry, len(strides), sigma, num_latents=60)]
        read = product(PositionBias(*leaves), geometry, precision).softmax(-1) @ values
        (read * direction).sum().backward()
        return [leaf.grad for leaf in leaves]

    errors = [
        ((found - expected).norm() / expected.norm()).item()
        for found, expected in zip(gradients(dtype), gradients(torch.float32), strict=True)
    ]
    assert errors[0] < 0.01
    assert errors[1] < sigma_error
    if len(strides) > 1:  # a single level has no gradient
        assert errors[2] < 0.01


def test_heads_of_a_new_model_look_at_the_box():
    config = tiny_v2_config(d_model=32, num_attention_heads=4)
    module = DePerceiverV2PositionBias(config)
    module.start()
    geometry = geometry_of((64, 96), [8, 16])
    boxes = torch.tensor([[[0.5, 0.25, 0.2, 0.1]]])
    bias = module(torch.randn(1, 1, 32), boxes, geometry)
    pixels = (bias.centers + geometry.grid_origin) * 4  # half a finest cell
    circle = FIRST_RADIUS * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    half_sides = torch.tensor([0.1, 0.05])
    size = torch.tensor([96, 64])
    torch.testing.assert_close(pixels[0, :, 0], (torch.tensor([0.5, 0.25]) + circle * half_sides) * size)
    expected = (FIRST_SIGMA * half_sides + MIN_SIGMA) * size / 4
    torch.testing.assert_close(bias.sigmas[0, :, 0], expected.expand(4, -1))
    assert not bias.levels.any()


def test_position_bias_is_float32_under_autocast():
    module = DePerceiverV2PositionBias(tiny_v2_config())
    latents, boxes, geometry = torch.randn(1, 3, 24), torch.rand(1, 3, 4), geometry_of((64, 96), [8, 16])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bias = module(latents.bfloat16(), boxes, geometry)
    expected = module(latents.bfloat16().float(), boxes, geometry)
    for found, reference in zip(bias, expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, reference)


@pytest.mark.parametrize("position_bias", [True, False])
@pytest.mark.parametrize("padded", [None, (80, 112)])
def test_cross_attention_is_attention_with_an_added_bias(padded, position_bias):
    config = tiny_v2_config(position_bias=position_bias, read_offsets=False, edge_votes=False)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    attention, key_values = DePerceiverV2CrossAttention(config), DePerceiverV2KeyValues(config)
    geometry = geometry_of((64, 96), [8, 16], padded)
    num_tokens = geometry.centers.shape[1]
    latents, positions, boxes = torch.randn(1, 7, 24), torch.randn(1, 7, 24), torch.rand(1, 7, 4) * 0.5 + 0.2
    tokens, token_positions = torch.randn(1, num_tokens, 24), torch.randn(1, num_tokens, 24)
    with torch.no_grad():
        key, value = key_values(tokens, token_positions, None, place_tokens(tokens, geometry, config))
        output, _ = attention(latents, positions, boxes, key, value, geometry)

        added = torch.zeros(1, 2, 7, num_tokens)
        if position_bias:
            added = gaussian_bias(attention.position_bias(latents, boxes, geometry), geometry).float()
        if padded is not None:
            added = added.masked_fill(~geometry.mask[:, None, None], -torch.inf)
        query, plain_key, plain_value = (
            states.unflatten(-1, (2, 12)).transpose(1, 2)
            for states in (
                attention.q_proj(latents + positions),
                key_values.k_proj(tokens + token_positions),
                key_values.v_proj(tokens),
            )
        )
        read = torch.nn.functional.scaled_dot_product_attention(query, plain_key, plain_value, added)
        expected = attention.o_proj(read.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


# --- where the heads have read


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (torch.float16, 0.01), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("side", [0.002, 0.02, 0.1, 0.4])
@pytest.mark.parametrize("strides", [[8, 16, 32], [4, 8]])
def test_offset_of_a_token_that_was_read_is_its_distance_from_the_box(strides, side, dtype, error):
    """In half sides, wherever in a large image the box is; rounding costs a share of a half side."""
    geometry = geometry_of((800, 1333), strides)
    generator = torch.Generator().manual_seed(0)
    boxes = torch.cat((torch.rand(1, 200, 2, generator=generator), torch.full((1, 200, 2), side)), dim=-1)
    boxes[0, :2, :2] = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    distance = (geometry.centers[:, None] - boxes[:, :, None, :2]).abs() / boxes[:, :, None, 2:]  # (1, 200, N, 2)
    inside = (distance < 0.5).all(-1)  # tokens in the box
    query, token = inside[0].nonzero(as_tuple=True)
    if len(query) > 500:
        some = torch.randperm(len(query), generator=generator)[:500]
        query, token = query[some], token[some]
    waves = wave_features(geometry.grid, dtype)[0, token][
        None, :, None
    ]  # what a head reads that reads this token alone
    assert waves.dtype == dtype
    found = read_offsets(waves, boxes[:, query], geometry)
    half_sides = (boxes[0, query, 2:] / 2 * geometry.grid_size).clamp(min=0.5)
    expected = (geometry.centers[0, token] - boxes[0, query, :2]) * geometry.grid_size / half_sides
    assert found.dtype == torch.float32
    # A sine falls short of its angle, in every precision by the same.
    assert ((found[0, :, 0] - expected).abs() <= error + 0.23 * expected.abs()).all()
    exact = read_offsets(
        wave_features(geometry.grid, torch.float32)[0, token][None, :, None], boxes[:, query], geometry
    )
    assert ((found - exact).abs() <= error).all()


def test_offsets_are_bounded_and_do_not_depend_on_padding():
    alone, padded = geometry_of((200, 333), [8, 16]), geometry_of((200, 333), [8, 16], padded=(256, 512))
    real = padded.mask[0]
    boxes = torch.rand(1, 20, 4) * torch.tensor([1.0, 1.0, 0.05, 0.05])
    weights = torch.rand(1, 20, 2, int(real.sum())).softmax(-1)
    waves, padded_waves = (wave_features(geometry.grid, torch.float32) for geometry in (alone, padded))
    offsets = read_offsets(weights @ waves[:, None], boxes, alone)
    torch.testing.assert_close(
        read_offsets(weights @ padded_waves[:, None, real], boxes, padded), offsets, rtol=0, atol=1e-4
    )
    assert offsets.shape == (1, 20, 2, 2)
    assert offsets.abs().max() <= LARGEST_OFFSET


@pytest.mark.parametrize("edge_votes", [True, False])
def test_every_latent_is_told_what_it_has_read(edge_votes):
    config = tiny_v2_config(edge_votes=edge_votes)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    attention, key_values = DePerceiverV2CrossAttention(config), DePerceiverV2KeyValues(config)
    geometry = geometry_of((64, 96), [8, 16])
    tokens = torch.randn(1, geometry.centers.shape[1], 24)
    places = DePerceiverV2EdgeVotes(config)(tokens, geometry) if edge_votes else geometry.grid
    reports = wave_features(places, torch.float32)
    latents, boxes = torch.randn(1, 7, 24), torch.rand(1, 7, 4) * 0.5 + 0.2
    with torch.no_grad():
        key, value = key_values(tokens, tokens, reports, place_tokens(tokens, geometry, config))
        output, _ = attention(latents, latents, boxes, key, value, geometry)
        attention.offset_proj.weight.zero_()
        without, _ = attention(latents, latents, boxes, key, value, geometry)
    assert ((output - without).abs().amax(-1) > 1e-3).all()


def test_votes_start_at_the_anchors_and_are_read_as_edges_of_the_box():
    geometry = geometry_of((64, 96), [8, 16])
    votes = DePerceiverV2EdgeVotes(tiny_v2_config())
    votes.start()
    tokens = torch.randn(1, geometry.centers.shape[1], 24)
    edges = votes(tokens, geometry)  # in halves of a cell of 8 pixels, from the middle of the image
    cells = torch.where(geometry.levels == 0, 2.0, 4.0)[..., None]
    torch.testing.assert_close(edges[..., :2], geometry.grid - cells)
    torch.testing.assert_close(edges[..., 2:], geometry.grid + cells)

    # A head that reads one token alone tells a latent on its anchor that the edges are those of its box.
    boxes = torch.cat((geometry.centers, 2 * geometry.cells), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = votes(tokens, geometry)
    assert rounded.dtype == torch.float32
    told = read_offsets(wave_features(rounded, torch.float32)[:, :, None], boxes, geometry)
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0]).expand_as(told)
    torch.testing.assert_close(told, expected, rtol=0, atol=0.03)  # a sine falls short of its angle
