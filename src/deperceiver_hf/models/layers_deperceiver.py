# SPDX-License-Identifier: Apache-2.0
"""Layers of a Perceiver IO (Jaegle et al. 2021, https://arxiv.org/abs/2107.14795): attention and MLP as DePerceiver
pairs them, and the adapter that makes its tokens of feature maps.

Shapes: B images, N tokens, Q queries, K keys, M latents, D channels; (h, w) cells of a feature map.
"""

import torch
from einops import rearrange
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_deperceiver import DePerceiverAttention, DePerceiverMLP, DePerceiverSinePositionEmbedding
from .configuration_deperceiver import LEVEL_EMBEDDING_DIM, DePerceiverConfig


class DePerceiverCrossAttentionLayer(GradientCheckpointingLayer):
    """Queries read another array (pre-norm on both), followed by an MLP.

    Args:
        config (`DePerceiverConfig`): Gives heads and widening factor.
        query_dim (`int`): Width of the queries.
        key_value_dim (`int`): Width of the array that is read.
        query_residual (`bool`): Add the queries to what was read (the encoder does, the decoder does not).
        dropout (`float`): Dropout on the output of attention and MLP.
        attention_dropout (`float`): Dropout on the attention weights.
    """

    def __init__(
        self,
        config: DePerceiverConfig,
        query_dim: int,
        key_value_dim: int,
        *,
        query_residual: bool,
        dropout: float,
        attention_dropout: float,
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
        self.dropout = nn.Dropout(dropout)

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
        self.self_attention = None
        if config.decoder_type == "layered":
            self.self_attention = DePerceiverAttention(
                config, dim, dim, config.num_decoder_self_attention_heads, config.decoder_attention_dropout or 0.0
            )
            self.self_attention_norm = nn.LayerNorm(dim)
        self.cross_attention = DePerceiverCrossAttentionLayer(
            config,
            dim,
            config.d_latents,
            query_residual=False,
            dropout=config.decoder_dropout or 0.0,
            attention_dropout=0.0,
        )

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
            hidden_states = self.self_attention_norm(hidden_states + attended)
        return self.cross_attention(hidden_states, latents, query_positions, **kwargs)


class DePerceiverLearnedPositionEmbedding(nn.Module):
    """One learned embedding per column (first half of the channels) and per row.

    Args:
        embedding_dim (`int`): Channels, half for x (first) and half for y.
        num_positions (`int`): Rows and columns in the tables.

    Raises:
        ValueError: A feature map has more rows or columns than the tables.
    """

    def __init__(self, embedding_dim: int, num_positions: int):
        super().__init__()
        self.row_embedding = nn.Embedding(num_positions, embedding_dim // 2)
        self.column_embedding = nn.Embedding(num_positions, embedding_dim // 2)

    def start(self) -> None:
        """Uniform in [0, 1), as in the original."""
        init.uniform_(self.row_embedding.weight)
        init.uniform_(self.column_embedding.weight)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Encoding `(1, embedding_dim, h, w)` for a feature map `(B, channels, h, w)`; the mask plays no part."""
        height, width = features.shape[-2:]
        if max(height, width) > self.row_embedding.num_embeddings:
            raise ValueError(
                f"a feature map of {height} x {width} cells has no learned positions beyond "
                f"{self.row_embedding.num_embeddings}: use smaller images, `position_embedding_type='sine'`, or train "
                f"with a larger `num_position_embeddings`."
            )
        x = self.column_embedding(torch.arange(width, device=features.device))[None].expand(height, -1, -1)
        y = self.row_embedding(torch.arange(height, device=features.device))[:, None].expand(-1, width, -1)
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
        self, feature_maps: list[tuple[torch.Tensor, torch.Tensor | None]]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            feature_maps (`list[tuple[torch.Tensor, torch.Tensor | None]]`): Per level the features
                `(B, channels, h, w)` and the mask of their real cells `(B, h, w)`, if any cell is padding.

        Returns:
            Tokens `(B, N, d_model)` of all levels, and their mask `(B, N)` (1 = real) if the features have one.
        """
        tokens, masks = [], []
        for level, ((features, mask), projection) in enumerate(zip(feature_maps, self.projections, strict=True)):
            if mask is not None:
                masks.append(mask.flatten(1))
            projected = projection(features)
            level_tokens = rearrange(projected + self.position_embedding(projected, mask), "b d h w -> b (h w) d")
            if self.level_embedding is not None:
                embedding = self.level_embedding(torch.full(level_tokens.shape[:2], level, device=features.device))
                level_tokens = torch.cat((level_tokens, embedding.to(level_tokens.dtype)), dim=-1)
            tokens.append(level_tokens)
        return torch.cat(tokens, dim=1), torch.cat(masks, dim=1) if masks else None
