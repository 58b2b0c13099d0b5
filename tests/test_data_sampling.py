# SPDX-License-Identifier: Apache-2.0
"""Which images go together: every image in its turn, the same number of batches everywhere."""

import itertools

import numpy as np
import pytest
import torch
from transformers.image_utils import SizeDict

from deperceiver_hf.data import TrainingBatchSampler, same_size_batches
from deperceiver_hf.data.sampling import ASPECT_RATIO_EDGES, repeat_factors
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


def test_repeat_factors_are_those_of_lvis():
    labels = [[0], [0, 0], [0, 1], [0, 2], [], [0], [0], [0]]
    # Class 0 is on 7 of 8 images, 1 and 2 on one each.
    factors = repeat_factors(labels, threshold=0.5)
    assert factors == pytest.approx([1, 1, 2, 2, 1, 1, 1, 1])
    assert repeat_factors(labels, threshold=0.1) == pytest.approx([1] * 8)
    with pytest.raises(ValueError, match="from 0 to 1"):
        repeat_factors(labels, threshold=0)


@pytest.mark.parametrize("grouped", [False, True])
def test_images_come_as_often_as_their_factors_say_and_epochs_are_of_one_length(grouped):
    repeats = np.ones(40)
    repeats[:3] = [2.0, 1.5, 3.25]
    repeats[10] = 1.25

    def batches(epoch, **process):
        images = Images(40)
        images.epoch = epoch
        return list(TrainingBatchSampler(images, 4, group_by_aspect_ratio=grouped, repeats=repeats, **process))

    counts = np.zeros(40)
    for epoch in range(400):
        shares = batches(epoch)
        assert len(shares) == 11  # 44 images
        keys = [key for batch in shares for key in batch]
        assert len(set(keys)) == len(keys) == 44
        assert all(key.repeat == 0 or key._replace(repeat=key.repeat - 1) in keys for key in keys)
        counts += np.bincount([key.place for key in keys], minlength=40)
    assert counts / 400 == pytest.approx(repeats, abs=0.08)
    if not grouped:
        shares = [batches(3, process_index=rank, num_processes=2) for rank in range(2)]
        assert shares == [batches(3)[0:10:2], batches(3)[1:10:2]]


def test_whether_a_batch_is_plain_is_asked_when_it_is_loaded():
    sampler = TrainingBatchSampler(Images(12), 2, process_index=1, num_processes=2, is_plain=lambda batch: batch >= 2)
    assert [{key.plain for key in batch} for batch in sampler] == [{False}, {False}, {True}]
    sampler.set_epoch(0, skip=1)
    assert [{key.plain for key in batch} for batch in sampler] == [{False}, {True}]
