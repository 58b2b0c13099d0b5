# SPDX-License-Identifier: Apache-2.0
"""DePerceiver: object detection with a Perceiver IO, as a transformers model.

Importing the package registers its classes with transformers' Auto classes and with `pipeline("object-detection")`.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection
from transformers.pipelines import PIPELINE_REGISTRY

from .backbone_weights import backbone_preprocessing, create_model, detector_preprocessing
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
from .models.pipeline_deperceiver import DePerceiverObjectDetectionPipeline

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

# `pipeline("object-detection")` chooses its class by the task alone. For other models this one is the class it was.
PIPELINE_REGISTRY.supported_tasks["object-detection"]["impl"] = DePerceiverObjectDetectionPipeline

_MOVED = {  # modules of version 0.2, and where what was in them is now
    **{
        f"{name}_deperceiver": "models" for name in ("configuration", "image_processing", "modeling", "loss", "layers")
    },
    **{
        f"{name}_deperceiver_v2": "models"
        for name in ("configuration", "image_processing", "modeling", "loss", "layers")
    },
    **{name: "models" for name in ("denoising_deperceiver_v2", "tokens_deperceiver_v2")},
    "benchmark": "benchmarks.timing",
    "coco_metric": "evaluation.coco_metric",
    "conversion_job": "conversion.job",
    "convert_original": "conversion.original_checkpoint",
    "cost": "benchmarks.cost",
    "data.context": "data.synthetic.context",
    "data.loading": "data.dataset",
    "data.shapes": "data.synthetic.shapes",
    "evaluation_job": "evaluation.job",
    "scaling": "benchmarks.scaling",
    "training.batches": "data.sampling",
    "variants": "benchmarks.variants",
}


class _MovedModules:
    """Finds and loads the modules of version 0.2 by their old names, with a warning that says the new one."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        if package != __name__ or module not in _MOVED:
            return None
        return importlib.util.spec_from_loader(name, _MovedModules)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        old = module.__name__.partition(".")[2]
        new = f"{__name__}.{_MOVED[old]}" + (f".{old}" if _MOVED[old] == "models" else "")
        warnings.warn(f"{module.__name__} is {new} now.", FutureWarning, stacklevel=2)
        moved = importlib.import_module(new)
        module.__getattr__ = lambda attribute: getattr(moved, attribute)  # type: ignore[method-assign]


sys.meta_path.append(_MovedModules)  # type: ignore[arg-type]

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
    "detector_preprocessing",
    "load_original",
]
