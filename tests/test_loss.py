# SPDX-License-Identifier: Apache-2.0
"""Invariants of matching and loss, and their behaviour at the edges."""

import itertools

import pytest
import torch
from torchvision.ops import generalized_box_iou as reference_giou

from conftest import tiny_config, tiny_model
from deperceiver_hf.models import matching_deperceiver
from deperceiver_hf.models.loss_deperceiver import set_prediction_loss
from deperceiver_hf.models.matching_deperceiver import (
    center_to_corners,
    generalized_box_iou,
    hungarian_match,
    matching_cost,
    pad_targets,
)

CONFIG = tiny_config(num_queries=6)


def random_predictions(layers=1, batch=3, queries=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, batch, queries, classes + 1, generator=generator)
    boxes = torch.rand(layers, batch, queries, 4, generator=generator) * 0.5 + 0.1
    return logits, boxes


def random_labels(sizes, classes=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(classes, (size,), generator=generator),
            "boxes": torch.rand(size, 4, generator=generator) * 0.5 + 0.1,
        }
        for size in sizes
    ]


def test_giou_is_that_of_torchvision():
    boxes = center_to_corners(torch.rand(40, 4, generator=torch.Generator().manual_seed(0)))
    pairwise = generalized_box_iou(boxes[:20, None], boxes[None, 20:])
    torch.testing.assert_close(pairwise, reference_giou(boxes[:20], boxes[20:]))
    torch.testing.assert_close(generalized_box_iou(boxes[:20], boxes[20:]), pairwise.diagonal())


