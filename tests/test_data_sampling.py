# SPDX-License-Identifier: Apache-2.0
"""Which images go together: every image in its turn, the same number of batches everywhere."""

import itertools

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from transformers.image_utils import SizeDict

from deperceiver_hf import image_processing_deperceiver
from deperceiver_hf.data import TrainingBatchSampler, resized_size, same_size_batches
from deperceiver_hf.data.sampling import ASPECT_RATIO_EDGES


class Images:
    """What the sampler needs of a data set: images of random aspect ratio."""

    def __init__(self, count: int):
        self.epoch = 0
        self.aspect_ratios = np.exp(np.random.default_rng(0).normal(size=count) * 0.6)

    def __len__(self) -> int:
        return len(self.aspect_ratios)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("count", "num_processes"), [(41, 1), (41, 2), (41, 4), (40, 2), (17, 4)])
def test_each_process_gets_as_many_full_batches_of_different_images(grouped, drop_last, count, num_processes):
    sampler = TrainingBatchSampler(
        Images(count), 4, group_by_aspect_ratio=grouped, drop_last=drop_last, num_processes=num_processes
    )
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert {len(batch) for batch in batches} == {4}
    indices = [index for batch in batches for index in batch]
    if drop_last:
        assert len(set(indices)) == len(indices) > count - 4 * num_processes
    else:
        assert set(indices) == set(range(count))
        assert len(indices) - count < 4 * num_processes
    # accelerate deals them out without adding or leaving out any
    shards = [list(BatchSamplerShard(sampler, num_processes, rank)) for rank in range(num_processes)]
    assert shards == [batches[rank::num_processes] for rank in range(num_processes)]


def test_fewer_images_than_a_batch_are_repeated():
    sampler = TrainingBatchSampler(Images(3), 8, num_processes=2)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [8, 8]
    assert {index for batch in batches for index in batch} == {0, 1, 2}


@pytest.mark.parametrize("grouped", [False, True])
def test_order_is_a_function_of_seed_and_epoch(grouped):
    unrelated = itertools.count()

    def batches(seed, epoch):
        sampler = TrainingBatchSampler(Images(41), 4, seed=seed, group_by_aspect_ratio=grouped)
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


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 2, "num_processes": 0}])
def test_wrong_numbers_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        TrainingBatchSampler(Images(4), **arguments)


def test_nothing_to_sample_is_refused():
    with pytest.raises(ValueError, match="no images"):
        TrainingBatchSampler(Images(0), 2)
    with pytest.raises(ValueError, match="drop_last=False"):
        TrainingBatchSampler(Images(3), 4, drop_last=True)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_batches_are_of_one_size_and_hold_every_image_once(batch_size):
    size = {"shortest_edge": 100, "longest_edge": 167}
    generator = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in pair) for pair in generator.choice([40, 60, 61, 300], size=(50, 2))]
    batches = same_size_batches(sizes, batch_size, size)
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({resized_size(*sizes[index], size) for index in batch}) == 1


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 800, "longest_edge": 1333},
        {"shortest_edge": 64},
        {"max_height": 90, "max_width": 70},
        {"height": 30, "width": 20},
    ],
)
def test_sizes_are_those_of_the_image_processor(size):
    generator = np.random.default_rng(0)
    pairs = [*generator.integers(1, 3000, size=(300, 2)).tolist(), (1, 1), (1, 3000), (3000, 2), (480, 640), (2, 1435)]
    for height, width in pairs:
        expected = image_processing_deperceiver.resized_size((height, width), SizeDict(**size))
        assert resized_size(height, width, size) == tuple(expected)


def test_unknown_kinds_of_size_are_refused():
    with pytest.raises(ValueError, match="shortest_edge"):
        resized_size(10, 10, {"longest_edge": 5})
