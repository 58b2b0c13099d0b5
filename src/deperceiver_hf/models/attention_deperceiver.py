# SPDX-License-Identifier: Apache-2.0
"""Attention, MLP, sine positions and the box head: the parts that both architectures are built of."""

import math

import torch
from einops import rearrange
from torch import nn


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
