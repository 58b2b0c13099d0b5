# SPDX-License-Identifier: Apache-2.0
"""New models whose backbone, or whose backbone and encoder, start from pretrained weights.

`from_pretrained` never needs this: a saved model holds its backbone. It is for the start of a training, where
transformers itself would leave the backbone random.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, AutoBackbone, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.utils import logging

from .data.records import is_main_process
from .errors import UserError
from .models.configuration_backbone_deperceiver import DePerceiverBackboneConfig
from .models.configuration_deperceiver_v2 import DePerceiverV2Config
from .models.detector_features_deperceiver_v2 import detector_family
from .output_files import expand_home
from .saved_models import license_of, load_config, load_image_processor, load_model

logger = logging.get_logger(__name__)

DEFAULT_PRETRAINED_BACKBONE = "resnet50.tv_in1k"  # torchvision's ImageNet weights, which the original started from
TORCHVISION_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
IMAGENET_PREPROCESSING = {
    "image_mean": list(IMAGENET_DEFAULT_MEAN),
    "image_std": list(IMAGENET_DEFAULT_STD),
    "resample": PILImageResampling.BILINEAR,
}
"""What the image processors do by themselves, and the original did."""

PREPARATION_FIELDS = (
    *("do_resize", "size", "resample", "pad_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
"""Of an image processor: what becomes of an image."""

_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# By timm's names; its others, such as "random", are taken for bilinear.
_RESAMPLING = {"bilinear": PILImageResampling.BILINEAR, "bicubic": PILImageResampling.BICUBIC}


def default_weights(backbone: str) -> str:
    """Name of the weights that a timm backbone starts from if none are named: torchvision's for its ResNets, as in the
    original, timm's own choice for all others."""
    return f"{backbone}.tv_in1k" if backbone in TORCHVISION_RESNETS else backbone


def create_model(
    config: DePerceiverBackboneConfig | None = None,
    pretrained_backbone: str | PathLike | None = DEFAULT_PRETRAINED_BACKBONE,
    *,
    start_from: str | PathLike | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """Make a new model, with pretrained weights in its backbone and everything else initialised at random.

    Args:
        config ([`DePerceiverConfig`] or [`DePerceiverV2Config`], *optional*): Architecture and labels; decides the
            model's class. May be left out with `start_from`.
        pretrained_backbone (`str` or `PathLike`, *optional*): For a timm backbone, the name of a timm model with
            weights of the same architecture (such as `"resnet50.tv_in1k"`), or a file with its state dict
            (`.safetensors`, `.pth`, `.bin`). For another backbone, a Hub id or directory that
            `AutoBackbone.from_pretrained` takes. `None` leaves the backbone random.
        start_from (`str` or `PathLike`, *optional*): A detector of transformers, as a directory or Hub id, whose
            backbone and encoder a DePerceiver v2 takes over, with their weights: an RT-DETR, RT-DETRv2, D-FINE,
            DEIMv2, LW-DETR, RF-DETR, Deformable DETR or DETR. Its classes are not taken over.
        fields: Without a `config`, of [`~DePerceiverV2Config.from_detector`]: `num_labels` or `id2label`, `preset` ...

    Images must be prepared as the weights expect it: see [`backbone_preprocessing`] and [`detector_preprocessing`].

    ```python
    source = "PekingU/rtdetr_v2_r18vd"
    model = create_model(start_from=source, preset="small", id2label={0: "cell"}, label2id={"cell": 0})
    image_processor = DePerceiverV2ImageProcessor(**detector_preprocessing(source))
    ```

    Raises:
        OSError: The weights cannot be downloaded or read.
        ValueError: The weights are of another architecture, or not finite, or the detector is of another kind.
    """
    if config is None:
        if start_from is None:
            raise UserError("give the `config` of a new model, or `start_from`, a detector that it takes after.")
        config = config_from_detector(start_from, **fields)
    elif fields:
        raise UserError(f"`config` is given, so that {', '.join(fields)} have no place: set them in it.")
    if start_from is not None:
        if getattr(config, "token_encoder", None) != "detector":
            raise UserError(
                "`start_from` brings a backbone and an encoder, but `config` has others: leave it out, or make it by "
                "`DePerceiverV2Config.from_detector`."
            )
        pretrained_backbone = start_from
    model = MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)](config)
    if pretrained_backbone is None:
        if config.freeze_batch_norm and not config.freeze_backbone:
            logger.warning(
                "The backbone starts from random weights with its batch normalisation frozen, which trains badly: set "
                "`freeze_batch_norm=False` and `frozen_backbone_stages=-1`."
            )
        return model
    if getattr(config, "token_encoder", None) == "detector":
        load_detector_features(model, pretrained_backbone)
    else:
        load_backbone_weights(model.model.backbone.model, pretrained_backbone)
    return model


