# SPDX-License-Identifier: Apache-2.0
"""The architectures that can be trained on the same data, backbone and schedule, one module each.

Imports nothing of the training loop but its options and the image size that follows from them.
"""

from .architecture import Architecture
from .d_fine import D_FINE
from .deformable_detr import DEFORMABLE_DETR
from .deperceiver import DEPERCEIVER
from .deperceiver_v2 import DEPERCEIVER_V2
from .detr import DETR
from .rt_detr_v2 import RT_DETR_V2

# By the `model_type` of their configurations, which is also their name for the user.
ARCHITECTURES: dict[str, Architecture] = {
    "deperceiver": DEPERCEIVER,
    "deperceiver_v2": DEPERCEIVER_V2,
    "detr": DETR,
    "deformable_detr": DEFORMABLE_DETR,
    "rt_detr_v2": RT_DETR_V2,
    "d_fine": D_FINE,
}

__all__ = ["ARCHITECTURES", "Architecture"]
