# SPDX-License-Identifier: Apache-2.0
"""Feature maps from another detector: its backbone and its encoder or projector, in the place of a plain backbone.

transformers' own modules, without decoder and heads, give what that decoder would read, to the digit. A family of
detectors is a record of `DETECTOR_FAMILIES`: which modules, how they are called, and which images they take.

Shapes: B images, D channels; (H, W) pixels, (h, w) cells of a feature map.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig

from .backbone_deperceiver import FeatureMaps, FrozenInPart
from .configuration_backbone_deperceiver import DePerceiverBackboneConfig, timm_strides

LAYER_OF_VIT = re.compile(r"backbone\.backbone\.encoder\.layer\.(\d+)\.")  # in LW-DETR and RF-DETR
NEVER_USED = ("mask_token",)  # of the pretraining of vision transformers


@dataclass(frozen=True)
class DetectorFamily:
    """How the detectors of a `model_type` are taken over.

    Attributes:
        parts: Names of the modules and parameters of transformers' model that lead to what its decoder reads.
        read: Calls them: from the parts, images `(B, 3, H, W)` and a mask `(B, H, W)`, 1 at real pixels, to maps
            `(B, D, h, w)`, each with the mask `(B, h, w)` of its real cells if padding is hidden from the encoder.
        strides: Pixels per cell of each map, of a configuration.
        hides_padding: Padding is hidden from the encoder, and sides may be of any length. Otherwise there must be no
            padding, and the sides of images are multiples of `patch` and all strides.
        patch: Pixels of a side that the backbone cuts images into, of a configuration.
        squares_only: Whether images must be square, of a configuration.
    """

    parts: tuple[str, ...]
    read: Callable[[Any, torch.Tensor, torch.Tensor], FeatureMaps]
    strides: Callable[[Any], list[int]]
    hides_padding: bool = False
    patch: Callable[[Any], int] = lambda config: 1
    squares_only: Callable[[Any], bool] = lambda config: False

    def side_multiple(self, config: PreTrainedConfig) -> int:
        """What height and width of images must be multiples of."""
        return 1 if self.hides_padding else math.lcm(self.patch(config), *self.strides(config))


def detector_family(config: PreTrainedConfig) -> DetectorFamily:
    """The family of a detector's configuration.

    Raises:
        ValueError: It is not known.
    """
    if config.model_type not in DETECTOR_FAMILIES:
        raise ValueError(
            f"the features of a {config.model_type} cannot be taken over; those of {', '.join(DETECTOR_FAMILIES)} can."
        )
    return DETECTOR_FAMILIES[config.model_type]


class DePerceiverV2DetectorFeatures(FrozenInPart):
    """Feature maps that the decoder of another detector reads.

    Parts that transformers freezes in that detector, by its configuration, are frozen here too; batch norms learn or
    not as they do there.

    Attributes:
        channels: Of each feature map.
        strides: Pixels per cell of each.
    """

    def __init__(self, config: DePerceiverBackboneConfig):
        super().__init__()
        source: Any = config.backbone_config
        self.config = source
        source.backbone_config._attn_implementation = None  # not every backbone has what is asked of the whole model
        self.family = detector_family(source)
        self.strides = config.strides
        self.channels = [source.d_model] * len(self.strides)
        detector = MODEL_MAPPING[type(source)](source)
        for name in self.family.parts:
            setattr(self, name, getattr(detector, name))
        self._always_frozen = {
            name
            for name, parameter in self.named_parameters()
            if not parameter.requires_grad or name.endswith(NEVER_USED) or self._is_behind_the_features(name)
        }
        self.freeze(config)

    def _is_behind_the_features(self, name: str) -> bool:
        """Whether a parameter is of a layer behind the last one whose features are taken: those of LW-DETR and RF-DETR
        are usually counted from the embeddings on, which leaves the last layer without use and without a gradient."""
        layer = LAYER_OF_VIT.match(name)
        return layer is not None and int(layer[1]) >= max(self.config.backbone_config.out_indices)

    def freeze(self, config: DePerceiverBackboneConfig) -> None:
        """Exclude from training what the detector's own configuration says, and with `freeze_backbone` everything."""
        for name, parameter in self.named_parameters():
            if config.freeze_backbone or name in self._always_frozen:
                parameter.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> FeatureMaps:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 at real pixels, 0 at padding.

        Returns:
            Per level the features `(B, D, h, w)` and the boolean mask of their real cells `(B, h, w)`, if there is a
            `pixel_mask`.

        Raises:
            ValueError: The detector does not take images of this size, or no padding.
        """
        self._check_images(pixel_values, pixel_mask)
        everywhere = pixel_values.new_ones(pixel_values.shape[0], *pixel_values.shape[2:])
        maps = self.family.read(self, pixel_values, everywhere if pixel_mask is None else pixel_mask)
        if pixel_mask is None:
            return [(features, None) for features, _ in maps]
        return [
            (features, pixel_mask[:, ::stride, ::stride].bool() if mask is None else mask)
            for (features, mask), stride in zip(maps, self.strides, strict=True)
        ]

    def _check_images(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> None:
        kind, (height, width) = self.config.model_type, pixel_values.shape[-2:]
        multiple = self.family.side_multiple(self.config)
        if height % multiple or width % multiple:
            raise ValueError(
                f"the image is {height} x {width} pixels, but the encoder of this {kind} takes sides that are "
                f"multiples of {multiple} only: give the image processor such a `size`, with height and width."
            )
        if height != width and self.family.squares_only(self.config):
            raise ValueError(
                f"the image is {height} x {width} pixels, but the backbone of this {kind} takes square images only, "
                f"as it cuts them into windows: give the image processor a `size` of equal height and width."
            )
        if self.family.hides_padding or pixel_mask is None or torch.compiler.is_compiling():
            return
        if not pixel_mask.all():
            raise ValueError(
                f"the encoder of a {kind} sees padding as if it were image: make all images of a batch the same size "
                f"(a `size` with height and width, or one image at a time)."
            )


def _read_hybrid(parts: Any, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> FeatureMaps:
    features = parts.backbone(pixel_values, pixel_mask)
    projected = [project(level) for project, (level, _) in zip(parts.encoder_input_proj, features, strict=True)]
    return _projected(parts, parts.encoder(projected).last_hidden_state)


def _read_deimv2(parts: Any, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> FeatureMaps:
    return _projected(parts, parts.encoder(parts.conv_encoder(pixel_values)).feature_maps)


def _projected(parts: Any, encoded: list[torch.Tensor]) -> FeatureMaps:
    """Maps of an encoder as the decoder reads them."""
    return [(project(level), None) for project, level in zip(parts.decoder_input_proj, encoded, strict=True)]


def _read_lw_detr(parts: Any, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> FeatureMaps:
    return [(features, None) for features, _ in parts.backbone(pixel_values, pixel_mask)]


def _read_rf_detr(parts: Any, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> FeatureMaps:
    return [(parts.backbone(pixel_values, pixel_mask)[0], None)]


def _read_detr(parts: Any, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> FeatureMaps:
    features, mask = parts.backbone(pixel_values, pixel_mask)[-1]
    tokens = parts.input_projection(features)
    positions = _positions(parts, features, mask, pixel_values.dtype)
    encoded = parts.encoder(
        inputs_embeds=_flat(tokens), attention_mask=mask.flatten(1), spatial_position_embeddings=_flat(positions)
    ).last_hidden_state
    return [(encoded.transpose(1, 2).unflatten(2, features.shape[-2:]), mask)]


def _read_deformable_detr(parts: Any, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> FeatureMaps:
    features = parts.backbone(pixel_values, pixel_mask)
    projections = list(parts.input_proj)
    maps = [(project(level), mask) for project, (level, mask) in zip(projections, features, strict=False)]
    coarser = features[-1][0]  # the coarsest maps are made of the backbone's last one, each of that before
    for project in projections[len(features) :]:
        coarser = project(coarser)
        mask = nn.functional.interpolate(pixel_mask[None].to(pixel_values.dtype), size=coarser.shape[-2:])[0]
        maps.append((coarser, mask.bool()))

    shapes = [tuple(level.shape[-2:]) for level, _ in maps]
    spatial_shapes = torch.as_tensor(shapes, dtype=torch.long, device=pixel_values.device)
    positions, ratios = [], []  # (B, h w, D) per level; parts of width and height that are no padding (B, 2)
    for (level, mask), embedding in zip(maps, parts.level_embed, strict=True):
        embedded = _positions(parts, level, mask, pixel_values.dtype).to(level.dtype)
        positions.append(_flat(embedded) + embedding)
        height, width = mask.shape[1:]
        ratios.append(torch.stack((mask[:, 0].sum(1) / width, mask[:, :, 0].sum(1) / height), dim=-1))
    encoded = parts.encoder(
        inputs_embeds=torch.cat([_flat(level) for level, _ in maps], dim=1),
        attention_mask=torch.cat([mask.flatten(1) for _, mask in maps], dim=1),
        spatial_position_embeddings=torch.cat(positions, dim=1),
        spatial_shapes=spatial_shapes,
        spatial_shapes_list=shapes,
        level_start_index=torch.cat((spatial_shapes.new_zeros(1), spatial_shapes.prod(1).cumsum(0)[:-1])),
        valid_ratios=torch.stack(ratios, dim=1).to(coarser.dtype),
    ).last_hidden_state  # (B, N, D)
    levels = encoded.split([height * width for height, width in shapes], dim=1)
    return [
        (level.transpose(1, 2).unflatten(2, shape), mask)
        for level, shape, (_, mask) in zip(levels, shapes, maps, strict=True)
    ]


def _positions(parts: Any, features: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Position embedding `(B, D, h, w)` of a map."""
    return parts.position_embedding(shape=features.shape, device=features.device, dtype=dtype, mask=mask)


