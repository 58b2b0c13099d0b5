# SPDX-License-Identifier: Apache-2.0
"""From pixels to feature maps: a timm backbone, frozen as the original froze it, from which padding is hidden.

Shapes: B images, C channels; (H, W) pixels, (h, w) cells of a feature map.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoBackbone
from transformers import initialization as init

from .configuration_backbone_deperceiver import DePerceiverBackboneConfig

FeatureMaps = list[tuple[torch.Tensor, torch.Tensor | None]]
"""Per level the features `(B, C, h, w)` and the boolean mask `(B, h, w)` of their real cells, `None` if all are."""


def require_images(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, num_channels: int) -> None:
    """Refuse images that are not `(B, num_channels, H, W)`, or a mask that is not `(B, H, W)`, with a `ValueError`."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"`pixel_values` must be (batch, {num_channels}, height, width), but is {tuple(pixel_values.shape)}."
        )
    if pixel_mask is not None and pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[2:]):
        raise ValueError(
            f"`pixel_mask` must be (batch, height, width) of `pixel_values` {tuple(pixel_values.shape)}, but is "
            f"{tuple(pixel_mask.shape)}."
        )


class DePerceiverFrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and affine map, as one fused kernel that keeps half precision.

    Args:
        num_features (`int`): Number of channels.
        eps (`float`): Added to the variance.
        activation (`list[nn.Module]`): What follows inside of the same module, as in timm's `BatchNormAct2d`.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, activation: Sequence[nn.Module] = ()):
        super().__init__()
        self.eps = eps
        self.activation = nn.Sequential(*activation)
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )
        return self.activation(normed)


def freeze_batch_norms(module: nn.Module) -> None:
    """Replace every `BatchNorm2d` inside a new backbone by a [`DePerceiverFrozenBatchNorm2d`], in place.

    The frozen norms start as the identity, whatever was there: a new ResNet scales its residual branches by 0, and
    frozen they would stay shut.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            activation = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
            frozen = DePerceiverFrozenBatchNorm2d(child.num_features, child.eps, activation)
            setattr(module, name, frozen.to(child.weight))
        else:
            freeze_batch_norms(child)


def backbone_stage(parameter_name: str) -> int | None:
    """Stage that a backbone's parameter belongs to, counted from 1, or `None` for the stem and what is in no stage.

    Knows the names of timm (`layer1.…`, `stages.0.…`, `stages_0.…`, `blocks.0.…`) and of transformers (`stages.0.…`).
    """
    match = re.search(r"(?:^|\.)(layer|layers|stages?|blocks)[._]?(\d+)\.", parameter_name)
    if match is None:
        return None
    return int(match[2]) + (0 if match[1] == "layer" else 1)


def keep_frozen_parts(model: nn.Module) -> None:
    """Put the modules of which no parameter is trained in evaluation mode, since in training mode the statistics of
    their norms would move and their dropout would act."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def mask_of_cells(pixel_mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Mask `(..., height, width)` of the cells of a feature map that hold a real pixel, from `(..., H, W)`.

    A cell is real if its first row and column of pixels is: what `ceil(side / stride)` cells of the image alone are,
    whatever it is padded to.
    """
    while pixel_mask.shape[-2:] != (height, width):
        halved = pixel_mask[..., ::2, ::2]
        if halved.shape[-2] < height or halved.shape[-1] < width:  # the backbone rounds down
            break
        pixel_mask = halved
    return pixel_mask[..., :height, :width]


class HiddenPadding(TorchFunctionMode):
    """Within this context convolutions and pooling see where their input is padding what they see beyond its border:
    zeros, which in averages do not count.

    Otherwise a backbone writes into the padding what its filters make of the image's edge, reads it in the next layer,
    and gives another result for an image that is padded than for the image alone.

    Args:
        pixel_mask (`torch.Tensor` of shape `(B, H, W)`): 1 at real pixels, 0 at padding.
    """

    SPATIAL = (torch.conv2d, nn.functional.max_pool2d, nn.functional.avg_pool2d, nn.functional.pad)

    def __init__(self, pixel_mask: torch.Tensor):
        super().__init__()
        self.pixel_mask = pixel_mask[:, None]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        pointwise = func is torch.conv2d and args[1].shape[-2:] == (1, 1)  # never looks at a neighbour
        if func not in self.SPATIAL or pointwise or args[0].ndim != 4:
            return func(*args, **kwargs)
        features, *others = args
        mask = mask_of_cells(self.pixel_mask, *features.shape[-2:]).to(features.dtype)
        if mask.shape[-2:] != features.shape[-2:]:  # padded by `pad`, which has hidden the padding already
            return func(*args, **kwargs)
        result = func(features * mask, *others, **kwargs)
        if func is nn.functional.avg_pool2d:
            result = result / func(mask, *others, **kwargs).clamp(min=1e-6)
        return result


class FrozenInPart(nn.Module):
    """Part of a model of which the configuration says how much is trained."""

    def freeze(self, config: DePerceiverBackboneConfig) -> None:
        """Exclude from training what `config` says; called again after weights were loaded."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "FrozenInPart":
        """Training mode but for what is frozen."""
        super().train(mode)
        if mode:
            keep_frozen_parts(self)
        return self


