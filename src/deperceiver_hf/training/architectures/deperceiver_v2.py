# SPDX-License-Identifier: Apache-2.0
"""DePerceiver v2 from the options of a training run."""

from functools import partial
from typing import Any

from ...backbone_weights import config_from_detector
from ...models.configuration_deperceiver_v2 import DePerceiverV2Config
from ...models.image_processing_deperceiver_v2 import DePerceiverV2ImageProcessor
from ...models.modeling_deperceiver_v2 import DePerceiverV2ForObjectDetection
from .architecture import LEARNING_BACKBONE, Architecture, common_fields, new_config
from .options import ModelOptions

DEFAULT_PRESET = "base"


class DePerceiverV2Architecture(Architecture):
    model_class = DePerceiverV2ForObjectDetection
    image_processor_class = DePerceiverV2ImageProcessor

    def make_config(self, options: ModelOptions, label_names: list[str]) -> DePerceiverV2Config:
        """The preset decides what options do not give."""
        fields = {
            "backbone": options.backbone,
            "dilation": options.dilation or None,
            "freeze_backbone": options.freeze_backbone,
            "feature_strides": [8, 16, 32] if options.multiscale else options.downsample_factor,
            "d_model": options.hidden_dim,
            "num_attention_heads": options.nheads,
            "decoder_layers": options.dec_layers,
            **common_fields(options),
        }
        if options.no_pretrained_backbone:
            fields |= LEARNING_BACKBONE
        preset = options.preset or DEFAULT_PRESET
        make = partial(DePerceiverV2Config.from_preset, preset)
        if options.start_from is not None:
            make = partial(config_from_detector, options.start_from, preset=preset)
        return new_config(DePerceiverV2Config, fields, options, label_names, make)

    def saved_fields(self, options: ModelOptions, config: DePerceiverV2Config) -> dict[str, Any]:
        return {**common_fields(options), "freeze_backbone": options.freeze_backbone}
