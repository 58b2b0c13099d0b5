# SPDX-License-Identifier: Apache-2.0
"""Loading what was saved of a detector, with errors that say what is wrong with the directory."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    IMAGE_PROCESSOR_MAPPING,
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, logging
from yaml import YAMLError

from .data.classes import repair_labels, require_class_names
from .data.records import is_main_process
from .errors import UserError, one_line
from .models.configuration_deperceiver import DePerceiverConfig
from .models.configuration_deperceiver_v2 import DePerceiverV2Config
from .output_files import expand_home

logger = logging.get_logger(__name__)

LFS_POINTER = b"version https://git-lfs"
PROCESSOR_FIELDS = {"image_processor_type", "feature_extractor_type", "size"}  # it has one of them
WEIGHT_FILES = (".safetensors", ".bin", ".json")
WHOLE_NUMBERS = ("I", "U", "BOOL")  # in safetensors' names of types
LARGEST_WEIGHT = 1e15  # of a training; what is larger is damage, and overflows
BATCH_COUNTER = "num_batches_tracked"  # of batch norms that learn; frozen ones have none


def load_detector(
    source: str, *, num_queries: int | None = None, num_blocks: int | None = None, token_share: float | None = None
) -> tuple[PreTrainedModel, Any]:
    """A detector ready to predict, and its image processor.

    Args:
        source: directory written by `save_pretrained` (any object detection model of transformers), or a Hub id.
        num_queries: how many objects it is to look for at a time, if not as many as it was trained with: more for
            crowded images, fewer to be faster. For models that pick their object queries from the image, such as
            DePerceiver v2; as many as the image has tokens at most.
        num_blocks, token_share: what a DePerceiver v2 spends on an image, see `DePerceiverV2Config`.

    Raises:
        OSError: there is no such directory, a file in it is missing, or the Hub cannot be reached.
        ValueError: it holds no object detection model, or not all of its weights, or they are damaged; or it cannot do
            what is asked for.
    """
    config = load_config(source)
    saved_queries = getattr(config, "num_queries", None)
    dials = {"num_queries": num_queries, "num_blocks": num_blocks, "token_share": token_share}
    given = {name: value for name, value in dials.items() if value is not None}
    if num_queries is not None and num_queries < 1:
        raise UserError(f"num_queries must be at least 1, got {num_queries}.")
    for name, value in given.items():
        if not hasattr(config, name):
            raise UserError(f"{source} is a {config.model_type}, which has no {name} to change; leave it out.")
        setattr(config, name, value)
    if isinstance(config, DePerceiverV2Config):
        try:
            config.dials(num_queries, num_blocks, token_share)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
    processor = load_image_processor(source)
    model = load_model(source, config, saved_queries=saved_queries, new_queries=num_queries is None)
    return model.eval(), processor


def add_dial_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a command the options of [`load_detector`]."""
    parser.add_argument(
        "--num_queries",
        type=int,
        help="Objects that are looked for at a time, if not as many as in training; for models that pick their "
        "queries from the image (DePerceiver v2).",
    )
    parser.add_argument(
        "--num_blocks", type=int, help="Blocks of a DePerceiver v2 that work, the first so many; fewer cost less."
    )
    parser.add_argument(
        "--token_share",
        type=float,
        help="Share of the tokens that the blocks of a DePerceiver v2 read, in (0, 1]; a smaller one costs less.",
    )


