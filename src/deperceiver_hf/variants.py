# SPDX-License-Identifier: Apache-2.0
"""The models of the paper, by name: DePerceiver at its documented scales, and DETR at those that it was compared at.

A name is an architecture and a scale, such as `deperceiver-16` or `detr-multiscale`. All have random weights, the same
backbone and the same heads; they are for counting and timing, not for training.
"""

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection

from .configuration_deperceiver import DePerceiverConfig, timm_out_indices
from .modeling_deperceiver import DePerceiverForObjectDetection, DePerceiverModel

SCALES = {"32": [32], "16": [16], "8": [8], "4": [4], "multiscale": [8, 16, 32]}
DEFAULT_NUM_LATENTS = 1024  # of the original's command line
PAPER_NUM_LATENTS = 2048
ORIGINAL_NUM_LABELS = 91  # the original's labels are COCO's category ids, gaps included

VARIANT_NAMES = (
    *("detr-32", "detr-16", "detr-8", "detr-multiscale"),
    *(f"deperceiver-{scale}" for scale in SCALES),
)


def deperceiver_variant(
    scale: str, *, backbone: str = "resnet50", num_latents: int = DEFAULT_NUM_LATENTS, **overrides
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
        raise ValueError(f"there is no scale {scale!r}; choose from {', '.join(SCALES)}.")
    fields = {"feature_strides": SCALES[scale], "num_labels": ORIGINAL_NUM_LABELS}
    try:
        return DePerceiverConfig(backbone=backbone, num_latents=num_latents, **{**fields, **overrides})
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error


def make_variant(
    name: str,
    *,
    backbone: str = "resnet50",
    num_latents: int = DEFAULT_NUM_LATENTS,
    attn_implementation: str = "sdpa",
) -> nn.Module:
    """A model of [`VARIANT_NAMES`] with random weights, in evaluation mode.

    Args:
        name: One of [`VARIANT_NAMES`].
        backbone: Name of a timm model, the same for all.
        num_latents: Length of DePerceiver's latent array; DETR has none.
        attn_implementation: `"eager"`, `"sdpa"`, or another of transformers'.

    Raises:
        ValueError: No such model.
    """
    if name not in VARIANT_NAMES:
        raise ValueError(f"there is no model {name!r}; choose from {', '.join(VARIANT_NAMES)}.")
    architecture, scale = name.split("-")
    # As a dictionary it is for the transformer alone; timm's backbones choose for themselves.
    attention = {"": attn_implementation}
    if architecture == "deperceiver":
        config = deperceiver_variant(scale, backbone=backbone, num_latents=num_latents, attn_implementation=attention)
        return DePerceiverForObjectDetection(config).eval()
    strides = SCALES[scale]
    config = DetrConfig(
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": backbone,
            "out_indices": timm_out_indices(backbone, strides[:1]),
        },
        num_labels=ORIGINAL_NUM_LABELS,
        attn_implementation=attention,
    )
    if len(strides) == 1:
        return DetrForObjectDetection(config).eval()
    return MultiscaleDetr(config, deperceiver_variant(scale, backbone=backbone)).eval()


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
