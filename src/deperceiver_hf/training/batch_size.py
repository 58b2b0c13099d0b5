# SPDX-License-Identifier: Apache-2.0
"""The largest batch that the memory has room for, with as many batches in a step as make the images asked for."""

import ctypes
import dataclasses
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import find_executable_batch_size, gather_object, send_to_device
from transformers.image_utils import SizeDict

from ..errors import UserError
from ..machine import available_memory
from ..models.detection_processing_deperceiver import resized_size
from .arguments import TrainingOptions
from .averaging import WeightAverage
from .building import build_model, training_mode
from .checkpoints import read_state
from .computation import Float32Depthwise
from .optimization import create_optimizer
from .processes import main_process_first
from .setup import TrainingData

logger = get_logger(__name__)

DEFAULT_IMAGES_PER_STEP = 16
SHARE_OF_MEMORY = 0.8  # of what is available, on a CPU: the rest is for what was not measured
SAMPLING_SECONDS = 0.002  # between two looks at the memory of the process


def resumed_batch_size(options: TrainingOptions, state: Path) -> TrainingOptions:
    """Options with the batch size that the run of a training state has chosen.

    Raises:
        ValueError: The state's steps have another number of images than asked for.
    """
    known = read_state(state)["fingerprint"]
    batch_size, batches = known["batch_size"], known["gradient_accumulation_steps"]
    if options.images_per_step not in (None, batch_size * batches):
        raise UserError(
            f"cannot resume from {state}: a step has {batch_size * batches} images of a process there, "
            f"--images_per_step asks for {options.images_per_step}."
        )
    logger.info(f"Batch size {batch_size}, {batches} of them in a step, as before.")
    return _with(options, batch_size, batches)


def fitting_batch_size(options: TrainingOptions, accelerator: Accelerator, data: TrainingData) -> TrainingOptions:
    """Options with the largest batch size that fits, the same on all processes; every process must call this.

    Steps are tried on a model that is thrown away, with the largest images and the most objects of the data. On a GPU
    it is the first batch size, from the largest down, whose step does not run out of memory. On a CPU, where running
    out of memory ends the process, the memory of a step is measured for batches of one and two images, and what larger
    ones need is estimated from that.

    Raises:
        ValueError: Not even one image fits, or the data have too few.
    """
    images = options.images_per_step or DEFAULT_IMAGES_PER_STEP
    most = len(data.dataset) // accelerator.num_processes
    sizes = [size for size in range(1, images + 1) if images % size == 0 and size <= most]
    if not sizes:
        raise UserError(f"{len(data.dataset)} images are too few for {accelerator.num_processes} processes.")
    trial = _Trial(options, accelerator, data)
    largest, why = _estimated(trial, sizes) if accelerator.device.type == "cpu" else _tried(trial, sizes)
    batch_size = min(gather_object([largest]))
    if batch_size == 0:
        raise UserError(f"not even a batch of one image fits into memory: {why}. {_LESS}")
    logger.info(
        f"Batch size {batch_size}, of 1 to {sizes[-1]}: {why}. A step takes {images} images of each "
        f"process (--gradient_accumulation_steps {images // batch_size})."
    )
    return _with(options, batch_size, images // batch_size)


_LESS = "A smaller model, smaller images or --gradient_checkpointing need less."


def _with(options: TrainingOptions, batch_size: int, batches: int) -> TrainingOptions:
    return dataclasses.replace(
        options, batch_size=batch_size, gradient_accumulation_steps=batches, images_per_step=None
    )


class _Trial:
    """Training steps on a model that nobody keeps."""

    def __init__(self, options: TrainingOptions, accelerator: Accelerator, data: TrainingData):
        self.options, self.accelerator, self.data = options, accelerator, data
        self.shapes = _largest_shapes(options, data)
        objects = data.dataset.data.dataset.with_format(None)["objects"]
        self.num_objects = max((len(one["category"]) for one in objects), default=0)
        self.num_objects *= (4 if options.mosaic else 1) * (2 if options.mixup else 1)

    def make_model(self) -> tuple[torch.nn.Module, torch.optim.Optimizer, WeightAverage | None]:
        """All that holds memory from step to step."""
        options, labels = self.options, self.data.train.label_names
        model = main_process_first(
            self.accelerator, lambda: build_model(options, labels, load_pretrained_backbone=False)
        )
        attention = options.attn_implementation
        if attention in (None, "auto"):  # on a CPU it is chosen later: this one needs the most
            attention = "eager" if self.accelerator.device.type == "cpu" else "sdpa"
        model.set_attn_implementation(attention)
        Float32Depthwise.of(model)
        model.to(self.accelerator.device)
        average = None if options.ema_decay is None else WeightAverage(model, options.ema_decay)
        return model, create_optimizer(model, options), average

    def make_batch(self, batch_size: int) -> dict[str, Any]:
        boxes = [[float(number % 4), 0.0, 4.0, 4.0] for number in range(self.num_objects)]
        objects = [{"bbox": box, "category_id": 0, "area": 16.0, "iscrowd": 0} for box in boxes]
        items = [
            {
                "image": torch.zeros(3, max(8, height), max(8, width), dtype=torch.uint8),
                "annotations": {"image_id": number, "annotations": objects},
            }
            for number, (height, width) in enumerate(islice(cycle(self.shapes), batch_size))
        ]
        batch = self.data.collate(items)
        return {key: batch[key] for key in ("pixel_values", "pixel_mask", "labels") if batch.get(key) is not None}

    def step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch_size: int) -> None:
        batch = send_to_device(self.make_batch(batch_size), self.accelerator.device)
        training_mode(model)
        with self.accelerator.autocast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _largest_shapes(options: TrainingOptions, data: TrainingData) -> list[tuple[int, int]]:
    """Height and width of the tallest and the widest image that training makes."""
    size = data.image_processor.size
    if not getattr(data.image_processor, "do_resize", True):
        shapes = data.dataset.image_sizes
    elif options.augmentation == "original" and size.shortest_edge:  # its crops have ratios of their own
        shapes = [(size.shortest_edge, size.longest_edge or 2 * size.shortest_edge)]
        shapes += [shape[::-1] for shape in shapes]
    else:
        target = SizeDict(**dict(size))
        shapes = [resized_size(image_size, target) for image_size in dict.fromkeys(data.dataset.image_sizes)]
    tallest, widest = (max(shapes, key=lambda shape: (shape[side], shape[1 - side])) for side in (0, 1))
    return sorted({tallest, widest}, key=lambda shape: -shape[0] * shape[1])


