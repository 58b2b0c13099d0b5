# SPDX-License-Identifier: Apache-2.0
"""Conversion of checkpoints of the authors' code (PyTorch Lightning, 2021) to this model.

Lightning checkpoints hold no hyper-parameters, so the architecture is read off the names and shapes of the weights.
Two things leave no trace in them and are arguments: how often the encoder's shared block is applied, and dilation.
"""

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from ..data.coco_categories import COCO_CATEGORIES
from ..errors import UserError
from ..models.configuration_deperceiver import DePerceiverConfig
from ..models.modeling_deperceiver import DePerceiverForObjectDetection

RESNET_DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
BACKBONE = "backbone.backbone.body."
STRIDE_OF_STAGE = {1: 4, 2: 8, 3: 16, 4: 32}


# Applied in this order to every name; the second half renames the parts inside of a layer.
NAME_RULES = [
    (r"^perceiver\.encoder\.latents$", "model.encoder.latents"),
    (r"^perceiver\.encoder\.cross_attn\.", "model.encoder.cross_attention."),
    (r"^perceiver\.encoder\.self_attention_block\.(\d+)\.layer_norm\.", r"model.encoder.layers.\1.attention_norm."),
    (r"^perceiver\.encoder\.self_attention_block\.", "model.encoder.layers."),
    (r"^perceiver\.decoder\.cross_attention\.", "model.decoder.layers.0.cross_attention."),
    (r"^perceiver\.decoder\.layers\.(\d+)\.partial_self_attention\.", r"model.decoder.layers.\1.self_attention."),
    (r"^perceiver\.decoder\.layers\.(\d+)\.norm1\.", r"model.decoder.layers.\1.self_attention_norm."),
    (r"^perceiver\.decoder\.", "model.decoder."),
    (r"^query_embed\.", "model.query_embedding."),
    (r"^input_proj\.(weight|bias)$", r"model.input_adapter.projections.0.\1"),
    (r"^input_proj\.", "model.input_adapter.projections."),
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"^(?:.*\.)?row_embed\.", "model.input_adapter.position_embedding.row_embedding."),
    (r"^(?:.*\.)?col_embed\.", "model.input_adapter.position_embedding.column_embedding."),
    (r"^backbone\.backbone\.body\.", "model.backbone.model._backbone."),
    (r"\.kv_layer_norm\.", ".key_value_norm."),
    (r"\.q_layer_norm\.", ".query_norm."),
    (r"\.qkv_layer_norm\.", ".mlp_norm."),
    (r"\.projection\.", ".o_proj."),
    (r"\.([qkv])\.(weight|bias)$", r".\1_proj.\2"),
    (r"\.mlp\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.mlp\.2\.", ".mlp.fc2."),
]


