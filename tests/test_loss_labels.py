# SPDX-License-Identifier: Apache-2.0
"""Labels that cannot be meant end in one sentence, whatever the model and its mode."""

import pytest
import torch

from conftest import tiny_model, tiny_v2_model

MODELS = [(tiny_model, {}), (tiny_model, {"decoder_type": "layered"}), (tiny_v2_model, {})]
MODELS += [(tiny_v2_model, {"query_selection": False})]


@pytest.fixture(params=MODELS, ids=["v1", "v1_layered", "v2", "v2_learned"])
def model(request):
    make_model, fields = request.param
    return make_model(**fields)


@pytest.fixture(params=[True, False], ids=["training", "evaluation"])
def loss_of(request, model, images, labels):
    """Loss with changed labels of the first image."""

    def compute(**changes: torch.Tensor) -> torch.Tensor:
        model.train(request.param)
        return model(images, labels=[{**labels[0], **changes}, labels[1]]).loss

    return compute


@pytest.mark.parametrize(
    ("box", "shown"),
    [
        ([320.0, 200.0, 60.0, 40.0], r"\(320, 200, 60, 40\)"),
        ([0.5, 0.5, 1.5, 0.5], r"\(0.5, 0.5, 1.5, 0.5\)"),
        ([0.5, 0.5, 0.2, -0.1], r"\(0.5, 0.5, 0.2, -0.1\)"),
        ([0.5, 0.5, 0.2, float("inf")], r"\(0.5, 0.5, 0.2, inf\)"),
    ],
)
def test_boxes_that_are_not_in_the_unit_square_are_refused(loss_of, labels, box, shown):
    boxes = labels[0]["boxes"].clone()
    boxes[2] = torch.tensor(box)
    expected = rf"\(center_x, center_y, width, height\) in \[0, 1\].*box 2 of image 0 of the batch is {shown}"
    with pytest.raises(ValueError, match=expected):
        loss_of(boxes=boxes)


def test_boxes_of_integers_are_pixels(loss_of):
    with pytest.raises(ValueError, match=r"box 0 of image 0 of the batch is \(10, 20, 30, 40\)"):
        loss_of(boxes=torch.tensor([[10, 20, 30, 40]] * 3))


@pytest.mark.parametrize("label", [-1, 5, 91])
def test_labels_of_other_classes_are_refused(loss_of, label):
    with pytest.raises(ValueError, match=rf"`class_labels` must be in \[0, 5\).*one is {label}\."):
        loss_of(class_labels=torch.tensor([0, label, 1]))


def test_rounding_does_no_harm(loss_of):
    exact = torch.tensor([[0.5, 0.5, 1.0, 1.0], [1.0, 0.0, 0.1, 0.1], [0.5, 0.996, 0.3, 0.3]])
    for boxes in (exact, exact * (1 + 1e-6), exact - 1e-7, exact.bfloat16(), exact.half()):
        assert loss_of(boxes=boxes).isfinite()
