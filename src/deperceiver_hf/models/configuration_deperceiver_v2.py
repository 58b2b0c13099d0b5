# SPDX-License-Identifier: Apache-2.0
"""Configuration of DePerceiver v2, whose object queries are the latent array."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.utils import auto_docstring

from .configuration_backbone_deperceiver import DePerceiverBackboneConfig

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "backbone": "test_resnet",
        "d_model": 96,
        "num_attention_heads": 4,
        "num_queries": 60,
        "decoder_layers": 3,
        "share_key_values": True,
        "num_denoising_queries": 40,
    },
    "small": {
        "backbone": "resnet18",
        "d_model": 128,
        "num_attention_heads": 4,
        "num_queries": 200,
        "decoder_layers": 3,
    },
    "base": {"backbone": "resnet50"},
    "large": {"backbone": "resnet50", "feature_strides": [4, 8, 16, 32]},
}
"""Sizes of the architecture, as fields that differ from the defaults of [`DePerceiverV2Config`]."""

REMOVED_FIELDS = {"num_context_latents": 0, "box_refinement": True, "selection_matches": 1}
"""Fields of configurations saved by version 0.2.0 that exist no more, with the only value that can still be built."""


@auto_docstring(checkpoint="deperceiver-hf/deperceiver-v2-base")
@strict
class DePerceiverV2Config(DePerceiverBackboneConfig):
    r"""
    backbone_config (`dict` or `PreTrainedConfig`, *optional*):
        Configuration of the convolutional backbone, any that `AutoBackbone` knows. Its `out_indices` or
        `out_features` must name one feature map per entry of `feature_strides`. By default timm's ResNet-50; the
        keyword `backbone="resnet18"` is a shorthand for another timm model. Weights are never downloaded from here:
        see [`~deperceiver_hf.create_model`].
    num_channels (`int`, *optional*, defaults to 3):
        Number of input channels.
    freeze_batch_norm (`bool`, *optional*, defaults to `True`):
        Replace the backbone's batch normalisation by a fixed affine map (statistics, scale and shift do not change).
    frozen_backbone_stages (`int`, *optional*, defaults to 1):
        How much of the backbone is not trained: -1 nothing, 0 the stem, 1 the stem and the first stage, and so on.
    freeze_backbone (`bool`, *optional*, defaults to `False`):
        Train no parameter of the backbone.
    mask_padding (`bool`, *optional*, defaults to `True`):
        Keep what is padding in `pixel_mask` at zero all the way through the backbone, so that a prediction does not
        depend on what an image is padded to.
    dilation (`bool`, *optional*, defaults to `False`):
        Replace the stride of the backbone's last stage by dilation; the map called 32 in `feature_strides` then has
        16 pixels per cell. timm backbones only.
    feature_strides (`int` or `list[int]`, *optional*, defaults to `[8, 16, 32]`):
        Strides of the feature maps whose cells are the tokens, any of 4, 8, 16 and 32, ascending.
    d_model (`int`, *optional*, defaults to 256):
        Width of tokens and latents, a multiple of 4.
    num_attention_heads (`int`, *optional*, defaults to 8):
        Heads of every attention.
    num_queries (`int`, *optional*, defaults to 300):
        Number of object latents: the most objects that can be found in an image. With `query_selection`, a trained
        model takes any other number, `from_pretrained(..., num_queries=1000)`.
    decoder_layers (`int`, *optional*, defaults to 6):
        Number of blocks, each a self-attention among the latents, a reading of the tokens and an MLP.
    widening_factor (`int`, *optional*, defaults to 4):
        Hidden width of the MLP of a block, relative to `d_model`.
    dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the output of every attention and MLP, in [0, 1).
    attention_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the attention weights, in [0, 1).
    query_selection (`bool`, *optional*, defaults to `True`):
        Pick the object latents and their first boxes from the tokens of the image; `False` learns both.
    position_bias (`bool`, *optional*, defaults to `True`):
        Let each head of an object latent look around a place of its own near the box.
    read_offsets (`bool`, *optional*, defaults to `True`):
        Tell each object latent where, relative to its box, each head has read.
    share_key_values (`bool`, *optional*, defaults to `False`):
        Compute keys and values of the tokens once for all blocks instead of once for each.
    num_denoising_queries (`int`, *optional*, defaults to 100):
        Denoising queries in training, about: as many pairs of a positive and a negative group of noised objects as
        this gives room for, at least one. Of more than `num_queries` objects in an image so many are drawn. 0 trains
        without.
    label_noise_ratio (`float`, *optional*, defaults to 0.25):
        Share of the denoising queries that are given a random class, in [0, 1].
    box_noise_scale (`float`, *optional*, defaults to 1.0):
        How far, in half sides of a box, the corners of negative denoising boxes are moved at most is twice this, of
        positive ones once.
    classification_loss (`str`, *optional*, defaults to `"mal"`):
        `"focal"`: focal loss. `"varifocal"`: the IoU of the matched box is the target (RT-DETR). `"mal"`:
        matchability-aware loss, the IoU to the power of `mal_gamma` is the target (DEIM).
    focal_alpha (`float`, *optional*, defaults to 0.25):
        Weight of the positives in focal loss and matching cost, in [0, 1].
    focal_gamma (`float`, *optional*, defaults to 2.0):
        Exponent that turns the attention of focal and varifocal loss to what is hard.
    mal_gamma (`float`, *optional*, defaults to 1.5):
        The same of the matchability-aware loss.
    class_cost (`float`, *optional*, defaults to 2):
        Weight of the classification in the matching.
    bbox_cost (`float`, *optional*, defaults to 5):
        Weight of the L1 distance of the boxes in the matching.
    giou_cost (`float`, *optional*, defaults to 2):
        Weight of the generalised IoU in the matching.
    class_loss_coefficient (`float`, *optional*, defaults to 1):
        Weight of the classification in the loss.
    bbox_loss_coefficient (`float`, *optional*, defaults to 5):
        Weight of the L1 distance of the boxes in the loss.
    giou_loss_coefficient (`float`, *optional*, defaults to 2):
        Weight of the generalised IoU in the loss.
    init_std (`float`, *optional*, defaults to 0.02):
        Standard deviation of the embeddings of a new model.

    Example:

    ```python
    >>> from deperceiver_hf import DePerceiverV2Config, DePerceiverV2ForObjectDetection

    >>> config = DePerceiverV2Config.from_preset("nano", num_labels=8)
    >>> model = DePerceiverV2ForObjectDetection(config)
    ```"""

    model_type = "deperceiver_v2"
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "auxiliary_outputs",
        "last_hidden_state",
        "intermediate_hidden_states",
        "intermediate_boxes",
        "selection_logits",
        "selection_boxes",
        "query_mask",
        "hidden_states",
        "attentions",
        "cross_attentions",
    ]
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "decoder_layers",
    }

    feature_strides: int | list[int] | tuple[int, ...] = (8, 16, 32)
    d_model: int = 256
    num_attention_heads: int = 8
    num_queries: int = 300
    decoder_layers: int = 6
    widening_factor: int = 4
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    query_selection: bool = True
    position_bias: bool = True
    read_offsets: bool = True
    share_key_values: bool = False
    num_denoising_queries: int = 100
    label_noise_ratio: float | int = 0.25
    box_noise_scale: float | int = 1.0
    classification_loss: Literal["focal", "varifocal", "mal"] = "mal"
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    mal_gamma: float | int = 1.5
    class_cost: float | int = 2
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    class_loss_coefficient: float | int = 1
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    init_std: float = 0.02

    def __post_init__(self, **kwargs):
        for name, built in REMOVED_FIELDS.items():
            value = kwargs.pop(name, built)
            if value != built:
                raise ValueError(
                    f"`{name}` no longer exists: models are built as with {built!r}, but this configuration has "
                    f"{value!r}. Version 0.2.0 of deperceiver_hf can build such a model."
                )
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "DePerceiverV2Config":
        """Configuration of a named size.

        Args:
            name: `"nano"` (trains on a CPU in minutes), `"small"` (ResNet-18), `"base"` (ResNet-50) or `"large"`
                (ResNet-50, with tokens of stride 4 too).
            overrides: Other fields, or other values of the same ones.

        Raises:
            ValueError: There is no such size.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; choose from {', '.join(PRESETS)}.")
        fields = {**PRESETS[name], **overrides}
        if "backbone_config" in overrides and "backbone" not in overrides:
            del fields["backbone"]
        return cls(**fields)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "DePerceiverV2Config":
        """There is no text part; without this, `decoder_layers` would be taken for the size of one."""
        return self

    def check_architecture(self) -> None:
        super().check_architecture()
        self.require_at_least(1, "d_model", "num_attention_heads", "num_queries", "decoder_layers", "widening_factor")
        self.require_at_least(
            0,
            *("num_denoising_queries", "box_noise_scale", "focal_gamma", "mal_gamma"),
            *("class_cost", "bbox_cost", "giou_cost"),
            *("class_loss_coefficient", "bbox_loss_coefficient", "giou_loss_coefficient"),
        )
        self.require_dropouts("dropout", "attention_dropout")
        self.require_matching_costs()
        for name in ("label_noise_ratio", "focal_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], not {getattr(self, name)}.")
        if self.d_model % 4 or self.d_model % self.num_attention_heads:
            raise ValueError(
                f"`d_model` ({self.d_model}) must be a multiple of 4, as positions take a sine and a cosine for each "
                f"of two axes, and of `num_attention_heads` ({self.num_attention_heads})."
            )


__all__ = ["DePerceiverV2Config"]
