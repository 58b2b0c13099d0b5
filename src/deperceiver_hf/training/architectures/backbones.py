# SPDX-License-Identifier: Apache-2.0
"""The timm backbone inside of transformers' own detectors: which one, with which weights, how much of it is trained.

What DePerceiver's configuration says of its backbone is done here for models whose configuration cannot say it. The
vision transformers of LW-DETR and RF-DETR are in `vision_transformers`.
"""

from types import MethodType
from typing import Any

import timm
import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel

from ...backbone_weights import load_backbone_weights
from ...errors import UserError
from ...models.backbone_deperceiver import FrozenInPart, backbone_stage
from ...models.configuration_backbone_deperceiver import timm_out_indices
from .architecture import Architecture
from .options import ModelOptions

DEFAULT_BACKBONE = "resnet50"


class TransformersArchitecture(Architecture):
    """One of transformers' own detectors, on a timm backbone."""

    def create(self, config: PreTrainedConfig, options: ModelOptions, weights: str | None) -> PreTrainedModel:
        model = self.model_class(config)
        self.prepare_new(model, options)
        fill_backbone(model, weights, from_scratch=options.no_pretrained_backbone)
        return model

    def prepare_new(self, model: PreTrainedModel, options: ModelOptions) -> None:
        """Start a new model, but for its backbone, as its authors did where transformers does not."""


def backbone_of(detector: PreTrainedModel) -> nn.Module:
    """The backbone of a detector of any architecture, without what projects its feature maps; of a model of ours all
    that stands in the place of one, such as the encoder of another detector."""
    model = detector.model
    if isinstance(getattr(model, "backbone", None), FrozenInPart):
        return model.backbone
    if hasattr(model, "conv_encoder"):  # DEIMv2, with the projections of its maps beside it
        return getattr(model.conv_encoder, "model", None) or model.conv_encoder.backbone
    return getattr(model.backbone, "backbone", model.backbone)  # LW-DETR and RF-DETR keep the projector beside it


def timm_backbone_config(name: str | None, strides: list[int], dilation: bool = False) -> PreTrainedConfig:
    """Configuration of a timm backbone that returns the feature maps of these strides; ResNet-50 by default.

    Raises:
        ValueError: There is no such model or no such map.
    """
    name = name or DEFAULT_BACKBONE
    return AutoConfig.for_model(
        model_type="timm_backbone",
        backbone=name,
        out_indices=timm_out_indices(name, strides),
        **({"output_stride": 16} if dilation else {}),
    )


def feature_channels(config: PreTrainedConfig) -> list[int]:
    """Channels of the feature maps of a timm backbone."""
    with torch.device("meta"):
        backbone = timm.create_model(config.backbone, features_only=True, out_indices=tuple(config.out_indices))
    return backbone.feature_info.channels()


def norms_activate(config: PreTrainedConfig) -> bool:
    """Whether the batch norms of a timm backbone hold the activation behind them, as those of EfficientNets do.

    transformers' own detectors replace a norm that they freeze by one without it, and nothing but linear maps is left.
    """
    with torch.device("meta"):
        backbone = timm.create_model(config.backbone, features_only=True, out_indices=tuple(config.out_indices))
    return any(
        isinstance(module, nn.BatchNorm2d) and not isinstance(getattr(module, "act", None), nn.Identity | None)
        for module in backbone.modules()
    )


def require_plain_norms(config: PreTrainedConfig, kind: str) -> None:
    """Refuse a backbone that a `kind` of detector would rob of its activations, see [`norms_activate`]."""
    if norms_activate(config):
        raise UserError(
            f"--backbone {config.backbone} holds its activations in its batch norms, which transformers replaces in a "
            f"{kind} by frozen ones without: take another backbone, such as resnet50, or another architecture."
        )


def fill_backbone(model: PreTrainedModel, weights: str | None, *, from_scratch: bool) -> None:
    """Put weights into the timm backbone of a new detector, in place.

    transformers replaces batch normalisation by a frozen one, or it is frozen here. With pretrained weights that
    stays, and the stem and the first stage are not trained, as in DETR's paper. From scratch the norms must learn:
    RT-DETRv2, D-FINE and DEIMv2 are configured to keep them; in the others those of timm are put back, and what they
    have learned is read by the frozen ones of the same names when the model is loaded again.

    Args:
        model: With its backbone in `model.model.backbone.model` or, DEIMv2's, `model.model.conv_encoder.model`.
        weights: See [`~deperceiver_hf.create_model`]; `None` if a training state will bring them.
        from_scratch: Start from random weights and train all of them.

    Raises:
        OSError: The weights cannot be had.
        ValueError: The weights are of another architecture, or the backbone is not of timm.
    """
    if model.config.backbone_config.model_type != "timm_backbone":
        raise UserError(f"a {model.config.model_type} is trained with a timm backbone only: see --backbone.")
    encoder = getattr(model.model, "conv_encoder", None) or model.model.backbone
    wrapped = hasattr(encoder.model, "_backbone")  # by transformers' class, as in RT-DETRv2, D-FINE and DEIMv2
    if from_scratch:
        if not wrapped:
            encoder.model = AutoBackbone.from_config(model.config.backbone_config)._backbone
            for module in encoder.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.num_batches_tracked = None  # the frozen norms know no such name
            encoder.model.register_load_state_dict_post_hook(_forget_batch_counters)
        return
    freeze_early_stages(encoder.model)
    freeze_norms(encoder.model)
    if weights is not None:
        backbone = AutoBackbone.from_config(model.config.backbone_config)
        load_backbone_weights(backbone, weights)
        (encoder.model._backbone if wrapped else encoder.model).load_state_dict(backbone._backbone.state_dict())


def freeze_early_stages(backbone: nn.Module) -> None:
    """Train from the second stage on, as in DETR's paper; transformers does so for its own ResNet only."""
    seen_stages = False
    for name, parameter in backbone.named_parameters():
        stage = backbone_stage(name)
        seen_stages |= stage is not None
        if stage == 1 or not seen_stages:
            parameter.requires_grad_(False)


def freeze_norms(backbone: nn.Module) -> None:
    """Train no batch norm; those that transformers has not replaced are then kept in evaluation mode."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def freeze_saved_backbone(model: PreTrainedModel) -> None:
    """Freeze the early stages of a saved model's convolutional backbone, unless it was trained from scratch and its
    norms still learn."""
    backbone = backbone_of(model)
    is_vit = model.config.backbone_config.model_type == "dinov3_vit"  # of DEIMv2's larger sizes; trained as a whole
    counters = [module.num_batches_tracked for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    if not is_vit and all(counter is not None and counter == 0 for counter in counters):
        freeze_early_stages(backbone)
        freeze_norms(backbone)


def _forget_batch_counters(backbone: nn.Module, keys: Any) -> None:
    """A batch norm adds the count of its batches to a state that lacks it, and then does not know the name."""
    keys.unexpected_keys[:] = [name for name in keys.unexpected_keys if not name.endswith("num_batches_tracked")]


def compute_in_float32(head: nn.Module) -> None:
    """Let a head work in float32 under autocast, in place: one that predicts whole boxes, not corrections of them,
    would place them by 8 bits of mantissa."""

    def forward_in_float32(self: nn.Module, states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return type(self).forward(self, states.to(next(self.parameters()).dtype))

    head.forward = MethodType(forward_in_float32, head)  # bound, so that a copy of the head has its own


def keep_boxes_in_float32(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of a box head. Under autocast boxes are in 8 bits of mantissa otherwise, pixels off in an image."""
    return output.float()