def _flat(features: torch.Tensor) -> torch.Tensor:
    return features.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h w, D)


def _hybrid_strides(config: Any) -> list[int]:
    if config.num_feature_levels != len(config.feat_strides):
        raise ValueError(
            f"a {config.model_type} whose `num_feature_levels` ({config.num_feature_levels}) are not as many as its "
            f"`feat_strides` {list(config.feat_strides)} cannot be taken over."
        )
    return list(config.feat_strides)


def _backbone_strides(config: Any) -> list[int]:
    """Strides of the maps that a DETR's convolutional backbone returns."""
    backbone = config.backbone_config
    if backbone.model_type == "timm_backbone":
        limit = backbone.output_stride or math.inf
        return [min(timm_strides(backbone.backbone)[index], limit) for index in backbone.out_indices]
    if backbone.model_type == "resnet":
        return [2 ** (max(index, 1) + 1) for index in backbone.out_indices]
    raise ValueError(f"the strides of a {backbone.model_type} in a {config.model_type} are not known.")


def _deformable_strides(config: Any) -> list[int]:
    strides = _backbone_strides(config)
    while len(strides) < config.num_feature_levels:
        strides.append(2 * strides[-1])
    return strides


def _lw_detr_strides(config: Any) -> list[int]:
    return [int(config.backbone_config.patch_size / scale) for scale in config.projector_scale_factors]


