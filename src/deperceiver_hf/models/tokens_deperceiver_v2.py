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
LARGEST_LOG_STEP = 3.0  # of a side in one step: a factor of 20
SMALLEST_SIDE = 1e-4  # of a box, in sides of the image
POOLED_AROUND = 5  # side of the square, in cells, whose best score a token is ranked by
OWN_SCORE = 0.01  # weight of the token's own score, which decides among tokens around the same best one
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
        levels (`torch.Tensor` of shape `(B, N)`): Level of each token.
        mask (`torch.Tensor` of shape `(B, N)`, *optional*): `True` at real tokens; `None` if all are.
        shapes (`list[tuple[int, int]]`): Height and width of the map of each level, whose tokens come one after
            another, finest first.
    """

    centers: torch.Tensor
    cells: torch.Tensor
    grid: torch.Tensor
    grid_size: torch.Tensor
    grid_origin: torch.Tensor
    levels: torch.Tensor
    mask: torch.Tensor | None
    shapes: list[tuple[int, int]]


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
    sides = sizes[:, None]
    return TokenGeometry(
        centers=pixels / sides,
        cells=cells / sides,
        grid=pixels / unit - origin[:, None],
        grid_size=sizes / unit,
        grid_origin=origin,
        levels=torch.cat(levels).expand(sizes.shape[0], -1),
        mask=torch.cat(masks, dim=1) if masks else None,
        shapes=[(features.shape[-2], features.shape[-1]) for features, _ in feature_maps],
    )


def rank_tokens(scores: torch.Tensor, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """How near to an object the tokens of each level `(B, h w)` lie, from how much each looks like one `(B, N)`.

    The best score in the square of cells around a token, plus the rank of the cell above it in the next coarser level:
    the edges of an object are read as well as its middle, and large objects are found in coarse maps.
    """
    ranks: list[torch.Tensor] = []
    for level in reversed(scores.split([height * width for height, width in shapes], dim=1)):
        own = level.unflatten(1, (1, *shapes[-1 - len(ranks)]))  # (B, 1, h, w)
        rank = nn.functional.max_pool2d(own, POOLED_AROUND, stride=1, padding=POOLED_AROUND // 2) + OWN_SCORE * own
        if ranks:
            rank = rank + nn.functional.interpolate(ranks[0], size=rank.shape[-2:], mode="nearest")
        ranks.insert(0, rank)
    return [rank.flatten(1) for rank in ranks]


def pool_tokens(
    tokens: torch.Tensor, positions: torch.Tensor, geometry: TokenGeometry, scores: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor, TokenGeometry]:
    """Of every level but the coarsest, the share of the tokens that lie nearest to an object; of the coarsest all.

    An image that is padded keeps as many of its real tokens as it would alone.

    Args:
        tokens (`torch.Tensor` of shape `(B, N, D)`): Tokens of all levels.
        positions (`torch.Tensor` of shape `(B or 1, N, D)`): Theirs.
        geometry (`TokenGeometry`): Where they are.
        scores (`torch.Tensor` of shape `(B, N)`): How much each looks like an object; `-inf` at padding.
        share (`float`): In (0, 1], taken in thousandths.

    Returns:
        The same of K fewer tokens, ordered by level and rank.
    """
    chosen, masks, first = [], [], 0
    for level, rank in enumerate(rank_tokens(scores, geometry.shapes)):
        thousandths = 1000 if level == len(geometry.shapes) - 1 else max(1, round(1000 * share))
        count = -(-rank.shape[1] * thousandths // 1000)  # rounded up
        if geometry.mask is not None:
            real = geometry.mask[:, first : first + rank.shape[1]]
            rank = rank.masked_fill(~real, -torch.inf)
            counts = -(-real.sum(1, keepdim=True) * thousandths // 1000)
            masks.append(torch.arange(count, device=scores.device) < counts)
        chosen.append(rank.topk(count, dim=1).indices + first)
        first = first + rank.shape[1]
    rows = torch.cat(chosen, dim=1)  # (B, K)
    pooled = geometry._replace(
        centers=gather_rows(geometry.centers, rows),
        cells=gather_rows(geometry.cells, rows),
        grid=gather_rows(geometry.grid, rows),
        levels=geometry.levels.expand(rows.shape[0], -1).gather(1, rows),
        mask=torch.cat(masks, dim=1) if masks else None,
    )
    return gather_rows(tokens, rows), gather_rows(positions, rows), pooled


def inverse_sigmoid(values: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """Logits of values in [0, 1], which are kept `eps` away from both ends."""
    return values.clamp(eps, 1 - eps).logit()


def logit_step(boxes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Boxes `(..., 4)` in [0, 1], corrected by steps `(..., 4)` of their logits (Deformable DETR)."""
    return (step + inverse_sigmoid(boxes)).sigmoid()


