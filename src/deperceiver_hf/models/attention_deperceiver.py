# SPDX-License-Identifier: Apache-2.0
"""Attention, MLP, sine positions and the box head: the parts that both architectures are built of.

Shapes: B images, Q queries, K keys, D channels; (h, w) cells of a feature map.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


class DePerceiverSinePositionEmbedding(nn.Module):
    """DETR's two-dimensional sine encoding: positions run from 0 to 2 pi over the real (un-padded) part of each axis.

    Args:
        embedding_dim (`int`): Channels, half for y (first) and half for x.
        temperature (`float`): Ratio of the longest wavelength to the shortest.
    """

    def __init__(self, embedding_dim: int, temperature: float = 10000.0):
        super().__init__()
        self.axis_dim = embedding_dim // 2
        self.temperature = temperature

    def encode(self, positions: torch.Tensor) -> torch.Tensor:
        """Map positions in radians `(...)` to sines and cosines `(..., axis_dim)` of falling frequency."""
        channel = torch.arange(0, self.axis_dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions[..., None] / self.temperature ** (channel / self.axis_dim)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(B, channels, h, w)`): Feature map that the encoding is for.
            mask (`torch.Tensor` of shape `(B, h, w)`, *optional*): 1 at real cells, 0 at padding.

        Returns:
            `torch.Tensor` of shape `(B or 1, embedding_dim, h, w)`.
        """
        height, width = features.shape[-2:]
        if mask is None:
            y = torch.arange(1, height + 1, dtype=torch.float32, device=features.device)
            x = torch.arange(1, width + 1, dtype=torch.float32, device=features.device)
            y = self.encode(y / (height + 1e-6) * 2 * math.pi)[None, :, None].expand(-1, -1, width, -1)
            x = self.encode(x / (width + 1e-6) * 2 * math.pi)[None, None].expand(-1, height, -1, -1)
        else:
            y, x = mask.cumsum(1, dtype=torch.float32), mask.cumsum(2, dtype=torch.float32)
            y = self.encode(y / (y[:, -1:] + 1e-6) * 2 * math.pi)
            x = self.encode(x / (x[:, :, -1:] + 1e-6) * 2 * math.pi)
        return rearrange(torch.cat((y, x), dim=-1), "b h w d -> b d h w").to(features.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that returns its weights.

    Args:
        query (`torch.Tensor` of shape `(B, heads, Q, D)`), key, value (`(B, heads, K, D)`).
        attention_mask (`torch.Tensor` of shape `(B, 1, 1 or Q, K)`, *optional*): Boolean (`True` = read) or added.

    Returns:
        Output `(B, Q, heads, D)` and weights `(B, heads, Q, K)`.
    """
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DePerceiverAttention(nn.Module):
    """Multi-head attention of queries `(B, Q, query_dim)` over keys and values `(B, K, key_value_dim)`."""

    def __init__(
        self, config: PreTrainedConfig, query_dim: int, key_value_dim: int, num_heads: int, attention_dropout: float
    ):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = (query_dim // num_heads) ** -0.5
        self.attention_dropout = attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(query_dim, query_dim)
        self.k_proj = nn.Linear(key_value_dim, query_dim)
        self.v_proj = nn.Linear(key_value_dim, query_dim)
        self.o_proj = nn.Linear(query_dim, query_dim)

    def forward(
        self,
        queries: torch.Tensor,
        key_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output `(B, Q, query_dim)` and, where the backend gives them, the weights `(B, heads, Q, K)`.

        With `values` `(B, K, key_value_dim)`, `key_values` are the keys only.
        """
        values = key_values if values is None else values
        query, key, value = (
            rearrange(states, "b n (heads d) -> b heads n d", heads=self.num_heads)
            for states in (self.q_proj(queries), self.k_proj(key_values), self.v_proj(values))
        )
        # Fused kernels never hold the weights, so asking for them takes the eager path.
        implementation = "eager" if kwargs.get("output_attentions") else self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(rearrange(output, "b n heads d -> b n (heads d)")), weights


class DePerceiverMLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, widening_factor: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * widening_factor)
        self.activation = ACT2FN["gelu"]
        self.fc2 = nn.Linear(dim * widening_factor, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class DePerceiverBoxPredictor(nn.Module):
    """Three-layer perceptron from a query to the logits of its box."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])

    def start_at_zero(self) -> None:
        """Let a new predictor say 0 of every query, for models in which this means no change of a box."""
        init.zeros_(self.layers[-1].weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states).relu()
        return self.layers[-1](hidden_states)
