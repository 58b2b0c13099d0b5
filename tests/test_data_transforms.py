# SPDX-License-Identifier: Apache-2.0
"""Training augmentation: sizes of the original, and boxes that stay on their objects."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from transformers.image_utils import SizeDict

from deperceiver_hf.data import make_train_transforms
from deperceiver_hf.data.transforms import AUGMENTATIONS, RandomShortestEdge, RandomZoom


def make_sample(height=90, width=130, boxes=((30, 20, 70, 50),), crowd=()) -> dict:
    """An image that is white inside its boxes and black elsewhere."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes:
        image[:, y0:y1, x0:x1] = 255
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    iscrowd = torch.zeros(len(boxes), dtype=torch.bool)
    iscrowd[list(crowd)] = True
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(len(boxes)),
        "area": torch.full((len(boxes),), 7.0),
        "iscrowd": iscrowd,
    }


def outputs(transforms, sample, count=60):
    torch.manual_seed(0)
    return [transforms(sample) for _ in range(count)]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_boxes_stay_on_the_pixels_of_their_object(augmentation):
    for out in outputs(make_train_transforms(augmentation, shortest_edge=128), make_sample()):
        image, boxes = out["image"], out["boxes"]
        assert image.dtype == torch.uint8
        assert boxes.canvas_size == tuple(image.shape[-2:])
        ys, xs = torch.nonzero(image[0] > 127, as_tuple=True)
        if len(xs) == 0 or len(boxes) == 0:
            # At most a sliver of the object is left, or less than a quarter of it, enlarged.
            assert len(xs) <= (0.25 * 40 * 30 * (128 / 90 / 0.6) ** 2 if "crop" in augmentation else image.shape[1])
            continue
        seen = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (boxes[0] - seen).abs().max() < 1.5
        torch.testing.assert_close(out["area"], (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def test_sizes_are_those_of_the_original():
    sizes = {tuple(out["image"].shape[-2:]) for out in outputs(make_train_transforms(), make_sample(480, 640), 150)}
    shortest = {min(size) for size in sizes}
    assert shortest <= set(range(480, 801, 32))
    assert len(shortest) == 11
    assert max(max(size) for size in sizes) <= 1333
    uncropped = {size for size in sizes if abs(size[1] / size[0] - 640 / 480) < 0.01}
    assert len(sizes) > len(uncropped) > 8  # a good half keeps its aspect ratio


@pytest.mark.parametrize(("shortest_edge", "longest_edge"), [(256, None), (100, 120)])
def test_sizes_are_scaled_in_proportion(shortest_edge, longest_edge):
    transforms = make_train_transforms("original", shortest_edge, longest_edge)
    bound = longest_edge or round(shortest_edge * 1333 / 800)
    allowed = {round(size * shortest_edge / 800) for size in range(480, 801, 32)}
    for out in outputs(transforms, make_sample(96, 100)):
        height, width = out["image"].shape[-2:]
        assert max(height, width) <= bound
        assert min(height, width) in allowed or max(height, width) >= bound - 1


def test_flip_is_fair_and_none_does_nothing_at_random():
    boxes = [tuple(out["boxes"][0].tolist()) for out in outputs(make_train_transforms("flip", 90), make_sample(), 200)]
    assert set(boxes) == {(30, 20, 70, 50), (60, 20, 100, 50)}
    assert 70 < boxes.count((30, 20, 70, 50)) < 130
    boxes = {tuple(out["boxes"][0].tolist()) for out in outputs(make_train_transforms("none", 45), make_sample())}
    assert boxes == {(15, 10, 35, 25)}


def test_crowds_are_dropped_with_all_that_belongs_to_them():
    sample = make_sample(boxes=((0, 0, 20, 20), (40, 40, 60, 60), (70, 10, 90, 30)), crowd=[1])
    out = make_train_transforms("none", 90)(sample)
    assert out["labels"].tolist() == [0, 2]
    assert out["boxes"].tolist() == [[0, 0, 20, 20], [70, 10, 90, 30]]
    assert out["area"].tolist() == [400, 400]
    assert not out["iscrowd"].any()


def test_objects_outside_the_crop_go_and_those_on_its_border_are_clipped():
    grid = [(x, y, x + 20, y + 20) for x in range(0, 400, 40) for y in range(0, 300, 40)]
    kept = []
    for out in outputs(make_train_transforms("original", 200), make_sample(300, 400, boxes=grid)):
        height, width = out["image"].shape[-2:]
        boxes = out["boxes"]
        assert len(boxes) == len(out["labels"]) == len(out["area"]) == len(out["iscrowd"])
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()
        for box, label in zip(boxes, out["labels"], strict=True):
            assert 0 <= label < len(grid)
            x, y = ((box[:2] + box[2:]) / 2).int().tolist()
            assert out["image"][0, min(y, height - 1), min(x, width - 1)] > 60
        kept.append(len(boxes))
    assert min(kept) < len(grid) == max(kept)


@pytest.mark.parametrize("augmentation", ["crop", "crop_any_orientation"])
@pytest.mark.parametrize(("height", "width"), [(97, 131), (131, 97), (100, 100), (480, 640)])
def test_crops_have_the_size_of_the_whole_image(augmentation, height, width):
    (size,) = {tuple(out["image"].shape[-2:]) for out in outputs(make_train_transforms("none", 64), make_sample(), 1)}
    assert size == (64, 92)
    sample = make_sample(height, width)
    (whole,) = {tuple(out["image"].shape[-2:]) for out in outputs(make_train_transforms("none", 64), sample, 1)}
    cropped = outputs(make_train_transforms(augmentation, 64), sample)
    assert {tuple(out["image"].shape[-2:]) for out in cropped} == {whole}


def test_crops_are_mild_and_drop_objects_of_which_little_is_left(monkeypatch):
    grid = [(x, y, x + 20, y + 20) for x in range(0, 200, 25) for y in range(0, 150, 25)]
    areas = []  # left, top, right, bottom of the crops
    crop = F.crop

    def recording(inpt, top, left, height, width):
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            areas.append((left, top, left + width, top + height))
        return crop(inpt, top, left, height, width)

    monkeypatch.setattr(F, "crop", recording)
    zoom, sample = RandomZoom(SizeDict(shortest_edge=150, longest_edge=200)), make_sample(150, 200, boxes=grid)
    crops = dropped = 0
    torch.manual_seed(0)
    for _ in range(200):
        areas.clear()
        out = zoom(sample)
        assert out["boxes"].canvas_size == tuple(out["image"].shape[-2:]) == (150, 200)
        if not areas:
            assert out["labels"].tolist() == list(range(len(grid)))
            assert out["boxes"].tolist() == [list(box) for box in grid]
            continue
        ((left, top, right, bottom),) = areas
        assert 0.6 - 0.01 <= (right - left) / 200 <= 1
        assert abs((right - left) / 200 - (bottom - top) / 150) < 0.01
        bounds = torch.tensor([left, top, left, top]), torch.tensor([right, bottom, right, bottom])
        clipped = torch.tensor(grid, dtype=torch.float32).clamp(*bounds) - bounds[0]
        visible = (clipped[:, 2:] - clipped[:, :2]).prod(dim=1) >= 100  # a quarter of 20 x 20
        assert out["labels"].tolist() == torch.nonzero(visible)[:, 0].tolist()
        scale = torch.tensor([200 / (right - left), 150 / (bottom - top)]).repeat(2)
        torch.testing.assert_close(out["boxes"].as_subclass(torch.Tensor), (clipped * scale)[visible])
        crops += 1
        dropped += int((~visible).sum())
    assert 90 < crops < 150  # three in five
    assert dropped > 0


@pytest.mark.parametrize(
    ("augmentation", "width", "orientations"),
    [("crop", 90, 2), ("crop", 130, 2), ("crop_any_orientation", 90, 8), ("crop_any_orientation", 130, 4)],
)
def test_orientations_of_the_whole_image(augmentation, width, orientations):
    x0, y0, x1, y1 = 10, 20, 50, 45
    across, down = ((x0, x1), (width - x1, width - x0)), ((y0, y1), (90 - y1, 90 - y0))
    upright = {(a, c, b, d) for a, b in across for c, d in (down if orientations > 2 else down[:1])}
    expected = upright | ({(b, a, d, c) for a, b, c, d in upright} if orientations == 8 else set())
    found = {
        tuple(out["boxes"][0].tolist())
        for out in outputs(make_train_transforms(augmentation, 90), make_sample(90, width, ((x0, y0, x1, y1),)), 300)
        if len(out["boxes"])
    }
    whole = {box for box in found if sorted((box[2] - box[0], box[3] - box[1])) == [25, 40]}
    assert whole == expected
    assert len(found) > 100  # the rest are crops


def test_colours_of_crops_change_mildly():
    sample = make_sample(100, 100)
    sample["image"] = tv_tensors.Image(torch.full((3, 100, 100), 120, dtype=torch.uint8))
    values = torch.stack([out["image"].float().mean() for out in outputs(make_train_transforms("crop", 64), sample)])
    assert 90 < values.min() < 110 < 130 < values.max() < 150


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (3, 2000), (2000, 3)])
def test_extreme_images_and_no_objects(augmentation, height, width):
    for out in outputs(make_train_transforms(augmentation, 64), make_sample(height, width, boxes=()), 20):
        assert min(out["image"].shape) >= 1
        assert max(out["image"].shape) <= round(64 * 1333 / 800)
        assert out["boxes"].shape == (0, 4)


def test_narrow_images_do_not_explode_before_the_crop(monkeypatch):
    sides = []
    make_params = RandomShortestEdge.make_params

    def recording(self, flat_inputs):
        params = make_params(self, flat_inputs)
        sides.extend(params["size"])
        return params

    monkeypatch.setattr(RandomShortestEdge, "make_params", recording)
    outputs(make_train_transforms("original", 64), make_sample(1, 3000, boxes=()), 20)
    assert 107 < max(sides) <= 8 * 107


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("mosaic",), "augmentation"), (("flip", 0), "shortest_edge"), (("flip", 100, 90), "longest_edge")],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_train_transforms(*arguments)
