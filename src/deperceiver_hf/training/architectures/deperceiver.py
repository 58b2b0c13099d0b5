# SPDX-License-Identifier: Apache-2.0
"""DePerceiver from the options of a training run."""

import math
from typing import Any

from ...models.configuration_deperceiver import DePerceiverConfig
from ...models.image_processing_deperceiver import DePerceiverImageProcessor
from ...models.modeling_deperceiver import DePerceiverForObjectDetection
from .architecture import LEARNING_BACKBONE, Architecture, common_fields, new_config
from .options import ModelOptions


class DePerceiverArchitecture(Architecture):
    model_class = DePerceiverForObjectDetection
    image_processor_class = DePerceiverImageProcessor

    def make_config(self, options: ModelOptions, label_names: list[str]) -> DePerceiverConfig:
        strides = [8, 16, 32] if options.multiscale else options.downsample_factor
        fields = {
            "backbone": options.backbone,
            "dilation": options.dilation,
            "freeze_backbone": options.freeze_backbone,
            "position_embedding_type": options.position_embedding,
            "feature_strides": strides,
            "num_latents": options.num_latents,
            "d_latents": options.hidden_dim,
            "d_model": options.hidden_dim,
            "num_blocks": options.enc_blocks,
            "num_self_attends_per_block": options.enc_layers_per_block,
            "num_self_attention_heads": options.nheads,
            "decoder_type": "cross_attention" if options.no_aux_loss else "layered",
            "decoder_layers": options.dec_layers,
            **common_fields(options),
            **_decoder_dropouts(options, layered=not options.no_aux_loss),
        }
        if options.position_embedding == "learned":
            finest = 8 if options.multiscale else options.downsample_factor or 32
            cells = math.ceil(max(options.image_size().values()) / finest)
            fields["num_position_embeddings"] = max(50, cells)
        if options.no_pretrained_backbone:
            fields |= LEARNING_BACKBONE
        return new_config(DePerceiverConfig, fields, options, label_names)

    def saved_fields(self, options: ModelOptions, config: DePerceiverConfig) -> dict[str, Any]:
        return {
            **common_fields(options),
            "freeze_backbone": options.freeze_backbone,
            **_decoder_dropouts(options, layered=config.decoder_type == "layered"),
        }


def _decoder_dropouts(options: ModelOptions, layered: bool) -> dict[str, float]:
    """Dropouts of the decoder, which has its own unless `--dropout` is given."""
    if options.dropout is None:
        return {}
    return {"decoder_dropout": options.dropout} | ({"decoder_attention_dropout": options.dropout} if layered else {})
