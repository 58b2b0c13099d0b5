# SPDX-License-Identifier: Apache-2.0
"""Blocks of DePerceiver v2: the latents attend to each other, then read the tokens, each from where it looks.

Shapes: B images, N tokens, M latents (of which Q have a box), D channels, H heads, L levels, F position features.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_deperceiver_v2 import DePerceiverV2Config
from .layers_deperceiver import DePerceiverAttention, DePerceiverMLP, eager_attention_forward
from .tokens_deperceiver import DePerceiverSinePositionEmbedding
from .tokens_deperceiver_v2 import TokenGeometry

HIDDEN_TOKEN = -1e4  # added to the attention logits of padding; within the range of float16
SQUARE_SCALE = 64.0  # squares of grid positions are divided by it, to stay within the range of float16
MIN_SIGMA = 0.004  # of the image's side


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


def split(values: torch.Tensor, parts: int, dtype: torch.dtype) -> list[torch.Tensor]:
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
            linear = split(-2 * square * center, splits.linear, dtype)
            features += [(SQUARE_SCALE * square).to(dtype)] * splits.square
            for part in range(splits.position):
                features += linear[: splits.linear - part]
            constant = constant + square * center.square()
        features += split(constant, splits.constant, dtype)
        ones = torch.ones_like(features[0])
        return torch.cat((torch.stack([*features, ones], dim=-1), self.levels.to(dtype)), dim=-1)


def key_features(geometry: TokenGeometry, num_levels: int, dtype: torch.dtype) -> torch.Tensor:
    """Features `(B or 1, N, F)` of the tokens that belong to `PositionBias.query_features`; they hide padding, too."""
    splits = position_splits(dtype)
    features = []
    for axis in range(2):
        position = geometry.grid[..., axis]  # (B, N)
        features += split(position.square() / SQUARE_SCALE, splits.square, dtype)
        for part, piece in enumerate(split(position, splits.position, dtype)):
            features += [piece] * (splits.linear - part)
    features += [torch.ones_like(features[0])] * splits.constant
    hidden = torch.zeros_like(features[0])
    if geometry.mask is not None:
        hidden = hidden.masked_fill(~geometry.mask, HIDDEN_TOKEN)
    levels = nn.functional.one_hot(geometry.levels, num_levels).to(dtype)  # (N, L)
    return torch.cat((torch.stack([*features, hidden], dim=-1), levels.expand(*hidden.shape, -1)), dim=-1)


class DePerceiverV2PositionBias(nn.Module):
    """Predicts from each object latent where its heads look (relatives: SMCA, Gao et al. 2021,
    https://arxiv.org/abs/2101.07448; Conditional DETR, Meng et al. 2021, https://arxiv.org/abs/2108.06152).

    At first the odd heads look at the centre of the box, the even ones at points of a circle around it.
    """

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_levels = config.num_feature_levels
        self.predictor = nn.Linear(config.d_model, self.num_heads * (4 + self.num_levels))

    def first_bias(self) -> torch.Tensor:
        """Bias `(H (4 + L),)` of the predictor of a new model, whose weight is zero."""
        first = torch.zeros(self.num_heads, 4 + self.num_levels)
        angles = torch.arange(0, self.num_heads, 2) * (2 * math.pi / self.num_heads)
        first[::2, 0], first[::2, 1] = 0.5 * angles.cos(), 0.5 * angles.sin()
        first[:, 2:4] = 0.3
        return first.flatten()

    def forward(self, latents: torch.Tensor, boxes: torch.Tensor, geometry: TokenGeometry) -> PositionBias:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, Q, D)`): Object latents.
            boxes (`torch.Tensor` of shape `(B, Q, 4)`): Their boxes, in [0, 1] of the un-padded image, float32.
            geometry (`TokenGeometry`): Unit of the result.
        """
        with torch.autocast(latents.device.type, enabled=False):
            predicted = nn.functional.linear(
                latents.float(), self.predictor.weight.float(), self.predictor.bias.float()
            )
            predicted = rearrange(predicted, "b q (h f) -> b h q f", h=self.num_heads)
            offset, log_scale, levels = predicted.split((2, 2, self.num_levels), dim=-1)
            center, half_side = boxes[:, None, :, :2], boxes[:, None, :, 2:] / 2
            sigmas = half_side * log_scale.clamp(-4, 4).exp() + MIN_SIGMA
            size, origin = geometry.grid_size[:, None, None], geometry.grid_origin[:, None, None]
            return PositionBias((center + offset * half_side) * size - origin, sigmas * size, levels)


class DePerceiverV2CrossAttention(nn.Module):
    """Latents read the tokens. The positional bias rides in extra channels of queries and keys, so that any plain
    attention kernel computes it, and nothing of size M x N is stored beside what the kernel does."""

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        dim = config.d_model
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (dim // self.num_heads) ** -0.5
        self.is_causal = False
        self.q_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
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
            latents (`torch.Tensor` of shape `(B, M, D)`): Object latents, then context latents.
            positions (`torch.Tensor` of shape `(B, M, D)`): Added to them.
            boxes (`torch.Tensor` of shape `(B, Q, 4)`): Of the object latents.
            key, value (`torch.Tensor` of shapes `(B, H, N, D / H + F)` and `(B, H, N, D / H)`): Of the tokens, from
                [`DePerceiverV2KeyValues`].
            geometry (`TokenGeometry`): Of the tokens.

        Returns:
            Output `(B, M, D)` and, where the backend gives them, the weights `(B, H, M, N)`.
        """
        query = rearrange(
            self.q_proj(latents + positions) * self.scaling, "b m (h d) -> b h m d", h=self.num_heads
        ).to(key.dtype)
        num_features = key.shape[-1] - query.shape[-1]
        # Whoever has no place of its own sees everything but the padding.
        features = query.new_zeros(*query.shape[:-1], num_features)
        features[..., -1 - self.config.num_feature_levels] = 1
        if self.position_bias is not None:
            num_objects = boxes.shape[1]
            bias = self.position_bias(latents[:, :num_objects], boxes, geometry)
            features = torch.cat((bias.query_features(key.dtype), features[:, :, num_objects:]), dim=2)
        implementation = "eager" if kwargs.get("output_attentions") else self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
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
        return self.o_proj(rearrange(output, "b m h d -> b m (h d)")), weights


class DePerceiverV2KeyValues(nn.Module):
    """Keys and values of the tokens, by head; the keys with the tokens' position features behind."""

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_levels = config.num_feature_levels
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, geometry: TokenGeometry
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `(B, H, N, D / H + F)` and values `(B, H, N, D / H)` of tokens `(B, N, D)`."""
        key, value = (
            rearrange(states, "b n (h d) -> b h n d", h=self.num_heads)
            for states in (self.k_proj(tokens + positions), self.v_proj(tokens))
        )
        features = key_features(geometry, self.num_levels, key.dtype)[:, None]
        return torch.cat((key, features.expand(*key.shape[:3], -1)), dim=-1), value


class DePerceiverV2Block(GradientCheckpointingLayer):
    """Pre-norm self-attention among the latents, reading of the tokens, MLP."""

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        dim = config.d_model
        self.self_attention_norm = nn.LayerNorm(dim)
        self.self_attention = DePerceiverAttention(
            config, dim, dim, config.num_attention_heads, config.attention_dropout
        )
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.key_values = None if config.share_key_values else DePerceiverV2KeyValues(config)
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
        geometry: TokenGeometry,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        self_attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, M, D)`): Object latents, then context latents.
            positions (`torch.Tensor` of shape `(B, M, D)`): Added to queries and keys.
            boxes (`torch.Tensor` of shape `(B, Q, 4)`): Of the object latents.
            tokens, token_positions (`torch.Tensor` of shape `(B, N, D)`), geometry (`TokenGeometry`): What is read.
            key, value: Those of the tokens, if all blocks share them.
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
            key, value = self.key_values(tokens, token_positions, geometry)
        read, _ = self.cross_attention(
            self.cross_attention_norm(latents), positions, boxes, key, value, geometry, **kwargs
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
        """Positions `(B, Q, D)` of boxes `(B, Q, 4)`."""
        return self.layers(self.sines.encode(boxes * 2 * math.pi).flatten(-2).to(dtype))
