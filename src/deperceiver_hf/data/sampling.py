# SPDX-License-Identifier: Apache-2.0
"""Which images go together into a batch, in training and in evaluation."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from .sizes import resized_size

ASPECT_RATIO_EDGES = (0.5, 1 / 1.4, 1.0, 1.4, 2.0)


class TrainingBatchSampler(Sampler[list[int]]):
    """Shuffled batches of one size, optionally of images of similar aspect ratio, for ALL processes together.

    Hand the `DataLoader` made with it to `Accelerator.prepare`, which deals the batches out: process `r` of `W` gets
    batches `r, r + W, ...`. The number of batches is a multiple of `num_processes` and every batch is full, hence each
    process gets the same number and accelerate has nothing to even out.

    The order is a function of (seed, epoch) alone. The epoch is the data set's, so that there is only one: set it by
    `set_epoch` of the data set, of this sampler or of the prepared loader. Together with
    `accelerate.skip_first_batches` an epoch goes on in the middle with the very samples that were left.

    Args:
        dataset: has a length, `epoch`, `set_epoch`; grouping by aspect ratio also needs `aspect_ratios`.
        batch_size: images per batch and process.
        seed: of the shuffling.
        group_by_aspect_ratio: put images of similar width / height together, which saves padding. What is left over in
            the groups is batched in order of aspect ratio.
        num_processes: of the training.
        drop_last: leave out what does not fill a batch for each process, else fill up with images from the beginning.
    """

    def __init__(
        self,
        dataset,
        batch_size: int,
        *,
        seed: int = 0,
        group_by_aspect_ratio: bool = False,
        num_processes: int = 1,
        drop_last: bool = False,
    ):
        if batch_size < 1 or num_processes < 1:
            raise ValueError(f"batch_size and num_processes must be at least 1, got {batch_size} and {num_processes}")
        if len(dataset) == 0:
            raise ValueError("The data set has no images to sample from.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.drop_last = drop_last
        self.ratios = np.asarray(dataset.aspect_ratios, dtype=np.float64) if group_by_aspect_ratio else None
        if len(self) == 0:
            raise ValueError(
                f"{len(dataset)} images do not fill a batch of {batch_size} for each of {num_processes} processes. "
                "Take a smaller batch size or drop_last=False."
            )

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """Number of batches of all processes together."""
        per_round = self.batch_size * self.num_processes
        rounds = len(self.dataset) // per_round if self.drop_last else -(-len(self.dataset) // per_round)
        return rounds * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        state = np.random.SeedSequence((self.seed, self.dataset.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> 1))
        order = torch.randperm(len(self.dataset), generator=generator)
        missing = len(self) * self.batch_size - len(order)
        order = order.repeat(-(-missing // len(order)) + 1) if missing > 0 else order
        order = order[: len(self) * self.batch_size].tolist()
        if self.ratios is None:
            batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        else:
            batches = self._grouped(order)
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        yield from batches

    def _grouped(self, order: list[int]) -> list[list[int]]:
        batches, open_batches = [], defaultdict(list)
        groups = np.searchsorted(ASPECT_RATIO_EDGES, self.ratios, side="right")
        for index in order:
            open_batch = open_batches[int(groups[index])]
            open_batch.append(index)
            if len(open_batch) == self.batch_size:
                batches.append(open_batch.copy())
                open_batch.clear()
        left = sorted((index for batch in open_batches.values() for index in batch), key=lambda i: self.ratios[i])
        return batches + [left[start : start + self.batch_size] for start in range(0, len(left), self.batch_size)]


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
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    groups = defaultdict(list)
    for index, (height, width) in enumerate(image_sizes):
        groups[resized_size(height, width, size)].append(index)
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0] * item[0][1], item[0]))
    return [group[start : start + batch_size] for _, group in ordered for start in range(0, len(group), batch_size)]
