# SPDX-License-Identifier: Apache-2.0
"""DePerceiver: DETR with its transformer replaced by a Perceiver IO.

Li & Kannan 2021, "DePerceiver: Improving Small Object Detection in DETR"; Jaegle et al. 2021, "Perceiver IO: A General
Architecture for Structured Inputs & Outputs" (https://arxiv.org/abs/2107.14795); Carion et al. 2020, "End-to-End Object
Detection with Transformers" (https://arxiv.org/abs/2005.12872).

    image -> backbone -> tokens -> encoder (latents read the tokens, then talk among themselves)
          -> decoder (object queries read the latents) -> classes and boxes

Shapes: B images, N tokens, M latents, Q object queries, C classes, D channels. Reading the tokens costs O(M N); nothing
else depends on N, so the cost is linear in the number of pixels.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn
from transformers import AutoBackbone
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_deperceiver import LEVEL_EMBEDDING_DIM, DePerceiverConfig
from .loss_deperceiver import set_prediction_loss


@auto_docstring(custom_intro="Output of the DePerceiver encoder: the latent array after it has read the tokens.")
@dataclass
class DePerceiverEncoderOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(batch_size, num_latents, d_latents)`):
        The latents.
    hidden_states (`tuple(torch.Tensor)`, *optional*):
        Latents before the first and after every self-attention layer: `num_blocks * num_self_attends_per_block + 1`.
    attentions (`tuple(torch.Tensor)`, *optional*):
        Weights of every self-attention, `(batch_size, num_self_attention_heads, num_latents, num_latents)`.
    cross_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights with which the latents read the tokens, one of `(batch_size, num_cross_attention_heads, num_latents,
        num_tokens)`.
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring(custom_intro="Output of the DePerceiver decoder: the object queries after they have read the latents.")
@dataclass
class DePerceiverDecoderOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`):
        Output of the last decoder layer.
    intermediate_hidden_states (`torch.Tensor` of shape `(decoder_layers, batch_size, num_queries, d_model)`, *optional*):
        Output of every decoder layer, when `config.auxiliary_loss` is set.
    hidden_states (`tuple(torch.Tensor)`, *optional*):
        Queries before the first and after every layer.
    attentions (`tuple(torch.Tensor)`, *optional*):
        Weights of every self-attention among queries, `(batch_size, num_decoder_self_attention_heads, num_queries,
        num_queries)`; empty for the `"cross_attention"` decoder.
    cross_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights with which the queries read the latents, `(batch_size, num_cross_attention_heads, num_queries,
        num_latents)`.
    """

    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring(custom_intro="Output of [`DePerceiverModel`].")
@dataclass
class DePerceiverModelOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`):
        Object queries after the decoder.
    intermediate_hidden_states (`torch.Tensor` of shape `(decoder_layers, batch_size, num_queries, d_model)`, *optional*):
        Object queries after every decoder layer, when `config.auxiliary_loss` is set.
    encoder_last_hidden_state (`torch.Tensor` of shape `(batch_size, num_latents, d_latents)`):
        The latents.
    decoder_hidden_states (`tuple(torch.Tensor)`, *optional*):
        Queries before the first and after every decoder layer.
    decoder_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights of the self-attention among queries.
    cross_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights with which the queries read the latents.
    encoder_hidden_states (`tuple(torch.Tensor)`, *optional*):
        Latents before the first and after every self-attention layer.
    encoder_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights of the self-attention among latents.
    encoder_cross_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights with which the latents read the tokens.
    """

    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_cross_attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring(custom_intro="Output of [`DePerceiverForObjectDetection`].")
@dataclass
class DePerceiverObjectDetectionOutput(ModelOutput):
    r"""
    loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` are given):
        Weighted sum of the terms of `loss_dict`, over all decoder layers.
    loss_dict (`dict[str, torch.Tensor]`, *optional*, returned when `labels` are given):
        Unweighted terms `loss_ce`, `loss_bbox`, `loss_giou` of the last decoder layer, the same with `_0`, `_1`, ... for
        the earlier ones, and for logging `class_error` (percent) and `cardinality_error` (objects per image).
    logits (`torch.Tensor` of shape `(batch_size, num_queries, num_labels + 1)`):
        Class logits; the last class is "no object".
    pred_boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`):
        Boxes as (center x, center y, width, height) in [0, 1] of the un-padded image.
    auxiliary_outputs (`list[dict[str, torch.Tensor]]`, *optional*):
        `logits` and `pred_boxes` of every decoder layer but the last, when `config.auxiliary_loss` is set.
    last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`):
        Object queries after the decoder.
    intermediate_hidden_states (`torch.Tensor` of shape `(decoder_layers, batch_size, num_queries, d_model)`, *optional*):
        Object queries after every decoder layer, when `config.auxiliary_loss` is set.
    encoder_last_hidden_state (`torch.Tensor` of shape `(batch_size, num_latents, d_latents)`):
        The latents.
    decoder_hidden_states (`tuple(torch.Tensor)`, *optional*):
        Queries before the first and after every decoder layer.
    decoder_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights of the self-attention among queries.
    cross_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights with which the queries read the latents.
    encoder_hidden_states (`tuple(torch.Tensor)`, *optional*):
        Latents before the first and after every self-attention layer.
    encoder_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights of the self-attention among latents.
    encoder_cross_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights with which the latents read the tokens.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None
    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_cross_attentions: tuple[torch.Tensor, ...] | None = None


class DePerceiverFrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and affine map, as one fused kernel that autocast leaves in half precision.

    Args:
        num_features (`int`): Number of channels.
        eps (`float`): Added to the variance.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def freeze_batch_norms(module: nn.Module) -> None:
    """Replace every `BatchNorm2d` inside `module` by a [`DePerceiverFrozenBatchNorm2d`], in place.

    Statistics are taken over. The affine map is, too, except where every scale is 0: that is how residual branches
    of a new ResNet start, and frozen they would stay shut.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = DePerceiverFrozenBatchNorm2d(child.num_features, child.eps).to(child.weight)
            if child.weight.device.type != "meta" and child.weight.any():
                frozen.load_state_dict(child.state_dict(), strict=False)
            # timm's BatchNormAct2d carries the activation that follows.
            activation = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
            setattr(module, name, nn.Sequential(frozen, *activation) if activation else frozen)
        else:
            freeze_batch_norms(child)


def backbone_stage(parameter_name: str) -> int | None:
    """Stage that a backbone's parameter belongs to, counted from 1, or `None` for the stem and whatever is in no stage.

    Knows the names of timm (`layer1.…`, `stages.0.…`, `stages_0.…`, `blocks.0.…`) and of transformers (`stages.0.…`).
    """
    match = re.search(r"(?:^|\.)(layer|layers|stages?|blocks)[._]?(\d+)\.", parameter_name)
    if match is None:
        return None
    return int(match[2]) + (0 if match[1] == "layer" else 1)


class DePerceiverBackbone(nn.Module):
    """Feature maps of a convolutional backbone.

    Raises:
        ValueError: A map has not the stride that the config says.
    """

    def __init__(self, config: DePerceiverConfig):
        super().__init__()
        self.model = AutoBackbone.from_config(config.backbone_config)
        self.channels: list[int] = self.model.channels
        self.strides = [16 if config.dilation and stride == 32 else stride for stride in config.feature_strides]
        if config.freeze_batch_norm:
            freeze_batch_norms(self.model)
        self._freeze(config)

    def _freeze(self, config: DePerceiverConfig) -> None:
        seen_stages = False
        for name, parameter in self.model.named_parameters():
            stage = backbone_stage(name)
            seen_stages |= stage is not None
            # Outside of the stages there is the stem before them (stage 0) and at most a norm behind them.
            frozen = (stage or 0) <= config.frozen_backbone_stages and (stage is not None or not seen_stages)
            if frozen or config.freeze_backbone:
                parameter.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Map `(B, num_channels, H, W)` to one `(B, channels, H / stride, W / stride)` per feature level."""
        feature_maps = self.model(pixel_values).feature_maps
        for features, stride in zip(feature_maps, self.strides, strict=True):
            # A side shorter than the stride may still give a cell or two; a wrong stride is off by a factor.
            for pixels, cells in zip(pixel_values.shape[-2:], features.shape[-2:], strict=True):
                if cells > max(2, 1.5 * pixels / stride) or cells < 0.5 * pixels / stride:
                    raise ValueError(
                        f"the backbone turns {pixels} pixels into {cells} cells, which is not the stride of {stride} "
                        f"in `feature_strides`: make `backbone_config` return the feature maps of these strides."
                    )
        return list(feature_maps)


