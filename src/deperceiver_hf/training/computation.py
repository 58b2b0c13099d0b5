# SPDX-License-Identifier: Apache-2.0
"""How a run computes where its options leave it to the machine: chosen at its start, and kept when it is resumed."""

import math
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig

from ..machine import HALF_PRECISIONS, AttentionShape, choose_threads, fastest_attention
from .arguments import TrainingOptions
from .checkpoints import read_state

logger = get_logger(__name__)

STRIDES = (8, 16, 32)  # of the tokens of models whose configuration does not say
POSITION_CHANNELS = 24  # that DePerceiver v2 appends to its keys, about
STEPS_TO_COMPARE = 20  # whose median later steps are compared with
MUCH_SLOWER = 3.0  # times that median
SLOW_STEPS = 3  # in a row, before another number of threads is tried
STEPS_UNTIL_ANOTHER_TRY = 500  # of more threads, after fewer have been taken
MOST_KEYS = 4096  # of an attention that is measured; more of them change nothing in what is faster


@dataclass(frozen=True)
class Computation:
    """What changes the last digits of a run and how fast it is, and nothing else.

    Attributes:
        attention: Implementation of attention; `None` for transformers' choice.
        threads: OpenMP threads of a process.
    """

    attention: str | None
    threads: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_computation(
    options: TrainingOptions, accelerator: Accelerator, config: PreTrainedConfig, state: Path | None
) -> Computation:
    """What the options say, else what the run that is resumed did, else what is fastest here; alike on all processes.

    Args:
        config: Of the model.
        state: Training state that the run goes on from.
    """
    if state is not None:
        chosen = Computation(**read_state(state)["computation"])
    else:
        threads = choose_threads(accelerator.device)
        torch.set_num_threads(threads)
        attention = None
        if options.attn_implementation in (None, "auto"):
            dtype = HALF_PRECISIONS.get(accelerator.mixed_precision, torch.float32)
            attention = fastest_attention(attention_shape(options, config), dtype, accelerator.device)
        chosen = Computation(attention, threads)
    if options.attn_implementation not in (None, "auto"):
        chosen = Computation(options.attn_implementation, chosen.threads)
    (chosen,) = broadcast_object_list([chosen])
    logger.info(f"Attention {chosen.attention or 'as transformers chooses'}, {chosen.threads} threads.")
    return chosen


class Float32Depthwise:
    """Hooks of a depthwise convolution that compute it in float32 where autocast on a CPU would take bfloat16.

    The gradient of the weights of 5 x 5 kernels takes oneDNN 3 to 6 times as long in bfloat16 as in float32, which was
    a third of the step of an EfficientNet-Lite0; forward it makes no difference. Outside of training nothing changes.
    """

    def __init__(self) -> None:
        self._autocast: torch.autocast | None = None

    def before(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        (features,) = inputs
        if not (torch.is_grad_enabled() and features.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return None
        self._autocast = torch.autocast("cpu", enabled=False)
        self._autocast.__enter__()
        return (features.float().contiguous(memory_format=torch.channels_last),)

    def after(self, module: torch.nn.Module, inputs: Any, features: torch.Tensor) -> torch.Tensor | None:
        if self._autocast is None:
            return None
        self._autocast.__exit__(None, None, None)
        self._autocast = None
        return None if features is None else features.to(torch.get_autocast_dtype("cpu"))

    @classmethod
    def of(cls, model: torch.nn.Module) -> None:
        """Give them to all depthwise convolutions of a model."""
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and module.groups == module.in_channels > 1:
                hooks = cls()
                module.register_forward_pre_hook(hooks.before)
                module.register_forward_hook(hooks.after, always_call=True)  # also after an error


class ThreadWatch:
    """Keeps a run from waiting for other programs that have come to share its cores.

    The threads of an operation wait for the last of them, which has to wait for its turn on a busy core: steps then
    take many times as long, while fewer threads would be nearly as fast as before. Where `OMP_NUM_THREADS` says how
    many there are, or an accelerator computes, nothing is changed.

    Args:
        device: Where the model is.
        threads: That the run has at its start.
        most: That it may have.
    """

    def __init__(self, device: torch.device, threads: int, most: int):
        self.device, self.threads, self.most = device, threads, most
        self.active = device.type == "cpu" and most > 1 and "OMP_NUM_THREADS" not in os.environ
        self._seconds: list[float] = []  # of the first steps with this number of threads
        self._slow = self._since = 0

    def after_step(self, seconds: float) -> None:
        """Take note of how long a step took; change the number of threads if that helps."""
        if not self.active:
            return
        self._since += 1
        if len(self._seconds) < STEPS_TO_COMPARE:
            self._seconds.append(seconds)
            return
        self._slow = self._slow + 1 if seconds > MUCH_SLOWER * statistics.median(self._seconds) else 0
        if self._slow == SLOW_STEPS or (self.threads < self.most and self._since == STEPS_UNTIL_ANOTHER_TRY):
            self._choose()

    def _choose(self) -> None:
        torch.set_num_threads(self.most)
        chosen = choose_threads(self.device)
        torch.set_num_threads(chosen)
        if chosen != self.threads:
            why = "other programs take the cores" if chosen < self.threads else "the cores are free again"
            logger.info(f"{chosen} threads instead of {self.threads} from here: {why}.")
            self.threads = chosen
            self._seconds = []
        self._slow = self._since = 0


def attention_shape(options: TrainingOptions, config: PreTrainedConfig) -> AttentionShape:
    """The attention in which a model spends most: its latents or queries read the tokens of a batch of images."""
    heads = getattr(config, "num_attention_heads", None) or 8
    pixels = math.prod(options.image_size().values())
    channels = max(8, config.d_model // heads)
    strides = getattr(config, "feature_strides", None) or STRIDES
    strides = [strides] if isinstance(strides, int) else strides
    return AttentionShape(
        batch=options.batch_size,
        heads=heads,
        queries=getattr(config, "num_latents", None) or config.num_queries,
        keys=max(1, min(MOST_KEYS, sum(pixels // stride**2 for stride in strides))),
        key_channels=channels + (POSITION_CHANNELS if getattr(config, "position_bias", False) else 0),
        value_channels=channels,
    )
