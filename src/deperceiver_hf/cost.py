# SPDX-License-Identifier: Apache-2.0
"""What a detector costs for one image of a given size, counted and not timed: FLOPs, activations, parameters.

The model is made and run on PyTorch's meta device, where arrays have shapes but no contents, so a count takes a
fraction of a second and no memory, also for models that no machine could run.

A multiplication with its addition counts as 2 FLOPs, and only matrix products and convolutions count, as in
`torch.utils.flop_counter`. By hand, for one image, with N tokens of D channels made from C channels of a single
feature map, M latents of L channels, S self-attention layers passed, Q queries, K class logits (no-object included),
widening factors 1 and the decoder of a single cross-attention:

    1x1 convolution to tokens      2 N C D
    latents read the tokens        2 M L^2 (queries) + 4 N D L (keys, values) + 4 M N L (scores, sum)
                                   + 2 M L^2 (output) + 4 M L^2 (MLP)
    self-attention, S times        8 M L^2 (four projections) + 4 M^2 L (scores, sum) + 4 M L^2 (MLP)
    queries read the latents       2 Q D^2 + 4 M L D + 4 Q M D + 2 Q D^2 + 4 Q D^2
    heads                          2 Q D K + 4 Q D^2 + 8 Q D

N occurs in the first two rows only, and not squared: what follows the backbone is an affine function of N with the
slope 2 C D + 4 D L + 4 M L. DETR's encoder has N^2 in every layer (4 N^2 D for scores and sum).

Activations are the elements that these matrix products and convolutions put out, the usual count, and with attention
computed plainly, so that its weights (M N for DePerceiver, heads N^2 per encoder layer for DETR) are among them. They
are also given alone: fused attention kernels do not store them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DetrForObjectDetection

MATRIX_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
)
SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Cost:
    """Cost of the forward pass for one image.

    Attributes:
        tokens: Cells of the feature maps.
        parameters: Of the whole model, trained or not.
        backbone_parameters: Those of the backbone.
        backbone_flops: FLOPs of the backbone.
        flops_after_backbone: FLOPs of all that follows: projection, encoder, decoder and heads.
        activations_after_backbone: Elements put out by the matrix products and convolutions after the backbone.
        attention_weights: Those of them that are attention weights.
    """

    tokens: int
    parameters: int
    backbone_parameters: int
    backbone_flops: int
    flops_after_backbone: int
    activations_after_backbone: int
    attention_weights: int

    @property
    def flops(self) -> int:
        """FLOPs of the whole model."""
        return self.backbone_flops + self.flops_after_backbone


def count_cost(make_model: Callable[[], nn.Module], height: int, width: int, num_channels: int = 3) -> Cost:
    """Count what a detector costs for one image without padding.

    Args:
        make_model: Makes a DePerceiver, transformers' DETR or a [`~deperceiver_hf.variants.MultiscaleDetr`], with
            eager attention.
        height, width: Size of the image that the model sees, in pixels.
        num_channels: Of the image.

    Raises:
        ValueError: The image is smaller than a cell, or attention is not eager.
    """
    check_image_size(height, width)
    with torch.device("meta"):
        model = make_model().eval().requires_grad_(False)
        pixel_values = torch.empty(1, num_channels, height, width)
    detector = getattr(model, "model", model)
    implementation = detector.encoder.config._attn_implementation
    if implementation != "eager":
        raise ValueError(f"attention must be eager to count its weights, but is {implementation!r}.")
    if isinstance(model, DetrForObjectDetection):
        # It makes masks from a mask of ones and looks whether they hide anything, which cannot be seen on meta.
        for part in (detector.encoder, detector.decoder):
            part.register_forward_pre_hook(_drop_masks, with_kwargs=True)

    at_encoder = {}
    backbone_flops = 0
    flops, activations = FlopCounterMode(display=False), _ActivationCounter()

    def after_backbone(*_) -> None:
        nonlocal backbone_flops
        backbone_flops = flops.get_total_flops()
        activations.reset()

    def before_encoder(_, args: tuple, kwargs: dict) -> None:
        at_encoder["tokens"] = (args[0] if args else kwargs["inputs_embeds"]).shape[1]

    detector.backbone.register_forward_hook(after_backbone)
    detector.encoder.register_forward_pre_hook(before_encoder, with_kwargs=True)
    with torch.no_grad(), flops, activations:
        model(pixel_values)
    return Cost(
        tokens=at_encoder["tokens"],
        parameters=_count_parameters(model),
        backbone_parameters=_count_parameters(detector.backbone),
        backbone_flops=backbone_flops,
        flops_after_backbone=flops.get_total_flops() - backbone_flops,
        activations_after_backbone=activations.elements,
        attention_weights=activations.attention_weights,
    )


def check_image_size(height: int, width: int) -> None:
    """Refuse images that are smaller than a cell of the coarsest feature map with a `ValueError`."""
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"height and width must be at least {SMALLEST_SIDE} pixels, not {height} and {width}.")


class _ActivationCounter(TorchDispatchMode):
    """Counts elements that come out of matrix products, convolutions and, apart from them, softmax."""

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.elements = self.attention_weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in MATRIX_PRODUCTS:
            self.elements += output.numel()
        elif func is torch.ops.aten._softmax.default:
            self.attention_weights += output.numel()
        return output


def _drop_masks(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {name: None if name.endswith("attention_mask") else value for name, value in kwargs.items()}


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