def load_config(source: str) -> PreTrainedConfig:
    """The configuration of a saved detector, its class names made to agree.

    Code that comes with a model is never run.

    Raises:
        OSError, ValueError: see [`load_detector`].
    """
    source = require_model_source(source)
    with _naming(source):
        stated, _ = PreTrainedConfig.get_config_dict(source)
        kind = stated.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise UserError(
                f"config.json of {source} has the model_type {kind!r}, which this version of transformers does not "
                "know. It may need a newer one; code that comes with a model is not run."
            )
        require_class_names(stated, source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if type(config) not in MODEL_FOR_OBJECT_DETECTION_MAPPING:
            raise UserError(f"{source} is a {kind}, which detects no objects.")
        repair_labels(config, source)
    for part in (config, getattr(config, "backbone_config", None)):
        if part is not None:
            part.return_dict = True  # what a model returns is read by name here, however it is used elsewhere
    return config


def load_image_processor(source: str) -> Any:
    """The image processor that was saved with a detector.

    Raises:
        OSError, ValueError: see [`load_detector`].
    """
    config = load_config(source)
    source = expand_home(source)
    with _naming(source):
        stated, _ = ImageProcessingMixin.get_image_processor_dict(source)
        if not stated.keys() & PROCESSOR_FIELDS:
            raise UserError(
                f"preprocessor_config.json of {source} describes no image processor: it has none of the fields "
                f"{', '.join(sorted(PROCESSOR_FIELDS))}."
            )
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        _require_switches_and_sizes(processor, source)
        black_and_white = [np.full((8, 8, 3), value, dtype=np.uint8) for value in (0, 255)]
        prepared = processor(images=black_and_white, return_tensors="pt")["pixel_values"]
        if prepared.ndim != 4 or prepared.shape[1] != 3 or not torch.isfinite(prepared).all():
            raise UserError(
                f"preprocessor_config.json of {source} makes of an image what no detector takes: numbers that are not "
                f"finite, or the shape {tuple(prepared.shape[1:])} instead of (3, height, width)."
            )
        if torch.equal(prepared[0], prepared[1]):
            raise UserError(
                f"preprocessor_config.json of {source} makes a black image and a white one equal; correct its "
                "rescale_factor, image_mean and image_std."
            )
        _require_detections_of(processor, config, source)
    return processor


def load_model(
    source: str,
    config: PreTrainedConfig,
    model_class: Any = AutoModelForObjectDetection,
    *,
    saved_queries: int | None = None,
    new_queries: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """The weights of a saved model, all of them.

    Args:
        source: see [`load_detector`].
        config: from `load_config`, perhaps changed.
        model_class: whose `from_pretrained` reads it.
        saved_queries: number of object queries of the saved model, if `config` may have another one: the weights that
            are as long as that, or as some groups of so many, are then new ones, with a warning.
        new_queries: `False` refuses them instead.
        options: of `from_pretrained`.

    Raises:
        OSError, ValueError: see [`load_detector`].
    """
    source = expand_home(source)
    with _naming(source), _without_report():
        model, report = model_class.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
        _require_all_weights(model, report, source, saved_queries, new_queries)
        _require_plausible_weights(model, source)
    return model


def license_of(source: str) -> str:
    """The licence that the card of a saved detector states; `"unknown"` if there is no card, or none in it."""
    path = Path(expand_home(source))
    try:
        card = ModelCard.load(path / "README.md" if path.is_dir() else source, ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError):
        return "unknown"
    stated = card.data.license
    if stated == "other":
        stated = card.data.license_name or stated
    return str(stated or "unknown")


def require_model_source(source: str) -> str:
    """Refuse what cannot be a saved model, before anything is loaded; returns the source, a `~` in it expanded.

    Raises:
        OSError: no such directory, or files missing in it.
        ValueError: the source is a file, or holds files that Git LFS has not fetched.
    """
    source = expand_home(source)
    path = Path(source)
    if path.is_file():
        remedy = (
            f"give the directory that it is in, {path.parent}."
            if path.suffix in WEIGHT_FILES and (path.parent / "config.json").is_file()
            else "a checkpoint of the authors' code is turned into one by `deperceiver convert`."
        )
        raise UserError(f"{source} is a file; a directory written by save_pretrained is needed: {remedy}")
    if path.is_dir():
        for name in ("config.json", "preprocessor_config.json"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{source} holds no {name}, so it is no saved detector. {_found_in(path)}")
        for file in sorted(path.iterdir()):
            if file.is_file() and _begins_with(file, LFS_POINTER):
                raise UserError(f"{file} is a pointer of Git LFS and not the file itself: run `git lfs pull` there.")
        return source
    try:
        validate_repo_id(source)
        is_id = len(path.parts) == 1 or not path.parent.is_dir()  # `outputs/run` beside `outputs/` is no Hub id
    except HFValidationError:
        is_id = False
    if not is_id:
        raise FileNotFoundError(f"There is no directory {source}.")
    return source


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
    """Whatever reading the files of a model raises, each library its own, names the model."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else UserError
        named = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise kind(
            f"Cannot load a detector from {source}: {named}{one_line(error)[:400]} If the directory was copied or "
            "downloaded, do that again; if it was written by training, take another one of its models."
        ) from error


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Within, transformers keeps its table of weights that do not fit: they are refused here, or said in a line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _require_switches_and_sizes(processor: Any, source: str) -> None:
    """Refuse switches that are neither on nor off, and numbers of pixels that are none."""
    for field, value in processor.to_dict().items():
        if field.startswith("do_") and not isinstance(value, bool | None):
            raise UserError(f"preprocessor_config.json of {source} has {field} = {value!r}; true or false is needed.")
    for field in ("size", "pad_size", "crop_size"):
        for side, value in dict(getattr(processor, field, None) or {}).items():
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(
                    f"preprocessor_config.json of {source} has the {field} {side} = {value!r}; a whole number of "
                    "pixels from 1 on is needed."
                )


def _require_detections_of(processor: Any, config: PreTrainedConfig, source: str) -> None:
    """Refuse an image processor that would make other detections of the model's outputs than the model's own does.

    Some take the scores of a class by a sigmoid, others by a softmax in which the last class is "no object".
    """
    name = type(processor).__name__
    if not hasattr(processor, "post_process_object_detection"):
        raise UserError(
            f"preprocessor_config.json of {source} is of a {name}, which makes no detections of a model's outputs; "
            f"the image processor of a {config.model_type} is needed."
        )
    own = (IMAGE_PROCESSOR_MAPPING.get(type(config), None) or {}).get("torchvision")
    if not isinstance(own, type) or isinstance(processor, own):
        return
    outputs = ModelOutput(logits=torch.tensor([[[0.0, 1.0, 2.0]]]), pred_boxes=torch.full((1, 1, 4), 0.5))
    best: list[list[float]] = []
    for candidate in (processor, own()):
        (found,) = candidate.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(8, 8)])
        place = int(found["scores"].argmax())
        best.append([float(found["scores"][place]), int(found["labels"][place]), *found["boxes"][place].tolist()])
    if not np.allclose(best[0], best[1], rtol=1e-4):
        raise UserError(
            f"preprocessor_config.json of {source} is of a {name}, which makes other detections of a model's outputs "
            f"than the {own.__name__} of a {config.model_type}, so that they would be wrong; save that one."
        )


def _require_all_weights(
    model: PreTrainedModel, report: dict[str, Any], source: str, saved_queries: int | None, new_queries: bool
) -> None:
    """Refuse weights that do not fill the model, which transformers only warns of, leaving random numbers."""
    config, shapes = model.config, {name: tuple(map(tuple, sizes)) for name, *sizes in report["mismatched_keys"]}
    queries = getattr(config, "num_queries", None)
    new = {
        name
        for name, (saved, asked) in shapes.items()
        if saved_queries is not None
        and len(saved) == len(asked)
        and all(
            a == b or (a % saved_queries == 0 and a * queries == b * saved_queries)
            for a, b in zip(saved, asked, strict=True)
        )
    }
    lacking = [
        *sorted(set(report["missing_keys"]) - shapes.keys()),
        *(f"{name} (of shape {shapes[name][1]}, it has {shapes[name][0]})" for name in sorted(shapes.keys() - new)),
    ]
    if lacking:
        raise UserError(
            f"{source} lacks {len(lacking)} weights that its config.json with {config.num_labels} classes asks for, "
            f"e.g. {lacking[0]}; it was saved by another version or only in part, or config.json was changed."
        )
    if new and not new_queries:
        raise UserError(
            f"{source} has {saved_queries} object queries that it has learned, and cannot have {config.num_queries}: "
            "leave num_queries out. Models that pick them from the image (DePerceiver v2 with query_selection) can."
        )
    if new and is_main_process():
        logger.warning(
            f"{source} has {saved_queries} object queries and {config.num_queries} are asked for: {len(new)} weights "
            f"are new, e.g. {min(new)}."
        )
    if left_over := sorted(name for name in report["unexpected_keys"] if not name.endswith(BATCH_COUNTER)):
        said = f"{source} has {len(left_over)} weights that its config.json does not ask for, e.g. {left_over[0]}"
        if isinstance(config, DePerceiverConfig | DePerceiverV2Config):
            raise UserError(f"{said}; config.json was changed, or belongs to other weights.")
        if is_main_process():
            logger.warning(f"{said}. They are left out.")


def _require_plausible_weights(model: PreTrainedModel, source: str) -> None:
    """Refuse weights that no training makes: not finite or huge, variances below 0, integers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    broken = [
        name
        for name, tensor in tensors.items()
        if not (tensor.abs() <= LARGEST_WEIGHT).all() or (name.endswith("running_var") and (tensor < 0).any())
    ]
    if broken:
        raise UserError(
            f"{len(broken)} weights of {source}, e.g. {broken[0]}, are not finite (NaN or infinite), huge, or "
            "variances below 0: it is damaged, or from a training that failed. Take an earlier model of the run."
        )
    for file in sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        if whole := [name for name in tensors if kinds.get(name, "F32").startswith(WHOLE_NUMBERS)]:
            raise UserError(
                f"{file} holds {len(whole)} weights as integers, e.g. {whole[0]}, which are no weights of a trained "
                "model. Save it as float32, float16 or bfloat16."
            )


def _found_in(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    models = sorted(
        str(file.parent) for depth in ("*", "*/*") for file in path.glob(f"{depth}/preprocessor_config.json")
    )
    if models:
        return f"There are models in {', '.join(models[:5])}."
    if (path / "training_state.json").is_file():
        return "It is a training state; models are beside it, in `best`, `last` and `epoch-*`."
    return f"Found there: {', '.join(names[:10]) or 'nothing'}."


def _begins_with(file: Path, start: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(start)) == start
