# SPDX-License-Identifier: Apache-2.0
"""Which images go together into a batch, in training and in evaluation, and what loads the batches."""

import atexit
import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.image_utils import SizeDict

from ..errors import UserError
from ..models.detection_processing_deperceiver import resized_size
from .dataset import DetectionDataset

ASPECT_RATIO_EDGES = (0.5, 1 / 1.4, 1.0, 1.4, 2.0)


class TrainingBatchSampler(Sampler[list[int]]):
    """One process' share of shuffled, full batches, optionally of images of similar aspect ratio.

    The batches of all processes together are a function of the data set's (seed, epoch) alone; process `r` of `W` gets
    batches `r, r + W, ...`, each process as many. Images that do not fill a batch for every process wait for another
    epoch.

    Args:
        dataset: has a length, `seed`, `epoch`, `set_epoch`; grouping by aspect ratio also needs `aspect_ratios`.
        batch_size: images per batch.
        group_by_aspect_ratio: put images of similar width / height together, which saves padding. What is left over in
            the groups is batched in order of aspect ratio.
        process_index, num_processes: which process of the training this is, and of how many.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        *,
        group_by_aspect_ratio: bool = False,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if len(dataset) < batch_size * num_processes:
            raise UserError(
                f"{len(dataset)} images do not fill a batch of {batch_size} for each of {num_processes} processes. "
                "Take a smaller batch size or more images."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.ratios = np.asarray(dataset.aspect_ratios, dtype=np.float64) if group_by_aspect_ratio else None
        self.skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch, of the data set too, and how many of its first batches to leave out as already seen."""
        self.dataset.set_epoch(epoch)
        self.skip = skip

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        return len(self.dataset) // (self.batch_size * self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        state = np.random.SeedSequence((self.dataset.seed, self.dataset.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> 1))
        count = len(self) * self.num_processes * self.batch_size
        order = torch.randperm(len(self.dataset), generator=generator)[:count].tolist()
        if self.ratios is None:
            batches = _split(order, self.batch_size)
        else:
            batches = self._grouped(order)
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        yield from batches[self.process_index :: self.num_processes][self.skip :]

    def _grouped(self, order: list[int]) -> list[list[int]]:
        ratios = np.asarray(self.ratios)
        batches: list[list[int]] = []
        open_batches: defaultdict[int, list[int]] = defaultdict(list)
        groups = np.searchsorted(ASPECT_RATIO_EDGES, ratios, side="right")
        for index in order:
            open_batch = open_batches[int(groups[index])]
            open_batch.append(index)
            if len(open_batch) == self.batch_size:
                batches.append(open_batch.copy())
                open_batch.clear()
        left = sorted((index for batch in open_batches.values() for index in batch), key=lambda i: ratios[i])
        return batches + _split(left, self.batch_size)


def same_size_batches(
    image_sizes: Sequence[tuple[int, int]], batch_size: int, size: Mapping[str, int | None]
) -> list[list[int]]:
    """Batches of images that have one size after the image processor's resize, for evaluation.

    None of them needs padding, so that no prediction depends on the others in the batch. Every image is in exactly one
    batch. The batches do not depend on the number of processes: process `r` of `W` takes `batches[r::W]` and none
    twice; the numbers of batches may then differ by one. Large images come first.

    Args:
        image_sizes: height and width of every image, in pixels.
        batch_size: the most images in a batch.
        size: the image processor's `size`.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    target = SizeDict(**size)
    groups = defaultdict(list)
    for index, image_size in enumerate(image_sizes):
        groups[resized_size(image_size, target)].append(index)
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0] * item[0][1], item[0]))
    return [batch for _, group in ordered for batch in _split(group, batch_size)]


def _split(indices: list[int], batch_size: int) -> list[list[int]]:
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def make_loader(
    dataset: Dataset,
    batches: Sampler[list[int]] | Sequence[list[int]],
    collate: Callable[[list[Any]], Any],
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """The loader of all that this package loads; iterate over it by [`iterating`].

    It draws nothing from torch's global random state. Its processes may be forked or spawned, leave signals to the
    process that they load for, and end with it.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_Worker() if num_workers else None,
        generator=torch.Generator(),
    )


@contextlib.contextmanager
def iterating(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """An iterator over the batches of a loader of [`make_loader`], whose processes end with the block in any case.

    Raises:
        RuntimeError: one of them was killed.

    Without it they would live as long as something refers to the iterator: the traceback of an error does.
    """
    if not loader.num_workers:
        yield iter(loader)
        return
    dismiss = loader.worker_init_fn.dismiss  # type: ignore[union-attr]  # a `_Worker`
    atexit.register(dismiss)  # before multiprocessing waits for its children
    iterator = iter(loader)
    try:
        yield _naming_the_dead(iterator)
    finally:
        dismiss()
        iterator._shutdown_workers()  # type: ignore[attr-defined]  # what its `__del__` does, but at once
        atexit.unregister(dismiss)


def _naming_the_dead(iterator: Any) -> Iterator[Any]:
    """The batches; if a process that loads them has died, an error that says so, whatever was noticed of it first."""
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            for process in iterator._workers:
                process.join(timeout=0.2)
            dead = [process.pid for process in iterator._workers if process.exitcode is not None]
            if not dead:
                raise
            raise RuntimeError(f"DataLoader worker (pid {dead[0]}) has died ({type(error).__name__}).") from error
        yield batch


class _Worker:
    """Makes a process that loads data ignore what is sent to the whole group, as Ctrl-C in a terminal is.

    The main process still needs it for the step that it finishes. Then it dismisses it, and SIGTERM, which
    multiprocessing ends its children by, ends it.
    """

    def __init__(self) -> None:
        self._dismissed = RawValue("b", 0)  # shared with the processes

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end_if_dismissed)

    def dismiss(self) -> None:
        """Let SIGTERM end the processes."""
        self._dismissed.value = 1

    def _end_if_dismissed(self, number: int, frame: FrameType | None) -> None:
        if self._dismissed.value:
            os._exit(0)
