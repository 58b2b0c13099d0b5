# SPDX-License-Identifier: Apache-2.0
"""FSDP2: parameters, gradients and optimizer states in shards, one in each process, by torch's `fully_shard`.

`accelerate launch` asks for it (`distributed_type: FSDP`). What accelerate makes of that is for language models: it
looks for embeddings, which detectors have none of, and leaves CPUs out without a word. So `make_accelerator` keeps it
from the accelerator, and this module does it.

The model is one group of shards, which is whole from the beginning of a forward pass to the end of its backward pass:
its blocks share their heads and may be used several times in a pass. What is saved is the memory of the optimizer.
"""

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..errors import UserError

NAME = "FSDP2"


class ModelShards:
    """Turns a model into shards, in place, and keeps a whole copy of it for what needs one.

    Args:
        model: The same on every process; afterwards its parameters are `DTensor`s. An optimizer is made after this.
        accelerator: Of several processes.

    Attributes:
        whole: The copy, which is evaluated and saved; as new as the last `gather`.
        optimizer: Of the shards, whose state is saved and loaded with them.

    Raises:
        ValueError: There is one process, or the precision needs a scaler of gradients.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        if accelerator.num_processes == 1:
            raise UserError(f"{NAME} shards a model over several processes, and there is one; launch more.")
        if accelerator.mixed_precision == "fp16":
            raise UserError(f"{NAME} is not there for float16; give --mixed_precision bf16 or no.")
        self.optimizer: torch.optim.Optimizer
        self._index = accelerator.process_index
        self.whole = copy.deepcopy(model).to(accelerator.device)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._model: FSDPModule = fully_shard(model.to(accelerator.device), mesh=mesh)
        # Of outputs that are views of others, which nobody changes in place.
        warnings.filterwarnings("ignore", message=".*returned a view tensor.*", category=UserWarning)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the whole copy up to date; every process must call this."""
        for ours, shards in zip(self.whole.parameters(), self._model.parameters(), strict=True):
            ours.copy_(shards.full_tensor())
        for ours, theirs in zip(self.whole.buffers(), self._model.buffers(), strict=True):
            ours.copy_(theirs)

    @contextlib.contextmanager
    def without_reduction(self) -> Iterator[None]:
        """Within, gradients are added up on each process and not averaged over all."""
        self._model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._model.set_requires_gradient_sync(True)

    def save(self, directory: Path) -> None:
        """Write the file of this process, which `load` restores to the bit."""
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        rates = {"rates": json.dumps([group["lr"] for group in self.optimizer.param_groups])}
        save_file(tensors, self._file(directory), metadata=rates)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Restore the shards of a run of as many processes.

        Raises:
            ValueError: The file is of another model.
        """
        with safe_open(self._file(directory), "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            rates = json.loads(file.metadata()["rates"])
        for name, parameter in self._model.named_parameters():
            for key in [key for key in saved if key.startswith(f"optimizer.{name}.")]:
                entry = key.removeprefix(f"optimizer.{name}.")
                like = saved[key].to(parameter.device) if entry == "step" else parameter
                self.optimizer.state[parameter][entry] = torch.zeros_like(like)
        tensors = self._tensors()
        if tensors.keys() != saved.keys():
            raise ValueError(f"{self._file(directory).name} is of another model")
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _file(self, directory: Path) -> Path:
        return directory / f"shards_{self._index}.safetensors"

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What this process has of weights, buffers and the optimizer's state."""
        tensors: dict[str, Any] = {f"model.{name}": tensor for name, tensor in self._model.named_parameters()}
        tensors |= {f"model.{name}": buffer for name, buffer in self._model.named_buffers()}
        for name, parameter in self._model.named_parameters():
            for entry, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{entry}"] = value
        return {name: own_part(tensor.detach()) for name, tensor in tensors.items()}


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor; of one that is whole, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose shards, if it has some, have been gathered; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
