# SPDX-License-Identifier: Apache-2.0
"""Invariants of the second architecture's loss, against references that are written out."""

import itertools
import math
import socket

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from conftest import tiny_v2_config, tiny_v2_model
from deperceiver_hf.models.denoising_deperceiver_v2 import make_denoising_queries
from deperceiver_hf.models.loss_deperceiver_v2 import (
    Predictions,
    classification_loss,
    detection_loss,
    prepare_targets,
    sigmoid_class_cost,
)
from deperceiver_hf.models.matching_deperceiver import (
    box_ious,
    center_to_corners,
    hungarian_match,
    matching_cost,
    pad_targets,
)
from test_loss import random_labels

CPU = torch.device("cpu")
CONFIG = tiny_v2_config()
LOSSES = ["focal", "varifocal", "mal"]


def random_predictions(stages=1, batch=3, queries=6, classes=5, seed=0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(stages, batch, queries, classes, generator=generator)
    return Predictions(logits, torch.rand(stages, batch, queries, 4, generator=generator) * 0.5 + 0.1)


def loss_of(blocks, labels, config=CONFIG, selection=None, is_query=None, denoised=None, denoising=None):
    targets = prepare_targets(labels, blocks.logits.shape[1], CPU)
    return detection_loss(selection, blocks, is_query, denoised, denoising, targets, config)


def match(predictions, labels, config=CONFIG, is_query=None):
    return hungarian_match(
        *predictions,
        pad_targets(labels, CPU),
        config,
        num_classes=config.num_labels,
        class_cost_function=sigmoid_class_cost,
        is_query=is_query,
    )


# --- classification


def reference_class_loss(logit: float, is_class: bool, iou: float, config) -> float:
    """Of one logit, as the papers write it."""
    p = 1 / (1 + math.exp(-logit))

    def cross_entropy(target):
        return -(target * math.log(p) + (1 - target) * math.log(1 - p))

    if config.classification_loss == "focal":
        alpha = config.focal_alpha if is_class else 1 - config.focal_alpha
        return -alpha * (1 - p if is_class else p) ** config.focal_gamma * math.log(p if is_class else 1 - p)
    if config.classification_loss == "varifocal":
        return iou * cross_entropy(iou) if is_class else 0.75 * p**config.focal_gamma * cross_entropy(0)
    return cross_entropy(iou**config.mal_gamma) if is_class else p**config.mal_gamma * cross_entropy(0)


@pytest.mark.parametrize("fields", [{}, {"focal_alpha": 0.4, "focal_gamma": 1.5, "mal_gamma": 1.2}])
@pytest.mark.parametrize("kind", LOSSES)
def test_classification_loss_is_that_of_its_paper(kind, fields):
    config = tiny_v2_config(classification_loss=kind, **fields)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 5, generator=generator)
    iou = torch.rand(20, generator=generator)
    one_hot = torch.nn.functional.one_hot(torch.arange(20) % 6, 6)[:, :5].float()  # every sixth has no class
    found = classification_loss(logits, one_hot, iou, config)
    for query, label in itertools.product(range(20), range(5)):
        expected = reference_class_loss(
            logits[query, label].item(), bool(one_hot[query, label]), iou[query].item(), config
        )
        assert found[query, label].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_is_that_of_torchvision(gamma):
    config = tiny_v2_config(classification_loss="focal", focal_gamma=gamma)
    logits = torch.randn(20, 5, requires_grad=True)
    one_hot = torch.nn.functional.one_hot(torch.arange(20) % 5, 5).float()
    loss = classification_loss(logits, one_hot, torch.rand(20), config)
    expected = sigmoid_focal_loss(logits, one_hot, config.focal_alpha, gamma)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(values.sum(), logits)[0] for values in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", LOSSES)
