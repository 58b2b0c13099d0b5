# SPDX-License-Identifier: Apache-2.0
"""Tables and words of the model cards."""

from collections.abc import Mapping
from typing import Any

from ..benchmarks.cost import Cost
from ..jobs import markdown_table
from ..models.configuration_backbone_deperceiver import DePerceiverBackboneConfig

IMAGE_SIZE = (800, 1333)  # height, width: the largest that the image processors make by default


def cost_table(costs: Mapping[str, Cost]) -> str:
    """Costs by title of their column."""
    formats = {
        "tokens": lambda cost: f"{cost.tokens:,}",
        "parameters (M)": lambda cost: f"{cost.parameters / 1e6:.1f}",
        "of them in the backbone (M)": lambda cost: f"{cost.backbone_parameters / 1e6:.1f}",
        "GFLOPs of the backbone": lambda cost: f"{cost.backbone_flops / 1e9:,.1f}",
        "GFLOPs after the backbone": lambda cost: f"{cost.flops_after_backbone / 1e9:,.1f}",
        "activations after the backbone (M)": lambda cost: f"{cost.activations_after_backbone / 1e6:,.1f}",
        "of them attention weights (M)": lambda cost: f"{cost.attention_weights / 1e6:,.1f}",
    }
    return markdown_table(["", *costs], [[title, *map(show, costs.values())] for title, show in formats.items()])


def describe_backbone(config: DePerceiverBackboneConfig) -> str:
    """Name of the backbone, and which of its feature maps are read."""
    backbone: Any = config.backbone_config
    name = getattr(backbone, "backbone", None) or backbone.model_type
    *others, last = config.strides
    text = (
        f"feature maps of strides {', '.join(map(str, others))} and {last}"
        if others
        else f"feature map of stride {last}"
    )
    return f"`{name}`, {text}{', last stage dilated' if config.dilation else ''}"
