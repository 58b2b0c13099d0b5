# SPDX-License-Identifier: Apache-2.0
"""DePerceiver: object detection with a Perceiver IO, as a transformers model.

Importing the package registers its classes with transformers' Auto classes and with `pipeline("object-detection")`.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection

from .backbone_weights import backbone_preprocessing, create_model
from .conversion.original_checkpoint import load_original
from .models.configuration_deperceiver import DePerceiverConfig
from .models.configuration_deperceiver_v2 import DePerceiverV2Config
from .models.image_processing_deperceiver import DePerceiverImageProcessor, DePerceiverImageProcessorPil
from .models.image_processing_deperceiver_v2 import DePerceiverV2ImageProcessor, DePerceiverV2ImageProcessorPil
from .models.modeling_deperceiver import DePerceiverForObjectDetection, DePerceiverModel, DePerceiverPreTrainedModel
from .models.modeling_deperceiver_v2 import (
    DePerceiverV2ForObjectDetection,
    DePerceiverV2Model,
    DePerceiverV2PreTrainedModel,
)

__version__ = "0.3.0.dev0"

for _config, _model, _detector, _processor in (
    (DePerceiverConfig, DePerceiverModel, DePerceiverForObjectDetection, DePerceiverImageProcessor),
    (DePerceiverV2Config, DePerceiverV2Model, DePerceiverV2ForObjectDetection, DePerceiverV2ImageProcessor),
):
    # The Auto classes find the classes of this package by the `model_type` of a saved configuration, ...
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForObjectDetection.register(_config, _detector, exist_ok=True)
    AutoImageProcessor.register(_config, image_processor_classes=_processor.backend_classes(), exist_ok=True)

    # ... and `save_pretrained` writes `auto_map` and the hub files beside the weights, for use without the package.
    _config.register_for_auto_class("AutoConfig")
    _model.register_for_auto_class("AutoModel")
    _detector.register_for_auto_class("AutoModelForObjectDetection")
    for _processor_class in _processor.backend_classes().values():
        _processor_class.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "DePerceiverConfig",
    "DePerceiverForObjectDetection",
    "DePerceiverImageProcessor",
    "DePerceiverImageProcessorPil",
    "DePerceiverModel",
    "DePerceiverPreTrainedModel",
    "DePerceiverV2Config",
    "DePerceiverV2ForObjectDetection",
    "DePerceiverV2ImageProcessor",
    "DePerceiverV2ImageProcessorPil",
    "DePerceiverV2Model",
    "DePerceiverV2PreTrainedModel",
    "backbone_preprocessing",
    "create_model",
    "load_original",
]
