# SPDX-License-Identifier: Apache-2.0
"""Denoising queries: how objects are noised, and that nothing but the loss notices."""

import pytest
import torch

from conftest import tiny_v2_config, tiny_v2_model
from deperceiver_hf.models.denoising_deperceiver_v2 import DenoisingQueries, make_denoising_queries
from deperceiver_hf.models.matching_deperceiver import center_to_corners, pad_targets
from test_loss import random_labels
from test_modeling_v2 import trained_losses

UNSEEN = ("logits", "pred_boxes", "selection_logits", "selection_boxes")


def queries_of(labels: list[dict[str, torch.Tensor]], **fields) -> DenoisingQueries:
    torch.manual_seed(0)
    return make_denoising_queries(pad_targets(labels, torch.device("cpu")), tiny_v2_config(**fields))


def apart(values: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positive and negative queries `(B, G, T, ...)` of all queries `(B, P, ...)`."""
    return values.unflatten(1, (num_groups, 2, -1)).unbind(2)


# --- noise


@pytest.mark.parametrize(
    ("sizes", "room", "groups"),
    [
        *[([3, 0], 100, 16), ([3, 5], 100, 10), ([1, 1], 2, 1), ([7, 2], 3, 1), ([30, 7], 3, 1), ([30, 31], 3, 1)],
        *[([500], 100, 1), ([0, 0], 100, 50)],
    ],
)
def test_number_of_groups(sizes, room, groups):
    queries = queries_of(random_labels(sizes), num_denoising_queries=room, num_queries=30)
    sizes = [min(size, 30) for size in sizes]
    most = max(1, *sizes)
    assert queries.num_groups == groups
    assert queries.class_labels.shape == queries.is_query.shape == (len(sizes), 2 * groups * most)
    assert queries.boxes.shape == (len(sizes), 2 * groups * most, 4)
    assert queries.num_objects == most
    assert queries.is_query.shape[1] <= max(room, 2 * 30)
    assert queries.is_query.sum(1).tolist() == [2 * groups * size for size in sizes]
    assert queries.class_labels.dtype == torch.long
    assert ((queries.class_labels >= 0) & (queries.class_labels < 5)).all()


def test_a_crowded_image_draws_objects_and_the_others_keep_theirs():
    labels = random_labels([40, 3, 9, 10])
    for target in labels:
        target["boxes"] = 0.25 + 0.5 * target["boxes"]
        target["boxes"][:, 2:] *= 0.2  # inside of the image, at whose border boxes would be cut
    queries = queries_of(labels, num_denoising_queries=40, label_noise_ratio=0, box_noise_scale=0)
    assert queries.num_groups == 2
    objects, classes, boxes, real = (
        values.unflatten(1, (4, 9))
        for values in (queries.objects, queries.class_labels, queries.boxes, queries.is_query)
    )
    assert (objects == objects[:, :1]).all()  # the same in every group
    drawn = [image[0][shown[0]].tolist() for image, shown in zip(objects, real, strict=True)]
    assert [len(image) for image in drawn] == [9, 3, 9, 9]
    assert all(image == sorted(set(image)) for image in drawn)
    assert drawn[1:3] == [[0, 1, 2], list(range(9))]
    for image, target in enumerate(labels):
        places = objects[image][real[image]]
        assert torch.equal(classes[image][real[image]], target["class_labels"][places])
        torch.testing.assert_close(boxes[image][real[image]], target["boxes"][places])


def test_every_object_of_a_crowded_image_has_its_turn():
    targets, config = pad_targets(random_labels([27]), torch.device("cpu")), tiny_v2_config(num_denoising_queries=2)
    torch.manual_seed(0)
    times = torch.zeros(27)
    for _ in range(300):
        times[make_denoising_queries(targets, config).objects[0, :9]] += 1
    assert 70 < times.min() <= times.max() < 130  # 100 on average


def test_nothing_is_drawn_before_an_image_is_crowded():
    """The noise of a seed is what it was before crowded images had to draw."""
    targets, config = pad_targets(random_labels([9, 2]), torch.device("cpu")), tiny_v2_config(num_denoising_queries=40)
    torch.manual_seed(5)
    queries = make_denoising_queries(targets, config)
    torch.manual_seed(5)
    kept = torch.rand(2, 2, 2, 9) >= config.label_noise_ratio
    assert torch.equal(queries.objects, torch.arange(9).repeat(4).expand(2, -1))
    clean = targets.class_labels.repeat(1, 4)
    assert torch.equal(queries.class_labels[kept.flatten(1)], clean[kept.flatten(1)])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_positive_boxes_move_less_than_negative_ones(scale):
    """No corner of a positive box moves by more than half a side, each of a negative one by one to two of them."""
    labels = random_labels([6, 6])
    for target in labels:
        target["boxes"] *= 0.2
        target["boxes"][:, :2] += 0.4  # far from the border, at which boxes would be cut
    queries = queries_of(labels, num_denoising_queries=600, box_noise_scale=scale)
    clean = torch.stack([target["boxes"] for target in labels])[:, None]
    half_sides = scale * clean[..., 2:] / 2
    low, high = center_to_corners(clean).split(2, dim=-1)
    positive, negative = (center_to_corners(boxes).split(2, dim=-1) for boxes in apart(queries.boxes, 50))
    slack = 1e-6
    for found, corner in zip(positive, (low, high), strict=True):
        assert ((found - corner).abs() <= half_sides + slack).all()

    def moved_twice(found, corner):
        distance = (found - corner).abs()
        return (distance >= half_sides - slack) & (distance <= 2 * half_sides + slack)

    # Where the corners have passed each other, they have changed places.
    straight = moved_twice(negative[0], low) & moved_twice(negative[1], high)
    crossed = moved_twice(negative[0], high) & moved_twice(negative[1], low)
    assert (straight | crossed).all()
    if scale:
        assert (positive[0] - low).abs().max() > 0.9 * half_sides.min()
        assert len(queries.boxes.flatten(0, 1).unique(dim=0)) == len(queries.boxes.flatten(0, 1))


def test_noised_boxes_lie_in_the_image():
    labels = random_labels([8])
    labels[0]["boxes"][:4] = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0, 0], [0.5, 0.5, 1, 1], [0.95, 0.5, 0.1, 1]]
    )
    queries = queries_of(labels, num_denoising_queries=800)
    corners = center_to_corners(queries.boxes)
    assert corners.min() >= -1e-6
    assert corners.max() <= 1 + 1e-6
    assert (queries.boxes[..., 2:] >= 0).all()


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
def test_label_noise(ratio):
    labels = random_labels([10, 10])
    queries = queries_of(labels, num_denoising_queries=2000, label_noise_ratio=ratio, num_queries=10)
    clean = torch.stack([target["class_labels"] for target in labels])[:, None]
    for found in apart(queries.class_labels, 100):
        # A random class of five is the right one once in five times.
        assert (found != clean).float().mean().item() == pytest.approx(ratio * 4 / 5, abs=0.05)


# --- who sees whom


def test_who_may_attend_to_whom():
    queries = DenoisingQueries(
        torch.zeros(1, 8), torch.zeros(1, 8, 4), torch.ones(1, 8), torch.zeros(1, 8), num_groups=2
    )
    sees = queries.may_attend(3)
    assert sees.shape == (1, 1, 11, 11)
    sees = sees[0, 0]
    assert sees[:4, :4].all()
    assert sees[4:8, 4:8].all()
    assert not sees[:4, 4:8].any()
    assert not sees[4:8, :4].any()
    assert sees[:, 8:].all()
    assert not sees[8:, :8].any()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"query_selection": False},
        {"share_key_values": True},
        {"position_bias": False},
    ],
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_predictions_do_not_see_denoising_queries(fields, implementation, images, labels):
    with_queries, without = (tiny_v2_model(**fields, num_denoising_queries=n) for n in (12, 0))
    without.load_state_dict(with_queries.state_dict(), strict=False)
    for model in (with_queries, without):
        model.set_attn_implementation(implementation)
    expected, found = (trained_losses(model, images, labels) for model in (without, with_queries))
    assert found.loss > expected.loss
    for name in UNSEEN:
        if name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    for name, value in expected.loss_dict.items():
        torch.testing.assert_close(found.loss_dict[name], value, rtol=1e-5, atol=1e-5)
    assert set(found.loss_dict) - set(expected.loss_dict) == {
        "loss_class_denoising",
        "loss_bbox_denoising",
        "loss_giou_denoising",
    }


def test_groups_do_not_see_each_other(images):
    trunk = tiny_v2_model().model
    both = queries_of(random_labels([3, 2]), num_denoising_queries=12)
    assert both.num_groups == 2
    with torch.no_grad():
        together = trunk(images, denoising=both)
        for group in range(2):
            part = slice(6 * group, 6 * group + 6)
            alone = trunk(images, denoising=DenoisingQueries(*(values[:, part] for values in both[:4]), 1))
            for name in ("denoising_hidden_states", "denoising_boxes"):
                torch.testing.assert_close(together[name][:, :, part], alone[name], rtol=0, atol=5e-5)


def test_what_a_denoising_query_sees_is_the_image(images):
    """Shows that the tests above can fail: its own group and the latents do take part."""
    trunk = tiny_v2_model().model
    queries = queries_of(random_labels([3, 3]), num_denoising_queries=6)
    labels = queries.class_labels.clone()
    labels[:, 0] = (labels[:, 0] + 1) % 5
    with torch.no_grad():
        states = trunk(images, denoising=queries).denoising_hidden_states
        others = trunk(images, denoising=queries._replace(class_labels=labels)).denoising_hidden_states
        shifted = trunk(images.flip(-1), denoising=queries).denoising_hidden_states
    assert (states - others)[:, :, 1:].abs().max() > 1e-4
    assert (states - shifted).abs().max() > 1e-4


def test_padding_queries_change_nothing(images):
    model = tiny_v2_model()
    labels = random_labels([3, 1])
    queries = queries_of(labels, num_denoising_queries=12)
    shown = queries.is_query[1]
    assert shown.sum() == 4
    assert len(shown) == 12
    noise = torch.where(queries.is_query[..., None], queries.boxes, torch.rand(queries.boxes.shape))
    classes = torch.where(queries.is_query, queries.class_labels, (queries.class_labels + 1) % 5)
    with torch.no_grad():
        expected = model.model(images, denoising=queries)
        found = model.model(images, denoising=queries._replace(boxes=noise, class_labels=classes))
        for name in ("last_hidden_state", "intermediate_boxes"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
        alone = DenoisingQueries(*(values[1:, shown] for values in queries[:4]), num_groups=2)
        by_itself = model.model(images[1:], denoising=alone)
    for name in ("denoising_hidden_states", "denoising_boxes"):
        for outputs in (found, by_itself):
            image = outputs[name][-1]
            image = image[:, shown] if image.shape[1] == 12 else image
            torch.testing.assert_close(image, expected[name][1][:, shown], rtol=0, atol=1e-5)


def test_evaluation_is_not_noised(images, labels):
    model = tiny_v2_model()
    with torch.no_grad():
        first, second = model(images, labels=labels), model(images, labels=labels)
    assert torch.equal(first.loss, second.loss)
    assert not any("denoising" in name for name in first.loss_dict)


# --- at the edges

VARIANTS = {
    "default": {},
    "learned": {"query_selection": False},
    "no_position_bias": {"position_bias": False},
    "no_offsets": {"read_offsets": False, "edge_votes": False},
    "positions": {"edge_votes": False},
    "shared": {"share_key_values": True},
    "no_denoising": {"num_denoising_queries": 0},
    "single": {"feature_strides": 16},
    "focal": {"classification_loss": "focal"},
    "varifocal": {"classification_loss": "varifocal"},
}


@pytest.mark.parametrize("sizes", [[3, 0], [0, 0], [40, 1]], ids=["one empty", "all empty", "crowded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_parameter_gets_a_finite_gradient(variant, sizes, images):
    """Also without any object, as distributed training needs it, and with more of them than queries."""
    model = tiny_v2_model(**VARIANTS[variant])
    outputs = trained_losses(model, images, random_labels(sizes))
    assert outputs.loss.isfinite()
    outputs.loss.backward()
    missing = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not missing
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    if not any(sizes):
        boxes = ("loss_bbox", "loss_giou", "loss_bbox_denoising", "loss_giou_denoising", "loss_class_denoising")
        assert all(outputs.loss_dict.get(name, 0) == 0 for name in boxes)


@pytest.mark.parametrize("num_queries", [20, 300])
def test_five_hundred_objects(num_queries, images):
    model = tiny_v2_model(num_queries=num_queries)
    outputs = trained_losses(model, images, random_labels([500, 2]))
    assert outputs.loss.isfinite()
    assert all(value.isfinite() for value in outputs.loss_dict.values())
    outputs.loss.backward()


@pytest.mark.parametrize("wrong", [-1, 5, 90])
def test_labels_out_of_range_are_refused_in_training(wrong, images, labels):
    """By the error that says so, not by an embedding that has no such row."""
    labels[0]["class_labels"][1] = wrong
    with pytest.raises(ValueError, match=r"`class_labels` must be in \[0, 5\)"):
        trained_losses(tiny_v2_model(), images, labels)


def test_a_training_step_under_checkpointed_blocks_noises_once(images, labels):
    plain, checkpointed = tiny_v2_model(), tiny_v2_model()
    checkpointed.gradient_checkpointing_enable()
    losses = [trained_losses(model, images, labels).loss for model in (plain, checkpointed)]
    assert torch.equal(*losses)
