# SPDX-License-Identifier: Apache-2.0
"""RT-DETRv2 (Lv et al. 2024, "RT-DETRv2: Improved Baseline with Bag-of-Freebies for Real-Time Detection
Transformer")."""

import transformers

from .hybrid_encoder import HybridEncoderArchitecture, HybridEncoderDetector


class RTDetrV2ForObjectDetection(HybridEncoderDetector, transformers.RTDetrV2ForObjectDetection):
    """transformers' RT-DETRv2 with its own loss; a saved one is transformers' own class again."""


class RTDetrV2Architecture(HybridEncoderArchitecture):
    model_class = RTDetrV2ForObjectDetection
