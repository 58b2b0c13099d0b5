# SPDX-License-Identifier: Apache-2.0
"""Tokens of DePerceiver v2, where they are in the image, and the choice of object latents among them.

Shapes: B images, N tokens of all levels, D channels, Q object latents, C classes, H heads.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn
from transformers import initialization as init

from .attention_deperceiver import DePerceiverBoxPredictor, DePerceiverSinePositionEmbedding
from .configuration_deperceiver_v2 import DePerceiverV2Config

PRIOR_LOGIT = -4.6  # of a probability of 0.01, which a new model gives to every class (Lin et al. 2017, section 4.1)
ANCHOR_SIDE = 2.0  # side of the box that a token proposes before it has learned better ones, in strides


class TokenGeometry(NamedTuple):
    """Where the tokens are. The first dimension is 1 instead of B where no image is padded.

    Attributes:
        centers (`torch.Tensor` of shape `(B, N, 2)`): x and y in [0, 1] of the un-padded image, float32.
        cells (`torch.Tensor` of shape `(B, N, 2)`): Width and height of the token's cell in the same unit, float32.
        grid (`torch.Tensor` of shape `(B, N, 2)`): x and y in halves of a finest cell, from about the middle of the
            un-padded image: integers, in float32.
        grid_size (`torch.Tensor` of shape `(B, 2)`): Width and height of the un-padded image in that unit.
        grid_origin (`torch.Tensor` of shape `(B, 2)`): Where `grid` is zero, in that unit from the upper left corner.
        levels (`torch.Tensor` of shape `(N,)`): Level of each token.
        mask (`torch.Tensor` of shape `(B, N)`, *optional*): `True` at real tokens; `None` if all are.
    """

    centers: torch.Tensor
    cells: torch.Tensor
    grid: torch.Tensor
    grid_size: torch.Tensor
    grid_origin: torch.Tensor
    levels: torch.Tensor
    mask: torch.Tensor | None


def locate_tokens(
    feature_maps: list[tuple[torch.Tensor, torch.Tensor | None]],
    strides: list[int],
    image_size: tuple[int, int],
    pixel_mask: torch.Tensor | None,
) -> TokenGeometry:
    """Geometry of the tokens of feature maps `(B, channels, h, w)` with masks `(B, h, w)`.

    Args:
        strides: Pixels per cell of each map, ascending.
        image_size: Height and width of the padded images.
        pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 at real pixels.
    """
    device = feature_maps[0][0].device
    if pixel_mask is None:
        sizes = torch.tensor([[image_size[1], image_size[0]]], dtype=torch.float32, device=device)  # (1, 2)
    else:
        sizes = torch.stack((pixel_mask[:, 0].sum(-1), pixel_mask[:, :, 0].sum(-1)), dim=-1).float()  # (B, 2)
    pixels, cells, levels = [], [], []
    for level, ((features, _), stride) in enumerate(zip(feature_maps, strides, strict=True)):
        height, width = features.shape[-2:]
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) * stride
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) * stride
        level_pixels = torch.stack((x[None].expand(height, -1), y[:, None].expand(-1, width)), dim=-1).flatten(0, 1)
        pixels.append(level_pixels)  # (h w, 2)
        cells.append(torch.full_like(level_pixels, stride))
        levels.append(torch.full((height * width,), level, device=device))
    pixels, cells = torch.cat(pixels), torch.cat(cells)
    unit = strides[0] / 2
    origin = (sizes / (2 * unit)).floor()
    masks = [mask.flatten(1) for _, mask in feature_maps if mask is not None]
    return TokenGeometry(
        centers=pixels / sizes[:, None],
        cells=cells / sizes[:, None],
        grid=pixels / unit - origin[:, None],
        grid_size=sizes / unit,
        grid_origin=origin,
        levels=torch.cat(levels),
        mask=torch.cat(masks, dim=1) if masks else None,
    )


def inverse_sigmoid(values: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """Logits of values in [0, 1], which are kept `eps` away from both ends."""
    return values.clamp(eps, 1 - eps).logit()


def gather_rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows `(B, Q, D)` of an array `(B or 1, N, D)` at the indices `rows` `(B, Q)`."""
    values = values.expand(rows.shape[0], -1, -1)
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def all_rows(embedding: nn.Embedding, device: torch.device) -> torch.Tensor:
    """All rows `(N, D)` of an embedding, by its forward: offloaded weights are only there while that runs."""
    return embedding(torch.arange(embedding.num_embeddings, device=device))


