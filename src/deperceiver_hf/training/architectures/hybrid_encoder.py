# SPDX-License-Identifier: Apache-2.0
"""What RT-DETRv2, D-FINE and DEIMv2 share: the hybrid encoder, contrastive denoising, and images without padding."""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UserError
from ...models.image_processing_deperceiver_v2 import DePerceiverV2ImageProcessor
from .architecture import new_config, scalars
from .backbones import (
    TransformersArchitecture,
    backbone_of,
    feature_channels,
    freeze_saved_backbone,
    keep_boxes_in_float32,
    norms_activate,
    timm_backbone_config,
)
from .float32_loss import OwnLossInFloat32
from .options import ModelOptions

STRIDES = [8, 16, 32]
SAME_SPREAD = 0.25  # relative difference up to which weights count as drawn with transformers' standard deviation
FEEDFORWARD_RATIO = 4  # hidden width of an MLP, relative to the model's
PRIOR_PROBABILITY = 0.01  # of a class
BOX_HEADS = ("bbox_embed", "enc_bbox_head", "pre_bbox_head")


class HybridEncoderDetector(OwnLossInFloat32):
    """Mix-in that trains transformers' RT-DETRv2, D-FINE or DEIMv2 with its own loss.

    That loss is the sum over the proposals of the encoder, all decoder layers and the denoising queries. On several
    processes it is divided by the number of objects of each process, as in transformers: not the joint batch's. An
    epoch with a batch without any object (which has no denoising queries) cannot be trained on several processes.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        for name, module in self.named_modules():
            if name.split(".")[-1] in BOX_HEADS:
                for head in module if isinstance(module, nn.ModuleList) else [module]:
                    head.register_forward_hook(keep_boxes_in_float32)

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs,
    ) -> Any:
        """Predictions, and with `labels` `loss` and `loss_dict`: the weighted terms of the last layer.

        Raises:
            ValueError: Images are padded, have sides that are no multiples of 32, or have fewer cells than queries.
        """
        self._check_images(pixel_values, pixel_mask)
        outputs = super().forward(pixel_values, pixel_mask=pixel_mask, labels=labels, **kwargs)
        if labels is not None:
            outputs.loss_dict = scalars(outputs.loss_dict, "loss_vfl", "loss_mal", "loss_bbox", "loss_giou")
        return outputs

    def _check_images(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> None:
        kind, (height, width) = self.config.model_type, pixel_values.shape[-2:]
        if pixel_mask is not None and not pixel_mask.all():
            raise UserError(
                f"a {kind} knows no padding, its boxes would be relative to the padded image: make all images of a "
                f"batch the same size (images of one size with an --augmentation that keeps it, or --batch_size 1)."
            )
        if height % STRIDES[-1] or width % STRIDES[-1]:
            raise UserError(
                f"the image is {height} x {width} pixels, but a {kind} takes sides that are multiples of "
                f"{STRIDES[-1]} only: see --shortest_edge and --longest_edge."
            )
        cells = sum((height // stride) * (width // stride) for stride in STRIDES)
        if cells < self.config.num_queries:
            raise UserError(
                f"the image of {height} x {width} pixels has {cells} cells to pick {self.config.num_queries} queries "
                f"from: give larger images or fewer --num_queries."
            )


class HybridEncoderArchitecture(TransformersArchitecture):
    """RT-DETRv2, D-FINE or DEIMv2, on the maps of strides 8, 16 and 32 of the same backbone."""

    image_processor_class = DePerceiverV2ImageProcessor
    side_multiple = STRIDES[-1]

    def make_config(self, options: ModelOptions, label_names: list[str]) -> PreTrainedConfig:
        hidden_dim = options.hidden_dim
        feedforward = options.dim_feedforward or (hidden_dim and FEEDFORWARD_RATIO * hidden_dim)
        backbone_config = timm_backbone_config(options.backbone, STRIDES)
        fields = {
            "backbone_config": backbone_config,
            # Where norms activate they are frozen by what is trained, see `fill_backbone`.
            "freeze_backbone_batch_norms": not (options.no_pretrained_backbone or norms_activate(backbone_config)),
            "encoder_in_channels": feature_channels(backbone_config),
            "encoder_hidden_dim": hidden_dim,
            "decoder_in_channels": hidden_dim and [hidden_dim] * len(STRIDES),
            "d_model": hidden_dim,
            "encoder_layers": options.enc_layers,
            "decoder_layers": options.dec_layers,
            "encoder_ffn_dim": feedforward,
            "decoder_ffn_dim": feedforward,
            "encoder_attention_heads": options.nheads,
            "decoder_attention_heads": options.nheads,
            **self.own_fields(),
            **_fields_of_any_model(options),
        }
        return new_config(self.model_class.config_class, fields, options, label_names)

    def own_fields(self) -> dict[str, Any]:
        """Fields of the configuration in which they differ."""
        return {}

    def saved_fields(self, options: ModelOptions, config: PreTrainedConfig) -> dict[str, Any]:
        return _fields_of_any_model(options)

    def prepare_saved(self, model: PreTrainedModel) -> None:
        freeze_saved_backbone(model)

    def prepare_new(self, model: PreTrainedModel, options: ModelOptions) -> None:
        """Start batch norms as the identity, and layers of no special start as torch's own.

        transformers draws the weights of both, and the scales of RT-DETRv2's norms, close to 0.
        """
        of_backbone = {*backbone_of(model).modules()}
        for module in model.modules():
            if module in of_backbone:
                continue
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear | nn.Conv2d) and _starts_as_any(module.weight, model.config):
                module.reset_parameters()
        _start_heads(model, model.config)


def _fields_of_any_model(options: ModelOptions) -> dict[str, Any]:
    """Fields that may differ from those of a saved model, as far as options give them."""
    fields = {
        "num_queries": options.num_queries,
        "dropout": options.dropout,
        "matcher_class_cost": options.set_cost_class,
        "matcher_bbox_cost": options.set_cost_bbox,
        "matcher_giou_cost": options.set_cost_giou,
        "weight_loss_bbox": options.bbox_loss_coef,
        "weight_loss_giou": options.giou_loss_coef,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _starts_as_any(weight: torch.Tensor, config: PreTrainedConfig) -> bool:
    """Whether a new layer's weights are spread as transformers spreads those of layers of no special start."""
    return bool((weight.std() / config.initializer_range - 1).abs() < SAME_SPREAD)


@torch.no_grad()
def _start_heads(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Boxes start on their references, classes as rare and those of denoising queries spread, as in the authors' code.

    transformers means most of this but does not see to it; it takes classes for as likely as there are few of them.
    """
    decoder = model.model.decoder
    prior = config.initializer_bias_prior_prob or PRIOR_PROBABILITY
    for head in [*decoder.class_embed, model.model.enc_score_head]:
        nn.init.xavier_uniform_(head.weight)
        nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    first = [decoder.pre_bbox_head] if hasattr(decoder, "pre_bbox_head") else []  # RT-DETRv2 has none
    for head in [*decoder.bbox_embed, model.model.enc_bbox_head, *first]:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    if config.num_denoising:
        nn.init.normal_(model.model.denoising_class_embed.weight[:-1])
        nn.init.zeros_(model.model.denoising_class_embed.weight[-1])  # of queries that fill up a batch
