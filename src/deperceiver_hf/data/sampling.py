# SPDX-License-Identifier: Apache-2.0
"""Which images go together into a batch, in training and in evaluation, and what loads the batches."""

import atexit
import contextlib
import multiprocessing
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.image_utils import SizeDict

from ..errors import UserError
from ..models.detection_processing_deperceiver import resized_size
from .dataset import DetectionDataset, SampleKey

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
ASPECT_RATIO_EDGES = (0.5, 1 / 1.4, 1.0, 1.4, 2.0)


class TrainingBatchSampler(Sampler[list[int]]):
    """One process' share of shuffled, full batches, optionally of images of similar aspect ratio.

    The batches of all processes together are a function of the data set's (seed, epoch) alone; process `r` of `W` gets
    batches `r, r + W, ...`, each process as many. Images that do not fill a batch for every process wait for another
    epoch.

    With `repeats` an epoch has as many images as they are in sum, rounded down: each image as often as its number
    says, where a fraction is the probability of one time more. The repeats of an image are augmented differently.

    Args:
        dataset: has a length, `seed`, `epoch`, `set_epoch`; grouping by aspect ratio also needs `aspect_ratios`.
        batch_size: images per batch.
        group_by_aspect_ratio: put images of similar width / height together, which saves padding. What is left over in
            the groups is batched in order of aspect ratio.
        process_index, num_processes: which process of the training this is, and of how many.
        repeats: (N,) at least 1, see [`repeat_factors`].
        is_plain: whether the images of a batch, counted in the epoch for this process, are not to be mixed with
            others; asked when the batch is to be loaded. `None` if none are mixed.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        *,
        group_by_aspect_ratio: bool = False,
        process_index: int = 0,
        num_processes: int = 1,
        repeats: np.ndarray | None = None,
        is_plain: Callable[[int], bool] | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.repeats = repeats
        self.images_per_epoch = len(dataset) if repeats is None else int(repeats.sum())
        if self.images_per_epoch < batch_size * num_processes:
            raise UserError(
                f"{self.images_per_epoch} images do not fill a batch of {batch_size} for each of {num_processes} "
                "processes. Take a smaller batch size or more images."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.ratios = np.asarray(dataset.aspect_ratios, dtype=np.float64) if group_by_aspect_ratio else None
        self.is_plain = is_plain
        self.skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch, of the data set too, and how many of its first batches to leave out as already seen."""
        self.dataset.set_epoch(epoch)
        self.skip = skip

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        return self.images_per_epoch // (self.batch_size * self.num_processes)

    def __iter__(self) -> Iterator[list[Any]]:
        state = np.random.SeedSequence((self.dataset.seed, self.dataset.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> 1))
        count = len(self) * self.num_processes * self.batch_size
        order = torch.randperm(len(self.dataset), generator=generator)
        if self.repeats is not None:
            order = _repeated(order, self.repeats, generator)
            order = order[torch.randperm(len(order), generator=generator)]
        chosen = order[:count].tolist()
        if self.ratios is None:
            batches = _split(chosen, self.batch_size)
        else:
            batches = self._grouped(chosen)
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        if self.repeats is None and self.is_plain is None:
            yield from batches[self.process_index :: self.num_processes][self.skip :]
            return
        counts: Counter[int] = Counter()
        keys = [[SampleKey(index, _next(counts, index)) for index in batch] for batch in batches]
        for number, batch in enumerate(keys[self.process_index :: self.num_processes]):
            if number >= self.skip:
                plain = self.is_plain is None or self.is_plain(number)
                yield [key._replace(plain=plain) for key in batch]

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


def _repeated(order: torch.Tensor, repeats: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """Each image as often as its number says, (sum of the numbers, rounded down,).

    Fractions are drawn by systematic sampling (Madow 1949) in the order given, a random one: an image comes once more
    with the probability of its fraction, up to the rounding, and their number is always the same.
    """
    whole = torch.from_numpy(np.floor(repeats).astype(np.int64))
    wanted = int(repeats.sum()) - int(whole.sum())
    fractions = torch.from_numpy(repeats % 1.0)[order]
    total = float(fractions.sum())
    if wanted:
        edges = fractions.cumsum(0) * (wanted / total)
        points = torch.arange(wanted) + torch.rand((), generator=generator, dtype=torch.float64)
        once_more = order[torch.searchsorted(edges, points).clamp(max=len(order) - 1)]
    else:
        once_more = order[:0]
    return torch.cat([order.repeat_interleave(whole[order]), once_more])


def _next(counts: Counter[int], index: int) -> int:
    """How often an index was asked for before."""
    counts[index] += 1
    return counts[index] - 1


def repeat_factors(labels: Sequence[Collection[int]], threshold: float) -> np.ndarray:
    """How often an epoch takes each image so that rare classes come more often (Gupta et al. 2019, LVIS,
    arXiv:1908.03195, section 5.3).

    A class that is on a part `f` of the images has the factor `max(1, sqrt(threshold / f))`, an image that of its
    rarest class, one without objects 1.

    Args:
        labels: of the objects of each image.
        threshold: part of the images, in (0, 1], below which a class counts as rare.

    Returns:
        (N,) float64, at least 1.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"the threshold of repeat factors is a part of the images, from 0 to 1, got {threshold}")
    images_with: Counter[int] = Counter(label for image in labels for label in set(image))
    factors = {label: max(1.0, (threshold * len(labels) / count) ** 0.5) for label, count in images_with.items()}
    return np.array([max((factors[label] for label in image), default=1.0) for image in labels], dtype=np.float64)


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
    with _signals_waiting():  # until the processes know what to do about them
        iterator = iter(loader)
    try:
        yield _naming_the_dead(iterator)
    finally:
        dismiss()
        iterator._shutdown_workers()  # type: ignore[attr-defined]  # what its `__del__` does, but at once
        atexit.unregister(dismiss)


@contextlib.contextmanager
def _signals_waiting() -> Iterator[None]:
    """Keep SIGINT and SIGTERM waiting, in this thread and in processes that it starts until they have a `_Worker`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # starting it would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # see `_signals_waiting`

    def dismiss(self) -> None:
        """Let SIGTERM end the processes."""
        self._dismissed.value = 1

    def _end_if_dismissed(self, number: int, frame: FrameType | None) -> None:
        if self._dismissed.value:
            os._exit(0)