class DePerceiverSinePositionEmbedding(nn.Module):
    """DETR's two-dimensional sine encoding: positions run from 0 to 2 pi over the real (un-padded) part of each axis.

    Args:
        embedding_dim (`int`): Channels, half for y (first) and half for x.
        temperature (`float`): Ratio of the longest wavelength to the shortest.
    """

    def __init__(self, embedding_dim: int, temperature: float = 10000.0):
        super().__init__()
        self.axis_dim = embedding_dim // 2
        self.temperature = temperature

    def encode(self, positions: torch.Tensor) -> torch.Tensor:
        """Map positions in radians `(...)` to sines and cosines `(..., axis_dim)` of falling frequency, interleaved."""
        channel = torch.arange(0, self.axis_dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions[..., None] / self.temperature ** (channel / self.axis_dim)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(B, channels, h, w)`): Feature map that the encoding is for.
            mask (`torch.Tensor` of shape `(B, h, w)`, *optional*): 1 at real cells, 0 at padding.

        Returns:
            `torch.Tensor` of shape `(B or 1, embedding_dim, h, w)`.
        """
        height, width = features.shape[-2:]
        if mask is None:
            y = torch.arange(1, height + 1, dtype=torch.float32, device=features.device)
            x = torch.arange(1, width + 1, dtype=torch.float32, device=features.device)
            y = self.encode(y / (height + 1e-6) * 2 * math.pi)[None, :, None].expand(-1, -1, width, -1)
            x = self.encode(x / (width + 1e-6) * 2 * math.pi)[None, None].expand(-1, height, -1, -1)
        else:
            y, x = mask.cumsum(1, dtype=torch.float32), mask.cumsum(2, dtype=torch.float32)
            y = self.encode(y / (y[:, -1:] + 1e-6) * 2 * math.pi)
            x = self.encode(x / (x[:, :, -1:] + 1e-6) * 2 * math.pi)
        return rearrange(torch.cat((y, x), dim=-1), "b h w d -> b d h w").to(features.dtype)


class DePerceiverLearnedPositionEmbedding(nn.Module):
    """One learned embedding per column (first half of the channels) and per row.

    Args:
        embedding_dim (`int`): Channels, half for x (first) and half for y.
        num_positions (`int`): Rows and columns in the tables. Larger maps read them linearly interpolated.
    """

    def __init__(self, embedding_dim: int, num_positions: int):
        super().__init__()
        self.row_embedding = nn.Embedding(num_positions, embedding_dim // 2)
        self.column_embedding = nn.Embedding(num_positions, embedding_dim // 2)

    @staticmethod
    def read(table: torch.Tensor, length: int) -> torch.Tensor:
        """First `length` rows of a table `(num_positions, D)`, or all of them stretched to `length`."""
        if length <= table.shape[0]:
            return table[:length]
        stretched = nn.functional.interpolate(table.float().T[None], size=length, mode="linear", align_corners=True)
        return stretched[0].T.to(table.dtype)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Encoding `(1, embedding_dim, h, w)` for a feature map `(B, channels, h, w)`; the mask plays no part."""
        height, width = features.shape[-2:]
        x = self.read(self.column_embedding.weight, width)[None].expand(height, -1, -1)
        y = self.read(self.row_embedding.weight, height)[:, None].expand(-1, width, -1)
        return rearrange(torch.cat((x, y), dim=-1), "h w d -> 1 d h w").to(features.dtype)


class DePerceiverInputAdapter(nn.Module):
    """Turns feature maps into the tokens that the latents read: 1x1 convolution, plus position, plus level.

    With several levels each has its own convolution to `d_model - 4` channels, and a learned embedding of 4 channels
    per level is concatenated.
    """

    def __init__(self, config: DePerceiverConfig, channels: list[int]):
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(c, config.token_dim, kernel_size=1) for c in channels)
        self.level_embedding = None
        if config.num_feature_levels > 1:
            self.level_embedding = nn.Embedding(config.num_feature_levels, LEVEL_EMBEDDING_DIM)
        if config.position_embedding_type == "sine":
            self.position_embedding = DePerceiverSinePositionEmbedding(config.token_dim)
        else:
            self.position_embedding = DePerceiverLearnedPositionEmbedding(
                config.token_dim, config.num_position_embeddings
            )

    def forward(
        self, feature_maps: list[torch.Tensor], pixel_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            feature_maps (`list[torch.Tensor]`): One `(B, channels, h, w)` per level.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 at real pixels, 0 at padding.

        Returns:
            Tokens `(B, N, d_model)` of all levels, and their mask `(B, N)` (1 = real) if there is a `pixel_mask`.
        """
        tokens, masks = [], []
        for level, (features, projection) in enumerate(zip(feature_maps, self.projections, strict=True)):
            mask = None
            if pixel_mask is not None:
                mask = nn.functional.interpolate(pixel_mask[:, None].float(), size=features.shape[-2:])[:, 0] > 0.5
                masks.append(mask.flatten(1))
            projected = projection(features)
            level_tokens = rearrange(projected + self.position_embedding(projected, mask), "b d h w -> b (h w) d")
            if self.level_embedding is not None:
                embedding = self.level_embedding.weight[level].expand(*level_tokens.shape[:2], -1)
                level_tokens = torch.cat((level_tokens, embedding.to(level_tokens.dtype)), dim=-1)
            tokens.append(level_tokens)
        return torch.cat(tokens, dim=1), torch.cat(masks, dim=1) if masks else None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that returns its weights.

    Args:
        query (`torch.Tensor` of shape `(B, heads, Q, D)`), key, value (`(B, heads, K, D)`).
        attention_mask (`torch.Tensor` of shape `(B, 1, 1 or Q, K)`, *optional*): Boolean (`True` = read) or added.

    Returns:
        Output `(B, Q, heads, D)` and weights `(B, heads, Q, K)`.
    """
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DePerceiverAttention(nn.Module):
    """Multi-head attention of queries `(B, Q, query_dim)` over keys and values `(B, K, key_value_dim)`."""

    def __init__(
        self, config: DePerceiverConfig, query_dim: int, key_value_dim: int, num_heads: int, attention_dropout: float
    ):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = (query_dim // num_heads) ** -0.5
        self.attention_dropout = attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(query_dim, query_dim)
        self.k_proj = nn.Linear(key_value_dim, query_dim)
        self.v_proj = nn.Linear(key_value_dim, query_dim)
        self.o_proj = nn.Linear(query_dim, query_dim)

    def forward(
        self,
        queries: torch.Tensor,
        key_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output `(B, Q, query_dim)` and, where the backend gives them, the weights `(B, heads, Q, K)`."""
        query, key, value = (
            rearrange(states, "b n (heads d) -> b heads n d", heads=self.num_heads)
            for states in (self.q_proj(queries), self.k_proj(key_values), self.v_proj(key_values))
        )
        # Fused kernels never hold the weights, so asking for them takes the eager path.
        implementation = "eager" if kwargs.get("output_attentions") else self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(rearrange(output, "b n heads d -> b n (heads d)")), weights


class DePerceiverMLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, widening_factor: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * widening_factor)
        self.activation = ACT2FN["gelu"]
        self.fc2 = nn.Linear(dim * widening_factor, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class DePerceiverCrossAttentionLayer(GradientCheckpointingLayer):
    """Queries read another array (pre-norm on both), followed by an MLP.

    Args:
        config (`DePerceiverConfig`): Gives heads, widening factor and dropout.
        query_dim (`int`): Width of the queries.
        key_value_dim (`int`): Width of the array that is read.
        attention_dropout (`float`): Dropout on the attention weights.
        query_residual (`bool`): Add the queries to what was read (the encoder does, the decoder does not).
    """

    def __init__(
        self,
        config: DePerceiverConfig,
        query_dim: int,
        key_value_dim: int,
        attention_dropout: float,
        query_residual: bool,
    ):
        super().__init__()
        self.query_residual = query_residual
        self.query_norm = nn.LayerNorm(query_dim)
        self.key_value_norm = nn.LayerNorm(key_value_dim)
        self.attention = DePerceiverAttention(
            config, query_dim, key_value_dim, config.num_cross_attention_heads, attention_dropout
        )
        self.mlp_norm = nn.LayerNorm(query_dim)
        self.mlp = DePerceiverMLP(query_dim, config.cross_attention_widening_factor)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_values: torch.Tensor,
        query_positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, Q, query_dim)`): Queries.
            key_values (`torch.Tensor` of shape `(B, K, key_value_dim)`): What they read.
            query_positions (`torch.Tensor` of shape `(B, Q, query_dim)`, *optional*): Added to the queries.
            attention_mask (`torch.Tensor` of shape `(B, 1, 1 or Q, K)`, *optional*): Hides keys.

        Returns:
            `torch.Tensor` of shape `(B, Q, query_dim)`.
        """
        queries = hidden_states if query_positions is None else hidden_states + query_positions
        attended, _ = self.attention(
            self.query_norm(queries), self.key_value_norm(key_values), attention_mask=attention_mask, **kwargs
        )
        attended = self.dropout(attended)
        hidden_states = hidden_states + attended if self.query_residual else attended
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class DePerceiverSelfAttentionLayer(GradientCheckpointingLayer):
    """Pre-norm self-attention among the latents, followed by an MLP."""

    def __init__(self, config: DePerceiverConfig):
        super().__init__()
        dim = config.d_latents
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = DePerceiverAttention(
            config, dim, dim, config.num_self_attention_heads, config.attention_dropout
        )
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = DePerceiverMLP(dim, config.self_attention_widening_factor)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """Map latents `(B, M, d_latents)` to the same shape."""
        normed = self.attention_norm(hidden_states)
        attended, _ = self.attention(normed, normed, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class DePerceiverDecoderLayer(GradientCheckpointingLayer):
    """Object queries read the latents; in the `"layered"` decoder they attend to each other first."""

    def __init__(self, config: DePerceiverConfig):
        super().__init__()
        dim = config.d_model
        dropout = config.decoder_attention_dropout
        self.self_attention = None
        if config.decoder_type == "layered":
            self.self_attention = DePerceiverAttention(config, dim, dim, config.num_decoder_self_attention_heads, dropout)
            self.self_attention_norm = nn.LayerNorm(dim)
        self.cross_attention = DePerceiverCrossAttentionLayer(
            config, dim, config.d_latents, dropout, query_residual=False
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        latents: torch.Tensor,
        query_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, Q, d_model)`): Content of the queries.
            latents (`torch.Tensor` of shape `(B, M, d_latents)`): What they read.
            query_positions (`torch.Tensor` of shape `(B, Q, d_model)`, *optional*): Learned identity of each query.

        Returns:
            `torch.Tensor` of shape `(B, Q, d_model)`.
        """
        if self.self_attention is not None:
            # Unlike in DETR, the query positions are part of the values, too.
            queries = hidden_states + query_positions
            attended, _ = self.self_attention(queries, queries, **kwargs)
            hidden_states = self.self_attention_norm(hidden_states + self.dropout(attended))
        return self.cross_attention(hidden_states, latents, query_positions, **kwargs)


