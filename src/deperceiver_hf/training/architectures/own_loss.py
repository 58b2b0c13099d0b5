# SPDX-License-Identifier: Apache-2.0
"""Mix-in of transformers' detectors that are trained with their own loss."""

from functools import partial
from typing import Any

import torch


class OwnLossInFloat32:
    """Computes transformers' loss in float32, matching and IoU included, whatever autocast says."""

    @property
    def loss_function(self) -> Any:
        return partial(_call_in_float32, super().loss_function)


def _call_in_float32(function: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(device_type=logits.device.type, enabled=False):
        args = [_to_float32(value) for value in args]
        return function(logits.float(), *args, **{name: _to_float32(value) for name, value in kwargs.items()})


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
