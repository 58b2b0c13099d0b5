# SPDX-License-Identifier: Apache-2.0
"""DePerceiver: DETR with its transformer replaced by a Perceiver IO.

Li & Kannan 2021, "DePerceiver: Improving Small Object Detection in DETR"; Jaegle et al. 2021, "Perceiver IO: A General
Architecture for Structured Inputs & Outputs" (https://arxiv.org/abs/2107.14795); Carion et al. 2020, "End-to-End
Object Detection with Transformers" (https://arxiv.org/abs/2005.12872).

    image -> backbone -> tokens -> encoder (latents read the tokens, then talk among themselves)
          -> decoder (object queries read the latents) -> classes and boxes

Shapes: B images, N tokens, M latents, Q object queries, C classes, D channels. Reading the tokens costs O(M N);
nothing else depends on N, so the cost is linear in the number of pixels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_deperceiver import DePerceiverAttention, DePerceiverBoxPredictor
from .backbone_deperceiver import DePerceiverBackbone, initialize_frozen_parts, require_images
from .configuration_deperceiver import DePerceiverConfig
from .layers_deperceiver import (
    DePerceiverCrossAttentionLayer,
    DePerceiverDecoderLayer,
    DePerceiverInputAdapter,
    DePerceiverSelfAttentionLayer,
)
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
    intermediate_hidden_states (`torch.Tensor` of shape `(layers, batch_size, num_queries, d_model)`, *optional*):
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
    intermediate_hidden_states (`torch.Tensor` of shape `(layers, batch_size, num_queries, d_model)`, *optional*):
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
        Unweighted terms `loss_ce`, `loss_bbox`, `loss_giou` of the last decoder layer, the same with `_0`, `_1`, ...
        for the earlier ones, and for logging `class_error` (percent) and `cardinality_error` (objects per image).
    logits (`torch.Tensor` of shape `(batch_size, num_queries, num_labels + 1)`):
        Class logits; the last class is "no object".
    pred_boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`):
        Boxes as (center x, center y, width, height) in [0, 1] of the un-padded image.
    auxiliary_outputs (`list[dict[str, torch.Tensor]]`, *optional*):
        `logits` and `pred_boxes` of every decoder layer but the last, when `config.auxiliary_loss` is set.
    last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`):
        Object queries after the decoder.
    intermediate_hidden_states (`torch.Tensor` of shape `(layers, batch_size, num_queries, d_model)`, *optional*):
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
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As in every model; then every part that has a `start` of its own (it holds no parameters itself, so that
        `_init_weights` is not called for it); then what is frozen in the backbone."""
        super().initialize_weights()
        for module in self.modules():
            if hasattr(module, "start"):
                module.start()
        initialize_frozen_parts(self)


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
            config,
            config.d_latents,
            config.d_model,
            query_residual=True,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
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
        self.norm: Any = nn.LayerNorm(config.d_model) if self.layered else None
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
        require_images(pixel_values, pixel_mask, self.config.num_channels)
        tokens, token_mask = self.input_adapter(self.backbone(pixel_values, pixel_mask))
        encoded = self.encoder(tokens, token_mask, **kwargs)
        latents = encoded.last_hidden_state
        query_index = torch.arange(self.config.num_queries, device=latents.device)
        queries = self.query_embedding(query_index).expand(latents.shape[0], -1, -1)
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
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):  # whole boxes need the mantissa
            states = hidden_states.to(self.bbox_predictor.layers[0].weight.dtype)
            pred_boxes = self.bbox_predictor(states).sigmoid()  # (layers, B, Q, 4)

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


# `pipeline("object-detection")` logs an error for any class name that is not in these tables. They are entered here
# and not in the package, so that a model loaded by `trust_remote_code` is known, too.
MODEL_MAPPING_NAMES[DePerceiverConfig.model_type] = DePerceiverModel.__name__
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[DePerceiverConfig.model_type] = DePerceiverForObjectDetection.__name__

__all__ = ["DePerceiverForObjectDetection", "DePerceiverModel", "DePerceiverPreTrainedModel"]
