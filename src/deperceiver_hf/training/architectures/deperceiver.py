# SPDX-License-Identifier: Apache-2.0
"""DePerceiver from the options of a training run."""

import math
from typing import Any

from ...backbone_weights import create_model
from ...models.configuration_deperceiver import DePerceiverConfig
from ...models.image_processing_deperceiver import DePerceiverImageProcessor
from ...models.modeling_deperceiver import DePerceiverForObjectDetection
from ..arguments import TrainingOptions
from ..image_size import training_size
from .architecture import Architecture, common_fields, new_config


def deperceiver_config(options: TrainingOptions, label_names: list[str]) -> DePerceiverConfig:
    """Configuration of a new DePerceiver; options that are not given keep the configuration's own defaults."""
    strides = [8, 16, 32] if options.multiscale else options.downsample_factor
    fields = {
        "backbone": options.backbone,
        "dilation": options.dilation,
        "freeze_backbone": options.lr_backbone == 0,
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
        finest = 8 if options.multiscale else strides or 32
        fields["num_position_embeddings"] = max(50, math.ceil(training_size(options)["longest_edge"] / finest))
    if options.no_pretrained_backbone:  # random weights need working batch normalisation and early layers that learn
        fields |= {"freeze_batch_norm": False, "frozen_backbone_stages": -1}
    return new_config(DePerceiverConfig, fields, options, label_names)


def _create(config: DePerceiverConfig, options: TrainingOptions, weights: str | None) -> DePerceiverForObjectDetection:
    return DePerceiverForObjectDetection(config) if weights is None else create_model(config, weights)


def _saved_fields(options: TrainingOptions, config: DePerceiverConfig) -> dict[str, Any]:
    return {
        **common_fields(options),
        "freeze_backbone": options.lr_backbone == 0,
        **_decoder_dropouts(options, layered=config.decoder_type == "layered"),
    }


def _decoder_dropouts(options: TrainingOptions, layered: bool) -> dict[str, float]:
    """Dropouts of the decoder, which has its own unless `--dropout` is given."""
    if options.dropout is None:
        return {}
    return {"decoder_dropout": options.dropout} | ({"decoder_attention_dropout": options.dropout} if layered else {})


DEPERCEIVER = Architecture(
    model_class=DePerceiverForObjectDetection,
    image_processor_class=DePerceiverImageProcessor,
    make_config=deperceiver_config,
    create=_create,
    saved_fields=_saved_fields,
)
