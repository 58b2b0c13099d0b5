# SPDX-License-Identifier: Apache-2.0
"""The models that are compared, by name: DePerceiver at its documented scales, DePerceiver v2 in its sizes, and DETR.

A name is an architecture and a scale or size, such as `deperceiver-16`, `detr-multiscale` or `deperceiver-v2-base`.
All have random weights and the same classes, and the same backbone unless a size of v2 brings its own; they are for
counting and timing, not for training.
"""

from collections.abc import Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection

from ..errors import UserError
from ..models.configuration_backbone_deperceiver import timm_out_indices
from ..models.configuration_deperceiver import DePerceiverConfig
from ..models.configuration_deperceiver_v2 import PRESETS, DePerceiverV2Config
from ..models.modeling_deperceiver import DePerceiverForObjectDetection, DePerceiverModel
from ..models.modeling_deperceiver_v2 import DePerceiverV2ForObjectDetection

SCALES = {"32": [32], "16": [16], "8": [8], "4": [4], "multiscale": [8, 16, 32]}
DEFAULT_BACKBONE = "resnet50"
OWN_BACKBONES = f"{DEFAULT_BACKBONE}, or that of the preset"
DEFAULT_NUM_LATENTS = 1024  # of the original's command line
PAPER_NUM_LATENTS = 2048
ORIGINAL_NUM_LABELS = 91  # the original's labels are COCO's category ids, gaps included

VARIANT_NAMES = (
    *("detr-32", "detr-16", "detr-8", "detr-multiscale"),
    *(f"deperceiver-{scale}" for scale in SCALES),
    *(f"deperceiver-v2-{preset}" for preset in PRESETS),
)


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
    try:
        return DePerceiverConfig(backbone=backbone, num_latents=num_latents, **{**fields, **overrides})
    except StrictDataclassError as error:
        raise UserError(" ".join(str(error).split())) from error


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
    try:
        return DePerceiverV2Config.from_preset(preset, **fields)
    except StrictDataclassError as error:
        raise UserError(" ".join(str(error).split())) from error


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
        num_latents: Length of the latent array of the first DePerceiver; the others have none of free length.
        attn_implementation: `"eager"`, `"sdpa"`, or another of transformers'.

    Raises:
        ValueError: No such model.
    """
    if name not in VARIANT_NAMES:
        raise UserError(f"there is no model {name!r}; choose from {', '.join(VARIANT_NAMES)}.")
    architecture, _, size = name.rpartition("-")
    # As a dictionary it is for the transformer alone; timm's backbones choose for themselves.
    attention = {"": attn_implementation}
    if architecture == "deperceiver-v2":
        config = deperceiver_v2_variant(size, backbone=backbone, attn_implementation=attention)
        return DePerceiverV2ForObjectDetection(config).eval()
    backbone = backbone or DEFAULT_BACKBONE
    if architecture == "deperceiver":
        config = deperceiver_variant(size, backbone=backbone, num_latents=num_latents, attn_implementation=attention)
        return DePerceiverForObjectDetection(config).eval()
    return make_detr(SCALES[size], backbone=backbone, attn_implementation=attn_implementation)


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
    config = DetrConfig(
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": backbone,
            "out_indices": timm_out_indices(backbone, strides[:1]),
        },
        num_labels=ORIGINAL_NUM_LABELS,
        d_model=d_model,
        encoder_ffn_dim=8 * d_model,
        decoder_ffn_dim=8 * d_model,
        encoder_attention_heads=num_heads,
        decoder_attention_heads=num_heads,
        attn_implementation={"": attn_implementation},
    )
    if len(strides) == 1:
        return DetrForObjectDetection(config).eval()
    tokens = deperceiver_variant(
        "multiscale", backbone=backbone, feature_strides=strides, d_model=d_model, d_latents=d_model
    )
    return MultiscaleDetr(config, tokens).eval()


def with_backbone(model: nn.Module) -> nn.Module:
    """The part of a variant that has the attribute `backbone`, whose output is a list of feature maps with masks."""
    return model if isinstance(model, MultiscaleDetr) else model.model


class MultiscaleDetr(nn.Module):
    """DETR's transformer on the tokens of DePerceiver's multi-scale input, all levels in one list.

    The model that the paper found to run out of memory. Unlike DETR it adds the positions to the tokens once, as
    DePerceiver does, instead of in every layer: that changes neither FLOPs nor the size of any array.

    Args:
        config: Of the transformer; its backbone is not used.
        token_config: Of backbone and tokens.
    """

    def __init__(self, config: DetrConfig, token_config: DePerceiverConfig):
        super().__init__()
        self.config = config
        tokenizer, detector = DePerceiverModel(token_config), DetrForObjectDetection(config)
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
