# SPDX-License-Identifier: Apache-2.0
"""Blocks of DePerceiver v2: the latents attend to each other, then read the tokens, each from where it looks.

Shapes: B images, N tokens, M latents, D channels, H heads, L levels, F position features.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_deperceiver import (
    DePerceiverAttention,
    DePerceiverMLP,
    DePerceiverSinePositionEmbedding,
    eager_attention_forward,
)
from .configuration_deperceiver_v2 import DePerceiverV2Config
from .tokens_deperceiver_v2 import ANCHOR_SIDE, TokenGeometry

# Attention: the positional bias in extra channels of queries and keys.
HIDDEN_TOKEN = -1e4  # logit of a padding token; within the range of float16
SQUARE_SCALE = 64.0  # divides squares of grid positions, so that they stay within the range of float16
CHANNEL_MULTIPLE = 8  # to which the channels of a head are filled up: matrix kernels are slow for odd numbers of them
# Where a head looks: a Gaussian around a point near the latent's box.
FIRST_RADIUS = 0.7  # start of the heads: distance of the points from the centre of the box, in half sides
FIRST_SIGMA = 0.6  # start of the heads: width of the Gaussians, in half sides
LARGEST_RADIUS = 2.0  # limit of the distance of the points, in half sides: further away padding might be nearer
MIN_SIGMA = 0.004  # least width, in sides of the image
MIN_GRID_SIGMA = 0.125  # least width, in units of the grid: tokens are far more apart, and float16 can hold it
# Where a head has read: the means of two waves over the positions, one for small and one for large boxes.
WAVELENGTHS = (64.0, 1024.0)  # in units of the grid, half a cell of the finest stride
LARGEST_FINE_BOX = 8.0  # half side up to which the shorter wave serves: a quarter of it is LARGEST_RADIUS of them
LARGEST_OFFSET = 4.0  # limit of what is reported, in half sides


class PositionSplits(NamedTuple):
    """Into how many numbers of low precision a factor of the positional bias is split, so that nothing is lost.

    Attributes:
        square: Of a squared position (an integer of up to 20 bits).
        position: Of a position (an integer of up to 11 bits).
        linear: Of the coefficient of the position.
        constant: Of the constant term.
    """

    square: int
    position: int
    linear: int
    constant: int


FULL_PRECISION = PositionSplits(square=1, position=1, linear=1, constant=1)
HALF_PRECISION = PositionSplits(square=3, position=2, linear=3, constant=3)


def position_splits(dtype: torch.dtype) -> PositionSplits:
    """The splits that the products of a data type need."""
    return HALF_PRECISION if dtype in (torch.bfloat16, torch.float16) else FULL_PRECISION


def exact_parts(values: torch.Tensor, parts: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Numbers of a lower precision that add up to float32 `values`; the gradient goes through the first alone."""
    pieces = [values.to(dtype)]
    rest = values.detach()
    for _ in range(parts - 1):
        rest = rest - pieces[-1].detach().float()
        pieces.append(rest.to(dtype))
    return pieces


class PositionBias(NamedTuple):
    """A Gaussian for each head and latent, in units of the grid of the tokens; all float32.

    Attributes:
        centers (`torch.Tensor` of shape `(B, H, M, 2)`): x and y.
        sigmas (`torch.Tensor` of shape `(B, H, M, 2)`): Standard deviations along x and y.
        levels (`torch.Tensor` of shape `(B, H, M, L)`): Logit of each level.
    """

    centers: torch.Tensor
    sigmas: torch.Tensor
    levels: torch.Tensor

    def query_features(self, dtype: torch.dtype) -> torch.Tensor:
        """Features `(B, H, M, F)` whose product with `key_features` is the bias.

        -(x - c)^2 / 2 s^2 = a x^2 + b x + a c^2 with a = -1 / 2 s^2 and b = -2 a c is an inner product of what depends
        on the query and what depends on the key. The three terms are large and cancel each other, which low precision
        does not survive; so there a is rounded first, and all that follows from it is split.
        """
        splits = position_splits(dtype)
        a = -0.5 / self.sigmas.square()  # (B, H, M, 2)
        if splits is HALF_PRECISION:
            a = a + (a.detach().to(dtype).float() - a.detach())  # rounded, with the gradient of what it was
        features, constant = [], torch.zeros_like(a[..., 0])
        for axis in range(2):
            square, center = a[..., axis], self.centers[..., axis]
            linear = exact_parts(-2 * square * center, splits.linear, dtype)
            features += [(SQUARE_SCALE * square).to(dtype)] * splits.square
            for part in range(splits.position):
                features += linear[: splits.linear - part]
            constant = constant + square * center.square()
        features += exact_parts(constant, splits.constant, dtype)
        ones = torch.ones_like(features[0])
        return torch.cat((torch.stack([ones, *features], dim=-1), self.levels.to(dtype)), dim=-1)


