# SPDX-License-Identifier: Apache-2.0
"""RT-DETRv2 (Lv et al. 2024, "RT-DETRv2: Improved Baseline with Bag-of-Freebies for Real-Time Detection
Transformer")."""

from functools import partial

import transformers
from transformers import RTDetrV2Config

from ...models.image_processing_deperceiver_v2 import DePerceiverV2ImageProcessor
from ..arguments import TrainingOptions
from .architecture import Architecture, new_config
from .backbones import freeze_saved_backbone
from .hybrid_encoder import (
    HybridEncoderDetector,
    create_hybrid_encoder_detector,
    hybrid_encoder_fields,
    hybrid_encoder_saved_fields,
)


class RTDetrV2ForObjectDetection(HybridEncoderDetector, transformers.RTDetrV2ForObjectDetection):
    """transformers' RT-DETRv2 with its own loss; a saved one is transformers' own class again."""


def rt_detr_v2_config(options: TrainingOptions, label_names: list[str]) -> RTDetrV2Config:
    """Configuration of a new RT-DETRv2 that reads the maps of strides 8, 16 and 32 of the same backbone."""
    return new_config(RTDetrV2Config, hybrid_encoder_fields(options), options, label_names)


RT_DETR_V2 = Architecture(
    model_class=RTDetrV2ForObjectDetection,
    image_processor_class=DePerceiverV2ImageProcessor,
    make_config=rt_detr_v2_config,
    create=partial(create_hybrid_encoder_detector, RTDetrV2ForObjectDetection),
    saved_fields=hybrid_encoder_saved_fields,
    prepare_saved=freeze_saved_backbone,
)
