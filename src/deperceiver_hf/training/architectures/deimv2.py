# SPDX-License-Identifier: Apache-2.0
"""DEIMv2 (Huang et al. 2025, "Real-Time Object Detection Meets DINOv3"), on a convolutional backbone as its smaller
sizes are."""

from typing import Any

import transformers
from transformers.loss.loss_deimv2 import Deimv2Loss

from .distribution_loss import DistributionLoss
from .hybrid_encoder import HybridEncoderArchitecture, HybridEncoderDetector

MATCHABILITY_GAMMA = 1.5  # of the authors' matchability-aware loss; transformers' default is 2


class Deimv2ForObjectDetection(HybridEncoderDetector, DistributionLoss, transformers.Deimv2ForObjectDetection):
    """transformers' DEIMv2 with its loss as in `distribution_loss`; a saved one is transformers' own class again."""

    criterion_class = Deimv2Loss


class Deimv2Architecture(HybridEncoderArchitecture):
    model_class = Deimv2ForObjectDetection

    def own_fields(self) -> dict[str, Any]:
        return {"focal_loss_gamma": MATCHABILITY_GAMMA}