def config_from_detector(source: str | PathLike, **fields: Any) -> DePerceiverV2Config:
    """Configuration of a new DePerceiver v2 on the backbone and encoder of a saved detector.

    Args:
        source: Directory or Hub id of the detector.
        fields: Of [`~DePerceiverV2Config.from_detector`].

    Raises:
        OSError: It cannot be downloaded or read.
        ValueError: It is no detector, or of a kind that is not known, or the fields describe no possible model.
    """
    source = str(source)
    config = load_config(source)
    try:
        detector_family(config)
    except ValueError as error:
        raise UserError(f"{source} is no start for a new model: {error}") from error
    directory = Path(expand_home(source))
    name = directory.resolve().name if directory.is_dir() else source
    fields.setdefault("start_from", {"name": name, "license": license_of(source)})
    return DePerceiverV2Config.from_detector(config, **fields)


def load_detector_features(model: PreTrainedModel, source: str | PathLike) -> None:
    """Fill backbone and encoder of a new DePerceiver v2 with those of the detector that they are of, in place.

    Raises:
        OSError: The detector cannot be downloaded or read.
        ValueError: It is another one than the model's configuration says, or its weights are damaged.
    """
    if source == DEFAULT_PRETRAINED_BACKBONE:
        raise UserError(
            f"the features are those of a {model.config.backbone_config.model_type}: say by `start_from` where its "
            f"weights are, or leave them random by `pretrained_backbone=None`."
        )
    source, features = str(source), model.model.backbone
    detector = load_model(source, load_config(source), dtype=torch.float32)
    weights, expected = detector.model.state_dict(), features.state_dict()
    problems = sorted(
        name for name, tensor in expected.items() if name not in weights or weights[name].shape != tensor.shape
    )
    if problems or detector.config.model_type != features.config.model_type:
        raise UserError(
            f"{source}, a {detector.config.model_type}, is not the {features.config.model_type} of the configuration: "
            f"{len(problems)} of {len(expected)} tensors are missing there or have another shape, such as "
            f"{problems[:3]}. Make the configuration of this detector's."
        )
    features.load_state_dict({name: weights[name] for name in expected})
    if is_main_process():
        stated = (model.config.start_from or {}).get("license", "unknown")
        logger.info(
            f"Backbone and encoder start from {source}, a {features.config.model_type}; its licence: {stated}."
        )


