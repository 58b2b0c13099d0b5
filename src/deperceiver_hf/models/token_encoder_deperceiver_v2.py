# SPDX-License-Identifier: Apache-2.0
"""Token encoder of DePerceiver v2: mixes the feature maps of all strides before they become tokens.

    coarsest map -> attention among its cells -> top-down: each finer map takes in what the coarser ones know
                                              -> bottom-up: each coarser map takes in what the finer ones know

The path aggregation of Liu et al. 2018 ("PANet", https://arxiv.org/abs/1803.01534) with the attention of Zhao et al.
2024 ("RT-DETR", https://arxiv.org/abs/2304.08069, section 4.2).

Shapes: B images, D channels; (h, w) cells of a feature map.
"""

import math
from functools import partial
from itertools import pairwise

import torch
from einops import rearrange
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_deperceiver import DePerceiverAttention, DePerceiverMLP, DePerceiverSinePositionEmbedding
from .backbone_deperceiver import FeatureMaps
from .configuration_deperceiver_v2 import DePerceiverV2Config

MOST_CELLS = 2048  # that attend to each other one by one: a batch of 1440 x 1440 pixels at stride 32


def hide_padding(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Features with zeros at padding: what a convolution sees beyond the border of the image alone."""
    return features if mask is None else features * mask[:, None].to(features.dtype)


class DePerceiverV2ConvNorm(nn.Module):
    """Convolution and batch normalisation, which inference can fold into one convolution."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(features))


class DePerceiverV2FusionBlock(nn.Module):
    """Two maps become one: concatenated, reduced by a 1x1 convolution, then two residual 3x3 convolutions."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduce = DePerceiverV2ConvNorm(2 * dim, dim)
        self.convs = nn.ModuleList(DePerceiverV2ConvNorm(dim, dim, 3) for _ in range(2))
        self.activation = nn.SiLU()

    def forward(self, one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Fuse maps `(B, D, h, w)`."""
        features = self.activation(self.reduce(torch.cat((one, other), dim=1)))
        for conv in self.convs:
            features = features + self.activation(conv(hide_padding(features, mask)))
        return features


class DePerceiverV2CellAttention(nn.Module):
    """Cells of the coarsest map attend to each other: a pre-norm transformer layer.

    In maps of more than `MOST_CELLS`, padding included, they attend to means of squares of cells instead, so that the
    cost stays linear in the cells; not in a graph that is exported for any size.
    """

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        dim = config.fusion_dim
        self.norm = nn.LayerNorm(dim)
        self.positions = DePerceiverSinePositionEmbedding(dim)
        self.attention = DePerceiverAttention(config, dim, dim, config.num_attention_heads, config.attention_dropout)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = DePerceiverMLP(dim, config.widening_factor)

    def forward(
        self, features: torch.Tensor, mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """Map `(B, D, h, w)` of the same shape."""
        height, width = features.shape[-2:]
        cells, positions = as_rows(features), as_rows(self.positions(features, mask))
        normed = self.norm(cells)
        read, read_positions, is_read = normed, positions, None if mask is None else mask.flatten(1)
        if not isinstance(height * width, torch.SymInt) and height * width > MOST_CELLS:
            side = math.ceil(math.sqrt(height * width / MOST_CELLS))
            shape = {"h": height, "w": width}
            read, is_read = mean_cells(rearrange(normed, "b (h w) d -> b d h w", **shape), mask, side)
            read_positions, _ = mean_cells(rearrange(positions, "b (h w) d -> b d h w", **shape), mask, side)
        attended, _ = self.attention(
            normed + positions,
            read + read_positions,
            attention_mask=None if is_read is None else is_read[:, None, None],
            values=read,
            **kwargs,
        )
        cells = cells + attended
        cells = cells + self.mlp(self.mlp_norm(cells))
        return rearrange(cells, "b (h w) d -> b d h w", h=height)


def as_rows(features: torch.Tensor) -> torch.Tensor:
    """Map `(B, D, h, w)` as `(B, h w, D)`."""
    return rearrange(features, "b d h w -> b (h w) d")


def mean_cells(
    features: torch.Tensor, mask: torch.Tensor | None, side: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Means `(B, n, D)` of the real cells of each square of `side` cells of a map `(B or 1, D, h, w)`, and which
    squares have any `(B, n)`; `None` if all have."""
    pool = partial(nn.functional.avg_pool2d, kernel_size=side, ceil_mode=True, count_include_pad=False)
    if mask is None:
        return as_rows(pool(features)), None
    share = pool(mask[:, None].to(features.dtype))
    means = pool(features * mask[:, None].to(features.dtype)) / share.clamp(min=1e-6)
    return as_rows(means), (share > 0).flatten(1)


class DePerceiverV2Fusion(nn.Module):
    """Maps of several strides, fused."""

    def __init__(self, config: DePerceiverV2Config, channels: list[int], strides: list[int]):
        super().__init__()
        dim, steps = config.fusion_dim, len(channels) - 1
        self.channels = [dim] * len(channels)
        self.projections = nn.ModuleList(DePerceiverV2ConvNorm(inputs, dim) for inputs in channels)
        self.attention = DePerceiverV2CellAttention(config)
        self.top_down = nn.ModuleList(DePerceiverV2FusionBlock(dim) for _ in range(steps))
        ratios = [coarse // fine for fine, coarse in pairwise(strides)]  # 2, but for levels left out and dilation
        self.shrink = nn.ModuleList(DePerceiverV2ConvNorm(dim, dim, 3, stride=ratio) for ratio in ratios)
        self.bottom_up = nn.ModuleList(DePerceiverV2FusionBlock(dim) for _ in range(steps))

    def forward(self, feature_maps: FeatureMaps, **kwargs: Unpack[TransformersKwargs]) -> FeatureMaps:
        """Maps `(B, D, h, w)` of the same strides, finest first."""
        masks = [mask for _, mask in feature_maps]
        maps = [project(features) for project, (features, _) in zip(self.projections, feature_maps, strict=True)]
        maps[-1] = self.attention(maps[-1], masks[-1], **kwargs)
        for level, fuse in zip(reversed(range(len(maps) - 1)), self.top_down, strict=True):
            grown = nn.functional.interpolate(maps[level + 1], size=maps[level].shape[-2:], mode="nearest")
            maps[level] = fuse(maps[level], grown, masks[level])
        for level, (shrink, fuse) in enumerate(zip(self.shrink, self.bottom_up, strict=True), start=1):
            height, width = maps[level].shape[-2:]  # a backbone may round a side down
            shrunk = shrink(hide_padding(maps[level - 1], masks[level - 1]))[..., :height, :width]
            maps[level] = fuse(maps[level], shrunk, masks[level])
        return list(zip(maps, masks, strict=True))