_HYBRID = DetectorFamily(
    parts=("backbone", "encoder_input_proj", "encoder", "decoder_input_proj"),
    read=_read_hybrid,
    strides=_hybrid_strides,
)

DETECTOR_FAMILIES = {
    "rt_detr": _HYBRID,
    "rt_detr_v2": _HYBRID,
    "d_fine": _HYBRID,
    "deimv2": DetectorFamily(
        parts=("conv_encoder", "encoder", "decoder_input_proj"), read=_read_deimv2, strides=_hybrid_strides
    ),
    "lw_detr": DetectorFamily(
        parts=("backbone",),
        read=_read_lw_detr,
        strides=_lw_detr_strides,
        patch=lambda config: config.backbone_config.patch_size * config.backbone_config.num_windows_side,
    ),
    "rf_detr": DetectorFamily(
        parts=("backbone",),
        read=_read_rf_detr,
        strides=lambda config: [config.backbone_config.patch_size],
        patch=lambda config: config.backbone_config.patch_size * config.backbone_config.num_windows,
        # transformers mixes up rows and columns of windows that are not square.
        squares_only=lambda config: config.backbone_config.num_windows > 1,
    ),
    "deformable_detr": DetectorFamily(
        parts=("backbone", "position_embedding", "input_proj", "level_embed", "encoder"),
        read=_read_deformable_detr,
        strides=_deformable_strides,
        hides_padding=True,
    ),
    "detr": DetectorFamily(
        parts=("backbone", "position_embedding", "input_projection", "encoder"),
        read=_read_detr,
        strides=lambda config: _backbone_strides(config)[-1:],
        hides_padding=True,
    ),
}
"""By the `model_type` of their configurations."""