class DePerceiverBackbone(FrozenInPart):
    """Feature maps of a convolutional backbone.

    Raises:
        ValueError: A map has not the stride that the config says.
    """

    def __init__(self, config: DePerceiverBackboneConfig):
        super().__init__()
        self.model = AutoBackbone.from_config(config.backbone_config)
        self.channels: list[int] = self.model.channels
        self.mask_padding = config.mask_padding
        self.strides = [16 if config.dilation and stride == 32 else stride for stride in config.strides]
        if config.freeze_batch_norm:
            freeze_batch_norms(self.model)
        self.freeze(config)

    def freeze(self, config: DePerceiverBackboneConfig) -> None:
        """Exclude from training what `frozen_backbone_stages` and `freeze_backbone` say."""
        seen_stages = False
        for name, parameter in self.model.named_parameters():
            stage = backbone_stage(name)
            seen_stages |= stage is not None
            # Outside of the stages there is the stem before them (stage 0) and at most a norm behind them.
            frozen = (stage or 0) <= config.frozen_backbone_stages and (stage is not None or not seen_stages)
            if frozen or config.freeze_backbone:
                parameter.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> FeatureMaps:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, H, W)`): Images.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 at real pixels, 0 at padding.

        Returns:
            Per level the features `(B, channels, H / stride, W / stride)` and the boolean mask of their real cells
            `(B, H / stride, W / stride)`, if there is a `pixel_mask`.
        """
        # Tensor cores and their like on CPUs want channels last, and so do the tokens that come of the features.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        hide_padding = self.mask_padding and pixel_mask is not None
        with HiddenPadding(pixel_mask) if hide_padding else nullcontext():
            # A config that asks for attentions or hidden states means those of the latents.
            feature_maps = self.model(pixel_values, output_attentions=False, output_hidden_states=False).feature_maps
        if not torch.compiler.is_compiling():
            self._check_strides(pixel_values, feature_maps)
        return [(features, self._token_mask(pixel_mask, features)) for features in feature_maps]

    def _token_mask(self, pixel_mask: torch.Tensor | None, features: torch.Tensor) -> torch.Tensor | None:
        if pixel_mask is None:
            return None
        if self.mask_padding:
            return mask_of_cells(pixel_mask, *features.shape[-2:]).bool()
        # The original's: at some sizes of the padded image one row or column of cells more or less.
        return nn.functional.interpolate(pixel_mask[:, None].float(), size=features.shape[-2:])[:, 0].bool()

    def _check_strides(self, pixel_values: torch.Tensor, feature_maps: tuple[torch.Tensor, ...]) -> None:
        for features, stride in zip(feature_maps, self.strides, strict=True):
            for pixels, cells in zip(pixel_values.shape[-2:], features.shape[-2:], strict=True):
                if abs(cells - pixels / stride) > 1:  # backbones round a side that is no multiple up or down
                    raise ValueError(
                        f"the backbone turns {pixels} pixels into {cells} cells, which is not the stride of {stride} "
                        f"in `feature_strides`: make `backbone_config` return the feature maps of these strides."
                    )


def initialize_frozen_parts(model: nn.Module) -> None:
    """Initialise the frozen norms of a new model, which the backbone's own initialisation does not know, and freeze
    its backbone again: loading puts new parameters in the place of those that were frozen."""
    for module in model.modules():
        if isinstance(module, FrozenInPart):
            module.freeze(model.config)
        if isinstance(module, DePerceiverFrozenBatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