def key_features(geometry: TokenGeometry, num_levels: int, dtype: torch.dtype) -> torch.Tensor:
    """Features `(B or 1, N, F)` of the tokens that belong to `PositionBias.query_features`; they hide padding, too."""
    splits = position_splits(dtype)
    features = []
    for axis in range(2):
        position = geometry.grid[..., axis]  # (B, N)
        features += exact_parts(position.square() / SQUARE_SCALE, splits.square, dtype)
        for part, piece in enumerate(exact_parts(position, splits.position, dtype)):
            features += [piece] * (splits.linear - part)
    features += [torch.ones_like(features[0])] * splits.constant
    hidden = torch.zeros_like(features[0])
    if geometry.mask is not None:
        hidden = hidden.masked_fill(~geometry.mask, HIDDEN_TOKEN)
    levels = nn.functional.one_hot(geometry.levels, num_levels).to(dtype)  # (B, N, L)
    return torch.cat((torch.stack([hidden, *features], dim=-1), levels), dim=-1)


class DePerceiverV2Float32Linear(nn.Linear):
    """A linear map that is computed in float32, whatever the precision of its weights and around it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float(), self.bias.float())


class DePerceiverV2PositionBias(nn.Module):
    """Predicts from each latent where its heads look (relatives: SMCA, Gao et al. 2021,
    https://arxiv.org/abs/2101.07448; Conditional DETR, Meng et al. 2021, https://arxiv.org/abs/2108.06152).

    At first the heads look at points of a circle around the centre of the box.
    """

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_levels = config.num_feature_levels
        self.predictor = DePerceiverV2Float32Linear(config.d_model, self.num_heads * (4 + self.num_levels))

    def start(self) -> None:
        """A new model looks at the box, whatever the latent is."""
        init.zeros_(self.predictor.weight)
        init.copy_(self.predictor.bias, self.first_bias())

    def first_bias(self) -> torch.Tensor:
        """Bias `(H (4 + L),)` of the predictor of a new model: points of a circle, one for each head."""
        first = torch.zeros(self.num_heads, 4 + self.num_levels)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        first[:, 0], first[:, 1] = FIRST_RADIUS * angles.cos(), FIRST_RADIUS * angles.sin()
        first[:, 2:4] = math.log(FIRST_SIGMA)
        return first.flatten()

    def forward(self, latents: torch.Tensor, boxes: torch.Tensor, geometry: TokenGeometry) -> PositionBias:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, M, D)`): Latents.
            boxes (`torch.Tensor` of shape `(B, M, 4)`): Their boxes, in [0, 1] of the un-padded image, float32.
            geometry (`TokenGeometry`): Unit of the result.
        """
        with torch.autocast(latents.device.type, enabled=False):
            predicted = rearrange(self.predictor(latents), "b m (h f) -> b h m f", h=self.num_heads)
            offset, log_scale, levels = predicted.split((2, 2, self.num_levels), dim=-1)
            center, half_side = boxes[:, None, :, :2], boxes[:, None, :, 2:] / 2
            sigmas = half_side * log_scale.clamp(-4, 4).exp() + MIN_SIGMA
            size, origin = geometry.grid_size[:, None, None], geometry.grid_origin[:, None, None]
            sigmas = (sigmas * size).clamp(min=MIN_GRID_SIGMA)
            offset = offset.clamp(-LARGEST_RADIUS, LARGEST_RADIUS)
            return PositionBias((center + offset * half_side) * size - origin, sigmas, levels)


class DePerceiverV2EdgeVotes(nn.Module):
    """Each token votes for where the edges of its object are, as in a dense detector (Tian et al. 2019, "FCOS",
    https://arxiv.org/abs/1904.01355). The votes are not boxes by themselves: a latent reads their mean.

    At first a token votes for the edges of the anchor around it.
    """

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        self.predictor = DePerceiverV2Float32Linear(config.d_model, 4)

    def start(self) -> None:
        """New votes are the anchors, whatever the token is."""
        init.zeros_(self.predictor.weight)
        half = ANCHOR_SIDE / 2
        init.copy_(self.predictor.bias, torch.tensor([-half, -half, half, half]))

    def forward(self, tokens: torch.Tensor, geometry: TokenGeometry) -> torch.Tensor:
        """Left, upper, right and lower edge `(B, N, 4)` by tokens `(B, N, D)`, in units of their grid, float32."""
        cells = geometry.cells * geometry.grid_size[:, None]  # (B, N, 2) in units of the grid
        return geometry.grid.repeat(1, 1, 2) + self.predictor(tokens) * cells.repeat(1, 1, 2)


def wave_features(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Features `(B or 1, N, 4 A)` of A numbers in units of the grid `(B or 1, N, A)`, x and y by turns: their cosines
    for each wave, then their sines."""
    waves = torch.tensor(WAVELENGTHS, device=places.device)
    phases = (places[..., None, :] * (2 * math.pi / waves[:, None])).flatten(-2)  # (B, N, 2 A)
    return torch.cat((phases.cos(), phases.sin()), dim=-1).to(dtype)


def read_offsets(waves: torch.Tensor, boxes: torch.Tensor, geometry: TokenGeometry) -> torch.Tensor:
    """Where the heads have read, or for which edges they have read votes, from the center of the box, in half sides.

    The mean of a wave over what was read, turned back by its phase at the center of the box, is the sine of the
    distance from there, which grows up to a quarter of the wavelength. Unlike a mean of positions it survives the
    rounding of half precision wherever in the image the box is.

    Args:
        waves (`torch.Tensor` of shape `(B, M, H, 4 A)`): Means of `wave_features` of A numbers: 2 of a position, 4 of
            edges.
        boxes (`torch.Tensor` of shape `(B, M, 4)`): In [0, 1] of the un-padded image.
        geometry (`TokenGeometry`): Of the tokens.

    Returns:
        `torch.Tensor` of shape `(B, M, H, A)`, float32: x and y by turns, at most [`LARGEST_OFFSET`].
    """
    size, origin = geometry.grid_size[:, None, None], geometry.grid_origin[:, None, None]
    pairs = waves.shape[-1] // 8
    center = boxes[:, :, None, None, :2] * size[..., None, :] - origin[..., None, :]
    center = center.repeat(1, 1, 1, 1, pairs)  # (B, M, 1, 1, A)
    half_side = (boxes[:, :, None, 2:] / 2 * size).clamp(min=0.5).repeat(1, 1, 1, pairs)  # at least half the unit
    frequency = 2 * math.pi / torch.tensor(WAVELENGTHS, device=boxes.device)[:, None]  # (2, 1)
    phase = center * frequency  # (B, M, 1, 2, A)
    cosines, sines = waves.float().unflatten(-1, (2, 2, 2 * pairs)).unbind(-3)  # (B, M, H, 2 waves, A)
    distance = (sines * phase.cos() - cosines * phase.sin()) / frequency
    fine, coarse = distance.unbind(-2)
    offset = torch.where(half_side <= LARGEST_FINE_BOX, fine, coarse) / half_side
    return offset.clamp(-LARGEST_OFFSET, LARGEST_OFFSET)


class DePerceiverV2CrossAttention(nn.Module):
    """Latents read the tokens.

    The positional bias rides in extra channels of queries and keys, so that any plain attention kernel computes it,
    and nothing of size M x N is stored beside what the kernel does. Extra channels of the values bring back what the
    content of the values does not say: where each head has read, or for which edges the tokens vote that it has read.
    """

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        dim = config.d_model
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (dim // self.num_heads) ** -0.5
        self.is_causal = False
        self.q_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        numbers = (4 if config.edge_votes else 2) * self.num_heads
        self.offset_proj = nn.Linear(numbers, dim, bias=False) if config.read_offsets else None
        self.position_bias = DePerceiverV2PositionBias(config) if config.position_bias else None

    def forward(
        self,
        latents: torch.Tensor,
        positions: torch.Tensor,
        boxes: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        geometry: TokenGeometry,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, M, D)`): What reads.
            positions (`torch.Tensor` of shape `(B, M, D)`): Added to them.
            boxes (`torch.Tensor` of shape `(B, M, 4)`): Those of the latents.
            key, value (`torch.Tensor` of shapes `(B, H, N, D / H + F)` and `(B, H, N, D / H + E)`): Of the tokens,
                from [`DePerceiverV2KeyValues`].
            geometry (`TokenGeometry`): Of the tokens.

        Returns:
            Output `(B, M, D)` and, where the backend gives them, the weights `(B, H, M, N)`.
        """
        query = rearrange(
            self.q_proj(latents + positions) * self.scaling, "b m (h d) -> b h m d", h=self.num_heads
        ).to(key.dtype)
        num_features = key.shape[-1] - query.shape[-1]
        if self.position_bias is None:  # everything is seen but the padding
            features = nn.functional.pad(torch.ones_like(query[..., :1]), (0, num_features - 1))
        else:
            features = self.position_bias(latents, boxes, geometry).query_features(key.dtype)
            features = nn.functional.pad(features, (0, num_features - features.shape[-1]))
        implementation = "eager" if kwargs.get("output_attentions") else self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        width = value.shape[-1]
        if implementation != "eager":  # fused kernels want keys and values of the same width
            value = nn.functional.pad(value, (0, key.shape[-1] - width))
        output, weights = attend(
            self,
            torch.cat((query, features), dim=-1),
            key,
            value,
            None,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=1.0,
            **kwargs,
        )
        channels = query.shape[-1]
        read = self.o_proj(rearrange(output[..., :channels], "b m h d -> b m (h d)"))
        if self.offset_proj is not None:
            offsets = read_offsets(output[..., channels:width], boxes, geometry)
            read = read + self.offset_proj(offsets.flatten(2).to(read.dtype))
        return read, weights


class TokenPlaces(NamedTuple):
    """Where the tokens are, in numbers and as extra channels of the keys, which are the same for all heads and blocks.
    Nothing of it carries a gradient.

    Attributes:
        geometry (`TokenGeometry`): In numbers.
        for_keys (`torch.Tensor` of shape `(B or 1, N, F)`): Channels of the keys, for the positional bias.
    """

    geometry: TokenGeometry
    for_keys: torch.Tensor


def attention_dtype(tokens: torch.Tensor) -> torch.dtype:
    """The data type in which attention on `tokens` is computed here."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


def place_tokens(tokens: torch.Tensor, geometry: TokenGeometry, config: DePerceiverV2Config) -> TokenPlaces:
    """Places of the tokens."""
    return TokenPlaces(geometry, key_features(geometry, config.num_feature_levels, attention_dtype(tokens)))


class DePerceiverV2KeyValues(nn.Module):
    """Keys and values of the tokens, by head, with features of the tokens' positions behind."""

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, reports: torch.Tensor | None, places: TokenPlaces
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `(B, H, N, D / H + F)` and values `(B, H, N, D / H + E)` of tokens `(B, N, D)`, from the E channels
        `(B or 1, N, E)` in which a head brings back what it reports."""
        key, value = (
            rearrange(states, "b n (h d) -> b h n d", h=self.num_heads)
            for states in (self.k_proj(tokens + positions), self.v_proj(tokens))
        )
        key = append_features(key, places.for_keys)
        if reports is not None:
            value = append_features(value, reports)
        width = max(key.shape[-1], value.shape[-1])  # a fused kernel fills the values up to the keys
        width += -width % CHANNEL_MULTIPLE
        return nn.functional.pad(key, (0, width - key.shape[-1])), value


def append_features(states: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """States `(B, H, N, D)` of all heads with the same features `(B or 1, N, F)` behind."""
    return torch.cat((states, features[:, None].expand(*states.shape[:3], -1)), dim=-1)


class DePerceiverV2Block(GradientCheckpointingLayer):
    """Pre-norm self-attention among the latents, reading of the tokens, MLP.

    Args:
        config (`DePerceiverV2Config`): Sizes.
        own_key_values (`bool`): Compute keys and values of the tokens here; otherwise they are given.
    """

    def __init__(self, config: DePerceiverV2Config, own_key_values: bool = True):
        super().__init__()
        dim = config.d_model
        self.self_attention_norm = nn.LayerNorm(dim)
        self.self_attention = DePerceiverAttention(
            config, dim, dim, config.num_attention_heads, config.attention_dropout
        )
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.key_values = DePerceiverV2KeyValues(config) if own_key_values else None
        self.cross_attention = DePerceiverV2CrossAttention(config)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = DePerceiverMLP(dim, config.widening_factor)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        latents: torch.Tensor,
        positions: torch.Tensor,
        boxes: torch.Tensor,
        tokens: torch.Tensor,
        token_positions: torch.Tensor,
        reports: torch.Tensor | None,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        *,
        places: TokenPlaces,
        self_attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        What carries a gradient comes loose and by position: reentrant checkpointing follows gradients only of tensors
        that are passed so, not of those inside of a tuple or behind a keyword.

        Args:
            latents (`torch.Tensor` of shape `(B, M, D)`): What reads.
            positions (`torch.Tensor` of shape `(B, M, D)`): Added to queries and keys.
            boxes (`torch.Tensor` of shape `(B, M, 4)`): Those of the latents.
            tokens, token_positions (`torch.Tensor` of shape `(B, N, D)`): What is read.
            reports (`torch.Tensor` of shape `(B or 1, N, E)`, *optional*): Channels behind its values.
            key, value: Those of the tokens, if all blocks share them.
            places (`TokenPlaces`): Where the tokens are.
            self_attention_mask (`torch.Tensor` of shape `(B or 1, 1, 1 or M, M)`, *optional*): `True` = attend.

        Returns:
            `torch.Tensor` of shape `(B, M, D)`.
        """
        normed = self.self_attention_norm(latents)
        attended, _ = self.self_attention(
            normed + positions, normed + positions, attention_mask=self_attention_mask, values=normed, **kwargs
        )
        latents = latents + self.dropout(attended)
        if self.key_values is not None:
            key, value = self.key_values(tokens, token_positions, reports, places)
        read, _ = self.cross_attention(
            self.cross_attention_norm(latents), positions, boxes, key, value, places.geometry, **kwargs
        )
        latents = latents + self.dropout(read)
        return latents + self.dropout(self.mlp(self.mlp_norm(latents)))


class DePerceiverV2BoxPosition(nn.Module):
    """Position of a latent from its box: sines of its four numbers, then a perceptron (Liu et al. 2022, "DAB-DETR",
    https://arxiv.org/abs/2201.12329)."""

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        dim = config.d_model
        self.sines = DePerceiverSinePositionEmbedding(dim)
        self.layers = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, boxes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Positions `(B, M, D)` of boxes `(B, M, 4)`."""
        return self.layers(self.sines.encode(boxes * 2 * math.pi).flatten(-2).to(dtype))
