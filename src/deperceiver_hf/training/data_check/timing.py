# SPDX-License-Identifier: Apache-2.0
"""How long a training will take here: a few of its steps, measured."""

import math
import os
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...data import DetectionCollator, DetectionData, DetectionDataset
from ...machine import choose_precision, choose_threads, device_name, fastest_attention, find_device
from ..arguments import TrainingOptions
from ..building import build_model, training_mode
from ..computation import attention_shape
from ..optimization import create_optimizer
from ..pace import minutes_in_words

MEASURED_STEPS = 3
ENOUGH_SECONDS = 15.0  # after which no further step is measured


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step.

    Attributes:
        step: Forward and backward pass, and the optimizer.
        loading: Reading the images of a batch and resizing them, in one process.
        steps: How many were measured.
        device: Name of what computes.
        precision: What it computes in.
        busy: A sentence where other programs share the cores.
    """

    step: float
    loading: float
    steps: int
    device: str
    precision: str
    busy: str = ""

    def minutes(self, options: TrainingOptions, num_images: int) -> float:
        """Minutes of a run without its evaluations."""
        accumulated = options.gradient_accumulation_steps
        batches = max(1, math.ceil(num_images / options.batch_size))
        total = batches * options.epochs
        if options.max_steps is not None:
            total = min(total, options.max_steps * accumulated)
        # Worker processes load while the model computes; where there is no accelerator they take its cores.
        beside = options.num_workers > 0 and self.device != device_name(torch.device("cpu"))
        batch = max(self.step, self.loading / max(1, options.num_workers)) if beside else self.step + self.loading
        minutes = total * batch / 60
        return min(minutes, options.max_minutes) if options.max_minutes is not None else minutes

    def sentence(self, options: TrainingOptions, num_images: int) -> str:
        """The time of a run, and on what it rests."""
        duration = minutes_in_words(self.minutes(options, num_images))
        return (
            f"About {duration} on this machine, evaluations left out: an estimate from {self.steps} steps on "
            f"{self.device} ({self.precision}), {self.step:.2f} s each and "
            f"{self.loading:.2f} s to load the {options.batch_size} images.{self.busy}"
        )


def measure_step(options: TrainingOptions, data: DetectionData, image_processor: Any) -> StepTime:
    """Time some steps of a run on its first images, with a model of random weights.

    Args:
        options: Of the run.
        data: To train on.
        image_processor: Of the run.

    Raises:
        RuntimeError: The memory is not enough, among others.
    """
    device, busy = find_device(), _busy()
    threads = torch.get_num_threads()
    torch.set_num_threads(choose_threads(device))  # as a run does: more of them are slower where cores are busy
    try:
        return replace(_measure(options, data, image_processor, device), busy=busy)
    finally:
        torch.set_num_threads(threads)


def _measure(options: TrainingOptions, data: DetectionData, image_processor: Any, device: torch.device) -> StepTime:
    precision = choose_precision(options.precision, device)
    model = build_model(options, data.label_names, load_pretrained_backbone=False).to(device)
    if options.attn_implementation in (None, "auto"):
        shape = attention_shape(options, model.config)
        model.set_attn_implementation(fastest_attention(shape, precision.dtype, device))
    training_mode(model)
    optimizer = create_optimizer(model, options)
    dataset = DetectionDataset(data, on_bad_image="skip", max_image_pixels=options.max_image_pixels)
    collate = DetectionCollator(image_processor, do_resize=True)
    loading, computing = [], []
    begin = time.perf_counter()
    for number in range(MEASURED_STEPS + 1):  # the first warms up
        clock = time.perf_counter()
        places = [(number * options.batch_size + place) % len(dataset) for place in range(options.batch_size)]
        batch = collate([dataset[place] for place in places])
        loading.append(time.perf_counter() - clock)
        clock = time.perf_counter()
        with torch.autocast(device.type, precision.dtype, enabled=precision.name != "no"):
            loss = model(
                pixel_values=batch["pixel_values"].to(device),
                pixel_mask=batch["pixel_mask"].to(device),
                labels=[{name: value.to(device) for name, value in label.items()} for label in batch["labels"]],
            ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the device
        computing.append(time.perf_counter() - clock)
        if number and time.perf_counter() - begin > ENOUGH_SECONDS:
            break
    return StepTime(
        step=statistics.median(computing[1:]),
        loading=statistics.median(loading[1:]),
        steps=len(computing) - 1,
        device=device_name(device),
        precision={"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision.name],
    )


def _busy() -> str:
    """Whether more is running than there are cores, in a sentence."""
    cores = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return ""
    if load <= cores:
        return ""
    return f" The {cores} cores were shared (load {load:.1f}): alone, it is faster."