def test_classification_moves_no_box(kind):
    """The IoU in its target is a constant."""
    iou = torch.rand(4, requires_grad=True)
    logits = torch.randn(4, 5, requires_grad=True)
    one_hot = torch.nn.functional.one_hot(torch.arange(4), 5).float()
    classification_loss(logits, one_hot, iou, tiny_v2_config(classification_loss=kind)).sum().backward()
    assert iou.grad is None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("value", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_logits_have_finite_losses(kind, value):
    logits = torch.full((2, 5), value, requires_grad=True)
    one_hot = torch.nn.functional.one_hot(torch.arange(2), 5).float()
    loss = classification_loss(logits, one_hot, torch.rand(2), tiny_v2_config(classification_loss=kind)).sum()
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


# --- matching


def test_class_cost_is_the_difference_of_focal_losses():
    logits = torch.randn(30, 5)
    right, wrong = (
        sigmoid_focal_loss(logits, torch.full_like(logits, target), CONFIG.focal_alpha, CONFIG.focal_gamma)
        for target in (1.0, 0.0)
    )
    torch.testing.assert_close(sigmoid_class_cost(logits, CONFIG), right - wrong)


def test_matching_is_one_to_one_and_of_least_cost():
    predictions, labels = random_predictions(stages=2), random_labels([3, 0, 4])
    targets = pad_targets(labels, CPU)
    pairs = match(predictions, labels)
    cost = matching_cost(*predictions, targets, CONFIG, sigmoid_class_cost)
    for stage, image in itertools.product(range(2), range(3)):
        mine = (pairs.layer == stage) & (pairs.image == image)
        queries, objects = pairs.query[mine].tolist(), pairs.target[mine].tolist()
        assert sorted(objects) == list(range(targets.sizes[image]))
        assert len(set(queries)) == targets.sizes[image]
        total = sum(cost[stage, image, q, t].item() for q, t in zip(queries, objects, strict=True))
        best = min(
            sum(cost[stage, image, q, t].item() for t, q in enumerate(order))
            for order in itertools.permutations(range(6), targets.sizes[image])
        )
        assert total == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("objects", [2, 9])
def test_padding_queries_take_no_part(objects):
    """Whatever they predict, and also where there are fewer others than objects."""
    predictions, labels = random_predictions(batch=1), random_labels([objects])
    mask = torch.tensor([[True, False, True, True, False, True]])
    hidden = Predictions(*(values.clone() for values in predictions))
    hidden.logits[0, ~mask] = -1e4
    kept = Predictions(*(values[:, :, mask[0]] for values in predictions))
    loss, terms = loss_of(hidden, labels, is_query=mask)
    expected, expected_terms = loss_of(kept, labels)
    torch.testing.assert_close(loss, expected)
    for name, value in expected_terms.items():
        torch.testing.assert_close(terms[name], value)


# --- the loss


@pytest.mark.parametrize("kind", LOSSES)
def test_terms_are_sums_over_matched_queries_by_the_number_of_boxes(kind):
    config = tiny_v2_config(classification_loss=kind)
    predictions, labels = random_predictions(), random_labels([3, 0, 2])
    pairs = match(predictions, labels, config)
    classes, l1, giou = 0.0, 0.0, 0.0
    ious, one_hot = torch.zeros(3, 6), torch.zeros(3, 6, 5)
    for image, query, target in zip(pairs.image, pairs.query, pairs.target, strict=True):
        box, label = labels[image]["boxes"][target], labels[image]["class_labels"][target]
        predicted = predictions.boxes[0, image, query]
        l1 += (predicted - box).abs().sum().item()
        corners = center_to_corners(torch.stack((predicted, box)))
        giou += generalized_box_iou_loss(corners[0], corners[1]).item()
        ious[image, query] = box_ious(corners[0], corners[1])[0]
        one_hot[image, query, label] = 1
    for image, query, label in itertools.product(range(3), range(6), range(5)):
        classes += reference_class_loss(
            predictions.logits[0, image, query, label].item(),
            bool(one_hot[image, query, label]),
            ious[image, query].item(),
            config,
        )
    _, terms = loss_of(predictions, labels, config)
    assert terms["loss_bbox"].item() == pytest.approx(l1 / 5, rel=1e-4)
    assert terms["loss_giou"].item() == pytest.approx(giou / 5, rel=1e-4)
    assert terms["loss_class"].item() == pytest.approx(classes / 5, rel=1e-3)


def test_loss_is_the_weighted_sum_over_stages():
    config = tiny_v2_config(class_loss_coefficient=3, bbox_loss_coefficient=0.5, giou_loss_coefficient=7)
    blocks, selection = random_predictions(stages=3), random_predictions(seed=8)
    labels = random_labels([2, 1, 3])
    loss, terms = loss_of(blocks, labels, config, selection)
    weights = {"loss_class": 3, "loss_bbox": 0.5, "loss_giou": 7}
    suffixes = ("", "_0", "_1", "_selection")
    torch.testing.assert_close(loss, sum(w * terms[name + s] for name, w in weights.items() for s in suffixes))
    stages = [(f"_{i}" if i < 2 else "", Predictions(*(values[i : i + 1] for values in blocks))) for i in range(3)]
    for suffix, stage in [*stages, ("_selection", selection)]:
        _, alone_terms = loss_of(stage, labels, config)
        for name in weights:
            torch.testing.assert_close(terms[name + suffix], alone_terms[name])
    assert sum(name.startswith("class_error") for name in terms) == 1
    assert not any(value.requires_grad for value in terms.values())


def test_loss_of_denoising_is_that_of_known_pairs():
    """Positive queries restore their object, negative ones are nothing; hidden ones do not count."""
    config = tiny_v2_config(classification_loss="focal")
    labels, blocks = random_labels([3, 0, 1]), random_predictions()
    targets = pad_targets(labels, CPU)
    denoising = make_denoising_queries(targets, config)
    assert denoising.num_groups == 2
    denoised = random_predictions(stages=2, queries=12, seed=4)
    without, _ = loss_of(blocks, labels, config)
    loss, terms = loss_of(blocks, labels, config, denoised=denoised, denoising=denoising)
    expected = dict.fromkeys(("loss_class", "loss_bbox", "loss_giou"), 0.0)
    for stage, (image, target), group, sign in itertools.product(
        range(2), [(0, 0), (0, 1), (0, 2), (2, 0)], range(2), range(2)
    ):
        query = (group * 2 + sign) * 3 + target
        one_hot = torch.zeros(5)
        if sign == 0:
            one_hot[labels[image]["class_labels"][target]] = 1
            box, true = denoised.boxes[stage, image, query], labels[image]["boxes"][target]
            expected["loss_bbox"] += (box - true).abs().sum()
            expected["loss_giou"] += generalized_box_iou_loss(center_to_corners(box), center_to_corners(true))
        logits = denoised.logits[stage, image, query]
        expected["loss_class"] += sigmoid_focal_loss(logits, one_hot, config.focal_alpha, config.focal_gamma).sum()
    for name, value in expected.items():
        torch.testing.assert_close(terms[f"{name}_denoising"], value / (2 * 4))
    weights = {"loss_class": 1, "loss_bbox": 5, "loss_giou": 2}
    torch.testing.assert_close(
        loss - without, sum(weights[name] * value / 8 for name, value in expected.items()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_of_denoising_in_a_crowd_is_the_mean_over_the_objects_drawn(kind):
    """Each positive query is compared with the object that it was made of, wherever that stands among the others."""
    config = tiny_v2_config(classification_loss=kind, num_queries=6, num_denoising_queries=24)
    labels = random_labels([40, 2, 7])
    torch.manual_seed(0)
    denoising = make_denoising_queries(pad_targets(labels, CPU), config)
    assert (denoising.num_groups, denoising.num_objects) == (2, 6)
    denoised = random_predictions(stages=2, queries=24, seed=4)
    _, terms = loss_of(random_predictions(), labels, config, denoised=denoised, denoising=denoising)
    expected = dict.fromkeys(("loss_class", "loss_bbox", "loss_giou"), 0.0)
    for stage, image, group, sign, place in itertools.product(range(2), range(3), range(2), range(2), range(6)):
        if image == 1 and place >= 2:
            continue
        query = (group * 2 + sign) * 6 + place
        target = int(denoising.objects[image, query])
        box, true = denoised.boxes[stage, image, query], labels[image]["boxes"][target]
        one_hot = torch.zeros(5)
        if sign == 0:
            one_hot[labels[image]["class_labels"][target]] = 1
            expected["loss_bbox"] += (box - true).abs().sum()
            expected["loss_giou"] += generalized_box_iou_loss(center_to_corners(box), center_to_corners(true))
        iou, _ = box_ious(center_to_corners(box), center_to_corners(true))
        logits = denoised.logits[stage, image, query]
        expected["loss_class"] += classification_loss(logits, one_hot, iou, config).sum()
    for name, value in expected.items():
        torch.testing.assert_close(terms[f"{name}_denoising"], value / (2 * (6 + 2 + 6)))


@pytest.mark.parametrize("kind", LOSSES)
def test_perfect_predictions_cost_nothing(kind):
    labels = random_labels([3])
    logits, boxes = torch.full((1, 1, 6, 5), -50.0), torch.full((1, 1, 6, 4), 0.9)
    for index in range(3):
        logits[0, 0, index, labels[0]["class_labels"][index]] = 50.0
        boxes[0, 0, index] = labels[0]["boxes"][index]
    loss, terms = loss_of(Predictions(logits, boxes), labels, tiny_v2_config(classification_loss=kind))
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert terms["class_error"] == 0


def test_order_of_objects_does_not_matter():
    blocks, labels = random_predictions(stages=2), random_labels([4, 2, 5])
    shuffled = [{name: tensor.flip(0) for name, tensor in target.items()} for target in labels]
    torch.testing.assert_close(loss_of(blocks, labels)[0], loss_of(blocks, shuffled)[0])


@pytest.mark.parametrize("kind", LOSSES)
def test_no_object_anywhere(kind):
    blocks = Predictions(*(values.requires_grad_() for values in random_predictions(stages=2)))
    loss, terms = loss_of(blocks, random_labels([0, 0, 0]), tiny_v2_config(classification_loss=kind))
    loss.backward()
    assert loss.isfinite()
    assert terms["loss_bbox"] == terms["loss_giou"] == 0
    assert blocks.logits.grad.abs().sum() > 0


# --- errors and precision


@pytest.mark.parametrize(("which", "name"), [(0, "logits"), (1, "pred_boxes")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sizes", [[2, 1, 0], [0, 0, 0]])
@pytest.mark.parametrize("stage", ["selection", "blocks"])
def test_non_finite_predictions_are_named(which, name, value, sizes, stage):
    predictions = {"selection": random_predictions(), "blocks": random_predictions(stages=2)}
    predictions[stage][which][0, 1, 2, 3] = value
    with pytest.raises(FloatingPointError, match=name):
        loss_of(predictions["blocks"], random_labels(sizes), selection=predictions["selection"])


def test_bad_labels_are_refused():
    blocks, labels = random_predictions(), random_labels([2, 1, 1])
    with pytest.raises(ValueError, match=r"labels` of 2 images for predictions of 3"):
        loss_of(blocks, labels[:2])
    for wrong in (-1, 5, 90):
        with pytest.raises(ValueError, match=r"`class_labels` must be in \[0, 5\)"):
            loss_of(blocks, [{**labels[0], "class_labels": torch.tensor([0, wrong])}, *labels[1:]])
    with pytest.raises(ValueError, match=r"`labels\[1\]` needs"):
        loss_of(blocks, [labels[0], {"boxes": torch.zeros(0, 4)}, labels[2]])
    with pytest.raises(ValueError, match=r"`labels\[0\]`: 'class_labels' must be"):
        loss_of(blocks, [{**labels[0], "boxes": torch.rand(3, 4)}, *labels[1:]])
    with pytest.raises(FloatingPointError, match="target boxes"):
        loss_of(blocks, [{**labels[0], "boxes": torch.full((2, 4), torch.nan)}, *labels[1:]])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_lose_nothing_in_the_loss(dtype, kind):
    config, labels = tiny_v2_config(classification_loss=kind), random_labels([3, 0, 2])
    parts = (random_predictions(stages=2), random_predictions(seed=8), random_predictions(queries=12, seed=9))
    denoising = make_denoising_queries(pad_targets(labels, CPU), config)
    blocks, selection, denoised = (Predictions(*(values.to(dtype) for values in part)) for part in parts)
    given = {"config": config, "denoising": denoising}
    expected, _ = loss_of(blocks.float(), labels, selection=selection.float(), denoised=denoised.float(), **given)
    with torch.autocast("cpu", dtype=dtype):
        loss, terms = loss_of(blocks, labels, selection=selection, denoised=denoised, **given)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert all(value.dtype == torch.float32 for value in terms.values())


# --- several processes


def joint_batch(sizes):
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(5)), random_labels(sizes)


def deterministic_model():
    """Without noise, and without batch norms, whose statistics are those of one process."""
    return tiny_v2_model(num_denoising_queries=0, freeze_batch_norm=True, token_encoder="none").train()


def _gradients_in_a_process(rank: int, world_size: int, port: int, sizes: list[int], results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    images, labels = joint_batch(sizes)
    model = torch.nn.parallel.DistributedDataParallel(deterministic_model())
    share = slice(rank * 2, rank * 2 + 2)
    model(images[share], labels=labels[share]).loss.backward()
    # With denoising queries every parameter takes part too, though only one of the processes has objects.
    noised = torch.nn.parallel.DistributedDataParallel(tiny_v2_model().train())
    for _ in range(2):
        noised(images[share], labels=labels[share]).loss.backward()
    if rank == 0:
        # Not tensors: their storage would be gone with this process.
        results.put({n: p.grad.tolist() for n, p in model.module.named_parameters() if p.grad is not None})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[5, 1, 0, 2], pytest.param([0, 0, 3, 1], marks=pytest.mark.heavy)])
def test_gradients_of_two_processes_equal_those_of_the_joint_batch(sizes):
    """Everything is normalised by the mean number of boxes over processes, whoever has how many."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    processes = torch.multiprocessing.start_processes(
        _gradients_in_a_process, (2, port, sizes, results), nprocs=2, join=False, start_method="spawn"
    )
    distributed = results.get()
    processes.join()

    images, labels = joint_batch(sizes)
    model = deterministic_model()
    model(images, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert distributed.keys() == expected.keys()
    for name, gradient in distributed.items():
        torch.testing.assert_close(torch.tensor(gradient), expected[name], rtol=1e-3, atol=1e-5)
