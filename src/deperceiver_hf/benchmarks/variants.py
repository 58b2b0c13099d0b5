# SPDX-License-Identifier: Apache-2.0
"""The models that are compared, by name: DePerceiver at its documented scales, DePerceiver v2 in its sizes, and those
of transformers that can be trained beside them.

A name is an architecture and a scale or size, if it has several, such as `deperceiver-16`, `deperceiver-v2-base` or
`rt-detr-v2`. All are made by the registry of architectures, with random weights and the same classes, and on the same
backbone unless a size of v2 brings its own; LW-DETR and RF-DETR always have their own. They are for counting and
timing, not for training.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UserError, refused_fields_as_user_errors
from ..models.configuration_deperceiver import DePerceiverConfig
from ..models.configuration_deperceiver_v2 import PRESETS, DePerceiverV2Config
from ..models.modeling_deperceiver import DePerceiverModel
from ..training.architectures import ARCHITECTURES
from ..training.architectures.architecture import Architecture
from ..training.architectures.backbones import backbone_of

SCALES = {"32": [32], "16": [16], "8": [8], "4": [4], "multiscale": [8, 16, 32]}
DEFAULT_BACKBONE = "resnet50"
OWN_BACKBONES = f"{DEFAULT_BACKBONE}, or that of the preset"
DEFAULT_NUM_LATENTS = 1024  # of the original's command line
PAPER_NUM_LATENTS = 2048
ORIGINAL_NUM_LABELS = 91  # the original's labels are COCO's category ids, gaps included

MULTISCALE_DETR = "detr-multiscale"  # a model for counting only, see `MultiscaleDetr`


class Variant(NamedTuple):
    """An architecture of the registry, and the options that make the variant of it."""

    architecture: str
    options: dict[str, Any]

    @property
    def kind(self) -> Architecture:
        """The architecture itself."""
        return ARCHITECTURES[self.architecture]


def _scale_options(scale: str) -> dict[str, Any]:
    return {"multiscale": True} if len(SCALES[scale]) > 1 else {"downsample_factor": SCALES[scale][0]}


VARIANTS = {
    **{f"detr-{scale}": Variant("detr", _scale_options(scale)) for scale in ("32", "16", "8")},
    MULTISCALE_DETR: Variant("detr", {}),
    **{
        f"deperceiver-{scale}": Variant("deperceiver", _scale_options(scale) | {"no_aux_loss": True})
        for scale in SCALES
    },
    **{f"deperceiver-v2-{preset}": Variant("deperceiver_v2", {"preset": preset}) for preset in PRESETS},
    "deformable-detr": Variant("deformable_detr", {}),
    "rt-detr-v2": Variant("rt_detr_v2", {}),
    "d-fine": Variant("d_fine", {}),
    "deimv2": Variant("deimv2", {}),
    "lw-detr": Variant("lw_detr", {}),
    "rf-detr": Variant("rf_detr", {}),
}
VARIANT_NAMES = tuple(VARIANTS)


def deperceiver_variant(
    scale: str, *, backbone: str = DEFAULT_BACKBONE, num_latents: int = DEFAULT_NUM_LATENTS, **overrides
) -> DePerceiverConfig:
    """Configuration of a DePerceiver that the original documents: the decoder of a single cross-attention.

    Args:
        scale: `"32"`, `"16"`, `"8"`, `"4"` or `"multiscale"`.
        backbone: Name of a timm model.
        num_latents: Length of the latent array.
        overrides: Other fields of [`DePerceiverConfig`].

    Raises:
        ValueError: No such scale, or the backbone has no such feature maps.
    """
    if scale not in SCALES:
        raise UserError(f"there is no scale {scale!r}; choose from {', '.join(SCALES)}.")
    fields = {"feature_strides": SCALES[scale], "num_labels": ORIGINAL_NUM_LABELS}
    with refused_fields_as_user_errors():
        return DePerceiverConfig(backbone=backbone, num_latents=num_latents, **{**fields, **overrides})


def deperceiver_v2_variant(preset: str, *, backbone: str | None = None, **overrides) -> DePerceiverV2Config:
    """Configuration of a DePerceiver v2 of a named size, with the classes of all other variants.

    Args:
        preset: `"nano"`, `"small"`, `"base"` or `"large"`.
        backbone: Name of a timm model; that of the preset if not given.
        overrides: Other fields of [`DePerceiverV2Config`].

    Raises:
        ValueError: No such preset, or the backbone has no such feature maps.
    """
    fields = {"num_labels": ORIGINAL_NUM_LABELS, **({} if backbone is None else {"backbone": backbone}), **overrides}
    with refused_fields_as_user_errors():
        return DePerceiverV2Config.from_preset(preset, **fields)


def make_variant(
    name: str,
    *,
    backbone: str | None = None,
    num_latents: int = DEFAULT_NUM_LATENTS,
    attn_implementation: str = "sdpa",
) -> nn.Module:
    """A model of [`VARIANT_NAMES`] with random weights, in evaluation mode.

    Args:
        name: One of [`VARIANT_NAMES`].
        backbone: Name of a timm model; if not given, the preset's for DePerceiver v2 and ResNet-50 for the others.
            LW-DETR and RF-DETR keep their own.
        num_latents: Length of the latent array of the first DePerceiver; the others have none of free length.
        attn_implementation: `"eager"`, `"sdpa"`, or another of transformers'.

    Raises:
        ValueError: No such model.
    """
    if name not in VARIANT_NAMES:
        raise UserError(f"there is no model {name!r}; choose from {', '.join(VARIANT_NAMES)}.")
    if name == MULTISCALE_DETR:
        strides = SCALES["multiscale"]
        return make_detr(strides, backbone=backbone or DEFAULT_BACKBONE, attn_implementation=attn_implementation)
    variant = VARIANTS[name]
    options = dict(variant.options)
    if variant.architecture == "deperceiver":
        options["num_latents"] = num_latents
    brings_its_own = variant.architecture == "deperceiver_v2" and backbone is None
    if variant.kind.own_backbone is None and not brings_its_own:
        options["backbone"] = backbone or DEFAULT_BACKBONE
    config = variant.kind.plain_config(ORIGINAL_NUM_LABELS, **options)
    return variant.kind.random_model(config, attn_implementation)


def make_detr(
    strides: Sequence[int],
    *,
    backbone: str = DEFAULT_BACKBONE,
    d_model: int = 256,
    num_heads: int = 8,
    attn_implementation: str = "sdpa",
) -> nn.Module:
    """A DETR of six and six layers that reads the feature maps of these strides, in evaluation mode.

    Args:
        strides: Ascending. Of a single one the model is transformers' DETR, of several a [`MultiscaleDetr`].
        backbone: Name of a timm model.
        d_model: Width; that of the MLPs is eight times as much, as in the original.
        num_heads: Heads of every attention.
        attn_implementation: `"eager"`, `"sdpa"`, or another of transformers'.

    Raises:
        ValueError: The backbone has no such feature maps.
    """
    strides = list(strides)
    detr = ARCHITECTURES["detr"]
    config = detr.plain_config(
        ORIGINAL_NUM_LABELS,
        backbone=backbone,
        downsample_factor=max(strides[0], 8),
        hidden_dim=d_model,
        dim_feedforward=8 * d_model,
        nheads=num_heads,
    )
    if len(strides) == 1:
        return detr.random_model(config, attn_implementation)
    tokens = deperceiver_variant(
        "multiscale", backbone=backbone, feature_strides=strides, d_model=d_model, d_latents=d_model
    )
    return MultiscaleDetr(detr.random_model(config, attn_implementation), tokens).eval()


def place_of_backbone(model: nn.Module) -> tuple[nn.Module, str]:
    """The part of a variant that has its backbone as an attribute, and the attribute's name."""
    backbone = model.backbone if isinstance(model, MultiscaleDetr) else backbone_of(model)
    (path,) = [name for name, module in model.named_modules() if module is backbone]
    holder, _, name = path.rpartition(".")
    return model.get_submodule(holder), name


