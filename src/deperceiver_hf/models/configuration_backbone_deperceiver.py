# SPDX-License-Identifier: Apache-2.0
"""What the configurations of both architectures say about their backbone, and which strides a timm model has."""

from functools import cache

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

NOMINAL_STRIDES = (4, 8, 16, 32)


@cache
def timm_strides(backbone: str) -> list[int]:
    """Strides of all feature maps of a timm model, in the order of `out_indices`.

    Raises:
        ValueError: The model does not exist or has no feature maps.
    """
    import timm
    import torch

    try:
        with torch.device("meta"):
            return timm.create_model(backbone, pretrained=False, features_only=True).feature_info.reduction()
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"timm cannot make a feature extractor of backbone {backbone!r} ({error}). "
            f"Choose a name from `timm.list_models()` or pass a `backbone_config`."
        ) from error


def timm_out_indices(backbone: str, strides: list[int]) -> list[int]:
    """Find the feature maps of a timm model that have the given strides.

    Args:
        backbone (`str`): Name of a timm model that can return feature maps, such as `"resnet50"`.
        strides (`list[int]`): Pixels per feature cell, ascending.

    Returns:
        `list[int]`: Values for timm's `out_indices`, in the order of `strides`.

    Raises:
        ValueError: The model does not exist, has no feature maps, or none of a wanted stride.
    """
    reductions = timm_strides(backbone)
    # Several maps can share a stride (stem and first stage, say); the deepest of them carries most information.
    index_of = {reduction: index for index, reduction in enumerate(reductions)}
    missing = [stride for stride in strides if stride not in index_of]
    if missing:
        raise ValueError(
            f"backbone {backbone!r} has feature maps of strides {sorted(index_of)}, but `feature_strides` asks for "
            f"{missing}."
        )
    return [index_of[stride] for stride in strides]


@strict
class DePerceiverBackboneConfig(PreTrainedConfig):
    """What the configurations of all architectures say about the convolutional backbone and its feature maps.

    The fields are documented where they can be set, in [`DePerceiverConfig`].
    """

    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - the form that every supported transformers reads

    backbone_config: dict | PreTrainedConfig | None = None
    num_channels: int = 3
    freeze_batch_norm: bool = True
    frozen_backbone_stages: int = 1
    freeze_backbone: bool = False
    mask_padding: bool = True
    dilation: bool = False
    feature_strides: int | list[int] | tuple[int, ...] = 32

    def __post_init__(self, **kwargs):
        strides = self.feature_strides
        self.feature_strides = [strides] if isinstance(strides, int) else list(strides)
        self.check_architecture()
        self.backbone_config = self.resolve_backbone(kwargs.pop("backbone", None))
        super().__post_init__(**kwargs)

    @property
    def strides(self) -> list[int]:
        """`feature_strides` as the list that it has become: pixels per cell of each feature map, finest first."""
        return [self.feature_strides] if isinstance(self.feature_strides, int) else list(self.feature_strides)

    @property
    def num_feature_levels(self) -> int:
        """Number of feature maps that the tokens come from."""
        return len(self.strides)

    def check_architecture(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: Names the fields, what they are, and what they may be.
        """
        self.check_strides()
        self.require_at_least(1, "num_channels")
        if self.frozen_backbone_stages < -1:
            raise ValueError(f"`frozen_backbone_stages` must be -1 (none) or more, not {self.frozen_backbone_stages}.")
        if self.dilation and 32 not in self.strides:
            raise ValueError(
                f"`dilation=True` changes the stage of stride 32, which `feature_strides` {self.strides} does not use."
            )

    def check_strides(self) -> None:
        """Refuse `feature_strides` that no backbone has with a `ValueError`."""
        strides = self.strides
        if not strides or strides != sorted(set(strides)) or not set(strides) <= set(NOMINAL_STRIDES):
            raise ValueError(
                f"`feature_strides` must be one of {NOMINAL_STRIDES} or an ascending list of them, not {strides}."
            )

    def require_at_least(self, least: int, *names: str) -> None:
        """Refuse fields that are smaller with a `ValueError`."""
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, not {getattr(self, name)}.")

    def require_dropouts(self, *names: str) -> None:
        """Refuse fields that are no probabilities below 1 with a `ValueError`."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), not {getattr(self, name)}.")

    def require_matching_costs(self) -> None:
        """Refuse a matching that nothing decides with a `ValueError`."""
        if self.class_cost == self.bbox_cost == self.giou_cost == 0:
            raise ValueError("`class_cost`, `bbox_cost` and `giou_cost` are all 0: nothing would decide the matching.")

    def resolve_backbone(self, name: str | None) -> dict | PreTrainedConfig:
        """The configuration of the backbone: `backbone_config`, or of the timm model of this name.

        Raises:
            ValueError: It does not fit the other fields.
        """
        backbone_config = self.backbone_config
        if backbone_config is not None and name is not None:
            raise ValueError(f"give either `backbone` ({name!r}) or `backbone_config`, not both.")
        if backbone_config is None:
            name = name or "resnet50"
            backbone_config = {
                "model_type": "timm_backbone",
                "backbone": name,
                "num_channels": self.num_channels,
                "out_indices": timm_out_indices(name, self.strides),
                **({"output_stride": 16} if self.dilation else {}),
            }
        if isinstance(backbone_config, dict):
            if "model_type" not in backbone_config:
                raise ValueError(
                    "`backbone_config` as a dictionary needs a 'model_type', such as 'timm_backbone' or 'resnet'."
                )
            backbone_config = AutoConfig.for_model(**backbone_config)
        is_timm = backbone_config.model_type == "timm_backbone"
        if self.dilation and not (is_timm and backbone_config.output_stride == 16):
            raise ValueError(
                "`dilation=True` needs a timm backbone; with your own `backbone_config` set its `output_stride` to 16."
            )
        outputs = getattr(backbone_config, "out_indices", None) or getattr(backbone_config, "out_features", None) or []
        if len(outputs) != self.num_feature_levels:
            raise ValueError(
                f"`backbone_config` returns {len(outputs)} feature maps ({outputs}), but `feature_strides` "
                f"{self.feature_strides} needs {self.num_feature_levels}."
            )
        if is_timm:
            available = timm_strides(backbone_config.backbone)
            strides = [available[index] for index in backbone_config.out_indices]
            if strides != self.feature_strides:
                raise ValueError(
                    f"`backbone_config` returns feature maps of strides {strides}, but `feature_strides` is "
                    f"{self.feature_strides}: set its `out_indices` to "
                    f"{timm_out_indices(backbone_config.backbone, self.strides)}."
                )
        channels = getattr(backbone_config, "num_channels", self.num_channels)
        if channels != self.num_channels:
            raise ValueError(
                f"`num_channels` is {self.num_channels}, but that of `backbone_config` is {channels}: make them equal."
            )
        return backbone_config
