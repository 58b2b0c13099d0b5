# SPDX-License-Identifier: Apache-2.0
"""DETR (Carion et al. 2020, "End-to-End Object Detection with Transformers") trained by the recipe of DePerceiver."""

import torch
import transformers
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

from ..loss_deperceiver import set_prediction_loss
from ..tokens_deperceiver import backbone_stage


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
        _freeze_early_stages(self.model.backbone)

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


def _freeze_early_stages(backbone: torch.nn.Module) -> None:
    """Train from the second stage on, as in the paper; transformers does so for its own ResNet only."""
    seen_stages = False
    for name, parameter in backbone.named_parameters():
        stage = backbone_stage(name)
        seen_stages |= stage is not None
        if stage == 1 or not seen_stages:
            parameter.requires_grad_(False)
