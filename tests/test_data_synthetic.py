# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes: the same everywhere, and the boxes say where the shapes are."""

import hashlib
import pickle

import numpy as np
import pytest
from torch.utils.data import DataLoader

from deperceiver_hf.data import DETECTION_FEATURES, DetectionDataset, SyntheticScenes, load_detection_data
from deperceiver_hf.data.synthetic.shapes import SHAPES, PlacedShapes, paint_shape, random_shape


def load(split="train", **options):
    return load_detection_data("synthetic", split, **{"num_samples": 6, "image_size": 128, **options})


def test_rows_have_the_schema_and_are_painted_on_access():
    data = load()
    assert data.dataset.features == DETECTION_FEATURES
    row = data.dataset[2]
    assert (row["image"].size, row["image"].mode) == ((128, 128), "RGB")
    assert row["image_id"] == 2
    assert data.label_names == list(SHAPES)
    assert len(SHAPES) == 8


def test_a_scene_depends_on_seed_split_and_number_only():
    first = load().dataset
    again = pickle.loads(pickle.dumps(load(num_samples=4).dataset))
    for index in (3, 0):
        assert first[index]["objects"] == again[index]["objects"]
        assert (np.asarray(first[index]["image"]) == np.asarray(again[index]["image"])).all()
    others = [load("val").dataset[0], load("test").dataset[0], load(seed=1).dataset[0], first[1]]
    for other in others:
        assert other["objects"]["bbox"] != first[0]["objects"]["bbox"]
        assert (np.asarray(other["image"]) != np.asarray(first[0]["image"])).mean() > 0.5


def test_the_first_scene_is_the_known_one():
    """Fails when a change makes other scenes of the same seed: results on them are then no longer comparable."""
    row = load_detection_data("synthetic", "val", num_samples=1).dataset[0]
    assert len(row["objects"]["id"]) == 12
    assert row["objects"]["category"] == [7, 5, 4, 1, 7, 4, 7, 6, 3, 7, 2, 1]
    np.testing.assert_allclose(row["objects"]["bbox"][0], [46.3117, 54.9712, 55.9086, 40.4291], atol=1e-3)
    np.testing.assert_allclose(np.asarray(row["image"]).mean(axis=(0, 1)), [136.5, 133.2, 85.2], atol=0.5)


def test_ordinary_scenes_stay_bit_identical():
    """Layouts to a thousandth of a pixel, pictures to the bit; a Pillow that draws otherwise changes these too."""
    layouts, pictures = hashlib.sha256(), hashlib.sha256()
    scenes = SyntheticScenes(image_size=64, seed=3)
    for index in range(20):
        for shape in scenes.layout(1, index):
            numbers = [shape.label, *np.round(1000 * shape.outline).astype(int).ravel().tolist()]
            layouts.update(repr([*numbers, *(round(1000 * value) for value in shape.box)]).encode())
        pictures.update(np.asarray(scenes.paint(1, index)).tobytes())
    assert layouts.hexdigest()[:16] == "f6165a9eb98d9592"
    assert pictures.hexdigest()[:16] == "f8711e443259a529"


@pytest.mark.parametrize("image_size", [128, 256])
def test_boxes_are_tight_around_the_pixels_of_the_shape(image_size):
    scenes = SyntheticScenes(image_size=image_size)
    for index in range(20):
        shapes = scenes.layout(0, index)
        covered = np.zeros((image_size, image_size), dtype=int)
        for shape in shapes:
            canvas = np.zeros((image_size, image_size, 3), dtype=np.uint8)
            paint_shape(canvas, shape, np.array([255, 255, 255]))
            mask = canvas[:, :, 0] > 32
            covered += mask
            ys, xs = np.nonzero(mask)
            x, y, width, height = shape.box
            edges = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert np.abs(edges - (x, y, x + width, y + height)).max() < 1
            assert min(x, y) >= 0
            assert max(x + width, y + height) <= image_size
        assert covered.max() <= 1  # no shape hides another


def test_shapes_are_painted_where_their_outline_is():
    """The centre of mass of the paint of a symmetric shape is the centre of its box."""
    scenes = SyntheticScenes(image_size=128)
    symmetric = [SHAPES.index(name) for name in ("disc", "square", "cross", "ring", "bar")]
    for shape in (shape for index in range(20) for shape in scenes.layout(0, index) if shape.label in symmetric):
        canvas = np.zeros((128, 128, 3), dtype=np.uint8)
        paint_shape(canvas, shape, np.array([255, 255, 255]))
        weights = canvas[:, :, 0] / canvas[:, :, 0].sum()
        centre = [(weights.sum(axis=axis) * (np.arange(128) + 0.5)).sum() for axis in (0, 1)]
        x, y, width, height = shape.box
        np.testing.assert_allclose(centre, [x + width / 2, y + height / 2], atol=0.2)


def test_sides_and_numbers_follow_the_options():
    data = load(num_samples=150, image_size=256)
    counts = [len(row["id"]) for row in data.dataset.with_format(None)["objects"]]
    assert (min(counts), max(counts)) == (3, 20)
    sides = np.array([max(box[2:]) for row in data.dataset.with_format(None)["objects"] for box in row["bbox"]])
    assert sides.min() >= 7
    assert sides.max() <= 110
    assert abs((sides < 20).mean() - 0.55) < 0.06
    assert 0.1 < (sides > 48).mean() < 0.2
    data = load(min_objects=1, max_objects=2, object_sizes=((1, 30, 31),))
    assert {len(row["id"]) for row in data.dataset.with_format(None)["objects"]} <= {1, 2}
    assert all(30 <= max(row["bbox"][0][2:]) <= 31 for row in data.dataset.with_format(None)["objects"])


