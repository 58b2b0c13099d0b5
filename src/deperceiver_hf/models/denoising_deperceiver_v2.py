# SPDX-License-Identifier: Apache-2.0
"""Denoising queries: noised objects that the model learns to restore, beside the latents that have to find them.

Li et al. 2022, "DN-DETR" (https://arxiv.org/abs/2203.01305); contrastive groups of Zhang et al. 2022, "DINO"
(https://arxiv.org/abs/2203.03605), section 3.3: of each object a positive copy, to be restored, and a negative one of
twice the noise, to be told from an object.

Shapes: B images, T = most objects in an image, G groups, P = 2 G T denoising queries, ordered (group, sign, object).
"""

from typing import NamedTuple

import torch
from einops import rearrange

from .configuration_deperceiver_v2 import DePerceiverV2Config
from .matching_deperceiver import DetectionTargets, center_to_corners


class DenoisingQueries(NamedTuple):
    """Noised objects.

    Attributes:
        class_labels (`torch.Tensor` of shape `(B, P)`): Classes that they are given, some of them wrong.
        boxes (`torch.Tensor` of shape `(B, P, 4)`): Noised boxes, (center x, center y, width, height) in [0, 1].
        mask (`torch.Tensor` of shape `(B, P)`): `False` where an image has fewer objects than another.
        num_groups (`int`): G.
    """

    class_labels: torch.Tensor
    boxes: torch.Tensor
    mask: torch.Tensor
    num_groups: int

    def may_attend(self, num_latents: int) -> torch.Tensor:
        """Which of the P queries and the `num_latents` latents behind them `(1, 1, P + M, P + M)` see which: a query
        its own group and all latents, a latent no query."""
        num_queries = self.mask.shape[1]
        device = self.mask.device
        group = torch.arange(num_queries, device=device) // (num_queries // self.num_groups)
        sees = torch.ones(num_queries + num_latents, num_queries + num_latents, dtype=torch.bool, device=device)
        sees[:, :num_queries] = False
        sees[:num_queries, :num_queries] = group[:, None] == group
        return sees[None, None]


def object_targets(targets: DetectionTargets) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Classes `(B, T)`, boxes `(B, T, 4)` and mask `(B, T)` of the objects, with T at least 1."""
    class_labels, boxes = targets.class_labels, targets.boxes
    if class_labels.shape[1] == 0:
        class_labels, boxes = class_labels.new_zeros(len(boxes), 1), boxes.new_full((len(boxes), 1, 4), 0.5)
    sizes = torch.tensor(targets.sizes, device=boxes.device)
    return class_labels, boxes, torch.arange(class_labels.shape[1], device=boxes.device) < sizes[:, None]


@torch.no_grad()
def make_denoising_queries(targets: DetectionTargets, config: DePerceiverV2Config) -> DenoisingQueries:
    """Noise the objects of a batch: as many groups as `num_denoising_queries` has room for, at least one.

    Without any object there is one group of queries that are masked: with several processes every parameter has to
    take part in every step.
    """
    class_labels, boxes, mask = object_targets(targets)
    num_objects = class_labels.shape[1]
    num_groups = max(1, config.num_denoising_queries // (2 * num_objects))

    def copies(values: torch.Tensor) -> torch.Tensor:  # (B, T, ...) -> (B, G, 2, T, ...)
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
        mask=rearrange(copies(mask), flat),
        num_groups=num_groups,
    )
