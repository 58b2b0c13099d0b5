# SPDX-License-Identifier: Apache-2.0
"""Configuration of DePerceiver v2, whose object queries are the latent array."""

import copy
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import auto_docstring

from .configuration_backbone_deperceiver import DePerceiverBackboneConfig
from .detector_features_deperceiver_v2 import detector_family

FIRST_EDITION = {
    "token_encoder": "none",
    "edge_votes": False,
    "box_steps": "logit",
    "classification_loss": "mal",
}
"""What a saved configuration means that does not say these fields: it is from before there was a choice."""

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        **FIRST_EDITION,  # in minutes from random weights it learns faster
        "backbone": "test_resnet",
        "d_model": 96,
        "num_attention_heads": 4,
        "num_queries": 60,
        "decoder_layers": 3,
        "share_key_values": True,
        "num_denoising_queries": 40,
    },
    "lite": {
        "backbone": "tf_efficientnet_lite0",
        "d_model": 128,
        "num_attention_heads": 4,
        "num_queries": 100,
        "decoder_layers": 3,
        "share_key_values": True,
        "num_denoising_queries": 40,
        "min_token_share": 0.25,
    },
    "small": {
        "backbone": "resnet18",
        "d_model": 128,
        "num_attention_heads": 4,
        "num_queries": 200,
        "decoder_layers": 3,
        "min_token_share": 0.25,
    },
    "base": {"backbone": "resnet50", "min_token_share": 0.25},
    "large": {
        "backbone": "resnet50",
        "feature_strides": [4, 8, 16, 32],
        "num_queries": 500,
        "min_token_share": 0.25,
    },
}
"""Sizes of the architecture, as fields that differ from the defaults of [`DePerceiverV2Config`]."""

REMOVED_FIELDS = {"num_context_latents": 0, "box_refinement": True, "selection_matches": 1}
"""Fields of configurations saved by version 0.2.0 that exist no more, with the only value that can still be built."""

LEFT_TO_THE_DETECTOR = {
    "freeze_batch_norm": False,
    "frozen_backbone_stages": -1,
    "mask_padding": False,
    "dilation": False,
}
"""Fields that say what the configuration of a detector says where the features come from one."""


class Dials(NamedTuple):
    """What a forward pass spends: see the fields of the same names in [`DePerceiverV2Config`]."""

    num_queries: int
    num_blocks: int
    token_share: float


