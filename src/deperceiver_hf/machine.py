# SPDX-License-Identifier: Apache-2.0
"""The machine that a command runs on: its devices by name, what they are called, and what is fast on them."""

import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import get_int_from_env, patch_environment, str_to_bool
from transformers.utils import logging

from .errors import UserError
from .output_files import as_path, write_json

logger = logging.get_logger(__name__)

PACKAGES = ("deperceiver-hf", "torch", "torchvision", "transformers", "accelerate", "timm", "pycocotools")
PRECISIONS = ("no", "fp16", "bf16")
LARGEST_MEASURED = 2e6  # weights of an attention that is measured; of a larger one a part of the batch is
CLEARLY_FASTER = 0.95  # of the time of what is taken otherwise
# As launchers call it: how many processes of a run are on this machine.
PROCESSES_HERE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
HALF_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What `accelerate launch` says of sharding in the environment, what it may say, and what to tell it.
SHARDING = {
    "FSDP_VERSION": ("2", "fsdp_version: 2"),
    "FSDP_AUTO_WRAP_POLICY": ("NO_WRAP", "fsdp_auto_wrap_policy: NO_WRAP, for the model is one group of shards"),
    "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params: false"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "fsdp_cpu_ram_efficient_loading: false"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false",
        "fsdp_activation_checkpointing: false, and --gradient_checkpointing to the training instead",
    ),
}


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

    `accelerate launch --cpu` makes `auto` the CPU.

    Raises:
        ValueError: There is no such device, or it cannot be used.
    """
    if name == "auto":
        usable = torch.accelerator.is_available() and not str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))
        return (torch.accelerator.current_accelerator() if usable else None) or torch.device("cpu")
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

    Unlike `Accelerator()`, it makes a group of the processes that `torchrun` starts on a machine without a GPU, and
    does not shard models, which the training does itself. It says how many processes there are.

    Args:
        device: Name of the device.
        arguments: Those of `accelerate.Accelerator`.

    Raises:
        ValueError: There is no such device, or accelerate takes another one, or `accelerate launch` asked for sharding
            in a way that is not supported.
    """
    is_sharding_asked_for()
    chosen = find_device(device)
    if chosen.index is not None and device != "auto":
        torch.accelerator.set_device_index(chosen.index)
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        accelerator = Accelerator(cpu=chosen.type == "cpu", **arguments)
    if device != "auto" and accelerator.device.type != chosen.type:
        raise UserError(f"device {device!r} was asked for, but accelerate takes {str(accelerator.device)!r} here.")
    if accelerator.is_main_process:
        processes_launched()
        count = accelerator.num_processes
        logger.info(f"{count} process{'es' if count > 1 else ''} on {accelerator.device.type}.")
    return accelerator


def is_sharding_asked_for() -> bool:
    """Whether `accelerate launch` was told to shard the model over the processes (FSDP2).

    Raises:
        ValueError: In a way that is not supported.
    """
    if not str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return False
    if wrong := [needed for name, (value, needed) in SHARDING.items() if os.environ.get(name, value) != value]:
        raise UserError(
            f"sharding (FSDP) is supported with other settings; tell `accelerate launch` {'; '.join(wrong)}."
        )
    return True


def processes_launched() -> int:
    """How many processes a launcher has started to work together. A warning says if it was asked for more than one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    # accelerate gives processes an address to meet at, and starts a single one that does not know of it.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ:
        logger.warning(
            "`accelerate launch` was asked for several processes and has started one: it starts several for several "
            "GPUs, and on a CPU only if it is told --multi_gpu, whatever the name says, or by "
            "`torchrun --nproc_per_node N`."
        )
    return count


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


def available_memory() -> int:
    """Bytes of main memory that this process may still take: its share of what the machine has, or of what is left to
    its container or job (Linux control groups of both versions), if that is less. All processes of a run on this
    machine have equal shares."""
    left = [psutil.virtual_memory().available, *_left_by_control_groups()]
    return max(0, min(left)) // max(1, get_int_from_env(PROCESSES_HERE, 1))


class _MemoryFiles(NamedTuple):
    """Where a version of control groups says what memory a group may take and takes."""

    mount: str
    limits: tuple[str, ...]
    usage: str
    reclaimable: str  # in `memory.stat`: cached files, which count as used and are given back when they are in the way


_CONTROL_GROUPS = {
    "": _MemoryFiles("sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "memory": _MemoryFiles(
        "sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
    ),
}


def _left_by_control_groups(root: Path = Path("/")) -> list[int]:
    """What each group that this process is in leaves, in bytes; groups without a limit are not among them."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:  # no Linux
        return []
    left = []
    for line in lines:  # such as 0::/user.slice/job, or 4:memory:/docker/5b3...
        _, _, kinds_and_path = line.partition(":")
        kinds, _, own = kinds_and_path.partition(":")
        files = next((files for kind, files in _CONTROL_GROUPS.items() if kind in kinds.split(",")), None)
        if files is None:
            continue
        # A container may see its own group as the top one, whatever its path outside: groups that are not there are
        # none of its business.
        group = Path(own.lstrip("/"))
        for directory in {root / files.mount / part for part in (group, *group.parents)}:
            with suppress(OSError, ValueError):
                left.append(_left_by(directory, files))
    return left


