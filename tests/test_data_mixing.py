# SPDX-License-Identifier: Apache-2.0
"""Mosaic and mixup: boxes stay on their objects, sizes stay, and samples are those of seed, epoch and key."""

import pytest
import torch
from torchvision import tv_tensors

from deperceiver_hf.data import DetectionCollator, DetectionDataset, load_detection_data, make_train_transforms
from deperceiver_hf.data.dataset import SampleKey
from deperceiver_hf.data.mixing import ImageMixing, cut_to, make_mosaic, mix_up
from deperceiver_hf.data.transforms import LEAST_VISIBLE_AREA
from deperceiver_hf.errors import UserError
from deperceiver_hf.training import DetectionTrainer
from training_runs import assert_equal_weights, tiny_options, train_until_killed, weights_of


def make_sample(label: int, height: int, width: int, boxes=((10, 10, 40, 30),), crowd: bool = False) -> dict:
    """A black image whose objects are filled with a brightness of their label's own."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes:
        image[:, y0:y1, x0:x1] = 40 * (label + 1)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.full((len(boxes),), label),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(dim=1),
        "iscrowd": torch.full((len(boxes),), crowd),
    }


def test_a_mosaic_has_the_objects_of_four_images_where_they_are_seen():
    sizes = [(90, 130), (60, 60), (200, 80), (50, 170)]
    seen, lost = set(), 0
    torch.manual_seed(0)
    for _ in range(60):
        mosaic = make_mosaic([make_sample(label, *size) for label, size in enumerate(sizes)])
        assert tuple(mosaic["image"].shape) == (3, 90, 130)
        assert mosaic["boxes"].canvas_size == (90, 130)
        assert len(set(mosaic["labels"].tolist())) == len(mosaic["labels"])
        near = torch.zeros(90, 130, dtype=torch.bool)
        for box, label in zip(mosaic["boxes"].tolist(), mosaic["labels"].tolist(), strict=True):
            seen.add(label)
            x0, y0, x1, y1 = (round(side) for side in box)
            inside = mosaic["image"][0, y0:y1, x0:x1].int() - 40 * (label + 1)
            assert (inside.abs() <= 2).float().mean() > 0.6  # its borders are blurred
            near[max(0, y0 - 6) : y1 + 6, max(0, x0 - 6) : x1 + 6] = True
        if len(mosaic["labels"]) < 4:
            lost += 1  # what is left of it is seen all the same
        else:
            assert not mosaic["image"][0][~near].any()
    assert seen == {0, 1, 2, 3}
    assert lost > 0


def test_objects_of_which_little_is_left_are_dropped_and_others_clipped():
    torch.manual_seed(1)
    sample = make_sample(0, 100, 100, boxes=((0, 0, 100, 100), (0, 40, 30, 60), (90, 90, 100, 100)))
    kept = []
    for _ in range(200):
        out = cut_to({**sample, "labels": torch.arange(3)}, 40, 100)  # at least three fifths of the height are cut off
        assert out["boxes"].canvas_size == tuple(out["image"].shape[-2:]) == (40, 100)
        assert (out["boxes"] >= 0).all()
        assert (out["boxes"] <= torch.tensor([100, 40, 100, 40]) + 1e-3).all()
        kept.append(set(out["labels"].tolist()))
        if 0 in kept[-1]:  # it covers all of the image, whatever was cut
            torch.testing.assert_close(out["boxes"][0].as_subclass(torch.Tensor), torch.tensor([0.0, 0, 100, 40]))
    shares = {label: sum(label in labels for labels in kept) / len(kept) for label in range(3)}
    assert 0.3 < shares[0] < 1  # 0.4 of it are left at best, less than LEAST_VISIBLE_AREA at worst
    assert 0 < shares[2] < shares[1] < 1
    assert LEAST_VISIBLE_AREA == 0.25


def test_a_mixup_is_a_mean_with_the_objects_of_both():
    first, second = make_sample(0, 80, 100, boxes=((0, 0, 100, 80),)), make_sample(4, 60, 60, boxes=((0, 0, 60, 60),))
    values = set()
    for _ in range(20):
        mixed = mix_up(first, second)
        assert mixed["labels"].tolist()[0] == 0
        assert mixed["boxes"][0].tolist() == [0, 0, 100, 80]
        (value,) = mixed["image"].unique().tolist()
        values.add(value)
    assert 40 + 0.4 * 160 - 1 <= min(values) < max(values) <= 40 + 0.6 * 160 + 1


def test_crowds_are_dropped_mixed_or_not():
    for mixing in (ImageMixing(), ImageMixing(1.0), ImageMixing(mixup=1.0)):
        mixed = mixing(make_sample(0, 50, 50, crowd=True), lambda: make_sample(1, 50, 50, crowd=True))
        assert mixed["labels"].tolist() == []


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (17, 16)])
def test_images_of_a_few_pixels_have_no_quarters(size):
    mixing = ImageMixing(1.0, 1.0)
    for _ in range(20):
        mixed = mixing(make_sample(0, *size, boxes=()), lambda: make_sample(1, 1, 3, boxes=()))
        assert tuple(mixed["image"].shape[-2:]) == size


@pytest.fixture(scope="module")
def data():
    return load_detection_data("synthetic", "train", num_samples=7, image_size=64, max_objects=4)


def make_dataset(data, mixing=None) -> DetectionDataset:
    return DetectionDataset(data, make_train_transforms("flip", 48), seed=3, mixing=mixing)


def equal(first, second) -> bool:
    return torch.equal(first["image"], second["image"]) and first["annotations"] == second["annotations"]


def test_samples_are_those_of_their_key(data):
    dataset = make_dataset(data, ImageMixing(0.5, 0.5))
    dataset.set_epoch(2)
    expected = [dataset[place] for place in range(7)]
    torch.manual_seed(5)
    assert all(equal(dataset[SampleKey(place)], expected[place]) for place in (4, 0, 6))
    assert not equal(dataset[SampleKey(0, repeat=1)], expected[0])
    plain = make_dataset(data)
    plain.set_epoch(2)
    assert all(equal(dataset[SampleKey(place, plain=True)], plain[place]) for place in range(7))
    mixed = {place: item["mixed_with"] for place, item in enumerate(expected) if "mixed_with" in item}
    assert 0 < len(mixed) < 7 or sum(map(len, mixed.values())) > 7


def test_a_batch_says_what_was_mixed_into_it(data, cat_and_dog):
    from deperceiver_hf import DePerceiverV2ImageProcessor

    collate = DetectionCollator(DePerceiverV2ImageProcessor.from_pretrained(cat_and_dog), do_resize=False)
    dataset = make_dataset(data, ImageMixing(1.0))
    batch = collate([dataset[1], dataset[SampleKey(2, plain=True)]])
    assert {image_id: len(others) for image_id, others in batch["mixed_with"].items()} == {1: 3}
    assert "mixed_with" not in collate([dataset[SampleKey(2, plain=True)]])


def test_the_last_part_of_a_run_is_plain(tmp_path):
    """12 steps: mixed are those that begin before two thirds of them are done."""
    run = DetectionTrainer(tiny_options(tmp_path, mosaic=1.0, plain_fraction=0.33, num_workers=1))
    mixed = []
    note = run.guard.note_images
    run.guard.note_images = lambda batch, others: (mixed.append(bool(others)), note(batch, others))
    run.train()
    assert mixed == [True] * 9 + [False] * 3  # step 8 begins at 8/12 < 0.67


def test_killed_and_resumed_mixes_and_repeats_the_same(tmp_path, monkeypatch):
    options = {"mosaic": 0.5, "mixup": 0.5, "repeat_factor_threshold": 1.0, "checkpointing_steps": 2, "dropout": 0.1}
    options |= {"num_workers": 1, "plain_fraction": 0.5}
    straight = DetectionTrainer(tiny_options(tmp_path / "straight", **options))
    assert len(straight.data.sampler) > 6
    straight.train()
    train_until_killed(tmp_path / "resumed", monkeypatch, 5, **{**options, "num_workers": 0})
    resumed = DetectionTrainer(tiny_options(tmp_path / "resumed", **options, resume="auto"))
    resumed.train()
    assert_equal_weights(weights_of(straight), weights_of(resumed))
    with pytest.raises(UserError, match=r"mosaic was 0\.5"):
        DetectionTrainer(tiny_options(tmp_path / "resumed", **{**options, "mosaic": 0.4}, resume="auto"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mosaic": 1.5}, "--mosaic is a part of 1"),
        ({"mixup": -0.1}, "--mixup must be at least 0"),
        ({"plain_fraction": 0.1}, "neither is given"),
        ({"mosaic": 0.5, "cache_features": True, "lr_backbone": 0.0}, "--cache_features"),
        ({"repeat_factor_threshold": 0.0}, "--repeat_factor_threshold"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        tiny_options(tmp_path, **options)
    with pytest.raises(UserError, match="probability"):
        ImageMixing(mosaic=2.0)
