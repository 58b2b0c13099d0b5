# SPDX-License-Identifier: Apache-2.0
"""Cost against the number of tokens: what follows the backbone, over images of several sizes, as table and picture.

FLOPs and memory are counted, seconds are measured. The picture needs matplotlib.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..machine import device_name, find_device
from ..output_files import atomic_path, require_writable_file
from .cost import check_at_least_one, check_image_size, count_cost, count_peak_memory
from .report import BenchmarkReport, require_matplotlib
from .timing import time_models
from .variants import DEFAULT_NUM_LATENTS, OWN_BACKBONES, check_models, check_sides, make_variant, place_of_backbone

SCALED_BY_DEFAULT = (
    *("detr-32", "detr-16", "detr-multiscale"),
    *("deperceiver-16", "deperceiver-multiscale", "deperceiver-v2-base", "deperceiver-v2-large"),
)
TIMED_BY_DEFAULT = ("detr-32", "detr-16", "deperceiver-16", "deperceiver-v2-base", "deperceiver-v2-large")
DEFAULT_SIZES = (256, 384, 512, 768, 1024, 1536)


def compare_scaling(
    models: Sequence[str] = SCALED_BY_DEFAULT,
    *,
    sizes: Sequence[int] = DEFAULT_SIZES,
    timed: Sequence[str] = TIMED_BY_DEFAULT,
    backbone: str | None = None,
    num_latents: int = DEFAULT_NUM_LATENTS,
    device: str = "cpu",
    warmup: int = 1,
    repeats: int = 3,
    progress: bool = True,
) -> BenchmarkReport:
    """Count and measure what follows the backbone for square images of several sizes.

    Args:
        models: Names of [`~deperceiver_hf.benchmarks.variants.VARIANT_NAMES`].
        sizes: Sides of the images in pixels.
        timed: Those of the models that are run, one image at a time in float32 with `"sdpa"` attention. The others
            are counted only.
        backbone: Name of a timm model for all; if not given, see [`~deperceiver_hf.benchmarks.variants.make_variant`].
        num_latents: Length of the latent array of the first DePerceiver.
        device: See `find_device`.
        warmup: Passes of each model that do not count.
        repeats: Passes of each model that count.
        progress: Show a progress bar.

    Raises:
        ValueError: An argument is out of range.
    """
    check_models(models)
    if others := [name for name in timed if name not in models]:
        raise UserError(f"{', '.join(others)} cannot be timed without being among the models.")
    if not sizes:
        raise UserError("sizes must name at least one side of an image.")
    for size in sizes:
        check_image_size(size, size)
        check_sides(models, size, size)
    check_at_least_one(repeats=repeats, num_latents=num_latents)
    if warmup < 0:
        raise UserError(f"warmup must be at least 0, not {warmup}.")
    target = find_device(device)
    make = partial(make_variant, backbone=backbone, num_latents=num_latents)
    rows: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(sizes) * len(models), desc="Counting and timing", disable=not progress) as bar:
        for size in sizes:
            for name in models:
                rows[f"{name}, {size}"] = {
                    "model": name,
                    "size": size,
                    **asdict(count_cost(partial(make, name, attn_implementation="eager"), size, size)),
                    "peak_memory_sdpa": count_peak_memory(partial(make, name), size, size),
                    **(_time_parts(make(name), size, target, warmup, repeats) if name in timed else {}),
                }
                bar.update()
    return BenchmarkReport(
        kind="scaling",
        settings={
            "backbone": backbone or OWN_BACKBONES,
            "num_latents": num_latents,
            "device": device_name(target) if timed else None,
            "threads": torch.get_num_threads() if timed and target.type == "cpu" else None,
            "repeats": repeats if timed else None,
            "torch": torch.__version__,
        },
        rows=rows,
        columns={
            "tokens": lambda row: f"{row['tokens']:,}",
            "GFLOPs": lambda row: f"{row['flops_after_backbone'] / 1e9:,.1f}",
            "peak memory (MiB)": lambda row: f"{row['peak_memory'] / 2**20:,.0f}",
            "with sdpa (MiB)": lambda row: f"{row['peak_memory_sdpa'] / 2**20:,.0f}",
            "seconds": lambda row: _seconds(row.get("latency")),
            "backbone GFLOPs": lambda row: f"{row['backbone_flops'] / 1e9:,.1f}",
            "backbone seconds": lambda row: _seconds(row.get("backbone_latency")),
        },
    )


def draw_scaling(report: BenchmarkReport, path: str | os.PathLike) -> None:
    """Write a PNG of a report of [`compare_scaling`]: FLOPs, memory and seconds against the tokens, logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "flops_after_backbone": ("FLOPs (counted)", 1),
        "peak_memory": ("peak memory in MiB (counted)\nplain attention; dotted: sdpa", 2**20),
        "latency": (f"seconds (measured)\n{_describe_device(report.settings)}", 1),
    }
    figure = Figure(figsize=(14, 5), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row["model"] for row in report.rows.values()))
    for axes, (key, (title, unit)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for index, name in enumerate(names):
            style = {"color": f"C{index}", "linestyle": "--" if name.startswith("detr") else "-"}
            axes.plot(*_curve(report, name, key, unit), marker="o", markersize=3, label=name, **style)
            if key == "peak_memory":
                axes.plot(*_curve(report, name, "peak_memory_sdpa", unit), color=f"C{index}", linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle("After the backbone, one image")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def check_figure(path: str | os.PathLike) -> Path:
    """Refuse a file for the picture that cannot be written.

    Raises:
        ImportError: There is no matplotlib.
        ValueError: It does not end in `.png`.
        OSError: It cannot be written.
    """
    require_matplotlib()
    if Path(path).suffix != ".png":
        raise UserError(f"the figure {path} must end in .png.")
    return require_writable_file(path)


class FixedBackbone(nn.Module):
    """Stands in for a backbone and returns the same feature maps at once, so that only what follows takes time."""

    def __init__(self, feature_maps: Any, strides: list[int] | None):
        super().__init__()
        self.feature_maps = feature_maps
        self.strides = strides

    def forward(self, *args, **kwargs) -> Any:
        return self.feature_maps


class BackboneCall(nn.Module):
    """Calls a backbone as its model did."""

    def __init__(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]):
        super().__init__()
        self.backbone, self.args, self.kwargs = backbone, args, kwargs

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.backbone(*self.args, **self.kwargs)


@torch.inference_mode()
def split_at_backbone(model: nn.Module, pixel_values: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """The backbone of a model for these images `(B, 3, H, W)`, and the model without it, both to be called with them.

    The model is changed in place.
    """
    calls = []
    holder, name = place_of_backbone(model)
    backbone = getattr(holder, name)
    with backbone.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True):
        model(pixel_values)
    args, kwargs, feature_maps = calls[0]
    setattr(holder, name, FixedBackbone(feature_maps, getattr(backbone, "strides", None)))
    return BackboneCall(backbone, args, kwargs), model


def _time_parts(model: nn.Module, size: int, device: torch.device, warmup: int, repeats: int) -> dict[str, Any]:
    pixel_values = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        backbone, rest = split_at_backbone(model.to(device), pixel_values)
    except torch.cuda.OutOfMemoryError:
        return {"latency": None, "backbone_latency": None}
    parts = {"backbone": backbone, "rest": rest}
    timings = time_models(parts, pixel_values, warmup=warmup, repeats=repeats)
    return {
        "latency": timings["rest"].latency,
        "quartiles": timings["rest"].quartiles,
        "backbone_latency": timings["backbone"].latency,
        "measured_peak_memory": timings["rest"].peak_memory,
    }


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _describe_device(settings: dict[str, Any]) -> str:
    if settings["device"] is None:
        return "none"
    threads = settings["threads"]
    return settings["device"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def _curve(report: BenchmarkReport, name: str, key: str, unit: float) -> tuple[list[int], list[float]]:
    """Tokens and values of a model, where there are any."""
    rows = [row for row in report.rows.values() if row["model"] == name and row.get(key) is not None]
    return [row["tokens"] for row in rows], [row[key] / unit for row in rows]
