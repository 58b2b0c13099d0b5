# SPDX-License-Identifier: Apache-2.0
"""Denoising queries: noised objects that the model learns to restore, beside the latents that have to find them.

Li et al. 2022, "DN-DETR" (https://arxiv.org/abs/2203.01305); contrastive groups of Zhang et al. 2022, "DINO"
(https://arxiv.org/abs/2203.03605), section 3.3: of each object a positive copy, to be restored, and a negative one of
twice the noise, to be told from an object.

What they cost has a ceiling, whatever the number of objects: groups shrink to one, then each image draws some of its
objects.

Shapes: B images, T = most objects in an image, K <= T objects that are noised, G groups, P = 2 G K denoising queries,
ordered (group, sign, object).
"""

from typing import NamedTuple

import torch
from einops import rearrange

from .configuration_deperceiver_v2 import DePerceiverV2Config
from .matching_deperceiver import DetectionTargets, center_to_corners
from .tokens_deperceiver_v2 import SelectedTokens, gather_rows


class DenoisingQueries(NamedTuple):
    """Noised objects.

    Attributes:
        class_labels (`torch.Tensor` of shape `(B, P)`): Classes that they are given, some of them wrong.
        boxes (`torch.Tensor` of shape `(B, P, 4)`): Noised boxes, (center x, center y, width, height) in [0, 1].
        is_query (`torch.Tensor` of shape `(B, P)`): `False` at padding queries, where an image has fewer objects than
            another.
        objects (`torch.Tensor` of shape `(B, P)`): Which of the T objects of its image each was made of.
        num_groups (`int`): G.
    """

    class_labels: torch.Tensor
    boxes: torch.Tensor
    is_query: torch.Tensor
    objects: torch.Tensor
    num_groups: int

    @property
    def num_objects(self) -> int:
        """K."""
        return self.is_query.shape[1] // (2 * self.num_groups)

    def may_attend(self, num_latents: int) -> torch.Tensor:
        """Which of the P queries and the `num_latents` latents behind them `(1, 1, P + M, P + M)` see which: a query
        its own group and all latents, a latent no query."""
        num_queries = self.is_query.shape[1]
        device = self.is_query.device
        group = torch.arange(num_queries, device=device) // (num_queries // self.num_groups)
        sees = torch.ones(num_queries + num_latents, num_queries + num_latents, dtype=torch.bool, device=device)
        sees[:, :num_queries] = False
        sees[:num_queries, :num_queries] = group[:, None] == group
        return sees[None, None]


class LatentArray(NamedTuple):
    """The array of M latents that the blocks work on: P denoising queries, if there are any, then Q object queries.

    This order is known here and nowhere else: `join` makes it, and `split` takes apart what the blocks have made.

    Attributes:
        content (`torch.Tensor` of shape `(B, M, D)`): First states of the latents.
        boxes (`torch.Tensor` of shape `(B, M, 4)`): First boxes, (center x, center y, width, height) in [0, 1].
        is_query (`torch.Tensor` of shape `(B, M)`, *optional*): `False` at padding queries; `None` if there are none.
        denoising (`DenoisingQueries`, *optional*): The denoising queries.
    """

    content: torch.Tensor
    boxes: torch.Tensor
    is_query: torch.Tensor | None
    denoising: DenoisingQueries | None

    @classmethod
    def join(
        cls, selected: SelectedTokens, denoising: DenoisingQueries | None, denoised: torch.Tensor | None
    ) -> "LatentArray":
        """The array of object queries and denoising queries, whose first states `(B, P, D)` are `denoised`."""
        content, is_query = selected.content, selected.is_query
        # Boxes of selected tokens learn from the loss of the selection, learned ones from that of the blocks.
        boxes = selected.boxes if selected.logits is None else selected.boxes.detach()
        if denoising is not None and denoised is not None:
            if is_query is None:
                is_query = torch.ones_like(boxes[..., 0], dtype=torch.bool)
            content = torch.cat((denoised.to(content.dtype), content), dim=1)
            boxes = torch.cat((denoising.boxes, boxes), dim=1)
            is_query = torch.cat((denoising.is_query, is_query), dim=1)
        return cls(content, boxes, is_query, denoising)

    @property
    def num_denoising(self) -> int:
        """P, 0 without denoising queries."""
        return 0 if self.denoising is None else self.denoising.is_query.shape[1]

    def self_attention_mask(self) -> torch.Tensor | None:
        """Which latents see which, `(B, 1, 1 or M, M)`, `True` = attend: nobody sees a padding query, and a denoising
        query is seen by its own group only. `None`: all see all."""
        if self.is_query is None:
            return None
        is_key = self.is_query[:, None, None]  # (B, 1, 1, M)
        if self.denoising is None:
            return is_key
        return self.denoising.may_attend(self.is_query.shape[1] - self.num_denoising) & is_key

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Values `(B, L, M, ...)` after every block: those of the denoising queries `(B, L, P, ...)`, `None` if there
        are none, and those of the object queries `(B, L, Q, ...)`."""
        num_objects = values.shape[2] - self.num_denoising
        denoising, objects = values.split((self.num_denoising, num_objects), dim=2)
        return denoising if self.num_denoising else None, objects


def object_targets(targets: DetectionTargets) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Classes `(B, T)` and boxes `(B, T, 4)` of the objects, and which are objects and no padding `(B, T)`; T is at
    least 1."""
    class_labels, boxes = targets.class_labels, targets.boxes
    if class_labels.shape[1] == 0:
        class_labels, boxes = class_labels.new_zeros(len(boxes), 1), boxes.new_full((len(boxes), 1, 4), 0.5)
    sizes = torch.tensor(targets.sizes, device=boxes.device)
    return class_labels, boxes, torch.arange(class_labels.shape[1], device=boxes.device) < sizes[:, None]