def relative_step(boxes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Boxes `(..., 4)` in [0, 1], corrected by steps `(..., 4)`: of the center in sides of the box, and of the
    logarithms of the sides.

    Girshick et al. 2014, https://arxiv.org/abs/1311.2524, appendix C; in a DETR Lin et al. 2023, "Plain DETR",
    https://arxiv.org/abs/2308.01904.
    """
    center, sides = boxes[..., :2], boxes[..., 2:]
    center = center + step[..., :2] * sides
    sides = sides * step[..., 2:].clamp(-LARGEST_LOG_STEP, LARGEST_LOG_STEP).exp()
    return torch.cat((keep_within(center, 0.0), keep_within(sides, SMALLEST_SIDE)), dim=-1)


def keep_within(values: torch.Tensor, least: float) -> torch.Tensor:
    """Values within `least` and 1, with the gradient of those that are not: they can find back."""
    return values - values.detach() + values.detach().clamp(least, 1)


BOX_STEPS = {"relative": relative_step, "logit": logit_step}
"""How a box is corrected, by the names of `DePerceiverV2Config.box_steps`."""


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
        scores (`torch.Tensor` of shape `(B, N)`, *optional*): How much each of all tokens looks like an object of any
            class, a logit; `-inf` at padding.
        is_query (`torch.Tensor` of shape `(B, Q)`, *optional*): `False` at padding queries, which stand for padding as
            the image has fewer tokens than the batch has latents; `None` where no image is padded.
    """

    content: torch.Tensor
    boxes: torch.Tensor
    logits: torch.Tensor | None
    scores: torch.Tensor | None
    is_query: torch.Tensor | None


class DePerceiverV2TokenSelector(nn.Module):
    """Picks the tokens that look most like an object of any class, and proposes a box for each.

    Zhu et al. 2021, "Deformable DETR" (https://arxiv.org/abs/2010.04159), section 4.2 (two-stage), with DINO's
    top-k (Zhang et al. 2022, https://arxiv.org/abs/2203.03605). Content and boxes leave without gradient.
    """

    def __init__(self, config: DePerceiverV2Config):
        super().__init__()
        dim = config.d_model
        self.refine = BOX_STEPS[config.box_steps]
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

    def forward(self, tokens: torch.Tensor, geometry: TokenGeometry, num_queries: int) -> SelectedTokens:
        """Choose so many among tokens `(B, N, D)`, or all if there are fewer."""
        memory = self.memory_norm(self.memory(tokens))
        logits = self.class_labels_classifier(memory)  # (B, N, C)
        scores = logits.detach().float().max(-1).values
        if geometry.mask is not None:
            scores = scores.masked_fill(~geometry.mask, -torch.inf)
        chosen = scores.topk(min(num_queries, scores.shape[1]), dim=1).indices  # (B, Q)

        centers, cells = gather_rows(geometry.centers, chosen), gather_rows(geometry.cells, chosen)
        anchors = torch.cat((centers, ANCHOR_SIDE * cells), dim=-1)
        memory = gather_rows(memory, chosen)
        boxes = self.refine(anchors, self.bbox_predictor(memory).float())
        is_query = None if geometry.mask is None else geometry.mask.gather(1, chosen)
        content = self.content_norm(self.content(memory.detach()))
        return SelectedTokens(content, boxes, gather_rows(logits, chosen), scores, is_query)


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

    def forward(self, tokens: torch.Tensor, geometry: TokenGeometry, num_queries: int) -> SelectedTokens:
        """All of the latents, for as many images as `tokens` `(B, N, D)` has."""
        content = all_rows(self.content, tokens.device).expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        boxes = all_rows(self.boxes, tokens.device).float().sigmoid().expand(tokens.shape[0], -1, -1)
        return SelectedTokens(content, boxes, None, None, None)
