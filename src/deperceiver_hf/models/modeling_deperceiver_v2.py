# SPDX-License-Identifier: Apache-2.0
"""DePerceiver v2: a Perceiver whose latents are the objects.

    image -> backbone -> token encoder: maps of all strides fused -> tokens
          -> selection: the most promising tokens become object latents, each with a box
          -> pool: the share of the tokens that lies nearest to objects
          -> blocks: latents attend to each other, read these tokens (each head near the box), refine their boxes

The first architecture reads the objects out of anonymous latents at the end, once; positions of small objects do not
survive that. Here each latent is an object from the start and reads the high-resolution tokens again in every block.

Shapes: B images, N tokens, Q object latents, P denoising queries, C classes, D channels, L blocks.
Everything that depends on N costs O(N), whatever Q is; nothing costs N^2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_deperceiver import DePerceiverAttention, DePerceiverBoxPredictor
from .backbone_deperceiver import DePerceiverBackbone, initialize_frozen_parts, require_images
from .configuration_deperceiver_v2 import DePerceiverV2Config
from .denoising_deperceiver_v2 import DenoisingQueries, LatentArray, make_denoising_queries
from .detector_features_deperceiver_v2 import DePerceiverV2DetectorFeatures
from .layers_deperceiver_v2 import (
    DePerceiverV2Block,
    DePerceiverV2BoxPosition,
    DePerceiverV2CrossAttention,
    DePerceiverV2EdgeVotes,
    DePerceiverV2KeyValues,
    attention_dtype,
    place_tokens,
    wave_features,
)
from .loss_deperceiver_v2 import Predictions, detection_loss, prepare_targets
from .token_encoder_deperceiver_v2 import DePerceiverV2Fusion
from .tokens_deperceiver_v2 import (
    BOX_STEPS,
    PRIOR_LOGIT,
    DePerceiverV2InputAdapter,
    DePerceiverV2LearnedQueries,
    DePerceiverV2TokenSelector,
    TokenGeometry,
    locate_tokens,
    pool_tokens,
)

NO_OBJECT_LOGIT = -1e4  # of every class at a padding query (see `SelectedTokens`); within the range of float16


@auto_docstring(custom_intro="Output of [`DePerceiverV2Model`].")
@dataclass
class DePerceiverV2ModelOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`):
        Object latents after the last block.
    intermediate_hidden_states (`torch.Tensor` of shape `(batch_size, layers, num_queries, d_model)`):
        Object latents after every block.
    intermediate_boxes (`torch.Tensor` of shape `(batch_size, layers, num_queries, 4)`):
        Boxes after every block, (center x, center y, width, height) in [0, 1] of the un-padded image.
    selection_logits (`torch.Tensor` of shape `(batch_size, num_queries, num_labels)`, *optional*):
        Class logits of the tokens that the object latents were made from.
    selection_boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`):
        Boxes of the object latents before the first block.
    query_mask (`torch.Tensor` of shape `(batch_size, num_queries)`, *optional*):
        1 at queries, 0 at padding queries: a padded image has fewer tokens than the batch has object latents.
    denoising_hidden_states (`torch.Tensor` of shape `(batch_size, layers, num_denoising, d_model)`, *optional*):
        Denoising queries after every block.
    denoising_boxes (`torch.Tensor` of shape `(batch_size, layers, num_denoising, 4)`, *optional*):
        Their boxes.
    hidden_states (`tuple(torch.Tensor)`, *optional*):
        All latents before the first and after every block: denoising queries (in training), object latents.
    attentions (`tuple(torch.Tensor)`, *optional*):
        Weights of the self-attention among the latents, per block `(batch_size, num_attention_heads, num_latents,
        num_latents)`.
    cross_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights with which the latents read the tokens, per block `(batch_size, num_attention_heads, num_latents,
        num_tokens)`.
    """

    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    intermediate_boxes: torch.Tensor | None = None
    selection_logits: torch.Tensor | None = None
    selection_boxes: torch.Tensor | None = None
    query_mask: torch.Tensor | None = None
    denoising_hidden_states: torch.Tensor | None = None
    denoising_boxes: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring(custom_intro="Output of [`DePerceiverV2ForObjectDetection`].")
