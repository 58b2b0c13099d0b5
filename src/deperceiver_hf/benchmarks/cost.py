# SPDX-License-Identifier: Apache-2.0
"""What a detector costs for one image of a given size, counted and not timed: FLOPs, activations, memory, parameters.

The model is made on PyTorch's meta device and run on fake tensors, which have shapes but no contents, so a count takes
seconds and no memory, also for models that no machine could run.

A multiplication with its addition counts as 2 FLOPs, and only matrix products and convolutions count, as in
`torch.utils.flop_counter`.

DePerceiver by hand, for one image, with N tokens of D channels made from C channels of a single feature map, M latents
of L channels, S self-attention layers passed, Q queries, K class logits (no-object included), widening factors 1 and
the decoder of a single cross-attention:

    1x1 convolution to tokens      2 N C D
    latents read the tokens        2 M L^2 (queries) + 4 N D L (keys, values) + 4 M N L (scores, sum)
                                   + 2 M L^2 (output) + 4 M L^2 (MLP)
    self-attention, S times        8 M L^2 (four projections) + 4 M^2 L (scores, sum) + 4 M L^2 (MLP)
    queries read the latents       2 Q D^2 + 4 M L D + 4 Q M D + 2 Q D^2 + 4 Q D^2
    heads                          2 Q D K + 4 Q D^2 + 8 Q D

N occurs in the first two rows only, and not squared: what follows the backbone is an affine function of N with the
slope 2 C D + 4 D L + 4 M L. DETR's encoder has N^2 in every layer (4 N^2 D for scores and sum).

DePerceiver v2 by hand, with N = N_1 + N_2 + ... tokens made from C_1, C_2, ... channels of G feature maps, Q object
latents, H heads with F position features of each key (6 + G in float32, and as many zeros as make D / H + F a multiple
of 8, and no less than D / H + E) and E = 4 A of each value (A = 4 with `edge_votes`, else 2, or 0 without
`read_offsets`), K class logits, widening factor W:

    1x1 convolutions to tokens     2 D (N_1 C_1 + N_2 C_2 + ...)
    selection                      2 N D^2 + 2 N D K (tokens) + 2 Q D^2 (content) + 4 Q D^2 + 8 Q D (boxes)
    votes                          8 N D (with `edge_votes`)
    in every block:
      keys and values              4 N D^2 (once for all blocks if they share them)
      positions of the boxes       6 Q D^2
      self-attention               8 Q D^2 (four projections) + 4 Q^2 D (scores, sum)
      latents read the tokens      4 Q D^2 (queries, output) + 2 Q D H (4 + G) (where they look)
                                   + 2 Q N (D + H F) (scores) + 2 Q N (D + H E) (sum)
                                   + 2 A Q H D (what the heads report)
      MLP                          4 W Q D^2
      heads                        4 Q D^2 + 8 Q D (boxes) + 2 Q D K (classes)

The number of latents does not depend on the image, so again all is affine in the N_i; nothing has N^2.

Activations are the elements that these matrix products and convolutions put out, the usual count, and with attention
computed plainly, so that its weights (M N for DePerceiver, H Q N per block for v2, heads N^2 per encoder layer for
DETR) are among them. They are also given alone: fused attention kernels do not store them.

Peak memory is what is alive at once when a plain forward pass without gradients runs, operation by operation.
"""

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import DetrForObjectDetection