@auto_docstring
class DePerceiverPreTrainedModel(PreTrainedModel):
    config: DePerceiverConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = [  # noqa: RUF012
        "DePerceiverBackbone",
        "DePerceiverInputAdapter",
        "DePerceiverCrossAttentionLayer",
        "DePerceiverSelfAttentionLayer",
        "DePerceiverDecoderLayer",
    ]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform linear maps as in DETR; latents, queries and learned positions as in the original."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, DePerceiverEncoder):
            init.normal_(module.latents, std=self.config.init_std)
        elif isinstance(module, DePerceiverBackbone):
            # The backbone initialises its own layers, but does not know this class.
            for norm in module.modules():
                if isinstance(norm, DePerceiverFrozenBatchNorm2d):
                    init.ones_(norm.weight)
                    init.zeros_(norm.bias)
                    init.zeros_(norm.running_mean)
                    init.ones_(norm.running_var)
        elif isinstance(module, DePerceiverLearnedPositionEmbedding):
            init.uniform_(module.row_embedding.weight)
            init.uniform_(module.column_embedding.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        else:
            super()._init_weights(module)


class DePerceiverEncoder(DePerceiverPreTrainedModel):
    """Perceiver IO encoder: learned latents read the tokens once, then pass `num_blocks` times through one stack of
    self-attention layers."""

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DePerceiverSelfAttentionLayer,
        "attentions": OutputRecorder(DePerceiverAttention, index=1, layer_name="layers"),
        "cross_attentions": OutputRecorder(DePerceiverAttention, index=1, layer_name="cross_attention"),
    }

    def __init__(self, config: DePerceiverConfig):
        super().__init__(config)
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.d_latents))
        self.cross_attention = DePerceiverCrossAttentionLayer(
            config, config.d_latents, config.d_model, config.attention_dropout, query_residual=True
        )
        self.layers = nn.ModuleList(
            DePerceiverSelfAttentionLayer(config) for _ in range(config.num_self_attends_per_block)
        )
        self.post_init()

    @capture_outputs
    def forward(
        self, tokens: torch.Tensor, token_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> DePerceiverEncoderOutput:
        r"""
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, d_model)`):
            Input array.
        token_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
            1 at real tokens, 0 at padding.
        """
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        attention_mask = None
        if token_mask is not None:
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=latents, attention_mask=token_mask, encoder_hidden_states=tokens
            )
        latents = self.cross_attention(latents, tokens, attention_mask=attention_mask, **kwargs)
        for _ in range(self.config.num_blocks):
            for layer in self.layers:
                latents = layer(latents, **kwargs)
        return DePerceiverEncoderOutput(last_hidden_state=latents)


