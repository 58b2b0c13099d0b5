# SPDX-License-Identifier: Apache-2.0
"""The machine that a command runs on: its devices by name, what they are called, and the precision they compute in."""

import os
import platform
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .errors import UserError

PACKAGES = ("deperceiver-hf", "torch", "torchvision", "transformers", "accelerate", "timm", "pycocotools")
PRECISIONS = ("no", "fp16", "bf16")
HALF_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """A precision of accelerate's, and why it is taken.

    Attributes:
        name: `"no"` (float32), `"fp16"` or `"bf16"`.
        reason: Half a sentence for the log.
        warning: What is wrong with it here, if anything is.
    """

    name: str
    reason: str
    warning: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What autocast computes in."""
        return HALF_PRECISIONS.get(self.name, torch.float32)


def find_device(name: str = "auto") -> torch.device:
    """The device of this name: `cpu`, `cuda:1`, `mps`, `xpu`, ...; `auto` is torch's accelerator, or else the CPU.

    Raises:
        ValueError: There is no such device, or it cannot be used.
    """
    if name == "auto":
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return best or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu, cuda, cuda:N, mps or xpu, not {name!r}.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} was asked for, but torch finds {torch.cuda.device_count()} CUDA devices.")
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's ways to say that it has none
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used: {reason}") from error
    return device


def make_accelerator(device: str = "auto", **arguments: Any) -> Accelerator:
    """The accelerator for a device of [`find_device`]; with `auto`, the one of each process.

    Unlike `Accelerator()`, it makes a group of the processes that `torchrun` starts on a machine without a GPU.

    Args:
        device: Name of the device.
        arguments: Those of `accelerate.Accelerator`.

    Raises:
        ValueError: There is no such device, or accelerate takes another one.
    """
    if device == "auto":
        return Accelerator(cpu=not torch.accelerator.is_available(), **arguments)
    chosen = find_device(device)
    if chosen.index is not None:
        torch.accelerator.set_device_index(chosen.index)
    accelerator = Accelerator(cpu=chosen.type == "cpu", **arguments)
    if accelerator.device.type != chosen.type:
        raise UserError(f"device {device!r} was asked for, but accelerate takes {str(accelerator.device)!r} here.")
    return accelerator


def choose_precision(requested: str, device: torch.device) -> Precision:
    """The precision to compute in.

    Args:
        requested: `"no"`, `"fp16"` or `"bf16"`, which is taken as it is, or `"auto"`: what `accelerate launch` was
            told, if that is a half precision; else bfloat16 where the device computes in it, float16 on older CUDA
            devices, and float32 elsewhere.
        device: Where the model is.

    Raises:
        ValueError: The name is unknown, or the device cannot compute in the precision that was asked for.
    """
    if requested not in ("auto", *PRECISIONS):
        raise UserError(f"mixed_precision must be auto, {', '.join(PRECISIONS)}, not {requested!r}.")
    if requested == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in HALF_PRECISIONS:
            return _best_precision(device)
        requested, reason = launched, "as accelerate was told"
    else:
        reason = "as asked for"
    if requested == "fp16" and device.type == "cpu":
        raise UserError(
            "float16 (--amp) needs a GPU; on a CPU take bf16 (--use_bfloat), no, or auto, which knows what is fast."
        )
    warning = None
    if requested == "bf16" and not computes_in_bfloat16(device):
        warning = f"bfloat16 is emulated on {device_name(device)}: {_slowdown(device)}; float32 is faster here."
    return Precision(requested, reason, warning)


def _best_precision(device: torch.device) -> Precision:
    name = device_name(device)
    if computes_in_bfloat16(device):
        return Precision("bf16", f"{name} computes in bfloat16")
    if device.type == "cuda":
        return Precision("fp16", f"{name} computes in float16 and not in bfloat16")
    return Precision("no", f"{name} does not compute in bfloat16")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices of bfloat16.

    CUDA devices of compute capability 8.0 and above do, and CPUs with AVX512-BF16, AMX-BF16 or Arm's bf16, unless its
    use is switched off (as by `ONEDNN_MAX_CPU_ISA=AVX2`).
    """
    match device.type:
        case "cuda":
            with torch.cuda.device(device):
                return torch.cuda.is_bf16_supported(including_emulation=False)
        case "xpu":
            return bool(getattr(torch.xpu, "is_bf16_supported", lambda: True)())
        case "cpu":
            return _cpu_computes_in_bfloat16()
    return False


def _cpu_computes_in_bfloat16() -> bool:
    # oneDNN says whether it may use them, but on x86 it says yes to all of AVX-512.
    try:
        allowed = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False
    if not allowed or platform.machine().lower() not in ("x86_64", "amd64"):
        return allowed
    largest = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if largest in ("AVX512_CORE", "AVX512_CORE_VNNI"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _slowdown(device: torch.device, size: int = 192, repeats: int = 3) -> str:
    """How much longer a matrix product takes in bfloat16 than in float32, measured in a few milliseconds."""
    if device.type != "cpu":
        return "about ten times slower"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        taken = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            matrix @ matrix
            taken.append(time.perf_counter() - start)
        seconds[dtype] = min(taken[1:])
    return f"a matrix product takes {seconds[torch.bfloat16] / seconds[torch.float32]:.0f} times as long"


def device_name(device: torch.device) -> str:
    """What a device calls itself."""
    match device.type:
        case "cuda":
            return torch.cuda.get_device_name(device)
        case "xpu":
            return torch.xpu.get_device_name(device)
        case "cpu":
            return f"cpu ({cpu_name()})"
    return str(device)


def cpu_name() -> str:
    """What the processor calls itself, or its kind where it does not say."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """What something was run on, for reports: device, threads, instruction set, and the versions of the software.

    Args:
        device: Where the model was; by default the device of [`find_device`].
    """
    device = find_device() if device is None else device
    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    return {name: version(name) for name in PACKAGES}
