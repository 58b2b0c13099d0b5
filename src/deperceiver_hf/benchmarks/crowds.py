# SPDX-License-Identifier: Apache-2.0
"""What a training step of DePerceiver v2 takes against the number of objects in an image: time and memory.

A step is forward pass, matching, loss and backward pass with random weights, images and objects. Seconds are measured.
Memory is followed array by array as in `cost`, but on real tensors and with gradients; on CUDA it is measured.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..machine import device_name, find_device
from ..models.loss_deperceiver_v2 import sigmoid_class_cost
from ..models.matching_deperceiver import hungarian_match, pad_targets
from .cost import MemoryCounter, check_at_least_one, check_image_size
from .report import BenchmarkReport
from .timing import time_once
from .variants import VARIANT_NAMES, make_variant

CROWDED_BY_DEFAULT = "deperceiver-v2-small"
DEFAULT_OBJECTS = (10, 50, 200, 1000)
CROWDED = tuple(name for name in VARIANT_NAMES if name.startswith("deperceiver-v2-"))


def compare_crowds(
    model: str = CROWDED_BY_DEFAULT,
    *,
    objects: Sequence[int] = DEFAULT_OBJECTS,
    height: int = 320,
    width: int = 320,
    batch_size: int = 4,
    backbone: str | None = None,
    device: str = "cpu",
    warmup: int = 1,
    repeats: int = 3,
    progress: bool = True,
) -> BenchmarkReport:
    """Measure a training step, and the matching alone, for several numbers of objects in every image.

    Args:
        model: One of `CROWDED`.
        objects: Numbers of objects.
        height, width: Size of the images in pixels.
        batch_size: Number of images.
        backbone: Name of a timm model; that of the preset if not given.
        device: See `find_device`.
        warmup: Steps that do not count.
        repeats: Steps that count.
        progress: Show a progress bar.

    Raises:
        ValueError: An argument is out of range.
    """
    if model not in CROWDED:
        raise UserError(f"crowds are measured with one of {', '.join(CROWDED)}, not with {model!r}.")
    if not objects or min(objects) < 0:
        raise UserError(f"objects must be numbers from 0 on, at least one, got {list(objects)}.")
    check_image_size(height, width)
    check_at_least_one(batch_size=batch_size, repeats=repeats)
    if warmup < 0:
        raise UserError(f"warmup must be at least 0, not {warmup}.")
    target = find_device(device)
    detector = make_variant(model, backbone=backbone).to(target).train()
    pixel_values = torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0)).to(target)
    rows = {}
    with tqdm(objects, desc="Training steps", disable=not progress) as bar:
        for number in bar:
            labels = random_objects(batch_size, number, detector.config.num_labels)
            labels = [{name: values.to(target) for name, values in image.items()} for image in labels]
            step, match = partial(_step, detector, labels), _matching(detector, pixel_values, labels)
            seconds, measured = _time(step, pixel_values, target, warmup, repeats)
            rows[f"{number} objects"] = {
                "objects": number,
                "seconds": seconds,
                "matching_seconds": _time(match, pixel_values, target, warmup, repeats)[0],
                "peak_memory": measured if target.type == "cuda" else _counted_memory(step, pixel_values),
            }
    return BenchmarkReport(
        kind="crowds",
        settings={
            "model": model,
            "backbone": backbone or "that of the preset",
            "height": height,
            "width": width,
            "batch_size": batch_size,
            "latents": detector.config.num_queries,
            "device": device_name(target),
            "threads": torch.get_num_threads() if target.type == "cpu" else None,
            "repeats": repeats,
            "torch": torch.__version__,
        },
        rows=rows,
        columns={
            "seconds": lambda row: f"{row['seconds']:.2f}",
            "of them matching": lambda row: f"{row['matching_seconds']:.3f}",
            "peak memory (MiB)": lambda row: f"{row['peak_memory'] / 2**20:,.0f}",
        },
        row_name="crowd",
    )


def random_objects(num_images: int, number: int, num_labels: int) -> list[dict[str, torch.Tensor]]:
    """Labels of images with so many objects each: random classes, boxes of 0.01 to 0.06 of the image; always the
    same."""
    generator = torch.Generator().manual_seed(0)

    def labels() -> dict[str, torch.Tensor]:
        centers = 0.05 + 0.9 * torch.rand(number, 2, generator=generator)
        sides = 0.01 + 0.05 * torch.rand(number, 2, generator=generator)
        classes = torch.randint(num_labels, (number,), generator=generator)
        return {"class_labels": classes, "boxes": torch.cat((centers, sides), dim=1)}

    return [labels() for _ in range(num_images)]


def _step(model: nn.Module, labels: list[dict[str, torch.Tensor]], pixel_values: torch.Tensor) -> None:
    model.zero_grad()
    model(pixel_values, labels=labels, token_share=1.0).loss.backward()  # training draws one of its own otherwise


@torch.no_grad()
def _matching(
    model: nn.Module, pixel_values: torch.Tensor, labels: list[dict[str, torch.Tensor]]
) -> Callable[[torch.Tensor], None]:
    """The matching of a step with what the model predicts: of all blocks, and of the selection."""
    outputs = model(pixel_values, labels=labels, token_share=1.0)
    blocks = [*outputs.auxiliary_outputs, {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
    stages = [
        [torch.stack([block[name] for block in blocks]) for name in ("logits", "pred_boxes")],
        [outputs.selection_logits[None], outputs.selection_boxes[None]],
    ]
    targets = pad_targets(labels, pixel_values.device)
    num_classes = model.config.num_labels

    def match(_: torch.Tensor) -> None:
        for stage in stages:
            hungarian_match(
                *stage, targets, model.config, num_classes=num_classes, class_cost_function=sigmoid_class_cost
            )

    return match


def _time(
    run: Callable[[torch.Tensor], None], pixel_values: torch.Tensor, device: torch.device, warmup: int, repeats: int
) -> tuple[float, int]:
    """Median of the seconds, and the most bytes that were measured (0 but on CUDA)."""
    taken = [time_once(run, pixel_values, device) for _ in range(warmup + repeats)][warmup:]
    return statistics.median(seconds for seconds, _ in taken), max(peak for _, peak in taken)


def _counted_memory(step: Callable[[torch.Tensor], None], pixel_values: torch.Tensor) -> int:
    with MemoryCounter() as memory:
        step(pixel_values)
    return memory.peak