def test_a_thousand_objects_find_room_beside_each_other():
    name = "synthetic:image_size=640,min_objects=1000,max_objects=1000,min_side=6,max_side=16,num_samples=1"
    row = load_detection_data(name, "val").dataset[0]
    boxes = np.array(row["objects"]["bbox"])
    assert len(boxes) == 1000
    sides = boxes[:, 2:].max(axis=1)
    assert 6 <= sides.min() < 7 < 15 < sides.max() <= 16
    assert boxes.min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 640
    covered = np.zeros((640, 640), dtype=int)
    for shape in SyntheticScenes(
        image_size=640, min_objects=1000, max_objects=1000, object_sizes=((1.0, 6, 16),)
    ).layout(1, 0):
        canvas = np.zeros((640, 640, 3), dtype=np.uint8)
        x, y, width, height = (int(value) for value in shape.box)
        paint_shape(canvas, shape, np.array([255, 255, 255]))
        window = np.s_[y : y + height + 2, x : x + width + 2]
        covered[window] += canvas[window][:, :, 0] > 32
    assert covered.max() == 1


def test_shapes_in_place_are_those_of_a_comparison_with_each():
    """Many shapes compared at once, boxes first, give the verdict of one comparison after the other."""
    random = np.random.default_rng(0)
    placed, occupied, verdicts = [], PlacedShapes(), []
    for _ in range(300):
        candidate = random_shape(random, random.uniform(4, 30)).moved(*random.uniform(0, 200, 2))
        verdicts.append(any(hulls_meet(candidate, other) for other in placed))
        assert occupied.overlap(candidate) == verdicts[-1]
        if not verdicts[-1]:
            placed.append(candidate)
            occupied.add(candidate)
    assert len(placed) > 64  # more than there is room for in the beginning
    assert sum(verdicts) > 30


def hulls_meet(one, other) -> bool:
    """Whether no line across one of 24 directions keeps two shapes a pixel apart; boxes are the first to look at."""
    (x, y, w, h), (ox, oy, ow, oh) = one.box, other.box
    if x > ox + ow + 1 or ox > x + w + 1 or y > oy + oh + 1 or oy > y + h + 1:
        return False
    for angle in np.arange(24) * np.pi / 24:
        a, b = (shape.outline @ [np.cos(angle), np.sin(angle)] for shape in (one, other))
        if max(b.min() - a.max(), a.min() - b.max()) > 1:
            return False
    return True


def test_what_a_canvas_cannot_hold_is_said(caplog):
    crowded = {"image_size": 96, "min_objects": 0, "max_objects": 400, "min_side": 8, "max_side": 12}
    data = load(num_samples=3, **crowded)
    (remark,) = data.report.remarks
    assert remark in caplog.text
    assert f"{data.report.num_objects} found room in 96 pixels" in remark
    assert not load(num_samples=3).report.remarks


def test_areas_are_those_of_the_boxes():
    for row in load().dataset.with_format(None)["objects"]:
        np.testing.assert_allclose(row["area"], [width * height for _, _, width, height in row["bbox"]])


def test_options_in_the_name_are_those_of_the_call():
    name = "synthetic:image_size=128,min_objects=2,max_objects=6,num_samples=5,seed=3"
    named = load_detection_data(name, "val").dataset
    given = load("val", min_objects=2, max_objects=6, num_samples=5, seed=3).dataset
    assert len(named) == 5
    assert named[:]["objects"] == given[:]["objects"]
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(named["image"], given["image"], strict=True))
    assert {len(row["id"]) for row in named["objects"]} <= set(range(2, 7))
    assert named[0]["objects"] != load("val", min_objects=2, max_objects=6, num_samples=5).dataset[0]["objects"]


@pytest.mark.parametrize(
    "options",
    ["", "seed", "seed=", "seed=1.5", "seed=x", "seed=1,", "colour=3", "seed=1,seed=2", "seed=1;image_size=64"],
)
def test_malformed_options_in_the_name_are_refused_with_the_known_ones(options):
    with pytest.raises(ValueError, match=r"image_size=INTEGER.* min_objects.* max_objects.* num_samples.* seed"):
        load_detection_data(f"synthetic:{options}", "val")


def test_an_option_in_the_name_is_not_overridden():
    with pytest.raises(TypeError, match="seed"):
        load_detection_data("synthetic:seed=3", "val", seed=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 16}, "image_size"),
        ({"min_objects": 5, "max_objects": 4}, "max_objects"),
        ({"object_sizes": ((1, 7, 200),)}, "object_sizes"),
        ({"min_side": 7, "max_side": 200}, "object_sizes"),
        ({"min_side": 9, "max_side": 7}, "object_sizes"),
        ({"min_side": 7}, "both min_side and max_side"),
        ({"min_side": 7, "max_side": 9, "object_sizes": ((1, 7, 20),)}, "object_sizes"),
        ({"object_sizes": ((0, 7, 20),)}, "shares"),
        ({"num_samples": 0}, "num_samples"),
        ({"seed": -1}, "seed"),
        ({"min_objects": 200, "max_objects": 200}, "fewer or smaller"),
    ],
)
def test_impossible_scenes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_other_splits_and_options_are_refused():
    with pytest.raises(FileNotFoundError, match="train, val, test"):
        load("trainval")
    with pytest.raises(TypeError, match="colour"):
        load(colour="red")


def test_workers_paint_the_same_scenes():
    dataset = DetectionDataset(load())
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    for index, item in enumerate(loader):
        assert (item["image"] == dataset[index]["image"]).all()
