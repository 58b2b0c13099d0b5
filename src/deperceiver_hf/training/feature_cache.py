# SPDX-License-Identifier: Apache-2.0
"""The feature maps of a frozen backbone, kept in memory: then a step costs what the head costs.

Made for comparing heads on equal features. It pays where the same pixels come again: with fixed sizes and flips, not
with crops or changes of colour.
"""

import hashlib
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.utils import logging

from ..machine import available_memory

logger = logging.get_logger(__name__)

SHARE_OF_MEMORY = 0.5  # of what is available at the start; beyond that features are computed again


class FeatureCache:
    """Puts a cache before the `forward(pixel_values, pixel_mask)` of a backbone, in place.

    Images go through the backbone one by one, so that what is kept does not depend on the batch it was first seen in.

    Args:
        backbones: Frozen, with the same weights, so that one cache serves all. Their `forward` takes images, and masks
            or nothing; all tensors that it returns, in whatever tuples, lists or outputs of transformers, have the
            images in their first dimension.

    Raises:
        ValueError: A parameter is trained.
    """

    def __init__(self, *backbones: nn.Module):
        if any(parameter.requires_grad for backbone in backbones for parameter in backbone.parameters()):
            raise ValueError("only the features of a frozen backbone can be kept, but some of its parameters train")
        self._forward = backbones[0].forward
        self._kept: dict[bytes, tuple[list[Any], TreeSpec]] = {}
        self._bytes_left = int(SHARE_OF_MEMORY * available_memory())
        for backbone in backbones:
            backbone.forward = self.forward

    def __len__(self) -> int:
        return len(self._kept)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The backbone's own output, on the device of the images."""
        masks = [None] * len(pixel_values) if pixel_mask is None else pixel_mask.split(1)
        images = [
            self._features(pixels, mask, kwargs) for pixels, mask in zip(pixel_values.split(1), masks, strict=True)
        ]
        leaves = [
            torch.cat(parts).to(pixel_values.device) if torch.is_tensor(parts[0]) else parts[0]
            for parts in zip(*(leaves for leaves, _ in images), strict=True)
        ]
        return tree_unflatten(leaves, images[0][1])

    def _features(
        self, pixels: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[list[Any], TreeSpec]:
        key = _digest(pixels, mask)
        if key in self._kept:
            return self._kept[key]
        leaves, structure = tree_flatten(self._forward(pixels, *(() if mask is None else (mask,)), **kwargs))
        features = [leaf.cpu() if torch.is_tensor(leaf) else leaf for leaf in leaves], structure
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves if torch.is_tensor(leaf))
        if size <= self._bytes_left:
            self._bytes_left -= size
            self._kept[key] = features
        elif self._bytes_left:
            self._bytes_left = 0
            logger.warning(
                f"The features of {len(self._kept)} images fill the share of memory that they may; those of others "
                "are computed in every step."
            )
        return features


def _digest(*tensors: torch.Tensor | None) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if tensor is not None:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy())
    return digest.digest()
