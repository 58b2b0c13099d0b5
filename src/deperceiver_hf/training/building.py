# SPDX-License-Identifier: Apache-2.0
"""The model and the image processor that a training run starts from."""

from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..backbone_weights import IMAGENET_PREPROCESSING, backbone_preprocessing, default_weights
from ..errors import UserError, refused_fields_as_user_errors
from ..saved_models import require_model_source
from .architectures import ARCHITECTURES
from .architectures.architecture import as_declared, label_fields
from .architectures.options import DEFAULT_IMAGE_SIZE
from .arguments import TrainingOptions

logger = logging.get_logger(__name__)


def build_model(
    options: TrainingOptions, label_names: list[str], *, load_pretrained_backbone: bool = True
) -> PreTrainedModel:
    """The model to train, on the CPU in float32.

    Args:
        options: What to build; with `options.model` a saved model is taken, and its heads are made new where the
            number of classes or queries differs.
        label_names: Names of the classes, by label.
        load_pretrained_backbone: `False` when a training state will bring the weights.

    Raises:
        ValueError: The options describe no possible model.
        OSError: Weights or a saved model cannot be read.
    """
    with refused_fields_as_user_errors():
        if options.model is not None:
            model = _load_model(options.model, options, label_names)
        else:
            architecture = ARCHITECTURES[options.chosen_architecture]
            config = architecture.make_config(options, label_names)
            weights = pretrained_backbone_name(options, config) if load_pretrained_backbone else None
            model = architecture.create(config, options, weights)
    if options.freeze_backbone:
        for parameter in backbone_parameters(model).values():
            parameter.requires_grad_(False)
    if options.gradient_checkpointing:
        # The method's name in later versions of transformers, and in earlier ones.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model


def build_image_processor(options: TrainingOptions) -> Any:
    """The processor that is saved with the model: it holds the size that the model is trained for.

    That of a new model prepares images as the weights of its backbone expect it, see `preprocessing_of_new_model`;
    that of a saved model stays as it is but for the size.

    Raises:
        ValueError: The options describe no possible model, or timm has no such weights.
        OSError: A saved model or the configuration of weights on the Hub cannot be read.
    """
    if options.model is None:
        processor = ARCHITECTURES[options.chosen_architecture].image_processor_class(
            **preprocessing_of_new_model(options)
        )
    else:
        require_model_source(options.model)
        processor = AutoImageProcessor.from_pretrained(options.model)
    size = DEFAULT_IMAGE_SIZE | {key: processor.size[key] for key in DEFAULT_IMAGE_SIZE if processor.size.get(key)}
    processor.size = type(processor.size)(**options.image_size(size))
    return processor


def preprocessing_of_new_model(options: TrainingOptions) -> dict[str, Any]:
    """Mean, standard deviation and resampling that the weights of a new model's backbone expect.

    Torchvision's weights of a ResNet, the default, expect what the original does: ImageNet's numbers and bilinear.
    A backbone of transformers takes them from the image processor that is saved with its weights, if there is one.
    """
    config = ARCHITECTURES[options.chosen_architecture].make_config(options, ["object"])
    weights = pretrained_backbone_name(options, config)
    backbone = getattr(config.backbone_config, "backbone", None)
    try:
        return backbone_preprocessing(weights, backbone)
    except (UserError, OSError) as error:
        if backbone is not None:
            raise
        logger.warning(f"Images are normalised by ImageNet's mean and standard deviation: {error}")
        return {**IMAGENET_PREPROCESSING}


def pretrained_backbone_name(options: TrainingOptions, config: PreTrainedConfig) -> str | None:
    """Which weights the backbone of a new model starts from; `None` for random ones.

    Args:
        options: What is asked for.
        config: Of the new model: its backbone may come from a preset.

    Raises:
        ValueError: The backbone is not of timm, and its weights are not named.
    """
    if options.no_pretrained_backbone:
        return None
    if options.pretrained_backbone is not None:
        return options.pretrained_backbone
    backbone = getattr(config.backbone_config, "backbone", None)
    if backbone is None:
        raise UserError(
            f"no weights are known for a backbone of type {config.backbone_config.model_type}: give "
            f"--pretrained_backbone or --no_pretrained_backbone."
        )
    return default_weights(backbone)


def backbone_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters of the convolutional backbone, by name: what `--lr_backbone` applies to."""
    return {name: parameter for name, parameter in model.named_parameters() if "backbone" in name.split(".")}


def _load_model(source: str, options: TrainingOptions, label_names: list[str]) -> PreTrainedModel:
    require_model_source(source)
    config = AutoConfig.from_pretrained(options.model)
    if config.model_type not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise UserError(f"--model {options.model} is of type {config.model_type}; {known} can be trained.")
    if options.architecture not in (None, config.model_type):
        raise UserError(
            f"--model {options.model} is a {config.model_type}, not a {options.architecture}: give --architecture "
            f"{config.model_type} or none."
        )
    options.check_architecture(config.model_type)
    architecture = ARCHITECTURES[config.model_type]
    changed = as_declared(architecture.saved_fields(options, config), type(config)) | label_fields(label_names)
    for name, value in changed.items():
        setattr(config, name, value)
    model, report = architecture.model_class.from_pretrained(
        options.model, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
    )
    if missing := sorted(report["missing_keys"] - {name for name, *_ in report["mismatched_keys"]}):
        raise UserError(f"--model {options.model} lacks {len(missing)} weights, such as {missing[:3]}.")
    architecture.prepare_saved(model)
    return model
