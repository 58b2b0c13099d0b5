# SPDX-License-Identifier: Apache-2.0
"""D-FINE (Peng et al. 2024, "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement")."""

import transformers

from .hybrid_encoder import HybridEncoderArchitecture, HybridEncoderDetector


class DFineForObjectDetection(HybridEncoderDetector, transformers.DFineForObjectDetection):
    """transformers' D-FINE with its own loss; a saved one is transformers' own class again."""


class DFineArchitecture(HybridEncoderArchitecture):
    model_class = DFineForObjectDetection
