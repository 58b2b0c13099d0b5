# SPDX-License-Identifier: Apache-2.0
"""Loading what was saved of a detector, with errors that say what is wrong with the directory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel

from .data.classes import repair_labels
from .errors import UserError, one_line
from .output_files import expand_home

LFS_POINTER = b"version https://git-lfs"


def load_detector(source: str) -> tuple[PreTrainedModel, Any]:
    """A detector ready to predict, and its image processor.

    Args:
        source: directory written by `save_pretrained` (any object detection model of transformers), or a Hub id.

    Raises:
        OSError: there is no such directory, a file in it is missing, or the Hub cannot be reached.
        ValueError: it holds no object detection model, or not all of its weights, or they are damaged.
    """
    config = load_config(source)
    processor = load_image_processor(source)
    model = load_model(source, config)
    return model.eval(), processor


def load_config(source: str) -> PreTrainedConfig:
    """The configuration of a saved model, its class names made to agree.

    Raises:
        OSError, ValueError: see [`load_detector`].
    """
    source = require_model_source(source)
    with _naming(source):
        config = AutoConfig.from_pretrained(source)
    repair_labels(config, source)
    return config


def load_image_processor(source: str) -> Any:
    """The image processor that was saved with a model.

    Raises:
        OSError, ValueError: see [`load_detector`].
    """
    source = require_model_source(source)
    with _naming(source):
        processor = AutoImageProcessor.from_pretrained(source)
        gray = np.full((8, 8, 3), 128, dtype=np.uint8)
        prepared = processor(images=[gray], do_resize=False, do_pad=False, return_tensors="pt")["pixel_values"]
        if not torch.isfinite(prepared).all():
            raise UserError("preprocessor_config.json makes numbers of an image that are not finite.")
    return processor


def load_model(
    source: str,
    config: PreTrainedConfig,
    model_class: Any = AutoModelForObjectDetection,
    *,
    ignore_mismatched_sizes: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The weights of a saved model, all of them.

    Args:
        source: see [`load_detector`].
        config: from `load_config`, perhaps changed.
        model_class: whose `from_pretrained` reads it.
        ignore_mismatched_sizes: leave weights of other shapes than the configuration's as they are in a new model.
        options: of `from_pretrained`.

    Raises:
        OSError, ValueError: see [`load_detector`].
    """
    source = expand_home(source)
    with _naming(source):
        model, report = model_class.from_pretrained(
            source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # transformers only warns of them and leaves random numbers in their place.
    mismatched = sorted(name for name, *_ in report["mismatched_keys"])
    lacking = sorted(set(report["missing_keys"]) - {*mismatched})
    if lacking or (mismatched and not ignore_mismatched_sizes):
        of = [*lacking, *(f"{name} (of another shape)" for name in mismatched)]
        raise UserError(
            f"{source} lacks {len(of)} weights that its config.json asks for, e.g. {of[0]}; it was saved by another "
            "version or only in part, or config.json was changed."
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{len(broken)} weights of {source}, e.g. {broken[0]}, are not finite (NaN or infinite): it is damaged, "
            "or from a training that failed. Take an earlier model of the run."
        )
    return model


def require_model_source(source: str) -> str:
    """Refuse what cannot be a saved model, before anything is loaded; returns the source, a `~` in it expanded.

    Raises:
        OSError: no such directory, or files missing in it.
        ValueError: the source is a file, or holds files that Git LFS has not fetched.
    """
    source = expand_home(source)
    path = Path(source)
    if path.is_file():
        raise UserError(
            f"{source} is a file; a directory written by save_pretrained is needed. A checkpoint of the authors' code "
            "is turned into one by `deperceiver convert`."
        )
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
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else UserError
        named = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise kind(
            f"Cannot load a detector from {source}: {named}{one_line(error)[:400]} If the directory was copied or "
            "downloaded, do that again; if it was written by training, take another one of its models."
        ) from error


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
