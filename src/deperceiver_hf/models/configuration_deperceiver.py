# SPDX-License-Identifier: Apache-2.0
"""Configuration of DePerceiver (Li & Kannan 2021, "DePerceiver: Improving Small Object Detection in DETR")."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.utils import auto_docstring

from .configuration_backbone_deperceiver import DePerceiverBackboneConfig

LEVEL_EMBEDDING_DIM = 4  # channels that tell the feature levels apart when there are several


@auto_docstring(checkpoint="deperceiver-hf/deperceiver-r50-16")
@strict
class DePerceiverConfig(DePerceiverBackboneConfig):
    r"""
    backbone_config (`dict` or `PreTrainedConfig`, *optional*):
        Configuration of the convolutional backbone, any that `AutoBackbone` knows. Its `out_indices` or
        `out_features` must name one feature map per entry of `feature_strides`. By default timm's ResNet-50 with
        the maps that `feature_strides` asks for; the keyword `backbone="resnet18"` is a shorthand for another timm
        model. Weights are never downloaded from here: see [`~deperceiver_hf.create_model`].
    num_channels (`int`, *optional*, defaults to 3):
        Number of input channels.
    freeze_batch_norm (`bool`, *optional*, defaults to `True`):
        Replace the backbone's batch normalisation by a fixed affine map (statistics, scale and shift do not change).
    frozen_backbone_stages (`int`, *optional*, defaults to 1):
        How much of the backbone is not trained: -1 nothing, 0 the stem, 1 the stem and the first stage, and so on.
        Applies to backbones with stages named `layer1`... (ResNets of timm) or `stages.0`...
    freeze_backbone (`bool`, *optional*, defaults to `False`):
        Train no parameter of the backbone.
    mask_padding (`bool`, *optional*, defaults to `True`):
        Keep what is padding in `pixel_mask` at zero all the way through the backbone, so that a prediction does not
        depend on what an image is padded to: exactly for ResNets (but timm's `resnetv2`) and others without global
        pooling whose strided layers round up; close to it elsewhere. `False` is the original's behaviour, in which
        image borders depend on it.
    dilation (`bool`, *optional*, defaults to `False`):
        Replace the stride of the backbone's last stage by dilation ("DC5"); the map called 32 in `feature_strides`
        then has 16 pixels per cell. timm backbones only.
    feature_strides (`int` or `list[int]`, *optional*, defaults to 32):
        Stride of the feature map whose cells are the input tokens, 4, 8, 16 or 32; a list of several ascending
        strides gives tokens of all these levels (the original's multi-scale model is `[8, 16, 32]`).
    position_embedding_type (`str`, *optional*, defaults to `"sine"`):
        `"sine"` (DETR's normalised 2-D encoding) or `"learned"` (one embedding per row and per column).
    num_position_embeddings (`int`, *optional*, defaults to 50):
        Rows and columns in the tables of learned positions: the largest feature map that the model takes.
    num_latents (`int`, *optional*, defaults to 1024):
        Length of the latent array.
    d_latents (`int`, *optional*, defaults to 256):
        Width of the latent array.
    d_model (`int`, *optional*, defaults to 256):
        Width of the input tokens and of the object queries.
    num_blocks (`int`, *optional*, defaults to 3):
        Passes of the latents through the one stack of self-attention layers (the passes share its weights).
    num_self_attends_per_block (`int`, *optional*, defaults to 6):
        Self-attention layers in that stack.
    num_self_attention_heads (`int`, *optional*, defaults to 8):
        Heads of the self-attention among latents.
    num_decoder_self_attention_heads (`int`, *optional*, defaults to 1):
        Heads of the self-attention among object queries in the `"layered"` decoder.
    num_cross_attention_heads (`int`, *optional*, defaults to 1):
        Heads of every cross-attention.
    self_attention_widening_factor (`int`, *optional*, defaults to 1):
        Hidden width of the MLP after self-attention, relative to its input.
    cross_attention_widening_factor (`int`, *optional*, defaults to 1):
        Hidden width of the MLP after cross-attention, relative to its input.
    dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the output of every attention and MLP of the encoder, in [0, 1).
    attention_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the attention weights of the encoder, in [0, 1).
    decoder_dropout (`float`, *optional*):
        Dropout on the output of cross-attention and MLP in the decoder, in [0, 1). Unless given 0.1 for the
        `"layered"` decoder, as in the original, and `dropout` for the `"cross_attention"` decoder.
    decoder_attention_dropout (`float`, *optional*):
        Dropout on the weights of the self-attention among queries in the `"layered"` decoder, in [0, 1). Unless given
        0.1, as in the original.
    decoder_type (`str`, *optional*, defaults to `"cross_attention"`):
        `"cross_attention"`: the queries read the latents once (original `--no_aux_loss`). `"layered"`:
        `decoder_layers` times self-attention among the queries and a reading of the latents.
    decoder_layers (`int`, *optional*, defaults to 3):
        Layers of the `"layered"` decoder.
    auxiliary_loss (`bool`, *optional*):
        Apply heads and loss to every decoder layer. `True` by default for the `"layered"` decoder; the
        `"cross_attention"` decoder has a single output and refuses it.
    num_queries (`int`, *optional*, defaults to 100):
        Number of object queries: the most objects that can be found in an image.
    class_cost (`float`, *optional*, defaults to 1):
        Weight of the class probability in the matching.
    bbox_cost (`float`, *optional*, defaults to 5):
        Weight of the L1 distance of the boxes in the matching.
    giou_cost (`float`, *optional*, defaults to 2):
        Weight of the generalised IoU in the matching.
    class_loss_coefficient (`float`, *optional*, defaults to 1):
        Weight of the cross entropy in the loss.
    bbox_loss_coefficient (`float`, *optional*, defaults to 5):
        Weight of the L1 distance of the boxes in the loss.
    giou_loss_coefficient (`float`, *optional*, defaults to 2):
        Weight of the generalised IoU in the loss.
    eos_coefficient (`float`, *optional*, defaults to 0.1):
        Weight of the no-object class in the cross entropy.
    init_std (`float`, *optional*, defaults to 0.02):
        Standard deviation of the latents and embeddings of a new model.

    Example:

    ```python
    >>> from deperceiver_hf import DePerceiverConfig, DePerceiverForObjectDetection

    >>> config = DePerceiverConfig(feature_strides=16, num_latents=2048, num_labels=80)
    >>> model = DePerceiverForObjectDetection(config)
    ```"""

    model_type = "deperceiver"
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "auxiliary_outputs",
        "last_hidden_state",
        "intermediate_hidden_states",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "encoder_cross_attentions",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
    ]
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "num_self_attention_heads",
        "num_hidden_layers": "num_encoder_layers",
    }

    position_embedding_type: Literal["sine", "learned"] = "sine"
    num_position_embeddings: int = 50
    num_latents: int = 1024
    d_latents: int = 256
    d_model: int = 256
    num_blocks: int = 3
    num_self_attends_per_block: int = 6
    num_self_attention_heads: int = 8
    num_decoder_self_attention_heads: int = 1
    num_cross_attention_heads: int = 1
    self_attention_widening_factor: int = 1
    cross_attention_widening_factor: int = 1
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    decoder_dropout: float | int | None = None
    decoder_attention_dropout: float | int | None = None
    decoder_type: Literal["cross_attention", "layered"] = "cross_attention"
    decoder_layers: int = 3
    auxiliary_loss: bool | None = None
    num_queries: int = 100
    class_cost: float | int = 1
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    class_loss_coefficient: float | int = 1
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    eos_coefficient: float | int = 0.1
    init_std: float = 0.02
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        for name in ("num_hidden_layers", "num_encoder_layers"):
            if name in kwargs:
                raise ValueError(f"`{name}` follows from `num_blocks` and `num_self_attends_per_block`: set those.")
        if self.decoder_dropout is None:
            self.decoder_dropout = 0.1 if self.decoder_type == "layered" else self.dropout
        if self.decoder_attention_dropout is None:
            self.decoder_attention_dropout = 0.1 if self.decoder_type == "layered" else 0.0
        if self.auxiliary_loss is None:
            self.auxiliary_loss = self.decoder_type == "layered"
        super().__post_init__(**kwargs)

    @property
    def num_encoder_layers(self) -> int:
        """Self-attention layers that the latents pass through, each shared layer counted once per block."""
        return self.num_blocks * self.num_self_attends_per_block

    @property
    def token_dim(self) -> int:
        """Channels of projected features and positions; with several levels a level embedding takes up the rest."""
        return self.d_model if self.num_feature_levels == 1 else self.d_model - LEVEL_EMBEDDING_DIM

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "DePerceiverConfig":
        """There is no text part; without this, `decoder_layers` would be taken for the size of one."""
        return self

    def check_architecture(self) -> None:
        super().check_architecture()
        self.require_at_least(
            1,
            *("num_position_embeddings", "num_latents", "d_latents", "d_model", "num_blocks"),
            *("num_self_attends_per_block", "num_self_attention_heads", "num_decoder_self_attention_heads"),
            *("num_cross_attention_heads", "self_attention_widening_factor", "cross_attention_widening_factor"),
            *("decoder_layers", "num_queries"),
        )
        self.require_dropouts("dropout", "attention_dropout", "decoder_dropout", "decoder_attention_dropout")
        self.require_at_least(
            0,
            *("class_cost", "bbox_cost", "giou_cost", "class_loss_coefficient", "bbox_loss_coefficient"),
            *("giou_loss_coefficient", "eos_coefficient"),
        )
        self.require_matching_costs()
        for width, heads, why in (
            ("d_latents", "num_self_attention_heads", "self-attention of the latents"),
            ("d_latents", "num_cross_attention_heads", "reading of the tokens by the latents"),
            ("d_model", "num_cross_attention_heads", "reading of the latents by the queries"),
            ("d_model", "num_decoder_self_attention_heads", "self-attention of the queries"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"`{width}` ({getattr(self, width)}) must be divisible by `{heads}` ({getattr(self, heads)}) for "
                    f"the {why}."
                )
        if self.token_dim < 4 or self.token_dim % 4:
            levels = f" less {LEVEL_EMBEDDING_DIM} for the level embedding" if self.num_feature_levels > 1 else ""
            raise ValueError(
                f"`d_model` ({self.d_model}){levels} must be a positive multiple of 4, as positions take a sine and a "
                f"cosine for each of two axes."
            )
        if self.auxiliary_loss and self.decoder_type != "layered":
            raise ValueError(
                "`auxiliary_loss=True` needs `decoder_type='layered'`: the 'cross_attention' decoder has one output."
            )
        if self.decoder_attention_dropout and self.decoder_type != "layered":
            raise ValueError(
                "`decoder_attention_dropout` needs `decoder_type='layered'`: the 'cross_attention' decoder has no "
                "self-attention. Its own dropout is `decoder_dropout`."
            )


__all__ = ["DePerceiverConfig"]
