# SPDX-License-Identifier: Apache-2.0
"""The batches of one process in one epoch, from where an interruption left them."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import TrainingBatchSampler


class ProcessBatches(Sampler[list[int]]):
    """This process' share of the batches that `TrainingBatchSampler` makes for all processes.

    Batch `i` of the sampler goes to process `i % num_processes`; all processes have the same number of batches.

    Args:
        batches: The batches of all processes.
        process_index: Which process this is.
    """

    def __init__(self, batches: TrainingBatchSampler, process_index: int):
        self.batches = batches
        self.process_index = process_index
        self.skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch, and how many of its batches to leave out because they were seen before an interruption."""
        self.batches.set_epoch(epoch)
        self.skip = skip

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        return len(self.batches) // self.batches.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        yield from list(self.batches)[self.process_index :: self.batches.num_processes][self.skip :]


def make_loader(
    dataset: Dataset, batches: ProcessBatches, collate: Callable[[list[Any]], Any], num_workers: int, pin_memory: bool
) -> DataLoader:
    """Loader of the epoch that `batches` is set to. It draws nothing from torch's global random state."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_main_process,
        generator=torch.Generator(),
    )


def _leave_signals_to_main_process(worker_id: int) -> None:
    # Ctrl-C reaches the workers too; the main process still needs them for the step that it finishes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
