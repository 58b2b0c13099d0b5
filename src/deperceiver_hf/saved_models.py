# SPDX-License-Identifier: Apache-2.0
"""Loading a trained detector and its image processor, with errors that say what is wrong with the directory."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel

from .errors import UserError
from .output_files import expand_home


def load_detector(source: str) -> tuple[PreTrainedModel, Any]:
    """A detector ready to predict, and its image processor.

    Args:
        source: directory written by `save_pretrained` (any object detection model of transformers; it may begin with
            `~`), or a Hub id.

    Raises:
        OSError: there is no such directory, a file in it is missing, or the Hub cannot be reached.
        ValueError: it holds no object detection model, or not all of its weights, or some that are not finite.
    """
    source = require_model_source(source)
    try:
        processor = AutoImageProcessor.from_pretrained(source)
        model, report = AutoModelForObjectDetection.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        kind = OSError if isinstance(error, OSError) else UserError
        raise kind(f"Cannot load a detector from {source}: {_first_sentences(error)}") from error
    # transformers only warns of them and leaves random numbers in their place.
    lacking = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if lacking:
        raise UserError(
            f"{source} lacks {len(lacking)} weights that its config.json asks for, e.g. {lacking[0]}; it was saved by "
            "another version or only in part."
        )
    broken = [name for name, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise UserError(
            f"{len(broken)} weights of {source}, e.g. {broken[0]}, are not finite (NaN or infinite): it is damaged, "
            "or from a training that failed. Take an earlier model of the run."
        )
    return model.eval(), processor


def require_model_source(source: str) -> str:
    """Refuse what cannot be a saved model, before anything is loaded.

    Returns:
        The source; of a directory that begins with `~` its path.

    Raises:
        OSError: no such directory, or files missing in it.
        ValueError: the source is a file.
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
                found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
                raise FileNotFoundError(f"{source} holds no {name}, so it is no saved detector. Found there: {found}.")
        return source
    try:
        validate_repo_id(source)
        is_id = len(path.parts) == 1 or not path.parent.is_dir()  # `outputs/run` beside `outputs/` is no Hub id
    except HFValidationError:
        is_id = False
    if not is_id:
        raise FileNotFoundError(f"There is no directory {source}.")
    return source


def _first_sentences(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
