# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average (EMA) of the weights, which is evaluated and saved in the place of the model."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn

AVERAGE_FILE = "average.safetensors"  # in a training state
WARMUP_STEPS = 10  # the average of step n reaches back over about the last tenth of n + 10 steps, at most


class WeightAverage:
    """The average of the weights of a model over its steps: timm's, that has no copy of what is frozen.

    At first it reaches back over a tenth of the steps so far, later over `1 / (1 - decay)` steps; so the random start
    is forgotten in short runs, too.

    Args:
        model: On its device, not wrapped for several processes.
        decay: What is kept of the average in a step, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self._source = model
        self._ema = ModelEmaV3(
            model, decay=decay, use_warmup=True, warmup_gamma=WARMUP_STEPS, warmup_power=1.0, exclude_buffers=True
        )
        self._ema.requires_grad_(False)
        sources = dict(model.named_modules())
        for name, module in self.model.named_modules():
            for key, parameter in sources[name].named_parameters(recurse=False):
                if not parameter.requires_grad:
                    module._parameters[key] = parameter

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights, in evaluation mode."""
        return self._ema.module

    def update(self, step: int) -> None:
        """Take in the weights after so many steps; buffers are those of the model."""
        self._ema.update(self._source, step=step)

    def save(self, directory: Path) -> None:
        """Write what `load` restores."""
        averaged = {name: p.contiguous() for name, p in self.model.named_parameters() if self._is_averaged(name)}
        save_file(averaged, directory / AVERAGE_FILE)

    def load(self, directory: Path) -> None:
        """Restore the average of a training state; the model itself must be restored already."""
        parameters = dict(self.model.named_parameters())
        saved = load_file(directory / AVERAGE_FILE)
        if saved.keys() != {name for name in parameters if self._is_averaged(name)}:
            raise ValueError(f"{AVERAGE_FILE} is of another model")
        with torch.no_grad():
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)
            for ours, theirs in zip(self.model.buffers(), self._source.buffers(), strict=True):
                ours.copy_(theirs)

    def _is_averaged(self, name: str) -> bool:
        return self._source.get_parameter(name).requires_grad
