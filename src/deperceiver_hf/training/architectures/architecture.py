# SPDX-License-Identifier: Apache-2.0
"""What is known of an architecture, and how options become a configuration."""

import copy
import dataclasses
import difflib
import json
from collections.abc import Callable
from typing import Any, ClassVar, get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...backbone_weights import create_model
from ...errors import UserError, refused_fields_as_user_errors
from .options import ModelOptions

LABEL_FIELDS = ("id2label", "label2id")
# Of a backbone that starts from random weights: batch normalisation works and the early layers learn.
LEARNING_BACKBONE = {"freeze_batch_norm": False, "frozen_backbone_stages": -1}


class Architecture:
    """One kind of model that can be trained: a subclass for each, with defaults for models of this package.

    Attributes:
        model_class: Class that is trained. `forward(pixel_values, pixel_mask, labels)` returns `loss` and `loss_dict`,
            a dictionary of scalars for the log.
        image_processor_class: Processor that is saved with a new model; its `post_process_object_detection` reads the
            model's outputs.
        side_multiple: Height and width of its images must be multiples of it, unless it is configured otherwise.
        square_only: Whether height and width must be equal.
        own_backbone: Timm model that its backbone is like, if it has a kind of its own and none that others share.
    """

    side_multiple: ClassVar[int] = 1
    square_only: ClassVar[bool] = False
    own_backbone: ClassVar[str | None] = None
    model_class: ClassVar[type[PreTrainedModel]]
    image_processor_class: ClassVar[type]

    @property
    def name(self) -> str:
        """The `model_type` of its configurations, which is also its name for the user."""
        return self.model_class.config_class.model_type

    def make_config(self, options: ModelOptions, label_names: list[str]) -> PreTrainedConfig:
        """Configuration of a new model; options that are not given keep the configuration's own defaults.

        Args:
            options: Of this architecture.
            label_names: Names of the classes, by label.

        Raises:
            ValueError: The options describe no possible model.
        """
        raise NotImplementedError

    def create(self, config: PreTrainedConfig, options: ModelOptions, weights: str | None) -> PreTrainedModel:
        """A new model, ready to be trained.

        Args:
            config: From `make_config`.
            options: The same as there.
            weights: Name of the backbone's weights; `None` leaves it random.
        """
        return self.model_class(config) if weights is None else create_model(config, weights)

    def timm_backbone(self, options: ModelOptions, config: PreTrainedConfig) -> str | None:
        """Name of the timm model whose weights the backbone of a new model takes; `None` if it is like none."""
        return getattr(config.backbone_config, "backbone", None)

    def pad_size(self, config: PreTrainedConfig, height: int, width: int) -> dict[str, int] | None:
        """Height and width that the image processor pads every image to; `None` if only to the others of a batch.

        Args:
            config: Of the model.
            height, width: The most that images have, in pixels.
        """
        return None

    def saved_fields(self, options: ModelOptions, config: PreTrainedConfig) -> dict[str, Any]:
        """Fields of a saved model's configuration `config` that the options change."""
        return common_fields(options)

    def prepare_saved(self, model: PreTrainedModel) -> None:
        """Do what is to be done to a saved model before it is trained on."""

    def plain_config(self, num_labels: int, **options: Any) -> PreTrainedConfig:
        """Configuration of a model that is to be looked at, counted or timed, not trained.

        Args:
            num_labels: Number of classes; they have transformers' default names.
            options: Fields of [`ModelOptions`], such as `preset`, `backbone`, `downsample_factor` or `num_queries`.

        Raises:
            ValueError: The options describe no possible model, or are none of this architecture.
        """
        label_names = [f"LABEL_{label}" for label in range(num_labels)]
        return self.make_config(ModelOptions(architecture=self.name, **options), label_names)

    def random_model(self, config: PreTrainedConfig, attn_implementation: str = "sdpa") -> PreTrainedModel:
        """A model of random weights in evaluation mode, also on the meta device. It is no start for a training.

        Args:
            config: Of this architecture.
            attn_implementation: Of the transformer; timm's backbones choose for themselves.
        """
        config = copy.deepcopy(config)  # transformers writes into it
        return self.model_class._from_config(config, attn_implementation={"": attn_implementation}).eval()


def new_config(
    config_class: type[PreTrainedConfig],
    fields: dict[str, Any],
    options: ModelOptions,
    label_names: list[str],
    make: Callable[..., PreTrainedConfig] | None = None,
) -> PreTrainedConfig:
    """A configuration of those `fields` that are not `None`, of the labels, and of what `--config` says.

    Args:
        config_class: Class of the configuration.
        fields: By name; a number is converted to the kind that the field takes.
        options: `config` wins over `fields`.
        label_names: Names of the classes, by label.
        make: Makes the configuration from keyword arguments; by default its class does.

    Raises:
        ValueError: An unknown field, a value of another type, or an impossible architecture.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    given |= parse_config_fields(options.config or [], config_class)
    with refused_fields_as_user_errors():
        return (make or config_class)(**as_declared(given, config_class), **label_fields(label_names))


def parse_config_fields(settings: list[str], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """`["d_model=96", "activation_function=relu"]` as a dictionary; a value that is no JSON is a string.

    Raises:
        ValueError: No such field in the configuration.
    """
    known = sorted({field.name for field in dataclasses.fields(config_class)} - {*LABEL_FIELDS})
    values = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name in LABEL_FIELDS:
            raise UserError(f"--config {setting}: the labels are those of the data.")
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}."
            raise UserError(f"--config {setting}: {config_class.__name__} has no field {name!r}; {hint}")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


def as_declared(fields: dict[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The same values, with numbers as `int` or `float`, whichever the configuration's fields take."""
    annotations = {field.name: field.type for field in dataclasses.fields(config_class)}
    return {name: _as_kind_of(annotations.get(name), value) for name, value in fields.items()}


def common_fields(options: ModelOptions) -> dict[str, Any]:
    """Fields that the configurations of DETR's family have by the same names, as far as options give them."""
    fields = {
        "num_queries": options.num_queries,
        "dropout": options.dropout,
        "class_cost": options.set_cost_class,
        "bbox_cost": options.set_cost_bbox,
        "giou_cost": options.set_cost_giou,
        "bbox_loss_coefficient": options.bbox_loss_coef,
        "giou_loss_coefficient": options.giou_loss_coef,
        "eos_coefficient": options.eos_coef,
    }
    return {name: value for name, value in fields.items() if value is not None}


def label_fields(label_names: list[str]) -> dict[str, Any]:
    """Fields of a configuration that name the classes."""
    id2label = dict(enumerate(label_names))
    return {"id2label": id2label, "label2id": {name: label for label, name in id2label.items()}}


def scalars(loss_dict: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    """Those of the named terms of a loss that it has, without their graph."""
    return {name: loss_dict[name].detach() for name in names if name in loss_dict}


def _as_kind_of(annotation: Any, value: Any) -> Any:
    """The same number as an `int` or a `float`, whichever a field of this annotation takes."""
    kinds = get_args(annotation) or (annotation,)
    if type(value) is int and int not in kinds and float in kinds:
        return float(value)
    if type(value) is float and float not in kinds and int in kinds and value.is_integer():
        return int(value)
    return value
