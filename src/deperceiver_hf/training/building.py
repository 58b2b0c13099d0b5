# SPDX-License-Identifier: Apache-2.0
"""The model and the image processor that a training run starts from."""

import math
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, DetrConfig, PreTrainedModel

from ..backbone_weights import create_model, load_backbone_weights
from ..configuration_deperceiver import DePerceiverConfig, timm_out_indices
from ..image_processing_deperceiver import DePerceiverImageProcessor
from ..modeling_deperceiver import DePerceiverForObjectDetection
from ..saved_models import require_model_source
from .arguments import TrainingOptions
from .detr_baseline import DetrForObjectDetection

DEFAULT_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
TORCHVISION_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
MODEL_CLASSES = {"deperceiver": DePerceiverForObjectDetection, "detr": DetrForObjectDetection}


def build_model(
    options: TrainingOptions, label_names: list[str], *, load_pretrained_backbone: bool = True
) -> PreTrainedModel:
    """The model to train, on the CPU in float32.

    Args:
        options: What to build; with `options.model` a saved model is taken, and its heads are made new where the
            number of classes or queries differs.
        label_names: Names of the classes, by label.
        load_pretrained_backbone: `False` when a training state will bring the weights.

    Raises:
        ValueError: The options describe no possible model.
        OSError: Weights or a saved model cannot be read.
    """
    weights = pretrained_backbone_name(options) if load_pretrained_backbone else None
    try:
        if options.model is not None:
            model = _load_model(options, label_names)
        elif options.architecture == "detr":
            model = _create_detr(options, label_names, weights)
        elif weights is not None:
            model = create_model(deperceiver_config(options, label_names), weights)
        else:
            model = DePerceiverForObjectDetection(deperceiver_config(options, label_names))
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if options.lr_backbone == 0:
        for parameter in backbone_parameters(model).values():
            parameter.requires_grad_(False)
    if options.gradient_checkpointing:
        # The method's name in later versions of transformers, and in earlier ones.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model


def build_image_processor(options: TrainingOptions) -> Any:
    """The processor that is saved with the model: it holds the size that the model is trained for."""
    if options.model is None:
        processor = DePerceiverImageProcessor()
    else:
        require_model_source(options.model)
        processor = AutoImageProcessor.from_pretrained(options.model)
    size = DEFAULT_SIZE | {key: processor.size[key] for key in DEFAULT_SIZE if processor.size.get(key)}
    processor.size = type(processor.size)(**_image_size(options, size))
    return processor


def _image_size(options: TrainingOptions, default: dict[str, int]) -> dict[str, int]:
    """Shortest and longest edge of the images that the model is trained for."""
    size = dict(default)
    if options.shortest_edge is not None:
        ratio = DEFAULT_SIZE["longest_edge"] / DEFAULT_SIZE["shortest_edge"]
        size = {"shortest_edge": options.shortest_edge, "longest_edge": round(ratio * options.shortest_edge)}
    if options.longest_edge is not None:
        size["longest_edge"] = options.longest_edge
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"--longest_edge {size['longest_edge']} is less than the shortest edge of {size['shortest_edge']}; "
            f"give a smaller --shortest_edge too."
        )
    return size


def pretrained_backbone_name(options: TrainingOptions) -> str | None:
    """Which weights the backbone of a new model starts from; `None` for random ones."""
    if options.no_pretrained_backbone:
        return None
    if options.pretrained_backbone is not None:
        return options.pretrained_backbone
    backbone = options.backbone or "resnet50"
    return f"{backbone}.tv_in1k" if backbone in TORCHVISION_RESNETS else backbone


def deperceiver_config(options: TrainingOptions, label_names: list[str]) -> DePerceiverConfig:
    """Configuration of a new DePerceiver; options that are not given keep the configuration's own defaults."""
    given = {
        "backbone": options.backbone,
        "position_embedding_type": options.position_embedding,
        "feature_strides": [8, 16, 32] if options.multiscale else options.downsample_factor,
        "num_latents": options.num_latents,
        "d_latents": options.hidden_dim,
        "d_model": options.hidden_dim,
        "num_blocks": options.enc_blocks,
        "num_self_attends_per_block": options.enc_layers_per_block,
        "num_self_attention_heads": options.nheads,
        "decoder_layers": options.dec_layers,
    }
    if options.position_embedding == "learned":
        finest = min(given["feature_strides"]) if options.multiscale else options.downsample_factor or 32
        longest_edge = _image_size(options, DEFAULT_SIZE)["longest_edge"]
        given["num_position_embeddings"] = max(50, math.ceil(longest_edge / finest))  # 50 in the original
    # Random weights need working batch normalisation and early layers that learn.
    from_scratch = {"freeze_batch_norm": False, "frozen_backbone_stages": -1} if options.no_pretrained_backbone else {}
    return DePerceiverConfig(
        dilation=options.dilation,
        decoder_type="cross_attention" if options.no_aux_loss else "layered",
        freeze_backbone=options.lr_backbone == 0,
        **from_scratch,
        **{name: value for name, value in given.items() if value is not None},
        **_common_fields(options),
        **_decoder_dropouts(options, layered=not options.no_aux_loss),
        **_label_fields(label_names),
    )


