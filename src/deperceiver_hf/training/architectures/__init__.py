# SPDX-License-Identifier: Apache-2.0
"""The architectures that can be trained on the same data, backbone and schedule, one module each.

Imports nothing of the training but how its options are declared.
"""

from .architecture import Architecture
from .d_fine import DFineArchitecture
from .deformable_detr import DeformableDetrArchitecture
from .deimv2 import Deimv2Architecture
from .deperceiver import DePerceiverArchitecture
from .deperceiver_v2 import DePerceiverV2Architecture
from .detr import DetrArchitecture
from .lw_detr import LwDetrArchitecture
from .options import ModelOptions
from .rf_detr import RfDetrArchitecture
from .rt_detr_v2 import RTDetrV2Architecture

# By the `model_type` of their configurations, which is also their name for the user.
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        DePerceiverArchitecture(),
        DePerceiverV2Architecture(),
        DetrArchitecture(),
        DeformableDetrArchitecture(),
        RTDetrV2Architecture(),
        DFineArchitecture(),
        Deimv2Architecture(),
        LwDetrArchitecture(),
        RfDetrArchitecture(),
    )
}

__all__ = ["ARCHITECTURES", "Architecture", "ModelOptions"]