def _tried(trial: _Trial, sizes: list[int]) -> tuple[int, str]:
    """The largest of the sizes whose steps do not run out of memory, 0 if none; and why it is that."""
    remaining = sizes[:-1]

    def smaller() -> int:
        return remaining.pop() if remaining else 0

    @find_executable_batch_size(starting_batch_size=sizes[-1], reduce_batch_size_fn=smaller)
    def largest(batch_size: int) -> int:
        model, optimizer, average = trial.make_model()
        for _ in range(2):  # the second one has the moments of the optimizer beside it
            trial.step(model, optimizer, batch_size)
        del model, optimizer, average
        return batch_size

    try:
        found = largest()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        found = 0
    return found, f"tried with images of {_described(trial.shapes)} pixels"


def _estimated(trial: _Trial, sizes: list[int]) -> tuple[int, str]:
    """The largest of the sizes that should fit into the memory available, 0 if none; and how that was found."""
    room = int(SHARE_OF_MEMORY * available_memory()) - _bytes_of_cached_images(trial)
    _return_freed_memory()
    before = psutil.Process().memory_info().rss
    model, optimizer, average = trial.make_model()
    peaks = []
    for batch_size in (1, 1, 2):  # the first one prepares kernels and moments
        with _peak_memory() as peak:
            trial.step(model, optimizer, batch_size)
        peaks.append(max(peak) - before)
        if 2 * peaks[-1] > room:
            break
    del model, optimizer, average
    needed = max(peaks[:2])
    pixels = sum(tensor.nbytes for tensor in trial.make_batch(1).values() if torch.is_tensor(tensor))
    # A batch never costs nothing, whatever memory the first one had left to the second.
    each = max(peaks[2] - needed, needed // 10, 4 * pixels) if len(peaks) == 3 else needed
    fitting = [size for size in sizes if needed + (size - 1) * each <= room]
    gigabytes = [f"{number / 2**30:.2f} GiB" for number in (needed, each, max(0, room))]
    why = (
        f"a step takes {gigabytes[0]} with one image of {_described(trial.shapes[:1])} pixels and {gigabytes[1]} more "
        f"with each other one, and {gigabytes[2]} may be taken"
    )
    return max(fitting, default=0), why


def _return_freed_memory() -> None:
    """Let the system have what this process has freed: a step would take that first, and seem to need nothing."""
    gc.collect()
    with suppress(OSError, AttributeError):  # of other systems than Linux, or another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _bytes_of_cached_images(trial: _Trial) -> int:
    cached = sum(3 * height * width for height, width in trial.data.dataset.image_sizes)
    return cached if trial.options.cache_images else 0


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Looks at the memory of this process (bytes that are resident) until the block ends."""
    process, ended = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def look() -> None:
        while not ended.wait(SAMPLING_SECONDS):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def _described(shapes: list[tuple[int, int]]) -> str:
    return " and ".join(f"{height} x {width}" for height, width in shapes)