@auto_docstring(checkpoint="deperceiver-hf/deperceiver-v2-base")
@strict
class DePerceiverV2Config(DePerceiverBackboneConfig):
    r"""
    backbone_config (`dict` or `PreTrainedConfig`, *optional*):
        Configuration of the convolutional backbone, any that `AutoBackbone` knows. Its `out_indices` or
        `out_features` must name one feature map per entry of `feature_strides`. By default timm's ResNet-50; the
        keyword `backbone="resnet18"` is a shorthand for another timm model. Weights are never downloaded from here:
        see [`~deperceiver_hf.create_model`]. With `token_encoder="detector"` the configuration of a detector.
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
        Strides of the feature maps whose cells are the tokens, any of 4, 8, 16 and 32, ascending; of a detector those
        of its encoder.
    token_encoder (`str`, *optional*, defaults to `"fusion"`):
        What mixes the feature maps before they become tokens. `"fusion"`: attention among the cells of the coarsest
        map, then convolutions from coarse to fine and back. `"none"`: nothing. `"detector"`: the encoder of another
        detector, whose configuration `backbone_config` is; see [`~DePerceiverV2Config.from_detector`].
    fusion_dim (`int`, *optional*, defaults to 128):
        Width of the maps inside of `"fusion"`, a multiple of 4 and of `num_attention_heads`.
    start_from (`dict`, *optional*):
        Where the weights of that detector are from: `name` and `license`. For the record only.
    d_model (`int`, *optional*, defaults to 256):
        Width of tokens and latents, a multiple of 4.
    num_attention_heads (`int`, *optional*, defaults to 8):
        Heads of every attention.
    num_queries (`int`, *optional*, defaults to 300):
        Number of object latents: the most objects that can be found in an image. With `query_selection`, a trained
        model takes any other number, `from_pretrained(..., num_queries=1000)`.
    decoder_layers (`int`, *optional*, defaults to 6):
        Number of blocks, each a self-attention among the latents, a reading of the tokens and an MLP.
    num_blocks (`int`, *optional*):
        Predict with the first so many blocks only, which costs less; each has heads of its own. By default all. In
        training all are trained.
    token_share (`float`, *optional*, defaults to 1.0):
        Share of the tokens that the blocks read, in (0, 1]: in every level but the coarsest those that lie nearest to
        what the selection takes for objects. In training see `min_token_share`.
    min_token_share (`float`, *optional*, defaults to 1.0):
        In training the share is drawn anew in every step, from here to 1; not where object latents are learned.
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
    edge_votes (`bool`, *optional*, defaults to `True`):
        Let every token vote for where the edges of its object are, and tell each object latent the mean votes that
        each head has read, instead of where; needs `read_offsets`.
    share_key_values (`bool`, *optional*, defaults to `False`):
        Compute keys and values of the tokens once for all blocks instead of once for each.
    box_steps (`str`, *optional*, defaults to `"relative"`):
        How a block corrects a box. `"relative"`: by a part of its sides. `"logit"`: in logits of its four numbers.
    num_denoising_queries (`int`, *optional*, defaults to 100):
        Denoising queries in training, about: as many pairs of a positive and a negative group of noised objects as
        this gives room for, at least one. Of more than `num_queries` objects in an image so many are drawn. 0 trains
        without.
    label_noise_ratio (`float`, *optional*, defaults to 0.25):
        Share of the denoising queries that are given a random class, in [0, 1].
    box_noise_scale (`float`, *optional*, defaults to 1.0):
        How far, in half sides of a box, the corners of negative denoising boxes are moved at most is twice this, of
        positive ones once.
    classification_loss (`str`, *optional*, defaults to `"varifocal"`):
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
    token_encoder: Literal["none", "fusion", "detector"] = "fusion"
    fusion_dim: int = 128
    start_from: dict | None = None
    d_model: int = 256
    num_attention_heads: int = 8
    num_queries: int = 300
    decoder_layers: int = 6
    num_blocks: int | None = None
    token_share: float | int = 1.0
    min_token_share: float | int = 1.0
    widening_factor: int = 4
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    query_selection: bool = True
    position_bias: bool = True
    read_offsets: bool = True
    edge_votes: bool = True
    share_key_values: bool = False
    box_steps: Literal["relative", "logit"] = "relative"
    num_denoising_queries: int = 100
    label_noise_ratio: float | int = 0.25
    box_noise_scale: float | int = 1.0
    classification_loss: Literal["focal", "varifocal", "mal"] = "varifocal"
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
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "DePerceiverV2Config":
        """As in every configuration; one that was saved by an earlier version means what it meant there."""
        return super().from_dict({**FIRST_EDITION, **config_dict}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> "DePerceiverV2Config":
        """The same of a file."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "DePerceiverV2Config":
        """Configuration of a named size.

        Args:
            name: `"nano"` (trains from nothing on a CPU in minutes), `"lite"` (EfficientNet-Lite0, for CPUs),
                `"small"` (ResNet-18), `"base"` (ResNet-50) or `"large"` (ResNet-50, with tokens of stride 4 and 500
                object latents).
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

    @classmethod
    def from_detector(cls, config: PreTrainedConfig, preset: str = "base", **overrides) -> "DePerceiverV2Config":
        """Configuration of a model on the backbone and encoder of another detector.

        What is frozen in the backbone, and whether its batch norms learn, is as `config` says. Its classes are not
        taken over: give `num_labels` or `id2label`.

        Args:
            config: Of the detector: an RT-DETR, RT-DETRv2, D-FINE, DEIMv2, LW-DETR, RF-DETR, Deformable DETR or DETR.
            preset: Size of all that follows, see [`~DePerceiverV2Config.from_preset`].
            overrides: Other fields, or other values of the same ones.

        Raises:
            ValueError: The detector is of another kind, or there is no such size.
        """
        strides = detector_family(config).strides(config)
        config = copy.deepcopy(config)
        config.num_labels = 1  # of heads that are not built
        for part in (config, config.backbone_config):
            part.dtype, part._name_or_path = None, ""  # of the file that it was read from
        fields = {"token_encoder": "detector", "feature_strides": strides, **LEFT_TO_THE_DETECTOR, **overrides}
        return cls.from_preset(preset, backbone_config=config, **fields)

    def resolve_backbone(self, name: str | None) -> dict | PreTrainedConfig:
        if self.token_encoder != "detector":
            return super().resolve_backbone(name)
        config = self.backbone_config
        if name is not None or config is None:
            raise ValueError('`token_encoder="detector"` needs the configuration of a detector as `backbone_config`.')
        if isinstance(config, dict):
            config = AutoConfig.for_model(**config)
        strides = detector_family(config).strides(config)
        if self.strides != strides:
            raise ValueError(
                f"the encoder of this {config.model_type} gives feature maps of strides {strides}, but "
                f"`feature_strides` is {self.strides}."
            )
        channels = getattr(config.backbone_config, "num_channels", self.num_channels)
        if channels != self.num_channels:
            raise ValueError(f"`num_channels` is {self.num_channels}, but that of `backbone_config` is {channels}.")
        return config

    def check_strides(self) -> None:
        if self.token_encoder != "detector":
            super().check_strides()
            return
        strides = self.strides
        if not strides or strides != sorted(set(strides)) or any(s < 1 or s % strides[0] for s in strides):
            raise ValueError(f"`feature_strides` must be ascending multiples of the first, not {strides}.")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "DePerceiverV2Config":
        """There is no text part; without this, `decoder_layers` would be taken for the size of one."""
        return self

    def check_architecture(self) -> None:
        super().check_architecture()
        if self.token_encoder == "detector":
            wrong = [
                f"`{name}` {value!r}" for name, value in LEFT_TO_THE_DETECTOR.items() if getattr(self, name) != value
            ]
            if wrong:
                raise ValueError(
                    f"the configuration of the detector decides what is frozen in it and how it sees padding: "
                    f"{' and '.join(wrong)} needed; `DePerceiverV2Config.from_detector` makes such a configuration."
                )
        self.require_at_least(1, "d_model", "num_attention_heads", "num_queries", "decoder_layers", "widening_factor")
        self.require_at_least(
            0,
            *("num_denoising_queries", "box_noise_scale", "focal_gamma", "mal_gamma"),
            *("class_cost", "bbox_cost", "giou_cost"),
            *("class_loss_coefficient", "bbox_loss_coefficient", "giou_loss_coefficient"),
        )
        if self.num_blocks is not None:
            self.require_at_least(1, "num_blocks")
        self.dials()
        if not 0 < self.min_token_share <= 1:
            raise ValueError(f"`min_token_share` must be more than 0 and at most 1, not {self.min_token_share}.")
        if self.token_encoder == "fusion":
            self._check_width("fusion_dim")
        if self.edge_votes and not self.read_offsets:
            raise ValueError("`edge_votes=True` needs `read_offsets=True`: the votes are what the latents are told.")
        self.require_dropouts("dropout", "attention_dropout")
        self.require_matching_costs()
        for name in ("label_noise_ratio", "focal_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], not {getattr(self, name)}.")
        self._check_width("d_model")

    def dials(
        self,
        num_queries: int | None = None,
        num_blocks: int | None = None,
        token_share: float | None = None,
        *,
        training: bool = False,
    ) -> Dials:
        """What a forward pass spends: what is asked for, or else what the configuration says.

        In training that is all blocks, and a share of the tokens drawn from `min_token_share` to 1.

        Raises:
            ValueError: Not possible with this model; names the field, its value and what it may be.
        """
        if training:
            blocks, share = self.decoder_layers, 1.0
            if self.min_token_share < 1 and self.query_selection:
                share = self.min_token_share + (1 - self.min_token_share) * torch.rand(()).item()
        else:
            blocks, share = self.num_blocks or self.decoder_layers, self.token_share
        dials = Dials(
            self.num_queries if num_queries is None else num_queries,
            blocks if num_blocks is None else num_blocks,
            share if token_share is None else token_share,
        )
        if not 1 <= dials.num_blocks <= self.decoder_layers:
            raise ValueError(
                f"`num_blocks` must be from 1 to the number of blocks, {self.decoder_layers}, not {dials.num_blocks}."
            )
        if dials.num_queries < 1:
            raise ValueError(f"`num_queries` must be at least 1, not {dials.num_queries}.")
        if not 0 < dials.token_share <= 1:
            raise ValueError(f"`token_share` must be more than 0 and at most 1, not {dials.token_share}.")
        if not self.query_selection and (dials.num_queries != self.num_queries or dials.token_share < 1):
            raise ValueError(
                f"`num_queries` ({dials.num_queries}) and `token_share` ({dials.token_share}) cannot be chosen with "
                f"`query_selection=False`: the {self.num_queries} object latents are learned, and no token is scored."
            )
        return dials

    def _check_width(self, name: str) -> None:
        width = getattr(self, name)
        if width < 1 or width % 4 or width % self.num_attention_heads:
            raise ValueError(
                f"`{name}` ({width}) must be a multiple of 4, as positions take a sine and a cosine for each of two "
                f"axes, and of `num_attention_heads` ({self.num_attention_heads})."
            )


__all__ = ["DePerceiverV2Config"]