def backbone_preprocessing(
    pretrained_backbone: str | PathLike | None = DEFAULT_PRETRAINED_BACKBONE, backbone: str | None = None
) -> dict[str, Any]:
    """How images are to be prepared for pretrained weights: arguments for an image processor.

    ```python
    weights = "tf_efficientnet_lite0.in1k"
    config = DePerceiverConfig(backbone="tf_efficientnet_lite0")
    model = create_model(config, weights)
    image_processor = DePerceiverImageProcessor(**backbone_preprocessing(weights))
    ```

    Nothing is downloaded for weights of timm's own list: timm knows the data configuration of each.

    Args:
        pretrained_backbone (`str` or `PathLike`, *optional*): As for [`create_model`]; `None`, a random backbone,
            takes ImageNet's numbers.
        backbone (`str`, *optional*): Name of the timm backbone that the weights are for. What timm does not know, such
            as a local file, is taken to expect what the default weights of this backbone expect.

    Returns:
        `image_mean`, `image_std` (lists of a number per channel) and `resample`.

    Raises:
        ValueError: timm has no such weights of a model that it has, or nothing is known of them and no `backbone`.
        OSError: The weights are on the Hub (`hf-hub:...`) or in a directory of timm's (`local-dir:...`), and their
            configuration cannot be had.
    """
    if pretrained_backbone is None:
        return {**IMAGENET_PREPROCESSING}
    source = str(pretrained_backbone)
    data_config = _timm_data_config(source)
    if data_config is None and backbone is not None:
        data_config = _timm_data_config(default_weights(backbone))
    if data_config is not None:
        return {
            "image_mean": [float(value) for value in data_config["mean"]],
            "image_std": [float(value) for value in data_config["std"]],
            "resample": _RESAMPLING.get(data_config["interpolation"], IMAGENET_PREPROCESSING["resample"]),
        }
    if backbone is not None:
        logger.warning(f"timm has no data configuration of {backbone!r}: images are normalised by ImageNet's.")
        return {**IMAGENET_PREPROCESSING}
    # A backbone of transformers: its image processor may be saved beside it.
    saved = {} if _is_file_name(source) else get_image_processor_config(source)
    if not saved.keys() >= {"image_mean", "image_std"}:
        raise UserError(
            f"nothing says how images are to be prepared for the weights {source!r}: name the timm `backbone` that "
            f"they are for, or a model that an image processor is saved with."
        )
    return IMAGENET_PREPROCESSING | {name: saved[name] for name in IMAGENET_PREPROCESSING if name in saved}


def detector_preprocessing(source: str | PathLike) -> dict[str, Any]:
    """How images are to be prepared for the features of a detector, as it does it itself: arguments for an image
    processor, see [`create_model`].

    One thing is done otherwise: the image processor of RF-DETR resizes without antialiasing in later versions of
    transformers, those of this package always with it.

    Args:
        source: Directory or Hub id of the detector.

    Raises:
        OSError: Its image processor cannot be downloaded or read.
        ValueError: It is none that prepares images for a detector.
    """
    processor = load_image_processor(str(source))
    fields = {name: getattr(processor, name, None) for name in PREPARATION_FIELDS}
    for name in ("size", "pad_size"):
        fields[name] = {side: value for side, value in dict(fields[name] or {}).items() if value} or None
    return {name: value for name, value in fields.items() if value is not None}


def load_backbone_weights(backbone: PreTrainedModel, source: str | PathLike) -> None:
    """Fill a backbone made by `AutoBackbone` with pretrained weights, in place. See [`create_model`].

    Raises:
        OSError: The weights cannot be downloaded or read.
        ValueError: The weights are of another architecture, or not finite.
    """
    is_timm = backbone.config.model_type == "timm_backbone"
    target = backbone._backbone if is_timm else backbone
    weights = _read_timm_weights(backbone, source) if is_timm else _read_transformers_weights(backbone, source)
    fill_with_weights(target, weights, source, _describe(backbone))


def fill_with_weights(
    target: torch.nn.Module, weights: dict[str, torch.Tensor], source: str | PathLike, described: str
) -> None:
    """Load all that a backbone has of some weights, which may have more, in place.

    Args:
        target: The backbone.
        weights: By the names of the backbone's own.
        source: Where they come from, and
        described: what the backbone is, for errors.

    Raises:
        ValueError: Some are missing, of another shape, or not finite.
    """
    expected = {name: tensor for name, tensor in target.state_dict().items() if "num_batches_tracked" not in name}
    # Classifier and stages behind the last feature map are not part of the backbone.
    usable = {name: tensor for name, tensor in weights.items() if name in expected and torch.is_tensor(tensor)}
    problems = sorted(expected.keys() - usable.keys())
    problems += sorted(name for name, tensor in usable.items() if tensor.shape != expected[name].shape)
    if problems:
        raise UserError(
            f"the weights of {str(source)!r} do not fit the backbone {described}: {len(problems)} of its "
            f"{len(expected)} tensors are missing there or have another shape, such as {problems[:3]}. Name weights "
            f"of the same architecture."
        )
    if broken := sorted(name for name, tensor in usable.items() if not tensor.isfinite().all()):
        raise UserError(
            f"{len(broken)} of the weights of {str(source)!r}, e.g. {broken[0]}, are not finite (NaN or infinite): "
            "they are damaged, or from a training that failed."
        )
    target.load_state_dict(usable, strict=False)