class DePerceiverDecoder(DePerceiverPreTrainedModel):
    """Perceiver IO decoder: object queries read the latents, once or in several layers."""

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DePerceiverDecoderLayer,
        "attentions": OutputRecorder(DePerceiverAttention, index=1, layer_name="self_attention"),
        "cross_attentions": OutputRecorder(DePerceiverAttention, index=1, layer_name="cross_attention"),
    }

    def __init__(self, config: DePerceiverConfig):
        super().__init__(config)
        self.layered = config.decoder_type == "layered"
        num_layers = config.decoder_layers if self.layered else 1
        self.layers = nn.ModuleList(DePerceiverDecoderLayer(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.d_model) if self.layered else None
        self.post_init()

    @capture_outputs
    def forward(
        self, queries: torch.Tensor, latents: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> DePerceiverDecoderOutput:
        r"""
        queries (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`):
            Object queries.
        latents (`torch.Tensor` of shape `(batch_size, num_latents, d_latents)`):
            Output of the encoder.
        """
        if not self.layered:
            return DePerceiverDecoderOutput(last_hidden_state=self.layers[0](queries, latents, **kwargs))
        hidden_states, intermediate = torch.zeros_like(queries), []
        for layer in self.layers:
            hidden_states = layer(hidden_states, latents, queries, **kwargs)
            intermediate.append(self.norm(hidden_states))
        return DePerceiverDecoderOutput(
            last_hidden_state=intermediate[-1],
            intermediate_hidden_states=torch.stack(intermediate) if self.config.auxiliary_loss else None,
        )


@auto_docstring(custom_intro="DePerceiver without heads: from pixels to object queries that have read the image.")
class DePerceiverModel(DePerceiverPreTrainedModel):
    def __init__(self, config: DePerceiverConfig):
        super().__init__(config)
        config.check_architecture()
        self.backbone = DePerceiverBackbone(config)
        self.input_adapter = DePerceiverInputAdapter(config, self.backbone.channels)
        self.encoder = DePerceiverEncoder(config)
        self.query_embedding = nn.Embedding(config.num_queries, config.d_model)
        self.decoder = DePerceiverDecoder(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | DePerceiverModelOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from deperceiver_hf import DePerceiverConfig, DePerceiverModel

        >>> model = DePerceiverModel(DePerceiverConfig(backbone="resnet18", num_latents=128)).eval()
        >>> list(model(torch.rand(1, 3, 128, 160)).last_hidden_state.shape)
        [1, 100, 256]
        ```"""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"`pixel_values` must be (batch, {self.config.num_channels}, height, width), but is "
                f"{tuple(pixel_values.shape)}."
            )
        if pixel_mask is not None and pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[2:]):
            raise ValueError(
                f"`pixel_mask` must be (batch, height, width) of `pixel_values` {tuple(pixel_values.shape)}, but is "
                f"{tuple(pixel_mask.shape)}."
            )
        feature_maps = self.backbone(pixel_values)
        tokens, token_mask = self.input_adapter(feature_maps, pixel_mask)
        encoded = self.encoder(tokens, token_mask, **kwargs)
        latents = encoded.last_hidden_state
        queries = self.query_embedding.weight.expand(latents.shape[0], -1, -1)
        decoded = self.decoder(queries, latents, **kwargs)
        return DePerceiverModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            encoder_last_hidden_state=latents,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            encoder_cross_attentions=encoded.cross_attentions,
        )


class DePerceiverBoxPredictor(nn.Module):
    """Three-layer perceptron from a query to the logits of its box."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states).relu()
        return self.layers[-1](hidden_states)


@auto_docstring(custom_intro="DePerceiver with a class head and a box head on every object query.")
class DePerceiverForObjectDetection(DePerceiverPreTrainedModel):
    def __init__(self, config: DePerceiverConfig):
        super().__init__(config)
        self.model = DePerceiverModel(config)
        self.class_labels_classifier = nn.Linear(config.d_model, config.num_labels + 1)  # the last is "no object"
        self.bbox_predictor = DePerceiverBoxPredictor(config.d_model)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | DePerceiverObjectDetectionOutput:
        r"""
        labels (`list[dict[str, torch.Tensor]]`, *optional*):
            For every image `class_labels` `(num_objects,)`, integers in [0, num_labels), and `boxes`
            `(num_objects, 4)` as (center x, center y, width, height) in [0, 1] of the un-padded image.

        Example:

        ```python
        >>> import torch
        >>> from PIL import Image
        >>> from transformers import AutoImageProcessor
        >>> from deperceiver_hf import DePerceiverForObjectDetection

        >>> processor = AutoImageProcessor.from_pretrained("path/to/model")
        >>> model = DePerceiverForObjectDetection.from_pretrained("path/to/model").eval()
        >>> image = Image.open("photo.jpg")
        >>> with torch.inference_mode():
        ...     outputs = model(**processor(image, return_tensors="pt"))
        >>> detections = processor.post_process_object_detection(outputs, 0.5, target_sizes=[image.size[::-1]])[0]
        ```"""
        outputs = self.model(pixel_values, pixel_mask, **kwargs)
        hidden_states = outputs.intermediate_hidden_states
        if hidden_states is None:
            hidden_states = outputs.last_hidden_state[None]
        logits = self.class_labels_classifier(hidden_states)  # (layers, B, Q, num_labels + 1)
        pred_boxes = self.bbox_predictor(hidden_states).sigmoid()  # (layers, B, Q, 4)

        loss, loss_dict = None, None
        if labels is not None:
            loss, loss_dict = set_prediction_loss(logits, pred_boxes, labels, self.config)
        auxiliary_outputs = None
        if self.config.auxiliary_loss:
            auxiliary_outputs = [
                {"logits": layer_logits, "pred_boxes": layer_boxes}
                for layer_logits, layer_boxes in zip(logits[:-1], pred_boxes[:-1], strict=True)
            ]
        return DePerceiverObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits[-1],
            pred_boxes=pred_boxes[-1],
            auxiliary_outputs=auxiliary_outputs,
            **outputs,
        )


# `pipeline("object-detection")` logs an error for any class name that is not in this table. It is entered here and not
# in the package, so that a model loaded by `trust_remote_code` is known, too.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[DePerceiverConfig.model_type] = DePerceiverForObjectDetection.__name__

__all__ = ["DePerceiverForObjectDetection", "DePerceiverModel", "DePerceiverPreTrainedModel"]
