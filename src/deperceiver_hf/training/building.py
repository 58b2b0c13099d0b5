# SPDX-License-Identifier: Apache-2.0
"""The model and the image processor that a training run starts from."""

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..backbone_weights import (
    IMAGENET_PREPROCESSING,
    backbone_preprocessing,
    default_weights,
    detector_preprocessing,
)
from ..data.classes import corresponding_classes, listing
from ..data.records import is_main_process
from ..errors import UserError, refused_fields_as_user_errors
from ..models.backbone_deperceiver import keep_frozen_parts
from ..saved_models import load_config, load_image_processor, load_model
from .architectures import ARCHITECTURES
from .architectures.architecture import Architecture, as_declared, label_fields
from .architectures.backbones import TransformersArchitecture, backbone_of
from .architectures.options import DEFAULT_IMAGE_SIZE
from .arguments import TrainingOptions

logger = logging.get_logger(__name__)


def build_model(
    options: TrainingOptions, label_names: list[str], *, load_pretrained_backbone: bool = True
) -> PreTrainedModel:
    """The model to train, on the CPU in float32.

    Args:
        options: What to build; with `options.model` a saved model is taken. The rows of its heads follow the names of
            the classes, those of new classes are new; where the number of queries differs, those are new.
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
    that of a saved model, or of the detector that a new one starts from, stays as it is but for a size that options
    give: with a warning, if its sizes are of another kind.

    Raises:
        ValueError: The options describe no possible model, or timm has no such weights.
        OSError: A saved model or the configuration of weights on the Hub cannot be read.
    """
    source = options.model or options.start_from
    if source is None:
        processor = ARCHITECTURES[options.chosen_architecture].image_processor_class(
            **preprocessing_of_new_model(options)
        )
        size = DEFAULT_IMAGE_SIZE | {key: processor.size[key] for key in DEFAULT_IMAGE_SIZE if processor.size.get(key)}
        processor.size = type(processor.size)(**options.image_size(size))
        _fit_padding(processor, options.chosen_architecture, _new_config(options))
        return processor
    processor = (
        ARCHITECTURES[options.chosen_architecture].image_processor_class(**detector_preprocessing(source))
        if options.model is None
        else load_image_processor(source)
    )
    if options.shortest_edge is None and options.longest_edge is None and options.fixed_size is None:
        return processor
    size = {key: processor.size[key] for key in DEFAULT_IMAGE_SIZE if processor.size.get(key)}
    before = _described(processor.size) if getattr(processor, "do_resize", True) else "as large as they are"
    if not size or not getattr(processor, "do_resize", True):
        if is_main_process():
            logger.warning(f"Images become {_described(options.image_size(DEFAULT_IMAGE_SIZE | size))}, not {before}.")
        processor.do_resize = True
    processor.size = type(processor.size)(**options.image_size(DEFAULT_IMAGE_SIZE | size))
    if options.model is not None and (config := load_config(options.model)).model_type in ARCHITECTURES:
        _fit_padding(processor, config.model_type, config)
    pad_size = getattr(processor, "pad_size", None)
    if pad_size and min(pad_size["height"], pad_size["width"]) < max(filter(None, dict(processor.size).values())):
        raise UserError(
            f"images of {_described(processor.size)} do not fit into the {_described(pad_size)} to which the image "
            f"processor of {source} pads them; give a smaller size, or change its pad_size."
        )
    return processor


def _fit_padding(processor: Any, architecture: str, config: PreTrainedConfig) -> None:
    """Let an image processor pad to a size that the model takes, in place, where it takes few."""
    size = processor.size
    largest = (size.height, size.width) if size.height else (size.longest_edge, size.longest_edge)
    pad_size = ARCHITECTURES[architecture].pad_size(config, *largest)
    if pad_size is not None:
        processor.pad_size = type(processor.size)(**pad_size)


def _new_config(options: TrainingOptions) -> PreTrainedConfig:
    """Configuration of a new model, whatever its classes."""
    return ARCHITECTURES[options.chosen_architecture].make_config(options, ["object"])