def _is_file_name(source: str) -> bool:
    return Path(source).suffix in _FILE_SUFFIXES or Path(source).is_file()


def _timm_data_config(source: str) -> dict[str, Any] | None:
    """timm's data configuration of weights; `None` for a file, and for what timm does not know."""
    if _is_file_name(source):
        return None
    scheme, _, name = source.partition(":")
    try:
        if scheme in ("hf-hub", "hf_hub"):
            pretrained_config = timm.models.load_model_config_from_hf(name)[0]
        elif scheme == "local-dir":
            pretrained_config = timm.models._hub.load_model_config_from_path(name)[0]
        else:
            known = timm.models.get_pretrained_cfg(source)
            pretrained_config = known and known.to_dict()
    except RuntimeError as error:  # a tag that the model does not have
        raise UserError(f"timm has no weights {source!r}: {error} See `timm.list_models(pretrained=True)`.") from error
    except Exception as error:  # huggingface_hub raises many kinds, offline ones among them
        raise OSError(
            f"the data configuration of the weights {source!r} could not be had ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'})."
        ) from error
    return resolve_data_config(pretrained_cfg=pretrained_config) if pretrained_config else None


def _describe(backbone: PreTrainedModel) -> str:
    return repr(getattr(backbone.config, "backbone", None) or backbone.config.model_type)


def _read_timm_weights(backbone: PreTrainedModel, source: str | PathLike) -> dict[str, torch.Tensor]:
    config = backbone.config
    if (weights := read_weights_file(source)) is not None:
        feature_net = timm.create_model(
            config.backbone, pretrained=False, features_only=True, out_indices=tuple(config.out_indices)
        )
        if weights.keys() >= feature_net.state_dict().keys():
            return weights
        # A classifier's names have dots where a feature extractor's have underscores (`stages.0` / `stages_0`).
        return {_feature_net_name(name, feature_net): tensor for name, tensor in weights.items()}
    return read_pretrained_weights(
        source, features_only=True, in_chans=config.num_channels, out_indices=tuple(config.out_indices)
    )


def read_weights_file(source: str | PathLike) -> dict[str, torch.Tensor] | None:
    """The state dict in a local file; `None` if this is not the name of a file.

    Raises:
        OSError: There is no such file, or it cannot be read.
    """
    if Path(source).is_file():
        from timm.models import load_state_dict

        try:
            return load_state_dict(str(source), use_ema=True)
        except Exception as error:  # whatever the file's format makes of it
            raise OSError(f"{str(source)!r} cannot be read as a checkpoint: {error}") from error
    if Path(source).suffix in _FILE_SUFFIXES:
        raise FileNotFoundError(f"there is no file {str(source)!r} with backbone weights.")
    return None


def read_pretrained_weights(source: str | PathLike, **options: Any) -> dict[str, torch.Tensor]:
    """The state dict of a timm model with its weights.

    Args:
        source: Its name.
        options: Of `timm.create_model`.

    Raises:
        OSError: The weights cannot be had.
        ValueError: timm has no such model.
    """
    try:
        pretrained = timm.create_model(str(source), pretrained=True, **options)
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


__all__ = [
    "DEFAULT_PRETRAINED_BACKBONE",
    "IMAGENET_PREPROCESSING",
    "backbone_preprocessing",
    "config_from_detector",
    "create_model",
    "default_weights",
    "detector_preprocessing",
    "load_backbone_weights",
]