def maps_of(output: Any) -> list[torch.Tensor]:
    """Feature maps `(B, C, H, W)` that a variant's backbone returns: with masks in a list, or as transformers'
    backbones do."""
    return list(output.feature_maps) if hasattr(output, "feature_maps") else [features for features, _ in output]


class MultiscaleDetr(nn.Module):
    """DETR's transformer on the tokens of DePerceiver's multi-scale input, all levels in one list.

    The model that the paper found to run out of memory. Unlike DETR it adds the positions to the tokens once, as
    DePerceiver does, instead of in every layer: that changes neither FLOPs nor the size of any array.

    Args:
        detector: A DETR, whose backbone is not used.
        token_config: Of backbone and tokens.
    """

    def __init__(self, detector: nn.Module, token_config: DePerceiverConfig):
        super().__init__()
        self.config = detector.config
        tokenizer = DePerceiverModel(token_config)
        self.backbone, self.input_adapter = tokenizer.backbone, tokenizer.input_adapter
        self.query_position_embeddings = detector.model.query_position_embeddings
        self.encoder, self.decoder = detector.model.encoder, detector.model.decoder
        self.class_labels_classifier, self.bbox_predictor = detector.class_labels_classifier, detector.bbox_predictor

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(B, Q, num_labels + 1)` and boxes `(B, Q, 4)` of images `(B, 3, H, W)` without padding."""
        tokens, _ = self.input_adapter(self.backbone(pixel_values))
        encoded = self.encoder(inputs_embeds=tokens).last_hidden_state
        positions = self.query_position_embeddings.weight.expand(tokens.shape[0], -1, -1)
        decoded = self.decoder(
            inputs_embeds=torch.zeros_like(positions),
            encoder_hidden_states=encoded,
            object_queries_position_embeddings=positions,
        ).last_hidden_state
        return self.class_labels_classifier(decoded), self.bbox_predictor(decoded).sigmoid()


def check_models(models: Sequence[str]) -> None:
    """Refuse unknown and repeated names with a `ValueError`."""
    unknown = [name for name in models if name not in VARIANT_NAMES]
    if unknown or not models:
        raise UserError(
            f"there is no model {', '.join(unknown) or '(none given)'}; choose from {', '.join(VARIANT_NAMES)}."
        )
    if len(set(models)) < len(models):
        raise UserError(f"a model is named twice in {', '.join(models)}.")


def check_sides(models: Sequence[str], height: int, width: int) -> None:
    """Refuse a size of images that one of the models does not take with a `ValueError`."""
    for name in models:
        if not takes_sides(name, height, width):
            kind = VARIANTS[name].kind
            raise UserError(
                f"{name} takes {'square ' if kind.square_only else ''}images whose sides are multiples of "
                f"{kind.side_multiple} only, not {height} x {width}: give other sides, or leave it out of --models."
            )


def takes_sides(name: str, height: int, width: int) -> bool:
    """Whether a model takes images of this size."""
    kind = VARIANTS[name].kind
    fits = height % kind.side_multiple == 0 and width % kind.side_multiple == 0
    return fits and (height == width or not kind.square_only)
