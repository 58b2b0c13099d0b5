# SPDX-License-Identifier: Apache-2.0
"""Plain vision transformers of timm as backbones of LW-DETR and RF-DETR, which have classes of their own for them.

Only the layers are timm's, and their weights: which of them attend within windows, and from which the features are
taken, is the detector's.
"""

import re
from os import PathLike
from typing import NamedTuple

import timm
import torch
from torch import nn

from ...backbone_weights import fill_with_weights, read_pretrained_weights, read_weights_file
from ...errors import UserError

# Parts of a plain vision transformer in timm's names, and of one of its layers.
WHOLE = {"cls_token", "pos_embed", "patch_embed.proj", "norm", "fc_norm", "head"}
LAYER = {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"}
LAYER_SCALES = {"ls1.gamma", "ls2.gamma"}
# Names in earlier versions of transformers.
EARLIER_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


class VisionTransformer(NamedTuple):
    """Measures of a plain vision transformer; `image_size` is that of its position embeddings, in pixels."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    mlp_ratio: int
    patch_size: int
    image_size: int


def measure_vision_transformer(name: str, architecture: str) -> VisionTransformer:
    """Measures of a timm model.

    Args:
        name: Of the model.
        architecture: Whose backbone it is to be, for errors.

    Raises:
        ValueError: There is no such model, or it is no plain vision transformer with a class token.
    """
    advice = (
        f"a {architecture} has a backbone of its own, a vision transformer with windows; --backbone names a plain one "
        f"of timm that it takes its measures and weights from, such as vit_tiny_patch16_224"
    )
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except RuntimeError as error:
        raise UserError(f"timm has no model {name!r}: {advice}.") from error
    names = {re.sub(r"\.(weight|bias)$", "", key) for key in model.state_dict()}
    parts = {re.sub(r"^blocks\.\d+\.", "", key) for key in names if key.startswith("blocks.")}
    others = {key for key in names if not key.startswith("blocks.")}
    plain = LAYER <= parts <= LAYER | LAYER_SCALES and {"cls_token", "pos_embed"} <= others <= WHOLE
    if not plain or len(set(model.patch_embed.img_size)) > 1:
        raise UserError(f"{name} is no plain vision transformer with a class token: {advice}.")
    hidden = model.blocks[0].mlp.fc1.out_features
    if hidden % model.embed_dim:
        raise UserError(f"the MLPs of {name} are not a whole number of times as wide as its tokens: {advice}.")
    return VisionTransformer(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.blocks[0].attn.num_heads,
        mlp_ratio=hidden // model.embed_dim,
        patch_size=model.patch_embed.patch_size[0],
        image_size=model.patch_embed.img_size[0],
    )


def load_vision_transformer(backbone: nn.Module, source: str | PathLike, names: dict[str, str]) -> None:
    """Fill a backbone with the weights of a timm model, in place.

    Args:
        backbone: Of transformers, with its layers in `encoder.layer`.
        source: Name of the timm model or a local file with its state dict.
        names: Of the backbone's parts, by timm's, those of a layer without its number. A part that the model lacks but
            the backbone has is a layer scale, and becomes 1; the bias of the keys, which changes nothing, may be
            lacking in the backbone.

    Raises:
        OSError: The weights cannot be had.
        ValueError: They are of another architecture, or not finite.
    """
    weights = read_weights_file(source)
    if weights is None:
        weights = read_pretrained_weights(source)
    target = backbone.state_dict()
    renamed = {key: torch.ones_like(tensor) for key, tensor in target.items() if _ends(key, names, LAYER_SCALES)}
    for key, tensor in weights.items():
        match = re.fullmatch(r"(?:blocks\.(?P<layer>\d+)\.)?(?P<part>.+?)(?P<kind>(\.weight|\.bias)?)", key)
        if match is None or match["part"] not in names:
            continue
        prefix = f"encoder.layer.{match['layer']}." if match["layer"] else ""
        joint = match["part"] == "attn.qkv"
        for letter, values in zip("qkv", tensor.chunk(3), strict=True) if joint else [("", tensor)]:
            renamed[_known(prefix + names[match["part"]].format(letter) + match["kind"], target)] = values
    fill_with_weights(backbone, renamed, source, f"of {len(backbone.encoder.layer)} layers")


def _ends(key: str, names: dict[str, str], parts: set[str]) -> bool:
    return any(key.endswith(f".{names[part]}") for part in parts)


def _known(key: str, target: dict[str, torch.Tensor]) -> str:
    """The name in this version of transformers."""
    if key not in target:
        for name, earlier in EARLIER_NAMES.items():
            key = key.replace(name, earlier)
    return key
