# SPDX-License-Identifier: Apache-2.0
"""DETR (Carion et al. 2020, "End-to-End Object Detection with Transformers") trained by the recipe of DePerceiver."""

import torch
import transformers
from transformers import DetrConfig
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

from ...errors import UserError
from ...models.image_processing_deperceiver import DePerceiverImageProcessor
from ...models.loss_deperceiver import set_prediction_loss
from .architecture import common_fields, new_config
from .backbones import (
    TransformersArchitecture,
    compute_in_float32,
    freeze_early_stages,
    require_plain_norms,
    timm_backbone_config,
)
from .options import ModelOptions


class DetrForObjectDetection(transformers.DetrForObjectDetection):
    """transformers' DETR with DePerceiver's loss; a saved one is transformers' own class again.

    The predictions after every decoder layer are made here, from the recorded hidden states, and not by
    `config.auxiliary_loss`: with that field transformers feeds the output of the final norm into the next layer, which
    neither the paper nor the authors' checkpoints do.

    Attributes:
        use_auxiliary_loss: Apply the loss to every decoder layer instead of the last one only.
    """

    use_auxiliary_loss = True

    def __init__(self, config: transformers.DetrConfig):
        super().__init__(config)
        config.auxiliary_loss = False
        config.class_loss_coefficient = 1
        compute_in_float32(self.bbox_predictor)
        freeze_early_stages(self.model.backbone)

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs,
    ) -> DetrObjectDetectionOutput:
        """Predictions, and with `labels` (boxes relative to the un-padded image) `loss` and `loss_dict`."""
        if labels is None:
            return super().forward(pixel_values, pixel_mask=pixel_mask, **kwargs)
        outputs = super().forward(pixel_values, pixel_mask=pixel_mask, output_hidden_states=True, **kwargs)
        logits, pred_boxes = outputs.logits[None], outputs.pred_boxes[None]  # (1, B, Q, ...)
        # The recorded states are the decoder's input, the output of every layer but the last, and the normed output.
        earlier = outputs.decoder_hidden_states[1:-1]
        if self.use_auxiliary_loss and earlier:
            states = self.model.decoder.layernorm(torch.stack(earlier))  # (L - 1, B, Q, D)
            logits = torch.cat((self.class_labels_classifier(states), logits))
            pred_boxes = torch.cat((self.bbox_predictor(states).sigmoid(), pred_boxes))
        loss, loss_dict = set_prediction_loss(logits, pred_boxes, labels, self.config)
        return DetrObjectDetectionOutput(
            loss=loss, loss_dict=loss_dict, logits=outputs.logits, pred_boxes=outputs.pred_boxes
        )


class DetrArchitecture(TransformersArchitecture):
    model_class = DetrForObjectDetection
    image_processor_class = DePerceiverImageProcessor

    def make_config(self, options: ModelOptions, label_names: list[str]) -> DetrConfig:
        """The model reads the feature map of `--downsample_factor` of the same backbone."""
        stride = options.downsample_factor or 32
        if options.dilation and stride != 32:
            raise UserError(
                f"--dilation changes the stage of stride 32, which --downsample_factor {stride} leaves out."
            )
        backbone_config = timm_backbone_config(options.backbone, [stride], options.dilation)
        require_plain_norms(backbone_config, self.name)
        fields = {
            "backbone_config": backbone_config,
            "dilation": options.dilation,
            "position_embedding_type": options.position_embedding,
            "d_model": options.hidden_dim,
            "encoder_layers": options.enc_layers,
            "decoder_layers": options.dec_layers,
            "encoder_ffn_dim": options.dim_feedforward,
            "decoder_ffn_dim": options.dim_feedforward,
            "encoder_attention_heads": options.nheads,
            "decoder_attention_heads": options.nheads,
            **common_fields(options),
        }
        return new_config(DetrConfig, fields, options, label_names)

    def prepare_new(self, model: DetrForObjectDetection, options: ModelOptions) -> None:
        model.use_auxiliary_loss = not options.no_aux_loss