from ..errors import UserError
from .report import BenchmarkReport
from .variants import (
    DEFAULT_NUM_LATENTS,
    OWN_BACKBONES,
    VARIANT_NAMES,
    check_models,
    check_sides,
    make_variant,
    maps_of,
    place_of_backbone,
    takes_sides,
)

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
        tokens: Cells of the feature maps; those of maps of one size, such as a vision transformer's, count once.
        parameters: Of the whole model, trained or not.
        backbone_parameters: Those of the backbone.
        backbone_flops: FLOPs of the backbone.
        flops_after_backbone: FLOPs of all that follows: projection, encoder, decoder and heads.
        activations_after_backbone: Elements put out by the matrix products and convolutions after the backbone.
        attention_weights: Those of them that are attention weights.
        peak_memory: Bytes of all arrays that are alive at once, at most, after the backbone: feature maps included,
            but neither the weights nor what a kernel uses inside.
    """

    tokens: int
    parameters: int
    backbone_parameters: int
    backbone_flops: int
    flops_after_backbone: int
    activations_after_backbone: int
    attention_weights: int
    peak_memory: int

    @property
    def flops(self) -> int:
        """FLOPs of the whole model."""
        return self.backbone_flops + self.flops_after_backbone


def count_cost(make_model: Callable[[], nn.Module], height: int, width: int, num_channels: int = 3) -> Cost:
    """Count what a detector costs for one image without padding.

    Args:
        make_model: Makes one of [`~deperceiver_hf.benchmarks.variants.VARIANTS`] with eager attention.
        height, width: Size of the image that the model sees, in pixels.
        num_channels: Of the image.

    Raises:
        ValueError: The image is smaller than a cell, or attention is not eager.
    """
    check_image_size(height, width)
    model = _make_without_contents(make_model)
    implementation = model.config._attn_implementation
    if implementation != "eager":
        raise UserError(f"attention must be eager to count its weights, but is {implementation!r}.")
    backbone = getattr(*place_of_backbone(model))
    tokens = backbone_flops = 0
    flops, activations, memory = FlopCounterMode(display=False), _ActivationCounter(), MemoryCounter()

    def after_backbone(_, args: tuple, output: Any) -> None:
        nonlocal tokens, backbone_flops
        tokens = sum(math.prod(size) for size in {features.shape[-2:] for features in maps_of(output)})
        backbone_flops = flops.get_total_flops()
        activations.reset()
        memory.reset_peak()

    backbone.register_forward_hook(after_backbone)
    _run_without_contents(model, (1, num_channels, height, width), flops, activations, memory)
    return Cost(
        tokens=tokens,
        parameters=_count_parameters(model),
        backbone_parameters=_count_parameters(backbone),
        backbone_flops=backbone_flops,
        flops_after_backbone=flops.get_total_flops() - backbone_flops,
        activations_after_backbone=activations.elements,
        attention_weights=activations.attention_weights,
        peak_memory=memory.peak,
    )


def count_peak_memory(make_model: Callable[[], nn.Module], height: int, width: int, num_channels: int = 3) -> int:
    """The `peak_memory` of [`Cost`] for any attention: a fused one counts with what the CPU's kernels put out.

    Args:
        make_model, height, width, num_channels: See [`count_cost`].

    Raises:
        ValueError: The image is smaller than a cell.
    """
    check_image_size(height, width)
    model = _make_without_contents(make_model)
    memory = MemoryCounter()
    getattr(*place_of_backbone(model)).register_forward_hook(lambda *_: memory.reset_peak())
    _run_without_contents(model, (1, num_channels, height, width), memory)
    return memory.peak


def check_image_size(height: int, width: int) -> None:
    """Refuse images that are smaller than a cell of the coarsest feature map with a `ValueError`."""
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(f"height and width must be at least {SMALLEST_SIDE} pixels, not {height} and {width}.")


def _make_without_contents(make_model: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        model = make_model().eval().requires_grad_(False)
    if isinstance(model, DetrForObjectDetection):
        # It makes masks from a mask of ones and looks whether they hide anything, which cannot be seen here.
        for part in (model.model.encoder, model.model.decoder):
            part.register_forward_pre_hook(_drop_masks, with_kwargs=True)
    return model


def _run_without_contents(model: nn.Module, image_shape: tuple[int, ...], *counters: TorchDispatchMode) -> None:
    """A forward pass on fake tensors: unlike on the meta device, the operations are those of a real device."""
    with FakeTensorMode(allow_non_fake_inputs=True), _unchecked_values():
        for module in model.modules():  # each once, also where models share parts
            module.to_empty(device="cpu", recurse=False)
        pixel_values = torch.empty(image_shape)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for counter in counters:
                stack.enter_context(counter)
            model(pixel_values)


@contextlib.contextmanager
def _unchecked_values() -> Iterator[None]:
    """Within, transformers does not look into arrays, which have no contents here, to check a model's input."""
    name = "torch_compilable_check"
    loaded = [module for key, module in sys.modules.items() if key.startswith("transformers.")]
    with contextlib.ExitStack() as stack:
        for module in loaded:
            if name in vars(module):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, _check_nothing)
        yield


def _check_nothing(*_: Any, **__: Any) -> None:
    pass


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


class MemoryCounter(TorchDispatchMode):
    """Follows the bytes of all arrays that operations make, until nothing refers to them any more."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}  # bytes by address of the storage
        self.total = self.peak = 0

    def reset_peak(self) -> None:
        self.peak = self.total

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_iter(output):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.total += storage.nbytes()
                    weakref.finalize(storage, self._release, storage._cdata)
        self.peak = max(self.peak, self.total)
        return output

    def _release(self, address: int) -> None:
        self.total -= self.alive.pop(address)


def _drop_masks(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {name: None if name.endswith("attention_mask") else value for name, value in kwargs.items()}


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_at_least_one(**values: int) -> None:
    """Refuse values below 1 with a `ValueError`."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}.")


def compare_costs(
    models: Sequence[str] | None = None,
    *,
    height: int = 800,
    width: int = 800,
    backbone: str | None = None,
    num_latents: int = DEFAULT_NUM_LATENTS,
) -> BenchmarkReport:
    """Count FLOPs, activations and parameters of models for one image; see [`count_cost`].

    Args:
        models: Names of `VARIANT_NAMES`; if not given, all that take images of this size.
        height, width: Size of the image in pixels.
        backbone: Name of a timm model for all; if not given, see [`make_variant`].
        num_latents: Length of the latent array of the first DePerceiver.

    Raises:
        ValueError: An argument is out of range.
    """
    if models is None:
        models = [name for name in VARIANT_NAMES if takes_sides(name, height, width)]
    check_models(models)
    check_sides(models, height, width)
    check_at_least_one(num_latents=num_latents)
    rows = {}
    for name in models:
        make = partial(make_variant, name, backbone=backbone, num_latents=num_latents, attn_implementation="eager")
        rows[name] = asdict(count_cost(make, height, width))
    return BenchmarkReport(
        kind="cost",
        settings={"height": height, "width": width, "backbone": backbone or OWN_BACKBONES, "num_latents": num_latents},
        rows=rows,
        columns={
            "tokens": lambda row: f"{row['tokens']:,}",
            "parameters (M)": lambda row: f"{row['parameters'] / 1e6:.1f}",
            "backbone GFLOPs": lambda row: f"{row['backbone_flops'] / 1e9:.1f}",
            "GFLOPs after it": lambda row: f"{row['flops_after_backbone'] / 1e9:,.1f}",
            "activations after it (M)": lambda row: f"{row['activations_after_backbone'] / 1e6:,.1f}",
            "of them attention weights (M)": lambda row: f"{row['attention_weights'] / 1e6:,.1f}",
            "peak memory after it (MiB)": lambda row: f"{row['peak_memory'] / 2**20:,.0f}",
        },
    )