def detr_config(options: TrainingOptions, label_names: list[str]) -> DetrConfig:
    """Configuration of a new DETR that reads the feature map of `--downsample_factor` of the same backbone."""
    stride = options.downsample_factor or 32
    if options.dilation and stride != 32:
        raise ValueError(f"--dilation changes the stage of stride 32, which --downsample_factor {stride} leaves out.")
    backbone = options.backbone or "resnet50"
    backbone_config = {
        "model_type": "timm_backbone",
        "backbone": backbone,
        "out_indices": timm_out_indices(backbone, [stride]),
        **({"output_stride": 16} if options.dilation else {}),
    }
    given = {
        "position_embedding_type": options.position_embedding,
        "d_model": options.hidden_dim,
        "encoder_layers": options.enc_layers,
        "decoder_layers": options.dec_layers,
        "encoder_ffn_dim": options.dim_feedforward,
        "decoder_ffn_dim": options.dim_feedforward,
        "encoder_attention_heads": options.nheads,
        "decoder_attention_heads": options.nheads,
    }
    fields = {
        name: int(value) if name.endswith(("_cost", "_loss_coefficient")) and value == int(value) else value
        for name, value in _common_fields(options).items()  # DetrConfig takes whole weights only
    }
    return DetrConfig(
        backbone_config=AutoConfig.for_model(**backbone_config),
        dilation=options.dilation,
        **{name: value for name, value in given.items() if value is not None},
        **fields,
        **_label_fields(label_names),
    )


def backbone_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters of the convolutional backbone, by name: what `--lr_backbone` applies to."""
    return {name: parameter for name, parameter in model.named_parameters() if "backbone" in name.split(".")}


def _create_detr(options: TrainingOptions, label_names: list[str], weights: str | None) -> DetrForObjectDetection:
    config = detr_config(options, label_names)
    model = DetrForObjectDetection(config)
    model.use_auxiliary_loss = not options.no_aux_loss
    backbone = AutoBackbone.from_config(config.backbone_config)
    if weights is not None:
        load_backbone_weights(backbone, weights)
        model.model.backbone.model.load_state_dict(backbone._backbone.state_dict())
    elif options.no_pretrained_backbone:
        # With batch normalisation that learns; transformers' frozen one reads the same names afterwards.
        model.model.backbone.model = backbone._backbone
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.num_batches_tracked = None
    return model


def _load_model(options: TrainingOptions, label_names: list[str]) -> PreTrainedModel:
    require_model_source(options.model)
    config = AutoConfig.from_pretrained(options.model)
    if config.model_type not in MODEL_CLASSES:
        known = " or ".join(MODEL_CLASSES)
        raise ValueError(f"--model {options.model} is of type {config.model_type}; {known} can be trained.")
    changed = _common_fields(options) | _label_fields(label_names)
    if config.model_type == "deperceiver":
        changed["freeze_backbone"] = options.lr_backbone == 0
        changed |= _decoder_dropouts(options, layered=config.decoder_type == "layered")
    for name, value in changed.items():
        setattr(config, name, value)
    model, report = MODEL_CLASSES[config.model_type].from_pretrained(
        options.model, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
    )
    if missing := sorted(report["missing_keys"] - {name for name, *_ in report["mismatched_keys"]}):
        raise ValueError(f"--model {options.model} lacks {len(missing)} weights, such as {missing[:3]}.")
    return model


def _common_fields(options: TrainingOptions) -> dict[str, Any]:
    """Fields that both configurations have and that may differ from those of a saved model."""
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


def _decoder_dropouts(options: TrainingOptions, layered: bool) -> dict[str, float]:
    """Dropouts of a DePerceiver's decoder, which has its own unless `--dropout` is given."""
    if options.dropout is None:
        return {}
    return {"decoder_dropout": options.dropout} | ({"decoder_attention_dropout": options.dropout} if layered else {})


def _label_fields(label_names: list[str]) -> dict[str, Any]:
    id2label = dict(enumerate(label_names))
    return {"id2label": id2label, "label2id": {name: label for label, name in id2label.items()}}