@dataclass
class DePerceiverV2ObjectDetectionOutput(ModelOutput):
    r"""
    loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` are given):
        Weighted sum of the terms of `loss_dict`.
    loss_dict (`dict[str, torch.Tensor]`, *optional*, returned when `labels` are given):
        Unweighted terms `loss_class`, `loss_bbox`, `loss_giou` of the last block, the same with `_0`, `_1`, ... for
        the earlier ones, with `_selection` for the selected tokens and `_denoising` for the denoising queries; and
        for logging `class_error` (percent).
    logits (`torch.Tensor` of shape `(batch_size, num_queries, num_labels)`):
        Class logits, each for a sigmoid.
    pred_boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`):
        Boxes as (center x, center y, width, height) in [0, 1] of the un-padded image.
    auxiliary_outputs (`list[dict[str, torch.Tensor]]`, *optional*, returned when `labels` are given):
        `logits` and `pred_boxes` of every block but the last.
    last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`):
        Object latents after the last block.
    intermediate_hidden_states (`torch.Tensor` of shape `(batch_size, layers, num_queries, d_model)`):
        Object latents after every block.
    intermediate_boxes (`torch.Tensor` of shape `(batch_size, layers, num_queries, 4)`):
        Boxes after every block.
    selection_logits (`torch.Tensor` of shape `(batch_size, num_queries, num_labels)`, *optional*):
        Class logits of the tokens that the object latents were made from.
    selection_boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`):
        Boxes of the object latents before the first block.
    query_mask (`torch.Tensor` of shape `(batch_size, num_queries)`, *optional*):
        1 at queries, 0 at padding queries: a padded image has fewer tokens than the batch has object latents.
    hidden_states (`tuple(torch.Tensor)`, *optional*):
        All latents before the first and after every block.
    attentions (`tuple(torch.Tensor)`, *optional*):
        Weights of the self-attention among the latents.
    cross_attentions (`tuple(torch.Tensor)`, *optional*):
        Weights with which the latents read the tokens.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None
    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    intermediate_boxes: torch.Tensor | None = None
    selection_logits: torch.Tensor | None = None
    selection_boxes: torch.Tensor | None = None
    query_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring
class DePerceiverV2PreTrainedModel(PreTrainedModel):
    config: DePerceiverV2Config
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = [  # noqa: RUF012
        "DePerceiverBackbone",
        "DePerceiverV2DetectorFeatures",
        "DePerceiverV2Fusion",
        "DePerceiverV2InputAdapter",
        "DePerceiverV2TokenSelector",
        "DePerceiverV2Block",
    ]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As in every model, but that the encoder of another detector keeps its own: transformers asks all parts of it
        for the same, which backbones without attention refuse."""
        if self.config.token_encoder != "detector":
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
            return
        of_latents: Any = attn_implementation
        if isinstance(attn_implementation, dict):
            of_latents = attn_implementation.get("", self.config._attn_implementation)
        self.config._attn_implementation_internal = self.get_correct_attn_implementation(of_latents)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform linear maps."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.init_std)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As in every model; then every part that has a `start` of its own; then what is frozen in the backbone.

        `_init_weights` is no place for the second: transformers does not call it for modules outside of its own
        package that hold no parameters themselves, as parts of several layers.
        """
        super().initialize_weights()
        for module in self.modules():
            if hasattr(module, "start"):
                module.start()
        initialize_frozen_parts(self)


@auto_docstring(custom_intro="DePerceiver v2 without class heads: from pixels to object latents and their boxes.")
class DePerceiverV2Model(DePerceiverV2PreTrainedModel):
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DePerceiverV2Block,
        "attentions": OutputRecorder(DePerceiverAttention, index=1, layer_name="self_attention"),
        "cross_attentions": OutputRecorder(DePerceiverV2CrossAttention, index=1),
    }

    def __init__(self, config: DePerceiverV2Config):
        super().__init__(config)
        config.check_architecture()
        from_detector = config.token_encoder == "detector"
        self.backbone = DePerceiverV2DetectorFeatures(config) if from_detector else DePerceiverBackbone(config)
        self.token_encoder = None
        if config.token_encoder == "fusion":
            self.token_encoder = DePerceiverV2Fusion(config, self.backbone.channels, self.backbone.strides)
        encoder = self.token_encoder or self.backbone
        self.input_adapter = DePerceiverV2InputAdapter(config, encoder.channels)
        self.queries = (
            DePerceiverV2TokenSelector(config) if config.query_selection else DePerceiverV2LearnedQueries(config)
        )
        self.denoising_classes: Any = None
        if config.num_denoising_queries:
            self.denoising_classes = nn.Embedding(config.num_labels, config.d_model)
        self.edge_votes = DePerceiverV2EdgeVotes(config) if config.edge_votes else None
        self.key_values = DePerceiverV2KeyValues(config) if config.share_key_values else None
        self.box_position = DePerceiverV2BoxPosition(config)
        self.layers = nn.ModuleList(
            DePerceiverV2Block(config, own_key_values=not config.share_key_values)
            for _ in range(config.decoder_layers)
        )
        self.refine = BOX_STEPS[config.box_steps]
        self.norm = nn.LayerNorm(config.d_model)
        self.bbox_predictors = nn.ModuleList(
            DePerceiverBoxPredictor(config.d_model) for _ in range(config.decoder_layers)
        )
        self.post_init()

    def start(self) -> None:
        """The blocks of a new model leave all boxes where they are."""
        for predictor in self.bbox_predictors:
            predictor.start_at_zero()

    def _reports_of(self, tokens: torch.Tensor, geometry: TokenGeometry) -> torch.Tensor | None:
        """What tokens `(B, N, D)` tell through the heads that read them, `(B or 1, N, 8 or 16)`: for which edges they
        vote, or where they are, or nothing."""
        if not self.config.read_offsets:
            return None
        places = geometry.grid if self.edge_votes is None else self.edge_votes(tokens, geometry)
        return wave_features(places, attention_dtype(tokens))

    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        denoising: DenoisingQueries | None = None,
        num_queries: int | None = None,
        num_blocks: int | None = None,
        token_share: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | DePerceiverV2ModelOutput:
        r"""
        denoising (`DenoisingQueries`, *optional*):
            Noised objects to restore beside the object latents, which do not see them. Training only.
        num_queries (`int`, *optional*):
            Object latents, instead of the configuration's; not where they are learned.
        num_blocks (`int`, *optional*):
            How many of the blocks work, instead of the configuration's `num_blocks`.
        token_share (`float`, *optional*):
            Share of the tokens that are read, instead of the configuration's.

        Example:

        ```python
        >>> import torch
        >>> from deperceiver_hf import DePerceiverV2Config, DePerceiverV2Model

        >>> model = DePerceiverV2Model(DePerceiverV2Config.from_preset("nano")).eval()
        >>> list(model(torch.rand(1, 3, 128, 160)).last_hidden_state.shape)
        [1, 60, 96]
        ```"""
        require_images(pixel_values, pixel_mask, self.config.num_channels)
        dials = self.config.dials(num_queries, num_blocks, token_share, training=self.training)
        feature_maps = self.backbone(pixel_values, pixel_mask)
        if self.token_encoder is not None:
            feature_maps = self.token_encoder(feature_maps, **kwargs)
        geometry = locate_tokens(feature_maps, self.backbone.strides, pixel_values.shape[-2:], pixel_mask)
        tokens, token_positions = self.input_adapter(feature_maps, geometry)
        selected = self.queries(tokens, geometry, dials.num_queries)
        if dials.token_share < 1:
            pooled = pool_tokens(tokens, token_positions, geometry, selected.scores, dials.token_share)
            tokens, token_positions, geometry = pooled
        places = place_tokens(tokens, geometry, self.config)
        denoised = None if denoising is None else self.denoising_classes(denoising.class_labels)
        array = LatentArray.join(selected, denoising, denoised)
        reports = self._reports_of(tokens, geometry)
        key = value = None
        if self.key_values is not None:
            key, value = self.key_values(tokens, token_positions, reports, places)

        latents, boxes, self_attention_mask = array.content, array.boxes, array.self_attention_mask()
        hidden_states, pred_boxes = [], []
        for block in range(dials.num_blocks):
            latents = self.layers[block](
                latents,
                self.box_position(boxes, latents.dtype),
                boxes,
                tokens,
                token_positions,
                reports,
                key,
                value,
                places=places,
                self_attention_mask=self_attention_mask,
                **kwargs,
            )
            states = self.norm(latents)
            refined = self.refine(boxes, self.bbox_predictors[block](states).float())
            hidden_states.append(states)
            pred_boxes.append(refined)
            boxes = refined.detach()

        # Images first: `pipeline` takes every output of a batch apart by its first dimension.
        denoising_states, object_states = array.split(torch.stack(hidden_states, dim=1))
        denoising_boxes, object_boxes = array.split(torch.stack(pred_boxes, dim=1))
        return DePerceiverV2ModelOutput(
            last_hidden_state=object_states[:, -1],
            intermediate_hidden_states=object_states,
            intermediate_boxes=object_boxes,
            selection_logits=selected.logits,
            selection_boxes=selected.boxes,
            query_mask=None if selected.is_query is None else selected.is_query.long(),
            denoising_hidden_states=denoising_states,
            denoising_boxes=denoising_boxes,
        )


@auto_docstring(custom_intro="DePerceiver v2 with a class head on every object latent.")
class DePerceiverV2ForObjectDetection(DePerceiverV2PreTrainedModel):
    def __init__(self, config: DePerceiverV2Config):
        super().__init__(config)
        self.model = DePerceiverV2Model(config)
        self.class_labels_classifiers = nn.ModuleList(
            nn.Linear(config.d_model, config.num_labels) for _ in range(config.decoder_layers)
        )
        self.post_init()

    def start(self) -> None:
        """A new model believes in no class."""
        for classifier in self.class_labels_classifiers:
            init.constant_(classifier.bias, PRIOR_LOGIT)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | DePerceiverV2ObjectDetectionOutput:
        r"""
        labels (`list[dict[str, torch.Tensor]]`, *optional*):
            Objects of every image: `class_labels` `(num_objects,)` in [0, num_labels), and `boxes`
            `(num_objects, 4)` as (center x, center y, width, height) in [0, 1] of the un-padded image.
        kwargs:
            Those of [`DePerceiverV2Model`], `num_queries`, `num_blocks` and `token_share` among them.

        Example:

        ```python
        >>> import torch
        >>> from PIL import Image
        >>> from transformers import AutoImageProcessor
        >>> from deperceiver_hf import DePerceiverV2ForObjectDetection

        >>> processor = AutoImageProcessor.from_pretrained("path/to/model")
        >>> model = DePerceiverV2ForObjectDetection.from_pretrained("path/to/model").eval()
        >>> image = Image.open("photo.jpg")
        >>> with torch.inference_mode():
        ...     outputs = model(**processor(image, return_tensors="pt"))
        >>> detections = processor.post_process_object_detection(outputs, 0.5, target_sizes=[image.size[::-1]])[0]
        ```"""
        targets = denoising = None
        if labels is not None:
            targets = prepare_targets(labels, len(pixel_values), pixel_values.device)
            if self.training and self.config.num_denoising_queries:
                denoising = make_denoising_queries(targets, self.config)
        outputs = self.model(pixel_values, pixel_mask, denoising, **kwargs)
        is_query = None if outputs.query_mask is None else outputs.query_mask.bool()
        logits = self._classify(outputs.intermediate_hidden_states, is_query)  # (L, B, Q, C)
        pred_boxes = outputs.intermediate_boxes.transpose(0, 1)  # (L, B, Q, 4)

        loss = loss_dict = auxiliary_outputs = None
        if targets is not None:
            selection = denoised = None
            if outputs.selection_logits is not None:
                selection_logits = _silence_padding(outputs.selection_logits, is_query)
                selection = Predictions(selection_logits[None], outputs.selection_boxes[None])
            if denoising is not None:
                denoised = Predictions(
                    self._classify(outputs.denoising_hidden_states), outputs.denoising_boxes.transpose(0, 1)
                )
            loss, loss_dict = detection_loss(
                selection,
                Predictions(logits, pred_boxes),
                is_query,
                denoised,
                denoising,
                targets,
                self.config,
            )
            auxiliary_outputs = [
                {"logits": block_logits, "pred_boxes": block_boxes}
                for block_logits, block_boxes in zip(logits[:-1], pred_boxes[:-1], strict=True)
            ]
        shown = {name: outputs[name] for name in outputs if not name.startswith("denoising_")}
        return DePerceiverV2ObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits[-1],
            pred_boxes=pred_boxes[-1],
            auxiliary_outputs=auxiliary_outputs,
            **shown,
        )

    def _classify(self, hidden_states: torch.Tensor, is_query: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `(L, B, Q, C)` of the states `(B, L, Q, D)` of every block."""
        logits = [
            self.class_labels_classifiers[block](states)
            for block, states in enumerate(hidden_states.unbind(1))  # fewer than there are, if `num_blocks` says so
        ]
        return _silence_padding(torch.stack(logits), is_query)


def _silence_padding(logits: torch.Tensor, is_query: torch.Tensor | None) -> torch.Tensor:
    """Logits `(..., B, Q, C)` with no class at padding queries, where `is_query` `(B, Q)` is `False`."""
    return logits if is_query is None else logits.masked_fill(~is_query[..., None], NO_OBJECT_LOGIT)


# `pipeline("object-detection")` logs an error for any class name that is not in these tables. They are entered here
# and not in the package, so that a model loaded by `trust_remote_code` is known, too.
MODEL_MAPPING_NAMES[DePerceiverV2Config.model_type] = DePerceiverV2Model.__name__
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[DePerceiverV2Config.model_type] = DePerceiverV2ForObjectDetection.__name__

__all__ = ["DePerceiverV2ForObjectDetection", "DePerceiverV2Model", "DePerceiverV2PreTrainedModel"]