def preprocessing_of_new_model(options: TrainingOptions) -> dict[str, Any]:
    """Mean, standard deviation and resampling that the weights of a new model's backbone expect.

    Torchvision's weights of a ResNet, the default, expect what the original does: ImageNet's numbers and bilinear.
    A backbone of transformers takes them from the image processor that is saved with its weights, if there is one.
    """
    config = _new_config(options)
    weights = pretrained_backbone_name(options, config)
    backbone = ARCHITECTURES[options.chosen_architecture].timm_backbone(options, config)
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
    if options.start_from is not None:
        return options.start_from
    if options.pretrained_backbone is not None:
        return options.pretrained_backbone
    backbone = ARCHITECTURES[options.chosen_architecture].timm_backbone(options, config)
    if backbone is None:
        raise UserError(
            f"no weights are known for a backbone of type {config.backbone_config.model_type}: give "
            f"--pretrained_backbone or --no_pretrained_backbone."
        )
    return default_weights(backbone)


def backbone_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters of the backbone, by name: what `--lr_backbone` applies to."""
    own = {id(parameter) for parameter in backbone_of(model).parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def training_mode(model: torch.nn.Module) -> None:
    """Put a model in training mode but for what is frozen."""
    model.train()
    keep_frozen_parts(model)


def _load_model(source: str, options: TrainingOptions, label_names: list[str]) -> PreTrainedModel:
    config = load_config(source)
    if config.model_type not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise UserError(f"--model {source} is of type {config.model_type}; {known} can be trained.")
    if options.architecture not in (None, config.model_type):
        raise UserError(
            f"--model {source} is a {config.model_type}, not a {options.architecture}: give --architecture "
            f"{config.model_type} or none."
        )
    options.check_architecture(config.model_type)
    architecture = ARCHITECTURES[config.model_type]
    saved_queries = getattr(config, "num_queries", None)
    saved_names = [config.id2label[label] for label in range(len(config.id2label))]
    for name, value in as_declared(architecture.saved_fields(options, config), type(config)).items():
        setattr(config, name, value)
    model = load_model(source, config, architecture.model_class, saved_queries=saved_queries, dtype=torch.float32)
    if saved_names != label_names:
        model = _with_classes(model, architecture, options, saved_names, label_names)
    architecture.prepare_saved(model)
    return model


def _with_classes(
    saved: PreTrainedModel,
    architecture: Architecture,
    options: TrainingOptions,
    saved_names: list[str],
    label_names: list[str],
) -> PreTrainedModel:
    """A model of other classes with the weights of a saved one.

    Rows of the heads follow the names of the classes; those of classes that are new are as in a new model, those that
    stand for no class, such as "no object", stay.
    """
    places = corresponding_classes(label_names, saved_names)
    kept = [name for name, place in zip(label_names, places, strict=True) if place is not None]
    new = [name for name, place in zip(label_names, places, strict=True) if place is None]
    left_out = [name for place, name in enumerate(saved_names) if place not in places]
    if is_main_process():
        logger.warning(
            f"Rows of the heads follow the names of the classes: {len(kept)} kept ({listing(kept) or 'none'}), "
            f"{len(new)} new ({listing(new) or 'none'}), {len(left_out)} left out ({listing(left_out) or 'none'})."
        )
    configs = [copy.deepcopy(saved.config) for _ in range(2)]
    for config, names in zip(configs, (label_names, [*label_names, "another"]), strict=True):
        for field, value in label_fields(names).items():
            setattr(config, field, value)
    with torch.device("meta"):
        longer = architecture.model_class(configs[1]).state_dict()
    model = architecture.model_class(configs[0])
    if isinstance(architecture, TransformersArchitecture):
        architecture.prepare_new(model, options)
    before, after = saved.state_dict(), model.state_dict()
    for name, tensor in after.items():
        dimensions = [
            d for d, (one, more) in enumerate(zip(tensor.shape, longer[name].shape, strict=True)) if one != more
        ]
        if not dimensions:  # not of the classes
            after[name] = before[name]
            continue
        (dimension,) = dimensions
        rows, old_rows = tensor.movedim(dimension, 0), before[name].movedim(dimension, 0)
        for label, place in enumerate(places):
            if place is not None:
                rows[label] = old_rows[place]
        rows[len(label_names) :] = old_rows[len(saved_names) :]
    model.load_state_dict(after)
    return model


def _described(size: Any) -> str:
    return " x ".join(str(value) for value in dict(size).values() if value) + " pixels"