def test_giou_of_empty_boxes_is_finite():
    empty = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    value = generalized_box_iou(empty, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    value.sum().backward()
    assert value.isfinite().all()
    assert empty.grad.isfinite().all()


def test_matching_is_one_to_one_and_of_least_cost():
    logits, boxes = random_predictions(layers=2)
    labels = random_labels([3, 0, 4])
    targets = pad_targets(labels, logits.device)
    pairs = hungarian_match(logits, boxes, targets, CONFIG)
    cost = matching_cost(logits, boxes, targets, CONFIG)
    for layer, image in itertools.product(range(2), range(3)):
        mine = (pairs.layer == layer) & (pairs.image == image)
        queries, objects = pairs.query[mine].tolist(), pairs.target[mine].tolist()
        size = targets.sizes[image]
        assert sorted(objects) == list(range(size))
        assert len(set(queries)) == size
        total = sum(cost[layer, image, q, t].item() for q, t in zip(queries, objects, strict=True))
        best = min(
            sum(cost[layer, image, q, t].item() for t, q in enumerate(order))
            for order in itertools.permutations(range(6), size)
        )
        assert total == pytest.approx(best, abs=1e-5)


def test_matching_of_an_image_does_not_depend_on_the_batch():
    logits, boxes = random_predictions()
    labels = random_labels([3, 6, 1])
    together = hungarian_match(logits, boxes, pad_targets(labels, logits.device), CONFIG)
    for image in range(3):
        alone = hungarian_match(
            logits[:, image : image + 1],
            boxes[:, image : image + 1],
            pad_targets(labels[image : image + 1], logits.device),
            CONFIG,
        )
        mine = together.image == image
        assert together.query[mine].tolist() == alone.query.tolist()
        assert together.target[mine].tolist() == alone.target.tolist()


@pytest.mark.parametrize("sizes", [[5, 0, 2, 30, 3, 3, 0], [0, 0, 0, 0, 0, 0, 0], [30, 1, 1, 1, 1, 1, 31]])
@pytest.mark.parametrize("most", [1, 200, 800])
def test_a_crowded_image_does_not_make_the_others_longer(sizes, most, monkeypatch):
    """Parts of a batch are compared by themselves, within the limit or image by image, and matched as together."""
    logits, boxes = random_predictions(layers=2, batch=7)
    targets = pad_targets(random_labels(sizes), logits.device)
    expected = hungarian_match(logits, boxes, targets, CONFIG)
    compared = []

    def record(logits, boxes, targets, *others):
        compared.append((len(targets.sizes), len(targets.sizes) * targets.boxes.shape[1] * 2 * boxes.shape[2]))
        return matching_cost(logits, boxes, targets, *others)

    monkeypatch.setattr(matching_deperceiver, "matching_cost", record)
    monkeypatch.setattr(matching_deperceiver, "PAIRS_AT_ONCE", most)
    found = hungarian_match(logits, boxes, targets, CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(images for images, _ in compared) == 7
    assert all(images == 1 or pairs <= most for images, pairs in compared)
    assert (len(compared) > 1) == (7 * max(sizes) * 2 * boxes.shape[2] > most)


def test_order_of_objects_does_not_matter():
    logits, boxes = random_predictions(layers=2)
    labels = random_labels([4, 2, 5])
    shuffled = [{name: tensor.flip(0) for name, tensor in target.items()} for target in labels]
    loss, terms = set_prediction_loss(logits, boxes, labels, CONFIG)
    other_loss, other_terms = set_prediction_loss(logits, boxes, shuffled, CONFIG)
    torch.testing.assert_close(loss, other_loss)
    for name, term in terms.items():
        torch.testing.assert_close(term, other_terms[name])


def test_perfect_predictions_cost_nothing():
    labels = random_labels([3])
    logits = torch.full((1, 1, 6, 6), -50.0)
    boxes = torch.full((1, 1, 6, 4), 0.9)
    logits[..., -1] = 50.0
    for index in range(3):
        logits[0, 0, index, -1] = -50.0
        logits[0, 0, index, labels[0]["class_labels"][index]] = 50.0
        boxes[0, 0, index] = labels[0]["boxes"][index]
    loss, terms = set_prediction_loss(logits, boxes, labels, CONFIG)
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert terms["class_error"].item() == 0
    assert terms["cardinality_error"].item() == 0


def test_loss_is_the_weighted_sum_over_layers():
    config = tiny_config(class_loss_coefficient=3, bbox_loss_coefficient=0.5, giou_loss_coefficient=7)
    logits, boxes = random_predictions(layers=3)
    labels = random_labels([2, 1, 3])
    loss, terms = set_prediction_loss(logits, boxes, labels, config)
    weights = {"loss_ce": 3, "loss_bbox": 0.5, "loss_giou": 7}
    total = sum(weight * terms[name + suffix] for name, weight in weights.items() for suffix in ("", "_0", "_1"))
    torch.testing.assert_close(loss, total)
    for layer, suffix in enumerate(("_0", "_1", "")):
        _, alone = set_prediction_loss(logits[layer : layer + 1], boxes[layer : layer + 1], labels, config)
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            torch.testing.assert_close(terms[name + suffix], alone[name])
    assert sum(name.startswith("class_error") for name in terms) == 1


def test_cross_entropy_weighs_the_empty_class():
    logits, boxes = random_predictions(batch=2)
    labels = random_labels([2, 1])
    pairs = hungarian_match(logits, boxes, pad_targets(labels, logits.device), CONFIG)
    classes = torch.full((2, 6), 5)
    for image, query, target in zip(pairs.image, pairs.query, pairs.target, strict=True):
        classes[image, query] = labels[image]["class_labels"][target]
    weight = torch.ones(6)
    weight[-1] = CONFIG.eos_coefficient
    expected = torch.nn.functional.cross_entropy(logits[0].transpose(1, 2), classes, weight)
    _, terms = set_prediction_loss(logits, boxes, labels, CONFIG)
    torch.testing.assert_close(terms["loss_ce"], expected)


def test_no_object_anywhere():
    logits, boxes = random_predictions(layers=2)
    logits.requires_grad_()
    boxes.requires_grad_()
    loss, terms = set_prediction_loss(logits, boxes, random_labels([0, 0, 0]), CONFIG)
    loss.backward()
    assert loss.isfinite()
    assert terms["loss_bbox"] == terms["loss_giou"] == 0
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


def test_more_objects_than_queries():
    logits, boxes = random_predictions()
    labels = random_labels([500, 2, 6])
    pairs = hungarian_match(logits, boxes, pad_targets(labels, logits.device), CONFIG)
    crowded = pairs.image == 0
    assert sorted(pairs.query[crowded].tolist()) == list(range(6))
    assert len(set(pairs.target[crowded].tolist())) == 6
    loss, _ = set_prediction_loss(logits, boxes, labels, CONFIG)
    assert loss.isfinite()


@pytest.mark.parametrize(("which", "name"), [(0, "logits"), (1, "pred_boxes")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sizes", [[2, 1, 0], [0, 0, 0]])
def test_non_finite_predictions_are_named(which, name, value, sizes):
    predictions = random_predictions()
    predictions[which][0, 1, 2, 3] = value
    with pytest.raises(FloatingPointError, match=name):
        set_prediction_loss(*predictions, random_labels(sizes), CONFIG)


def test_bad_labels_are_refused():
    logits, boxes = random_predictions()
    labels = random_labels([2, 1, 1])
    with pytest.raises(ValueError, match=r"labels` of 2 images for predictions of 3"):
        set_prediction_loss(logits, boxes, labels[:2], CONFIG)
    for wrong in (-1, 5, 90):
        with pytest.raises(ValueError, match=r"`class_labels` must be in \[0, 5\)"):
            set_prediction_loss(
                logits, boxes, [{**labels[0], "class_labels": torch.tensor([0, wrong])}, *labels[1:]], CONFIG
            )
    with pytest.raises(ValueError, match=r"`labels\[1\]` needs"):
        set_prediction_loss(logits, boxes, [labels[0], {"boxes": torch.zeros(0, 4)}, labels[2]], CONFIG)
    with pytest.raises(ValueError, match=r"`labels\[0\]`: 'class_labels' must be"):
        set_prediction_loss(logits, boxes, [{**labels[0], "boxes": torch.rand(3, 4)}, *labels[1:]], CONFIG)
    with pytest.raises(FloatingPointError, match="target boxes"):
        set_prediction_loss(
            logits, boxes, [{**labels[0], "boxes": torch.full((2, 4), torch.nan)}, *labels[1:]], CONFIG
        )


def test_half_precision_predictions_lose_nothing_in_the_loss():
    logits, boxes = random_predictions(layers=2)
    logits, boxes, labels = logits.bfloat16(), boxes.bfloat16(), random_labels([3, 0, 2])
    expected, _ = set_prediction_loss(logits.float(), boxes.float(), labels, CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = set_prediction_loss(logits, boxes, labels, CONFIG)
    assert torch.equal(loss, expected)


def test_matching_copies_to_the_host_once(monkeypatch):
    logits, boxes = random_predictions(layers=4)
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor, *a, **k: copies.append(tensor.shape) or original(tensor))
    for method in ("item", "tolist"):
        unpatched = getattr(torch.Tensor, method)

        def on_host(tensor, unpatched=unpatched):
            assert copies, "a value was read on the host before the one copy"
            return unpatched(tensor)

        monkeypatch.setattr(torch.Tensor, method, on_host)
    set_prediction_loss(logits, boxes, random_labels([3, 0, 2]), CONFIG)
    assert len(copies) == 1


def _gradients_in_a_process(rank: int, world_size: int, port: int, sizes: list[int], results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    images, labels = joint_batch(sizes)
    model = torch.nn.parallel.DistributedDataParallel(tiny_model(decoder_type="layered", decoder_attention_dropout=0))
    share = slice(rank * 2, rank * 2 + 2)
    outputs = model(images[share], labels=labels[share])
    outputs.loss.backward()
    if rank == 0:
        # Not tensors: their storage would be gone with this process.
        results.put({n: p.grad.tolist() for n, p in model.module.named_parameters() if p.grad is not None})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def joint_batch(sizes):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    return images, random_labels(sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "compared"), [([5, 1, 0, 2], "bbox_predictor"), pytest.param([3, 1, 0, 4], "", marks=pytest.mark.heavy)]
)
def test_box_gradients_of_two_processes_equal_those_of_the_joint_batch(sizes, compared):
    """Boxes are normalised by their mean number over processes, so their averaged gradients are those of one process.

    The class term is, as in the original, a weighted mean within each process: it agrees, and with it every gradient,
    where the processes have equally many objects.
    """
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = torch.multiprocessing.start_processes(
        _gradients_in_a_process, (2, port, sizes, results), nprocs=2, join=False, start_method="spawn"
    )
    distributed = results.get()
    processes.join()

    images, labels = joint_batch(sizes)
    model = tiny_model(decoder_type="layered", decoder_attention_dropout=0)
    model(images, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert distributed.keys() == expected.keys()
    for name, gradient in distributed.items():
        if name.startswith(compared):
            torch.testing.assert_close(torch.tensor(gradient), expected[name], rtol=1e-3, atol=1e-5)
