# SPDX-License-Identifier: Apache-2.0
"""D-FINE (Peng et al. 2024, "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement")."""

from functools import partial

import transformers
from transformers import DFineConfig

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


class DFineForObjectDetection(HybridEncoderDetector, transformers.DFineForObjectDetection):
    """transformers' D-FINE with its own loss; a saved one is transformers' own class again."""


def d_fine_config(options: TrainingOptions, label_names: list[str]) -> DFineConfig:
    """Configuration of a new D-FINE that reads the maps of strides 8, 16 and 32 of the same backbone."""
    return new_config(DFineConfig, hybrid_encoder_fields(options), options, label_names)


D_FINE = Architecture(
    model_class=DFineForObjectDetection,
    image_processor_class=DePerceiverV2ImageProcessor,
    make_config=d_fine_config,
    create=partial(create_hybrid_encoder_detector, DFineForObjectDetection),
    saved_fields=hybrid_encoder_saved_fields,
    prepare_saved=freeze_saved_backbone,
)