@torch.no_grad()
def make_denoising_queries(targets: DetectionTargets, config: DePerceiverV2Config) -> DenoisingQueries:
    """Noise the objects of a batch: as many groups as `num_denoising_queries` has room for, at least one.

    Images of more objects than `num_queries` draw so many of them, so that there are never more denoising queries than
    `num_denoising_queries` or 2 `num_queries`, whichever is more. Without any object there are padding queries only:
    with several processes every parameter has to take part in every step.
    """
    class_labels, boxes, is_object = object_targets(targets)
    objects = _draw_objects(is_object, config.num_queries)  # (B, K)
    class_labels, is_object = class_labels.gather(1, objects), is_object.gather(1, objects)
    boxes = gather_rows(boxes, objects)
    num_groups = max(1, config.num_denoising_queries // (2 * objects.shape[1]))

    def copies(values: torch.Tensor) -> torch.Tensor:  # (B, K, ...) -> (B, G, 2, K, ...)
        return values[:, None, None].expand(-1, num_groups, 2, *values.shape[1:])

    # Labels out of range are refused by the matching, which comes after the forward pass.
    labels = copies(class_labels.clamp(0, config.num_labels - 1))
    wrong = torch.rand(labels.shape, device=boxes.device) < config.label_noise_ratio
    labels = torch.where(wrong, torch.randint_like(labels, config.num_labels), labels)

    clean = copies(boxes)
    move = torch.rand(clean.shape, device=boxes.device)
    move[:, :, 1] += 1  # negatives: further away than any positive
    sign = 2.0 * torch.randint(0, 2, clean.shape, device=boxes.device) - 1
    half_sides = clean[..., 2:].repeat(1, 1, 1, 1, 2) / 2
    corners = center_to_corners(clean) + config.box_noise_scale * sign * move * half_sides
    corners = corners.clamp(0, 1)
    low, high = corners[..., :2], corners[..., 2:]
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    noised = torch.cat(((low + high) / 2, high - low), dim=-1)
    flat = "b g s t -> b (g s t)"
    return DenoisingQueries(
        class_labels=rearrange(labels, flat),
        boxes=rearrange(noised, "b g s t c -> b (g s t) c"),
        is_query=rearrange(copies(is_object), flat),
        objects=rearrange(copies(objects), flat),
        num_groups=num_groups,
    )


def _draw_objects(is_object: torch.Tensor, most: int) -> torch.Tensor:
    """Indices `(B, K)` of `most` objects of each image at random, in ascending order: of all where there are no more.

    Images of fewer objects keep all of theirs; nothing is drawn where no image has more.
    """
    batch_size, num_objects = is_object.shape
    if num_objects <= most:
        return torch.arange(num_objects, device=is_object.device).expand(batch_size, -1)
    order = torch.rand(is_object.shape, device=is_object.device).masked_fill(~is_object, torch.inf)
    return order.topk(most, dim=1, largest=False).indices.sort(dim=1).values
