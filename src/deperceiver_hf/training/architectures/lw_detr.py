# SPDX-License-Identifier: Apache-2.0
"""LW-DETR (Chen et al. 2024, "LW-DETR: A Transformer Replacement to YOLO for Real-Time Detection")."""

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from .group_detr import GroupDetrArchitecture, GroupDetrDetector, feature_stages
from .vision_transformers import VisionTransformer


class LwDetrForObjectDetection(GroupDetrDetector, transformers.LwDetrForObjectDetection):
    """transformers' LW-DETR with its own loss; a saved one is transformers' own class again."""


class LwDetrArchitecture(GroupDetrArchitecture):
    """With ViT-Ti it is the authors' size "small", but for twelve layers of the backbone instead of ten."""

    model_class = LwDetrForObjectDetection
    own_backbone = "vit_tiny_patch16_224"
    side_multiple = 64  # 4 windows a side of cells of 16 pixels
    backbone_names = {  # noqa: RUF012
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.projection",
        "norm1": "layernorm_before",
        "attn.qkv": "attention.{}_proj",
        "attn.proj": "attention.o_proj",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.fc1",
        "mlp.fc2": "intermediate.fc2",
        "ls1.gamma": "gamma_1",
        "ls2.gamma": "gamma_2",
    }

    def vision_transformer_config(self, measures: VisionTransformer) -> PreTrainedConfig:
        """Features come from the layers that attend to the whole image, all others have windows.

        The indices of transformers' features count from the embeddings on; its default, which has the authors' numbers
        of layers from 0, takes features one layer early and leaves the last layer without use.
        """
        fields = measures._asdict()
        stages = feature_stages(measures.num_hidden_layers)
        windows = [layer for layer in range(measures.num_hidden_layers) if layer + 1 not in stages]
        return AutoConfig.for_model(
            "lw_detr_vit",
            pretrain_image_size=fields.pop("image_size"),
            image_size=1024,  # of no effect
            out_indices=stages,
            window_block_indices=windows,
            **fields,
        )

    def own_fields(self) -> dict[str, Any]:
        return {"projector_scale_factors": [1.0]}