def load_original(
    source: str | PathLike | Mapping[str, Any],
    *,
    num_blocks: int = 3,
    position_embedding_type: str | None = None,
    dilation: bool = False,
    **config_overrides: Any,
) -> DePerceiverForObjectDetection:
    """Make a model from a checkpoint of the authors' code.

    Args:
        source (`str`, `PathLike` or `Mapping`): A Lightning `.ckpt` or `.pth` file, or what such a file holds: a state
            dict, possibly nested under `"state_dict"`, possibly with the loss's `criterion.` entries.
        num_blocks (`int`): Passes through the encoder's shared block (`--enc_blocks`). The weights do not tell it.
        position_embedding_type (`str`, *optional*): `"sine"` or `"learned"`, to be checked: the weights tell it.
        dilation (`bool`): Whether the model was trained with `--dilation`. The weights do not tell it.
        **config_overrides: Other fields of [`DePerceiverConfig`], such as loss weights, heads or `id2label`.

    Returns:
        `DePerceiverForObjectDetection` in evaluation mode, float32, all weights loaded.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint of a DePerceiver, or an argument contradicts it; says why.
    """
    state_dict = _read_state_dict(source)
    inferred = _infer_config(state_dict)
    if position_embedding_type not in (None, inferred["position_embedding_type"]):
        raise UserError(
            f"`position_embedding_type={position_embedding_type!r}` was given, but the checkpoint has "
            f"{inferred['position_embedding_type']} positions."
        )
    known = set(DePerceiverConfig.__dataclass_fields__) | {"num_labels", "backbone"}
    unknown = sorted(set(config_overrides) - known)
    if unknown:
        raise UserError(f"{unknown} are not fields of DePerceiverConfig.")
    if "id2label" in config_overrides or "num_labels" in config_overrides:
        inferred = {name: value for name, value in inferred.items() if name not in ("id2label", "label2id")}
    if "id2label" in config_overrides:
        inferred["label2id"] = {name: int(index) for index, name in config_overrides["id2label"].items()}
    if "backbone_config" in config_overrides:
        del inferred["backbone"]
    config = DePerceiverConfig(**{**inferred, "num_blocks": num_blocks, "dilation": dilation, **config_overrides})
    model = DePerceiverForObjectDetection(config)
    converted = _convert_names(state_dict)
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - converted.keys()), sorted(converted.keys() - expected.keys())
    misshapen = [
        f"{name} {tuple(converted[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & converted.keys())
        if converted[name].shape != expected[name].shape
    ]
    if missing or unexpected or misshapen:
        raise UserError(
            f"this checkpoint does not fit the DePerceiver that its names describe: {len(missing)} weights are "
            f"missing (such as {missing[:3]}), {len(unexpected)} are unknown (such as {unexpected[:3]}), "
            f"{len(misshapen)} have another shape (such as {misshapen[:3]}). A backbone that is no plain ResNet "
            f"must be named, for example `backbone='wide_resnet50_2'`."
        )
    model.load_state_dict(converted)
    return model.eval()


def _read_state_dict(source: str | PathLike | Mapping[str, Any]) -> dict[str, torch.Tensor]:
    described = "the given mapping"
    if not isinstance(source, Mapping):
        described = str(source)
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise FileNotFoundError(f"there is no checkpoint file {described}.") from error
        except Exception as error:  # torch.load raises whatever its many formats do
            raise UserError(
                f"{described} cannot be read as a PyTorch checkpoint of tensors ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}). If it holds other pickled objects "
                f"and you trust it, save its weights alone: torch.save({{'state_dict': ...}}, FILE)."
            ) from error
    if isinstance(source, Mapping) and isinstance(source.get("state_dict"), Mapping):
        source = source["state_dict"]
    if not isinstance(source, Mapping) or not all(isinstance(value, torch.Tensor) for value in source.values()):
        raise UserError(f"{described} holds no state dict: names with tensors, possibly under 'state_dict'.")
    state_dict = {name.removeprefix("module."): tensor for name, tensor in source.items()}
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if not name.startswith("criterion.") and not name.endswith("num_batches_tracked")
    }


