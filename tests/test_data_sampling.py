# SPDX-License-Identifier: Apache-2.0
"""Which images go together: every image in its turn, the same number of batches everywhere."""

import itertools

import numpy as np
import pytest
import torch
from transformers.image_utils import SizeDict

from deperceiver_hf.data import TrainingBatchSampler, same_size_batches
from deperceiver_hf.data.sampling import ASPECT_RATIO_EDGES
from deperceiver_hf.models.detection_processing_deperceiver import resized_size


class Images:
    """What the sampler needs of a data set: images of random aspect ratio."""

    def __init__(self, count: int, seed: int = 0):
        self.seed = seed
        self.epoch = 0
        self.aspect_ratios = np.exp(np.random.default_rng(0).normal(size=count) * 0.6)

    def __len__(self) -> int:
        return len(self.aspect_ratios)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("count", "num_processes"), [(41, 1), (41, 2), (41, 4), (40, 2), (17, 4)])
def test_each_process_gets_as_many_full_batches_of_different_images(grouped, count, num_processes):
    def share(rank, size):
        return TrainingBatchSampler(
            Images(count), 4, group_by_aspect_ratio=grouped, process_index=rank, num_processes=size
        )

    samplers = [share(rank, num_processes) for rank in range(num_processes)]
    shares = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in shares] == [len(sampler) for sampler in samplers]
    assert len({len(batches) for batches in shares}) == 1
    assert {len(batch) for batches in shares for batch in batches} == {4}
    indices = [index for batches in shares for batch in batches for index in batch]
    assert len(set(indices)) == len(indices) > count - 4 * num_processes


@pytest.mark.parametrize("grouped", [False, True])
def test_processes_together_see_the_batches_of_one(grouped):
    def batches(**process):
        return list(TrainingBatchSampler(Images(40), 4, group_by_aspect_ratio=grouped, **process))

    assert [batches(process_index=rank, num_processes=2) for rank in range(2)] == [batches()[0::2], batches()[1::2]]


def test_batches_before_an_interruption_are_left_out():
    sampler = TrainingBatchSampler(Images(41), 4)
    sampler.set_epoch(2, skip=3)
    rest = list(sampler)
    sampler.set_epoch(2)
    assert rest == list(sampler)[3:]


def test_images_left_out_of_one_epoch_come_in_another():
    sampler = TrainingBatchSampler(Images(7), 4)
    seen = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        seen |= {index for batch in sampler for index in batch}
    assert seen == set(range(7))


@pytest.mark.parametrize("grouped", [False, True])
def test_order_is_a_function_of_seed_and_epoch(grouped):
    unrelated = itertools.count()

    def batches(seed, epoch):
        sampler = TrainingBatchSampler(Images(41, seed), 4, group_by_aspect_ratio=grouped)
        sampler.set_epoch(epoch)
        torch.manual_seed(next(unrelated))
        return list(sampler)

    assert batches(0, 1) == batches(0, 1)
    assert len({str(batches(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


def test_grouped_batches_hold_similar_aspect_ratios():
    images = Images(400)
    groups = np.searchsorted(ASPECT_RATIO_EDGES, images.aspect_ratios, side="right")
    batches = list(TrainingBatchSampler(images, 4, group_by_aspect_ratio=True))
    mixed = [batch for batch in batches if len(set(groups[batch])) > 1]
    assert len(mixed) < len(ASPECT_RATIO_EDGES) + 1  # what was left over in the groups
    assert len({tuple(sorted(set(groups[batch]))) for batch in batches[:20]}) > 2  # groups are mixed in time


def test_no_or_no_full_batch_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        TrainingBatchSampler(Images(4), 0)
    with pytest.raises(ValueError, match="7 images do not fill a batch of 4 for each of 2 processes"):
        TrainingBatchSampler(Images(7), 4, num_processes=2)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_batches_are_of_one_size_and_hold_every_image_once(batch_size):
    size = {"shortest_edge": 100, "longest_edge": 167}
    generator = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in pair) for pair in generator.choice([40, 60, 61, 300], size=(50, 2))]
    batches = same_size_batches(sizes, batch_size, size)
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({resized_size(sizes[index], SizeDict(**size)) for index in batch}) == 1
