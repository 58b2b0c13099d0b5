# SPDX-License-Identifier: Apache-2.0
"""What LW-DETR and RF-DETR share: a vision transformer with windows, proposals of its cells, and in training several
groups of queries that do not see each other (Chen et al. 2023, "Group DETR")."""

import copy
import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UserError
from ...models.detector_features_deperceiver_v2 import NEVER_USED
from ...models.image_processing_deperceiver_v2 import DePerceiverV2ImageProcessor
from .architecture import common_fields, new_config, scalars
from .backbones import TransformersArchitecture, backbone_of, keep_boxes_in_float32
from .float32_loss import OwnLossInFloat32
from .options import ModelOptions
from .vision_transformers import VisionTransformer, load_vision_transformer, measure_vision_transformer

PRIOR_PROBABILITY = 0.01  # of a class, where the authors let its head start
SAMPLING_POINTS = 2  # in the authors' sizes that read a single feature map; transformers' default is 4
LARGEST_LOGIT = 15.0  # beyond, float32 rounds a score to 1 and the logarithm of the rest is infinite


class GroupDetrDetector(OwnLossInFloat32):
    """Mix-in that trains transformers' LW-DETR or RF-DETR with its own loss.

    That loss is the sum over the proposals of the encoder and all decoder layers, over all groups. In evaluation mode
    there is a single group, for which transformers computes no loss; here it does.

    Attributes:
        square_only: Whether windows are cut rightly from square images only.
    """

    square_only = False

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        for head in (self.bbox_embed, *self.model.enc_out_bbox_embed):
            head.register_forward_hook(keep_boxes_in_float32)
        self.model.backbone.register_forward_hook(_in_float32)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: it is saved under the names of transformers' own class, which depend on that."""
        return False

    @property
    def loss_function(self) -> Any:
        return self._loss_of_its_groups

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs,
    ) -> Any:
        """Predictions, and with `labels` (boxes relative to the un-padded image) `loss` and `loss_dict`: the
        unweighted terms of the last layer.

        Raises:
            ValueError: The images, padding included, have sides that the windows do not divide, or fewer cells than
                queries.
        """
        self._check_images(*pixel_values.shape[-2:])
        outputs = super().forward(pixel_values, pixel_mask=pixel_mask, labels=labels, **kwargs)
        if labels is not None:
            outputs.loss_dict = scalars(outputs.loss_dict, "loss_ce", "loss_bbox", "loss_giou")
        return outputs

    def _loss_of_its_groups(
        self, logits: torch.Tensor, labels: list, device: torch.device, boxes: torch.Tensor, config: Any, *outputs: Any
    ) -> Any:
        if not self.training:
            config = copy.copy(config)
            config.group_detr = 1
        classes, layer_boxes, proposal_classes, proposal_boxes = outputs
        logits, classes, proposal_classes = (
            each if each is None else each.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
            for each in (logits, classes, proposal_classes)
        )
        compute = super().loss_function
        return compute(logits, labels, device, boxes, config, classes, layer_boxes, proposal_classes, proposal_boxes)

    def _check_images(self, height: int, width: int) -> None:
        kind, multiple = self.config.model_type, side_multiple(self.config)
        square = self.square_only and windows_a_side(self.config) > 1
        if height % multiple or width % multiple or (square and height != width):
            raise UserError(
                f"the image is {height} x {width} pixels, but this {kind} takes {'square ' if square else ''}images "
                f"with sides that are multiples of {multiple} only, padding included: let the image processor pad "
                f"them by its pad_size."
            )
        patch = self.config.backbone_config.patch_size
        scales = getattr(self.config, "projector_scale_factors", [1])
        cells = sum(int(height // patch * scale) * int(width // patch * scale) for scale in scales)
        if cells < self.config.num_queries:
            raise UserError(
                f"the image of {height} x {width} pixels has {cells} cells to pick {self.config.num_queries} queries "
                f"from: give larger images or fewer --num_queries."
            )


class GroupDetrArchitecture(TransformersArchitecture):
    """LW-DETR or RF-DETR, on a vision transformer with the layers of one of timm.

    Attributes:
        backbone_names: Parts of its backbone by timm's names, see [`load_vision_transformer`].
    """

    image_processor_class = DePerceiverV2ImageProcessor
    backbone_names: ClassVar[dict[str, str]]

    def vision_transformer_config(self, measures: VisionTransformer) -> PreTrainedConfig:
        """Configuration of the backbone."""
        raise NotImplementedError

    def own_fields(self) -> dict[str, Any]:
        """Fields of the configuration in which the two differ."""
        return {}

    def make_config(self, options: ModelOptions, label_names: list[str]) -> PreTrainedConfig:
        """The model reads the single map of its backbone, as the authors' sizes up to medium do."""
        measures = measure_vision_transformer(str(options.backbone or self.own_backbone), self.name)
        fields = {
            "backbone_config": self.vision_transformer_config(measures),
            "d_model": options.hidden_dim,
            "decoder_layers": options.dec_layers,
            "decoder_ffn_dim": options.dim_feedforward,
            "decoder_self_attention_heads": options.nheads,
            "decoder_cross_attention_heads": options.nheads and 2 * options.nheads,
            "decoder_n_points": SAMPLING_POINTS,
            "auxiliary_loss": not options.no_aux_loss,
            **self.own_fields(),
            **common_fields(options),
        }
        return new_config(self.model_class.config_class, fields, options, label_names)

    def timm_backbone(self, options: ModelOptions, config: PreTrainedConfig) -> str | None:
        return options.backbone or self.own_backbone

    def pad_size(self, config: PreTrainedConfig, height: int, width: int) -> dict[str, int]:
        if self.square_only:
            height = width = max(height, width)
        multiple = side_multiple(config)
        return {"height": math.ceil(height / multiple) * multiple, "width": math.ceil(width / multiple) * multiple}

    def create(self, config: PreTrainedConfig, options: ModelOptions, weights: str | None) -> PreTrainedModel:
        model = self.model_class(config)
        self.prepare_new(model, options)
        if weights is not None:
            load_vision_transformer(backbone_of(model), weights, self.backbone_names)
        return model

    def prepare_saved(self, model: PreTrainedModel) -> None:
        """Freeze what gets no gradient: the layers behind the last one whose features are taken (detectors on the Hub
        count theirs from the embeddings on), and what only the pretraining of the backbone uses."""
        backbone = backbone_of(model)
        for layer in backbone.get_submodule("encoder.layer")[max(model.config.backbone_config.out_indices) :]:
            layer.requires_grad_(False)
        for name, parameter in backbone.named_parameters():
            if name.endswith(NEVER_USED):
                parameter.requires_grad_(False)

    @torch.no_grad()
    def prepare_new(self, model: PreTrainedModel, options: ModelOptions) -> None:
        """Start layers as the authors do; transformers draws all but the sampling of the decoder close to 0."""
        of_backbone = {*backbone_of(model).modules()}
        for name, module in model.named_modules():
            if module in of_backbone or ".cross_attn." in name:
                continue
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                module.reset_parameters()
            if isinstance(module, nn.Linear) and name.startswith(("model.decoder.", "model.enc_output.")):
                joint = name.endswith(("q_proj", "k_proj", "v_proj"))  # one matrix in the authors' code
                nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if joint else 1)
                if ".self_attn." in name and module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(model.class_embed.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        nn.init.zeros_(model.bbox_embed.layers[-1].weight)
        nn.init.zeros_(model.bbox_embed.layers[-1].bias)
        for head, copies in (
            (model.class_embed, model.model.enc_out_class_embed),
            (model.bbox_embed, model.model.enc_out_bbox_embed),
        ):
            for each in copies:
                each.load_state_dict(head.state_dict())
        nn.init.zeros_(model.model.reference_point_embed.weight)
        nn.init.normal_(model.model.query_feat.weight)


def windows_a_side(config: PreTrainedConfig) -> int:
    """Into how many windows the backbone of an LW-DETR or RF-DETR divides a side of the image."""
    backbone = config.backbone_config
    return getattr(backbone, "num_windows_side", backbone.num_windows)


def side_multiple(config: PreTrainedConfig) -> int:
    """What the sides of images are multiples of, in pixels: a cell in every window."""
    return config.backbone_config.patch_size * windows_a_side(config)


def feature_stages(num_layers: int) -> list[int]:
    """After how many layers of the backbone features are taken: of twelve, after each third one; of six, after each
    second one, as in the authors' sizes."""
    parts = 4 if num_layers >= 8 else 3
    return sorted({num_layers * (part + 1) // parts for part in range(parts)} - {0})


def _in_float32(module: nn.Module, inputs: tuple, output: Any) -> Any:
    """Forward hook of backbone and projector. The grid of proposals has the type of their maps, and in bfloat16 would
    place objects by 8 bits of mantissa."""
    if isinstance(output, tuple):
        features, mask = output
        return features.float(), mask
    return [(features.float(), mask) for features, mask in output]
