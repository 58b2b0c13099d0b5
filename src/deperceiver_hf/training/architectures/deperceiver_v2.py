# SPDX-License-Identifier: Apache-2.0
"""DePerceiver v2 from the options of a training run."""

from functools import partial
from typing import Any

from ...backbone_weights import create_model
from ...models.configuration_deperceiver_v2 import DePerceiverV2Config
from ...models.image_processing_deperceiver_v2 import DePerceiverV2ImageProcessor
from ...models.modeling_deperceiver_v2 import DePerceiverV2ForObjectDetection
from ..arguments import TrainingOptions
from .architecture import Architecture, common_fields, new_config

DEFAULT_PRESET = "base"


def deperceiver_v2_config(options: TrainingOptions, label_names: list[str]) -> DePerceiverV2Config:
    """Configuration of a new DePerceiver v2; the preset decides what options do not give."""
    fields = {
        "backbone": options.backbone,
        "dilation": options.dilation or None,
        "freeze_backbone": options.lr_backbone == 0,
        "feature_strides": [8, 16, 32] if options.multiscale else options.downsample_factor,
        "d_model": options.hidden_dim,
        "num_attention_heads": options.nheads,
        "decoder_layers": options.dec_layers,
        **common_fields(options),
    }
    if options.no_pretrained_backbone:  # random weights need working batch normalisation and early layers that learn
        fields |= {"freeze_batch_norm": False, "frozen_backbone_stages": -1}
    make = partial(DePerceiverV2Config.from_preset, options.preset or DEFAULT_PRESET)
    return new_config(DePerceiverV2Config, fields, options, label_names, make)


def _create(
    config: DePerceiverV2Config, options: TrainingOptions, weights: str | None
) -> DePerceiverV2ForObjectDetection:
    return DePerceiverV2ForObjectDetection(config) if weights is None else create_model(config, weights)


def _saved_fields(options: TrainingOptions, config: DePerceiverV2Config) -> dict[str, Any]:
    return {**common_fields(options), "freeze_backbone": options.lr_backbone == 0}


DEPERCEIVER_V2 = Architecture(
    model_class=DePerceiverV2ForObjectDetection,
    image_processor_class=DePerceiverV2ImageProcessor,
    make_config=deperceiver_v2_config,
    create=_create,
    saved_fields=_saved_fields,
)
