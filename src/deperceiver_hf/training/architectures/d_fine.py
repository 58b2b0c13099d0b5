# SPDX-License-Identifier: Apache-2.0
"""D-FINE (Peng et al. 2024, "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement")."""

import transformers

from .distribution_loss import DFineCriterion, DistributionLoss
from .hybrid_encoder import HybridEncoderArchitecture, HybridEncoderDetector


class DFineForObjectDetection(HybridEncoderDetector, DistributionLoss, transformers.DFineForObjectDetection):
    """transformers' D-FINE with its loss as in `distribution_loss`; a saved one is transformers' own class again."""

    criterion_class = DFineCriterion


class DFineArchitecture(HybridEncoderArchitecture):
    model_class = DFineForObjectDetection