def _left_by(directory: Path, files: _MemoryFiles) -> int:
    """Raises an `OSError` or `ValueError` if the group has no limit."""
    limits = [(directory / name).read_text("utf-8").strip() for name in files.limits if (directory / name).is_file()]
    limit = min(int(text) for text in limits if text != "max")
    numbers = dict(line.split() for line in (directory / "memory.stat").read_text("utf-8").splitlines())
    usage = int((directory / files.usage).read_text("utf-8"))
    return limit - usage + int(numbers.get(files.reclaimable, 0))


class AttentionShape(NamedTuple):
    """Sizes of an attention: `batch` images, `heads`, `queries` that read `keys`; the channels of a head are
    `key_channels` of queries and keys, and `value_channels` of values."""

    batch: int
    heads: int
    queries: int
    keys: int
    key_channels: int
    value_channels: int


def fastest_attention(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str:
    """Which implementation of attention trains faster here, `"eager"` or `"sdpa"`.

    On accelerators it is `sdpa`, whose kernels are fused. On a CPU it depends on shape, precision and processor: it is
    measured in a few hundred milliseconds at most, and remembered for the machine.
    """
    if device.type != "cpu":
        return "sdpa"
    fitting = max(1, int(shape.batch * LARGEST_MEASURED / math.prod(shape[:4])))
    shape = shape._replace(batch=min(shape.batch, fitting))
    facts = (cpu_name(), torch.backends.cpu.get_cpu_capability(), computes_in_bfloat16(device), torch.__version__)
    key = " | ".join(map(str, ("attention", *facts, torch.get_num_threads(), dtype, tuple(shape))))
    return _remembered(key, lambda: _measure_attention(shape, dtype))


def _measure_attention(shape: AttentionShape, dtype: torch.dtype, repeats: int = 5) -> str:
    def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        weights = (query @ key.transpose(-1, -2)).softmax(dim=-1, dtype=torch.float32)
        return weights.to(value.dtype) @ value

    def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # Fused kernels want keys and values of the same width.
        value = torch.nn.functional.pad(value, (0, key.shape[-1] - value.shape[-1]))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)[..., : shape.value_channels]

    generator = torch.Generator().manual_seed(0)
    sizes = (
        (shape.queries, shape.key_channels),
        (shape.keys, shape.key_channels),
        (shape.keys, shape.value_channels),
    )
    tensors = [
        torch.randn(shape.batch, shape.heads, *size, generator=generator).to(dtype).requires_grad_() for size in sizes
    ]
    candidates = {"eager": eager, "sdpa": sdpa}
    with torch.enable_grad():
        return _fastest({name: partial(_backward, attend, tensors) for name, attend in candidates.items()}, repeats)


def _backward(attend: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> None:
    torch.autograd.grad(attend(*tensors).sum(), tensors)


def choose_threads(device: torch.device) -> int:
    """How many threads of this process compute fastest now.

    Threads that share a core with something else wait for each other in every operation. So all of them, half of them
    and a single one are tried on small operations, as they are many in a detector; it takes some milliseconds. Where
    `OMP_NUM_THREADS` says how many, or an accelerator computes, it is torch's own number.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or "OMP_NUM_THREADS" in os.environ:
        return threads
    matrix = torch.ones(256, 256)

    def compute(count: int) -> None:
        torch.set_num_threads(count)
        for _ in range(20):
            (matrix @ matrix).relu_()

    try:
        return _fastest({count: partial(compute, count) for count in (threads, max(threads // 2, 1), 1)}, repeats=7)
    finally:
        torch.set_num_threads(threads)


def _fastest(candidates: dict[Any, Callable[[], None]], repeats: int) -> Any:
    """The candidate of the least median time, of all measured in turns; the first one if they are about equal."""
    seconds: dict[Any, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}  # the first warms up
    first, best = next(iter(medians)), min(medians, key=medians.__getitem__)
    return best if medians[best] < CLEARLY_FASTER * medians[first] else first


def _remembered(key: str, measure: Callable[[], str]) -> str:
    """What was measured on this machine before, or is now; where no file can be kept, it is measured every time."""
    try:
        path = as_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "deperceiver_hf" / "measured.json"
    except UserError:  # a user without a home, as in containers
        return measure()
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or not isinstance(known.get(key), str):
        known = known if isinstance(known, dict) else {}
        known[key] = measure()
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
    return known[key]
