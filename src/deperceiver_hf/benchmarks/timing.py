# SPDX-License-Identifier: Apache-2.0
"""Forward passes of several models timed side by side in one run."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..machine import device_name, find_device
from .cost import check_at_least_one, check_image_size
from .report import BenchmarkReport
from .variants import DEFAULT_NUM_LATENTS, OWN_BACKBONES, check_models, check_sides, make_variant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIMED_BY_DEFAULT = ("detr-32", "detr-16", "deperceiver-32", "deperceiver-16")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Timing:
    """Forward passes of a model, measured.

    Attributes:
        latency: Median of the seconds that a pass took; `None` if the memory did not suffice.
        quartiles: First and third quartile of these seconds.
        peak_memory: Bytes that a pass took on a CUDA device at its peak, beyond weights and images; `None` elsewhere.
    """

    latency: float | None
    quartiles: tuple[float, float] | None
    peak_memory: int | None


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """What is timed, and how; checked.

    Attributes:
        height, width: Size of the images in pixels; they are not padded.
        batch_size: Number of images.
        backbone: Name of a timm model for all; if not given, see [`make_variant`].
        num_latents: Length of the latent array of the first DePerceiver.
        device: See `find_device`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        attn_implementation: `"eager"`, `"sdpa"`, or another of transformers'.
        compile: Compile the models with `torch.compile`.
        warmup: Passes of each model that do not count.
        repeats: Passes of each model that count.
        progress: Show a progress bar.

    Raises:
        ValueError: One of them is out of range.
    """

    height: int = 800
    width: int = 800
    batch_size: int = 1
    backbone: str | None = None
    num_latents: int = DEFAULT_NUM_LATENTS
    device: str = "cpu"
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    compile: bool = False
    warmup: int = 2
    repeats: int = 10
    progress: bool = True

    def __post_init__(self):
        check_image_size(self.height, self.width)
        check_at_least_one(batch_size=self.batch_size, repeats=self.repeats, num_latents=self.num_latents)
        if self.warmup < 0:
            raise UserError(f"warmup must be at least 0, not {self.warmup}.")
        if self.compile and self.warmup == 0:
            raise UserError("a compiled model is compiled in its first pass: warmup must be at least 1, not 0.")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")

    def settings(self, device: torch.device) -> dict[str, Any]:
        """What the times depend on, for the report."""
        return {
            "height": self.height,
            "width": self.width,
            "batch_size": self.batch_size,
            "backbone": self.backbone or OWN_BACKBONES,
            "num_latents": self.num_latents,
            "device": device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "compile": self.compile,
            "repeats": self.repeats,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "timm": timm.__version__,
        }


def compare_times(models: Sequence[str] = TIMED_BY_DEFAULT, **options: Any) -> BenchmarkReport:
    """Measure latency and, on CUDA, peak memory of the forward passes of models with random weights.

    Args:
        models: Names of `VARIANT_NAMES`. The first is what the others are compared with.
        options: Fields of [`TimingOptions`].

    Raises:
        ValueError: An argument is out of range.
        ImportError: The attention implementation is not installed.
    """
    how = TimingOptions(**options)
    check_models(models)
    check_sides(models, how.height, how.width)
    device, dtype = find_device(how.device), DTYPES[how.dtype]
    made: dict[str, nn.Module] = {}
    for name in models:
        model = make_variant(
            name,
            backbone=how.backbone,
            num_latents=how.num_latents,
            attn_implementation=how.attn_implementation,
        ).to(device, dtype)
        made[name] = torch.compile(model) if how.compile else model
    shape = (how.batch_size, 3, how.height, how.width)
    pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    timings = time_models(made, pixel_values, warmup=how.warmup, repeats=how.repeats, progress=how.progress)
    reference = timings[models[0]].latency
    rows = {
        name: asdict(timing) | {"ratio": timing.latency / reference if timing.latency and reference else None}
        for name, timing in timings.items()
    }
    return BenchmarkReport("time", how.settings(device), rows, _columns(models[0], device))


def _columns(reference: str, device: torch.device) -> dict[str, Callable[[dict[str, Any]], str]]:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "latency (ms)": lambda row: OUT_OF_MEMORY if row["latency"] is None else f"{1e3 * row['latency']:,.1f}",
        "quartiles (ms)": lambda row: " to ".join(f"{1e3 * value:,.1f}" for value in row["quartiles"] or ()),
        f"relative to {reference}": lambda row: "" if row["ratio"] is None else f"{row['ratio']:.2f}",
    }
    if device.type == "cuda":
        columns["peak memory (MiB)"] = lambda row: (
            "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}"
        )
    return columns


@torch.inference_mode()
def time_models(
    models: Mapping[str, nn.Module],
    pixel_values: torch.Tensor,
    *,
    warmup: int = 2,
    repeats: int = 10,
    progress: bool = False,
) -> dict[str, Timing]:
    """Measure the forward passes of several models on the same images.

    The models take turns, in alternating direction, so that whatever else the machine does hits all of them alike. A
    model that runs out of CUDA memory drops out.

    Args:
        models: Models by name, on the device of the images.
        pixel_values: `(B, C, H, W)`.
        warmup: Passes of each model that do not count.
        repeats: Passes of each model that count.
        progress: Show a progress bar.
    """
    device = pixel_values.device
    seconds: dict[str, list[float]] = {name: [] for name in models}
    peaks: dict[str, int] = dict.fromkeys(models, 0)
    running = list(models)
    with tqdm(total=(warmup + repeats) * len(models), desc="Timing", disable=not progress) as bar:
        for turn in range(warmup + repeats):
            for name in running[:: -1 if turn % 2 else 1]:
                try:
                    elapsed, peak = time_once(models[name], pixel_values, device)
                except torch.cuda.OutOfMemoryError:
                    running.remove(name)
                    seconds[name].clear()
                    torch.cuda.empty_cache()
                    continue
                finally:
                    bar.update()
                if turn >= warmup:
                    seconds[name].append(elapsed)
                    peaks[name] = max(peaks[name], peak)
    return {
        name: Timing(
            latency=statistics.median(taken) if taken else None,
            quartiles=_quartiles(taken),
            peak_memory=peaks[name] if taken and device.type == "cuda" else None,
        )
        for name, taken in seconds.items()
    }


def time_once(
    model: Callable[[torch.Tensor], Any], pixel_values: torch.Tensor, device: torch.device
) -> tuple[float, int]:
    """Seconds of one call and, on CUDA, the bytes that it took at its peak (0 elsewhere)."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    model(pixel_values)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - start
    return elapsed, torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0


def _quartiles(values: list[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return (values[0], values[0]) if values else None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