def _infer_config(state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    required = ("perceiver.encoder.latents", "query_embed.weight", "class_embed.weight", f"{BACKBONE}conv1.weight")
    missing = [name for name in required if name not in shapes]
    if missing:
        hint = " It looks like DETR." if any(name.startswith("transformer.") for name in shapes) else ""
        raise UserError(
            f"this is not a checkpoint of a DePerceiver: it has no {missing}.{hint} Its names start like "
            f"{sorted(shapes)[:3]}."
        )
    stage_channels = _stage_channels(shapes)
    projections = sorted(name for name in shapes if re.fullmatch(r"input_proj\.(\d+\.)?weight", name))
    strides = []
    for name in projections:
        stages = [stage for stage, channels in stage_channels.items() if channels == shapes[name][1]]
        if not stages:
            raise UserError(
                f"{name} reads {shapes[name][1]} channels, but the stages of the backbone have {stage_channels}."
            )
        strides.append(STRIDE_OF_STAGE[stages[0]])
    learned = [name for name in shapes if name.endswith("row_embed.weight")]
    if len(learned) > 1:
        raise UserError(f"found several tables of learned positions ({learned}), where one is expected.")
    num_latents, d_latents = shapes["perceiver.encoder.latents"]
    num_queries, d_model = shapes["query_embed.weight"]
    num_labels = shapes["class_embed.weight"][0] - 1
    layered_depth = _count(shapes, r"perceiver\.decoder\.layers\.(\d+)\.")
    encoder_mlp = shapes.get("perceiver.encoder.self_attention_block.0.mlp.mlp.0.weight", (1, 1))
    cross_mlp = shapes.get("perceiver.encoder.cross_attn.mlp.mlp.0.weight", (1, 1))
    config = {
        "backbone": _backbone_name(shapes),
        "num_channels": shapes[f"{BACKBONE}conv1.weight"][1],
        "feature_strides": strides,
        "mask_padding": False,
        "position_embedding_type": "learned" if learned else "sine",
        "num_latents": num_latents,
        "d_latents": d_latents,
        "d_model": d_model,
        "num_self_attends_per_block": _count(shapes, r"perceiver\.encoder\.self_attention_block\.(\d+)\."),
        "self_attention_widening_factor": encoder_mlp[0] // encoder_mlp[1],
        "cross_attention_widening_factor": cross_mlp[0] // cross_mlp[1],
        "decoder_type": "layered" if layered_depth else "cross_attention",
        "num_queries": num_queries,
        "num_labels": num_labels,
    }
    if layered_depth:
        config["decoder_layers"] = layered_depth
    if learned:
        config["num_position_embeddings"] = shapes[learned[0]][0]
    if num_labels == max(COCO_CATEGORIES) + 1:  # classes are COCO's category ids, gaps included
        del config["num_labels"]
        config["id2label"] = {index: COCO_CATEGORIES.get(index, "N/A") for index in range(num_labels)}
        config["label2id"] = {name: index for index, name in COCO_CATEGORIES.items()}
    return config


def _count(shapes: dict[str, tuple[int, ...]], pattern: str) -> int:
    """One more than the highest number that `pattern` captures in a name, 0 if it matches none."""
    return max((int(match[1]) + 1 for name in shapes if (match := re.match(pattern, name))), default=0)


def _stage_blocks(shapes: dict[str, tuple[int, ...]]) -> dict[int, int]:
    body = re.escape(BACKBONE)
    blocks = {stage: _count(shapes, rf"{body}layer{stage}\.(\d+)\.") for stage in STRIDE_OF_STAGE}
    return {stage: count for stage, count in blocks.items() if count}


def _stage_channels(shapes: dict[str, tuple[int, ...]]) -> dict[int, int]:
    """Output channels of the backbone's stages."""
    conv = "conv3" if f"{BACKBONE}layer1.0.conv3.weight" in shapes else "conv2"
    return {stage: shapes[f"{BACKBONE}layer{stage}.0.{conv}.weight"][0] for stage in _stage_blocks(shapes)}


def _backbone_name(shapes: dict[str, tuple[int, ...]]) -> str:
    """The shallowest ResNet whose first stages are those of the checkpoint (which lacks unused stages)."""
    blocks = tuple(_stage_blocks(shapes).values())
    bottleneck = f"{BACKBONE}layer1.0.conv3.weight" in shapes
    for name, depths in RESNET_DEPTHS.items():
        if (name not in ("resnet18", "resnet34")) == bottleneck and depths[: len(blocks)] == blocks:
            return name
    raise UserError(f"the backbone has stages of {blocks} blocks, which is none of the ResNets {RESNET_DEPTHS}.")


def _convert_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    converted = {}
    levels = sorted(name for name in state_dict if name.startswith("scale_embedding."))
    if levels:
        converted["model.input_adapter.level_embedding.weight"] = torch.cat([state_dict[name] for name in levels])
    for name, tensor in state_dict.items():
        if name in levels:
            continue
        for pattern, replacement in NAME_RULES:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    return converted


__all__ = ["load_original"]
