# SPDX-License-Identifier: Apache-2.0
"""New models whose backbone starts from pretrained weights.

`from_pretrained` never needs this: a saved model holds its backbone. It is for the start of a training, where
transformers itself would leave the backbone random.
"""

from os import PathLike
from pathlib import Path

import timm
import torch
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, AutoBackbone, PreTrainedModel
from transformers.utils import logging

from .errors import UserError
from .models.configuration_backbone_deperceiver import DePerceiverBackboneConfig

logger = logging.get_logger(__name__)

DEFAULT_PRETRAINED_BACKBONE = "resnet50.tv_in1k"  # torchvision's ImageNet weights, which the original started from


def create_model(
    config: DePerceiverBackboneConfig, pretrained_backbone: str | PathLike | None = DEFAULT_PRETRAINED_BACKBONE
) -> PreTrainedModel:
    """Make a new model, with pretrained weights in its backbone and everything else initialised at random.

    Args:
        config ([`DePerceiverConfig`] or [`DePerceiverV2Config`]): Architecture and labels; decides the model's class.
        pretrained_backbone (`str` or `PathLike`, *optional*): For a timm backbone, the name of a timm model with
            weights of the same architecture (such as `"resnet50.tv_in1k"`), or a file with its state dict
            (`.safetensors`, `.pth`, `.bin`). For another backbone, a Hub id or directory that
            `AutoBackbone.from_pretrained` takes. `None` leaves the backbone random.

    Raises:
        OSError: The weights cannot be downloaded or read.
        ValueError: The weights are of another architecture.
    """
    model = MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)](config)
    if pretrained_backbone is None:
        if config.freeze_batch_norm and not config.freeze_backbone:
            logger.warning(
                "The backbone starts from random weights with its batch normalisation frozen, which trains badly: set "
                "`freeze_batch_norm=False` and `frozen_backbone_stages=-1`."
            )
        return model
    load_backbone_weights(model.model.backbone.model, pretrained_backbone)
    return model


def load_backbone_weights(backbone: PreTrainedModel, source: str | PathLike) -> None:
    """Fill a backbone made by `AutoBackbone` with pretrained weights, in place. See [`create_model`].

    Raises:
        OSError: The weights cannot be downloaded or read.
        ValueError: The weights are of another architecture.
    """
    is_timm = backbone.config.model_type == "timm_backbone"
    target = backbone._backbone if is_timm else backbone
    weights = _read_timm_weights(backbone, source) if is_timm else _read_transformers_weights(backbone, source)
    expected = {name: tensor for name, tensor in target.state_dict().items() if "num_batches_tracked" not in name}
    # Classifier and stages behind the last feature map are not part of the backbone.
    usable = {name: tensor for name, tensor in weights.items() if name in expected}
    problems = sorted(expected.keys() - usable.keys())
    problems += sorted(name for name, tensor in usable.items() if tensor.shape != expected[name].shape)
    if problems:
        raise UserError(
            f"the weights of {str(source)!r} do not fit the backbone {_describe(backbone)}: {len(problems)} of its "
            f"{len(expected)} tensors are missing there or have another shape, such as {problems[:3]}. Name weights "
            f"of the same architecture."
        )
    target.load_state_dict(usable, strict=False)


def _describe(backbone: PreTrainedModel) -> str:
    return repr(getattr(backbone.config, "backbone", None) or backbone.config.model_type)


def _read_timm_weights(backbone: PreTrainedModel, source: str | PathLike) -> dict[str, torch.Tensor]:
    config = backbone.config
    if Path(source).is_file():
        from timm.models import load_state_dict

        try:
            weights = load_state_dict(str(source), use_ema=True)
        except Exception as error:  # whatever the file's format makes of it
            raise OSError(f"{str(source)!r} cannot be read as a checkpoint: {error}") from error
        feature_net = timm.create_model(
            config.backbone, pretrained=False, features_only=True, out_indices=tuple(config.out_indices)
        )
        if weights.keys() >= feature_net.state_dict().keys():
            return weights
        # A classifier's names have dots where a feature extractor's have underscores (`stages.0` / `stages_0`).
        return {_feature_net_name(name, feature_net): tensor for name, tensor in weights.items()}
    if Path(source).suffix in (".safetensors", ".pth", ".pt", ".bin"):
        raise FileNotFoundError(f"there is no file {str(source)!r} with backbone weights.")
    try:
        pretrained = timm.create_model(
            str(source),
            pretrained=True,
            features_only=True,
            in_chans=config.num_channels,
            out_indices=tuple(config.out_indices),
        )
    except Exception as error:  # timm and huggingface_hub raise many kinds, offline ones among them
        if isinstance(error, RuntimeError) and "Unknown model" in str(error):
            raise UserError(
                f"{str(source)!r} is neither a file nor a model of timm. See `timm.list_models(pretrained=True)`."
            ) from error
        raise OSError(
            f"the pretrained weights {str(source)!r} could not be had ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Download them where there is a network, "
            f"name a local file with the state dict, or start from random weights by leaving them out "
            f"(`pretrained_backbone=None`)."
        ) from error
    return pretrained.state_dict()


def _feature_net_name(name: str, feature_net: torch.nn.Module) -> str:
    for child in feature_net._modules:
        dotted = child.replace("_", ".")
        if dotted != child and name.startswith(f"{dotted}."):
            return child + name[len(dotted) :]
    return name


def _read_transformers_weights(backbone: PreTrainedModel, source: str | PathLike) -> dict[str, torch.Tensor]:
    try:
        return AutoBackbone.from_pretrained(source, config=backbone.config).state_dict()
    except (OSError, ValueError) as error:
        raise OSError(
            f"the pretrained backbone {str(source)!r} could not be had ({error}). Name a local directory, or leave it "
            f"out (`pretrained_backbone=None`)."
        ) from error


__all__ = ["DEFAULT_PRETRAINED_BACKBONE", "create_model", "load_backbone_weights"]