class DePerceiverV2InputAdapter(nn.Module):
    """Turns feature maps into tokens, and gives each a position: per level a 1x1 convolution and a norm.

    Unlike in the first architecture positions are kept apart, for queries and keys only.
    """

    def __init__(self, config: DePerceiverV2Config, channels: list[int]):
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(c, config.d_model, kernel_size=1) for c in channels)
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in channels)
        self.level_embedding = nn.Embedding(len(channels), config.d_model)
        self.position_embedding = DePerceiverSinePositionEmbedding(config.d_model)

    def forward(
        self, feature_maps: list[tuple[torch.Tensor, torch.Tensor | None]], geometry: TokenGeometry
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `(B, N, D)` of feature maps `(B, channels, h, w)`, and their positions `(B or 1, N, D)`."""
        tokens = torch.cat(
            [
                norm(rearrange(projection(features), "b d h w -> b (h w) d"))
                for (features, _), projection, norm in zip(feature_maps, self.projections, self.norms, strict=True)
            ],
            dim=1,
        )
        x, y = (geometry.centers * 2 * math.pi).unbind(-1)
        encode = self.position_embedding.encode
        positions = torch.cat((encode(y), encode(x)), dim=-1) + self.level_embedding(geometry.levels)
        return tokens, positions.to(tokens.dtype)


class SelectedTokens(NamedTuple):
    """Object latents before they have read the image.

    Attributes:
        content (`torch.Tensor` of shape `(B, Q, D)`): Their first states.
        boxes (`torch.Tensor` of shape `(B, Q, 4)`): Their first boxes, (center x, center y, width, height) in [0, 1].
        logits (`torch.Tensor` of shape `(B, Q, C)`, *optional*): What the selection takes them for.
        is_query (`torch.Tensor` of shape `(B, Q)`, *optional*): `False` at padding queries, which stand for padding as
            the image has fewer tokens than the batch has latents; `None` where no image is padded.
    """

    content: torch.Tensor
    boxes: torch.Tensor
    logits: torch.Tensor | None
    is_query: torch.Tensor | None


class DePerceiverV2TokenSelector(nn.Module):
    """Picks the tokens that look most like an object of any class, and proposes a box for each.

    Zhu et al. 2021, "Deformable DETR" (https://arxiv.org/abs/2010.04159), section 4.2 (two-stage), with DINO's
    top-k (Zhang et al. 2022, https://arxiv.org/abs/2203.03605). Content and boxes leave without gradient.
    """

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        dim = config.d_model
        self.num_queries = config.num_queries
        self.memory = nn.Linear(dim, dim)
        self.memory_norm = nn.LayerNorm(dim)
        self.class_labels_classifier = nn.Linear(dim, config.num_labels)
        self.bbox_predictor = DePerceiverBoxPredictor(dim)
        self.content = nn.Linear(dim, dim)
        self.content_norm = nn.LayerNorm(dim)

    def start(self) -> None:
        """A new selector proposes the anchors themselves and believes in no class."""
        self.bbox_predictor.start_at_zero()
        init.constant_(self.class_labels_classifier.bias, PRIOR_LOGIT)

    def forward(self, tokens: torch.Tensor, geometry: TokenGeometry) -> SelectedTokens:
        """Choose among tokens `(B, N, D)`."""
        memory = self.memory_norm(self.memory(tokens))
        logits = self.class_labels_classifier(memory)  # (B, N, C)
        scores = logits.detach().float().max(-1).values
        if geometry.mask is not None:
            scores = scores.masked_fill(~geometry.mask, -torch.inf)
        chosen = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices  # (B, Q)

        centers, cells = gather_rows(geometry.centers, chosen), gather_rows(geometry.cells, chosen)
        anchors = torch.cat((centers, ANCHOR_SIDE * cells), dim=-1)
        memory = gather_rows(memory, chosen)
        boxes = (self.bbox_predictor(memory).float() + inverse_sigmoid(anchors)).sigmoid()
        is_query = None if geometry.mask is None else geometry.mask.gather(1, chosen)
        content = self.content_norm(self.content(memory.detach()))
        return SelectedTokens(content, boxes, gather_rows(logits, chosen), is_query)


class DePerceiverV2LearnedQueries(nn.Module):
    """Object latents that are the same for every image, with learned content and boxes."""

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        self.content = nn.Embedding(config.num_queries, config.d_model)
        self.boxes = nn.Embedding(config.num_queries, 4)  # logits

    def start(self) -> None:
        """New boxes lie all over the image, with sides of 0.12 to 0.88 of its own."""
        init.uniform_(self.boxes.weight, -2.0, 2.0)
        init.normal_(self.content.weight)

    def forward(self, tokens: torch.Tensor, geometry: TokenGeometry) -> SelectedTokens:
        """The latents, for as many images as `tokens` `(B, N, D)` has."""
        content = all_rows(self.content, tokens.device).expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        boxes = all_rows(self.boxes, tokens.device).float().sigmoid().expand(tokens.shape[0], -1, -1)
        return SelectedTokens(content, boxes, None, None)
