# SPDX-License-Identifier: Apache-2.0
"""The conversion of an original checkpoint as a command does it: check everything, convert, save, reload, publish."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import httpx, validate_repo_id
from transformers.utils import logging

from ..errors import UserError
from ..jobs import FunctionJob
from ..model_cards import make_model_card
from ..models.image_processing_deperceiver import DePerceiverImageProcessor
from ..models.modeling_deperceiver import DePerceiverForObjectDetection
from ..output_files import as_path, require_writable_directory
from ..saved_models import load_detector
from .original_checkpoint import load_original

# What is published of the directory: nothing that happened to be there before.
PUBLISHED = ("README.md", "*.json", "*.safetensors", "*_deperceiver.py")


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        model: The converted model, in evaluation mode.
        output_dir: Where it lies with image processor, code and card.
        url: Where it was published, `None` if it was not.
    """

    model: DePerceiverForObjectDetection
    output_dir: Path
    url: str | None

    def summary(self) -> str:
        """What the model is and where it lies."""
        config = self.model.config
        decoder = f"{config.decoder_type} decoder"
        if config.decoder_type == "layered":
            decoder = f"{config.decoder_layers}-layer decoder"
        lines = [
            f"DePerceiver: backbone {getattr(config.backbone_config, 'backbone', None)}, "
            f"stride {', '.join(map(str, config.strides))}, {config.position_embedding_type} positions, "
            f"{config.num_latents} latents, {config.num_blocks} x {config.num_self_attends_per_block} layers, "
            f"{decoder}, {config.num_queries} queries, {config.num_labels} classes",
            f"Model: {self.output_dir}",
        ]
        return "\n".join([*lines, f"Published: {self.url}"] if self.url else lines)

    def to_dict(self) -> dict[str, Any]:
        """Where it lies, and what the model is."""
        return {"model": self.output_dir, "published": self.url, "config": self.model.config.to_diff_dict()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of the command."""
    parser.description = (
        "Convert a checkpoint of the authors' code into a directory with model, image processor and model card.\n\n"
        "The architecture is read off the weights. They do not tell how often the encoder's shared layers are passed\n"
        "(--num_blocks) nor whether the backbone was dilated (--dilation): give what the model was trained with."
    )
    parser.epilog = "example:\n  deperceiver convert epoch=49.ckpt my-deperceiver --num_blocks 3"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Lightning's .ckpt, or a .pth with the state dict.")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="New or empty directory.")
    parser.add_argument("--num_blocks", type=int, default=3, help="The original's --enc_blocks (%(default)s).")
    parser.add_argument("--dilation", action="store_true", help="The model was trained with --dilation.")
    parser.add_argument(
        "--position_embedding_type",
        choices=("sine", "learned"),
        help="Refuse a checkpoint with other positions than these.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Write into a directory that is not empty.")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="Publish the directory on the Hub.")


def prepare(arguments: argparse.Namespace) -> FunctionJob[Conversion]:
    """The conversion, as the command does it."""
    logging.disable_progress_bar()
    return FunctionJob(convert_checkpoint, vars(arguments))


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    num_blocks: int = 3,
    position_embedding_type: str | None = None,
    dilation: bool = False,
    overwrite: bool = False,
    push_to_hub: str | None = None,
) -> Conversion:
    """Turn a checkpoint of the authors' code into a directory with model, image processor, code and model card.

    What was saved is loaded again and compared before it counts as done.

    Args:
        checkpoint: Lightning's `.ckpt`, or a `.pth` with the state dict.
        output_dir: A new or empty directory.
        num_blocks: See [`~deperceiver_hf.load_original`], as are the next two.
        position_embedding_type: `"sine"` or `"learned"`, if it is to be checked.
        dilation: Whether the model was trained with `--dilation`.
        overwrite: Write into a directory that holds something already.
        push_to_hub: Publish the directory as this repository on the Hub.

    Raises:
        OSError: A file is missing or cannot be written, or the Hub cannot be reached.
        ValueError: The file is no checkpoint of a DePerceiver, or an argument contradicts it.
    """
    checkpoint, output_dir = as_path(checkpoint), as_path(output_dir)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {checkpoint}.")
    if output_dir.exists() and not output_dir.is_dir():
        raise NotADirectoryError(f"{output_dir} is a file; name a directory for the model.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise FileExistsError(f"{output_dir} is not empty; name another directory, or overwrite it with --overwrite.")
    if push_to_hub is not None:
        try:
            validate_repo_id(push_to_hub)
        except HFValidationError as error:
            raise UserError(f"{push_to_hub!r} is no name of a repository: {error}") from error
    try:
        model = load_original(
            checkpoint, num_blocks=num_blocks, position_embedding_type=position_embedding_type, dilation=dilation
        )
    except StrictDataclassError as error:
        raise UserError(" ".join(str(error).split())) from error
    require_writable_directory(output_dir)
    _save(model, output_dir, checkpoint.name, push_to_hub)
    _check_saved(model, output_dir)
    url = None if push_to_hub is None else _publish(output_dir, push_to_hub)
    return Conversion(model, output_dir, url)


def _save(model: DePerceiverForObjectDetection, output_dir: Path, source: str, repository: str | None) -> None:
    model.save_pretrained(output_dir)
    DePerceiverImageProcessor().save_pretrained(output_dir)
    card = make_model_card(
        model.config,
        repository.rsplit("/")[-1] if repository else output_dir.resolve().name,
        model_path=repository or "path/to/this/directory",
        converted_from=source,
    )
    (output_dir / "README.md").write_text(f"{card}\n", encoding="utf-8")


def _check_saved(model: DePerceiverForObjectDetection, output_dir: Path) -> None:
    reloaded, _ = load_detector(str(output_dir))
    saved, expected = reloaded.state_dict(), model.state_dict()
    different = sorted(saved.keys() ^ expected.keys())
    different += sorted(
        name for name in saved.keys() & expected.keys() if not torch.equal(saved[name], expected[name])
    )
    if different:
        raise UserError(
            f"{output_dir} was written, but loading it gives other weights: {len(different)} differ, such as "
            f"{different[0]}."
        )


def _publish(output_dir: Path, repository: str) -> str:
    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=output_dir, allow_patterns=list(PUBLISHED))
    except (OSError, httpx.HTTPError) as error:  # most of the Hub's own errors are OSErrors
        message = str(error).strip().splitlines() or ["no message"]
        raise OSError(
            f"the model was converted to {output_dir}, but could not be published as {repository} "
            f"({type(error).__name__}: {message[0]})."
        ) from error
    return str(url)
