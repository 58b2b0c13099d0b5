# SPDX-License-Identifier: Apache-2.0
"""Deformable DETR (Zhu et al. 2021, "Deformable DETR: Deformable Transformers for End-to-End Object Detection")."""

import math
from typing import Any

import torch
import transformers
from torch import distributed, nn
from transformers import DeformableDetrConfig

from ...errors import UserError
from ...models.image_processing_deperceiver_v2 import DePerceiverV2ImageProcessor
from .architecture import common_fields, new_config, scalars
from .backbones import (
    TransformersArchitecture,
    freeze_early_stages,
    keep_boxes_in_float32,
    require_plain_norms,
    timm_backbone_config,
)
from .float32_loss import OwnLossInFloat32
from .options import ModelOptions

FEEDFORWARD_RATIO = 4  # hidden width of an MLP, relative to the model's
NORM_GROUPS = 32  # of the group norms behind the backbone
CLASSIFICATION_WEIGHT = 2  # in the loss and, unless given, in the matching, as in the paper
PRIOR_PROBABILITY = 0.01  # of a class, where the authors let its head start


class DeformableDetrForObjectDetection(OwnLossInFloat32, transformers.DeformableDetrForObjectDetection):
    """transformers' Deformable DETR with its own loss; a saved one is transformers' own class again.

    transformers divides the number of objects by the number of processes twice; here the loss is that of all
    processes' objects. And it weights the classification by 1, here it has the paper's weight of 2.
    """

    def __init__(self, config: DeformableDetrConfig):
        super().__init__(config)
        for heads in (self.bbox_embed, self.model.decoder.bbox_embed or []):
            for head in heads:
                head.register_forward_hook(keep_boxes_in_float32)

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs,
    ) -> Any:
        """Predictions, and with `labels` (boxes relative to the un-padded image) `loss` and `loss_dict`: the
        unweighted terms of the last layer."""
        outputs = super().forward(pixel_values, pixel_mask=pixel_mask, labels=labels, **kwargs)
        if labels is not None:
            factor = _correction(sum(len(target["class_labels"]) for target in labels), pixel_values.device)
            classification = sum(term for name, term in outputs.loss_dict.items() if name.startswith("loss_ce"))
            outputs.loss = (outputs.loss + (CLASSIFICATION_WEIGHT - 1) * classification) * factor
            terms = scalars(outputs.loss_dict, "loss_ce", "loss_bbox", "loss_giou")
            outputs.loss_dict = {name: term * factor for name, term in terms.items()}
        return outputs


class DeformableDetrArchitecture(TransformersArchitecture):
    model_class = DeformableDetrForObjectDetection
    image_processor_class = DePerceiverV2ImageProcessor

    def make_config(self, options: ModelOptions, label_names: list[str]) -> DeformableDetrConfig:
        """The model has iterative box refinement, and reads the maps of strides 8, 16, 32 and 64.

        The last map is a convolution of the one before, as in the paper. The two-stage variant is left out:
        transformers has no loss for its first stage.
        """
        hidden_dim = options.hidden_dim
        if hidden_dim is not None and hidden_dim % NORM_GROUPS:
            raise UserError(f"--hidden_dim {hidden_dim}: a deformable_detr needs a multiple of {NORM_GROUPS}.")
        feedforward = options.dim_feedforward or (hidden_dim and FEEDFORWARD_RATIO * hidden_dim)
        backbone_config = timm_backbone_config(options.backbone, [8, 16, 32])
        require_plain_norms(backbone_config, self.name)
        fields = {
            "backbone_config": backbone_config,
            "with_box_refine": True,
            "auxiliary_loss": not options.no_aux_loss,
            "position_embedding_type": options.position_embedding,
            "d_model": hidden_dim,
            "encoder_layers": options.enc_layers,
            "decoder_layers": options.dec_layers,
            "encoder_ffn_dim": feedforward,
            "decoder_ffn_dim": feedforward,
            "encoder_attention_heads": options.nheads,
            "decoder_attention_heads": options.nheads,
            "class_cost": CLASSIFICATION_WEIGHT,
            **common_fields(options),
        }
        return new_config(DeformableDetrConfig, fields, options, label_names)

    def prepare_new(self, model: DeformableDetrForObjectDetection, options: ModelOptions) -> None:
        _start_heads_as_authors(model)

    def prepare_saved(self, model: DeformableDetrForObjectDetection) -> None:
        freeze_early_stages(model.model.backbone)


@torch.no_grad()
def _start_heads_as_authors(model: DeformableDetrForObjectDetection) -> None:
    """Start with rare objects and boxes on their reference points, which transformers leaves out."""
    for head in model.class_embed:
        nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    for head in model.bbox_embed:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    nn.init.constant_(model.bbox_embed[0].layers[-1].bias[2:], -2.0)  # sides of an eighth of the image


def _correction(num_objects: int, device: torch.device) -> torch.Tensor | float:
    """What the loss is multiplied by so that it is divided by the mean number of objects of a process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1.0
    mean = torch.tensor(float(num_objects), device=device)
    distributed.all_reduce(mean)
    mean /= distributed.get_world_size()
    return (mean / distributed.get_world_size()).clamp(min=1) / mean.clamp(min=1)
