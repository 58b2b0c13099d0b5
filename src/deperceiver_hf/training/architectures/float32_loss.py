# SPDX-License-Identifier: Apache-2.0
"""Mix-in of transformers' detectors that are trained with their own loss."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Detector
else:
    Detector = object  # the classes that are made of the mix-in bring the real one


class OwnLossInFloat32(Detector):
    """Computes transformers' loss in float32, matching and IoU included, whatever autocast says."""

    @property
    def loss_function(self) -> Any:
        return partial(_call_in_float32, super().loss_function)


def _call_in_float32(
    function: Any, logits: torch.Tensor, labels: list, device: torch.device, pred_boxes: torch.Tensor, *args, **kwargs
) -> Any:
    for name, values in (("logits", logits), ("pred_boxes", pred_boxes)):
        if not values.isfinite().all():
            raise FloatingPointError(f"the loss needs finite numbers, but {name} are not.")
    with torch.autocast(device_type=logits.device.type, enabled=False):
        arguments = [_to_float32(value) for value in (logits, labels, device, pred_boxes, *args)]
        return function(*arguments, **{name: _to_float32(value) for name, value in kwargs.items()})


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
