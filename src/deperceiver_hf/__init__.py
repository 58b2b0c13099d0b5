# SPDX-License-Identifier: Apache-2.0
"""DePerceiver: object detection with a Perceiver IO, as a transformers model.

Importing the package registers its classes with transformers' Auto classes and with `pipeline("object-detection")`.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection

from .backbone_weights import create_model
from .configuration_deperceiver import DePerceiverConfig
from .convert_original import load_original
from .image_processing_deperceiver import DePerceiverImageProcessor, image_processor_classes
from .image_processing_pil_deperceiver import DePerceiverImageProcessorPil
from .modeling_deperceiver import DePerceiverForObjectDetection, DePerceiverModel, DePerceiverPreTrainedModel

__version__ = "0.1.0"

# The Auto classes find the classes of this package by the `model_type` of a saved configuration, ...
AutoConfig.register(DePerceiverConfig.model_type, DePerceiverConfig, exist_ok=True)
AutoModel.register(DePerceiverConfig, DePerceiverModel, exist_ok=True)
AutoModelForObjectDetection.register(DePerceiverConfig, DePerceiverForObjectDetection, exist_ok=True)
AutoImageProcessor.register(DePerceiverConfig, image_processor_classes=image_processor_classes(), exist_ok=True)

# ... and `save_pretrained` writes `auto_map` and the hub files beside the weights, for use without the package.
DePerceiverConfig.register_for_auto_class("AutoConfig")
DePerceiverModel.register_for_auto_class("AutoModel")
DePerceiverForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")
for _processor_class in image_processor_classes().values():
    _processor_class.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "DePerceiverConfig",
    "DePerceiverForObjectDetection",
    "DePerceiverImageProcessor",
    "DePerceiverImageProcessorPil",
    "DePerceiverModel",
    "DePerceiverPreTrainedModel",
    "create_model",
    "load_original",
]
