# SPDX-License-Identifier: Apache-2.0
"""DePerceiver v2: a Perceiver whose latents are the objects.

    image -> backbone -> tokens of several strides
          -> the most promising tokens become object latents, each with a box
          -> blocks: latents attend to each other, read all tokens (each head near the box), refine their boxes

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
from .layers_deperceiver_v2 import (
    DePerceiverV2Block,
    DePerceiverV2BoxPosition,
    DePerceiverV2CrossAttention,
    DePerceiverV2KeyValues,
    place_tokens,
)
from .loss_deperceiver_v2 import Predictions, detection_loss, prepare_targets
from .tokens_deperceiver_v2 import (
    PRIOR_LOGIT,
    DePerceiverV2InputAdapter,
    DePerceiverV2LearnedQueries,
    DePerceiverV2TokenSelector,
    inverse_sigmoid,
    locate_tokens,
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
        "DePerceiverV2InputAdapter",
        "DePerceiverV2TokenSelector",
        "DePerceiverV2Block",
    ]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of every model; raises a `ValueError` that says so if `num_queries` does not fit learned queries."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except RuntimeError as error:
            if "num_queries" not in kwargs or "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} has weights of other sizes than asked for, which are listed above. "
                "If they are those of `queries`: it has learned them (`query_selection=False`) and cannot have "
                f"{kwargs['num_queries']}; leave `num_queries` out."
            ) from error

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
        "attentions": OutputRecorder(DePerceiverAttention, index=1),
        "cross_attentions": OutputRecorder(DePerceiverV2CrossAttention, index=1),
    }

    def __init__(self, config: DePerceiverV2Config):
        super().__init__(config)
        config.check_architecture()
        self.backbone = DePerceiverBackbone(config)
        self.input_adapter = DePerceiverV2InputAdapter(config, self.backbone.channels)
        self.queries = (
            DePerceiverV2TokenSelector(config) if config.query_selection else DePerceiverV2LearnedQueries(config)
        )
        self.denoising_classes: Any = None
        if config.num_denoising_queries:
            self.denoising_classes = nn.Embedding(config.num_labels, config.d_model)
        self.key_values = DePerceiverV2KeyValues(config) if config.share_key_values else None
        self.box_position = DePerceiverV2BoxPosition(config)
        self.layers = nn.ModuleList(
            DePerceiverV2Block(config, own_key_values=not config.share_key_values)
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.bbox_predictors = nn.ModuleList(
            DePerceiverBoxPredictor(config.d_model) for _ in range(config.decoder_layers)
        )
        self.post_init()

    def start(self) -> None:
        """The blocks of a new model leave all boxes where they are."""
        for predictor in self.bbox_predictors:
            predictor.start_at_zero()

    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        denoising: DenoisingQueries | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | DePerceiverV2ModelOutput:
        r"""
        denoising (`DenoisingQueries`, *optional*):
            Noised objects to restore beside the object latents, which do not see them. Training only.

        Example:

        ```python
        >>> import torch
        >>> from deperceiver_hf import DePerceiverV2Config, DePerceiverV2Model

        >>> model = DePerceiverV2Model(DePerceiverV2Config.from_preset("nano")).eval()
        >>> list(model(torch.rand(1, 3, 128, 160)).last_hidden_state.shape)
        [1, 60, 96]
        ```"""
        require_images(pixel_values, pixel_mask, self.config.num_channels)
        feature_maps = self.backbone(pixel_values, pixel_mask)
        geometry = locate_tokens(feature_maps, self.backbone.strides, pixel_values.shape[-2:], pixel_mask)
        tokens, token_positions = self.input_adapter(feature_maps, geometry)
        places = place_tokens(tokens, geometry, self.config)
        selected = self.queries(tokens, geometry)
        denoised = None if denoising is None else self.denoising_classes(denoising.class_labels)
        array = LatentArray.join(selected, denoising, denoised)
        key, value = (None, None) if self.key_values is None else self.key_values(tokens, token_positions, places)

        latents, boxes, self_attention_mask = array.content, array.boxes, array.self_attention_mask()
        hidden_states, pred_boxes = [], []
        for layer, bbox_predictor in zip(self.layers, self.bbox_predictors, strict=True):
            latents = layer(
                latents,
                self.box_position(boxes, latents.dtype),
                boxes,
                tokens,
                token_positions,
                key,
                value,
                places=places,
                self_attention_mask=self_attention_mask,
                **kwargs,
            )
            states = self.norm(latents)
            refined = (bbox_predictor(states).float() + inverse_sigmoid(boxes)).sigmoid()
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
            classifier(states)
            for classifier, states in zip(self.class_labels_classifiers, hidden_states.unbind(1), strict=True)
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
