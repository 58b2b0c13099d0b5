# SPDX-License-Identifier: Apache-2.0
"""RF-DETR (Robinson et al. 2025, "RF-DETR: Neural Architecture Search for Real-Time Detection Transformers")."""

from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

from .group_detr import GroupDetrArchitecture, GroupDetrDetector, feature_stages
from .vision_transformers import VisionTransformer

DINOV2_PATCH = 14


class RfDetrForObjectDetection(GroupDetrDetector, transformers.RfDetrForObjectDetection):
    """transformers' RF-DETR with its own loss; a saved one is transformers' own class again.

    Its windows are cut as the authors do, who train on squares: of another image they would mix up the cells.
    """

    square_only = True


class RfDetrArchitecture(GroupDetrArchitecture):
    """With DINOv2's ViT-S it is the authors' size "base"."""

    model_class = RfDetrForObjectDetection
    own_backbone = "vit_small_patch14_dinov2"
    side_multiple = 56  # 4 windows a side of cells of 14 pixels
    square_only = True
    backbone_names = {  # noqa: RUF012
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "norm1": "norm1",
        "attn.qkv": "attention.{}_proj",
        "attn.proj": "attention.o_proj",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }

    def vision_transformer_config(self, measures: VisionTransformer) -> PreTrainedConfig:
        """Windows as in the authors' sizes: 4 a side with DINOv2's patches of 14 pixels, 2 with those of 16."""
        return RfDetrDinov2Config(
            **measures._asdict(),
            out_indices=feature_stages(measures.num_hidden_layers),
            num_windows=4 if measures.patch_size == DINOV2_PATCH else 2,
            use_mask_token=False,
        )

    def own_fields(self) -> dict[str, Any]:
        return {"dropout": 0.0}  # the authors'; transformers' default is 0.1
