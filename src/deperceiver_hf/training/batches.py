# SPDX-License-Identifier: Apache-2.0
"""The data loader of one epoch."""

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def make_loader(
    dataset: Dataset,
    batches: Sampler[list[int]],
    collate: Callable[[list[Any]], Any],
    num_workers: int,
    pin_memory: bool,
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
