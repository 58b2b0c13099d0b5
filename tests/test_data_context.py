# SPDX-License-Identifier: Apache-2.0
"""Context scenes: the far beacon decides the class, and nothing else in the picture tells it."""

import pickle
from collections import Counter

import numpy as np
import pytest

from deperceiver_hf.data import SyntheticScenes, load_detection_data
from deperceiver_hf.data.synthetic import context
from deperceiver_hf.data.synthetic.context import CONTEXT_LABELS, DEPENDENT_SHAPES
from deperceiver_hf.data.synthetic.shapes import SHAPES, PlacedShapes

NAMES = ["disc (star)", "disc (cross)", "square (star)", "square (cross)", "triangle", "ring", "semicircle", "bar"]


def load(split="train", **options):
    options = {"num_samples": 6, "image_size": 128, "context": 1, **options}
    return load_detection_data("synthetic", split, **options)


def centre(box) -> np.ndarray:
    return np.array([box[0] + box[2] / 2, box[1] + box[3] / 2])


def test_a_scene_depends_on_seed_split_and_number_only():
    data = load_detection_data("synthetic:context=1,image_size=128,num_samples=6", "train")
    again = pickle.loads(pickle.dumps(load(num_samples=4).dataset))
    for index in (3, 0):
        assert data.dataset[index]["objects"] == again[index]["objects"]
        assert (np.asarray(data.dataset[index]["image"]) == np.asarray(again[index]["image"])).all()
    scenes = [SyntheticScenes(context=1), SyntheticScenes(context=1, seed=1)]
    places = [*(scenes[0].beacon(stream, index) for stream in (0, 1) for index in (0, 1)), scenes[1].beacon(0, 0)]
    assert len({beacon.place.box for beacon in places}) == 5


def test_classes_are_those_of_shape_and_beacon():
    data = load(num_samples=40)
    assert data.label_names == list(CONTEXT_LABELS) == NAMES
    assert data.category_ids == list(range(8))
    scenes = SyntheticScenes(image_size=128, context=1)
    for index, row in enumerate(data.dataset.with_format(None)["objects"]):
        beacon = SHAPES[scenes.beacon(0, index).shape.label]
        shapes = scenes.layout(0, index)
        assert row["bbox"] == [list(shape.box) for shape in shapes]
        for shape, label in zip(shapes, row["category"], strict=True):
            name = SHAPES[shape.label]
            assert data.label_names[label] == (f"{name} ({beacon})" if name in ("disc", "square") else name)


@pytest.mark.parametrize("image_size", [96, 128, 256])
def test_dependent_objects_are_far_from_the_beacon_and_none_covers_it(image_size):
    scenes = SyntheticScenes(image_size=image_size, context=1)
    near = []
    for index in range(150):
        beacon = scenes.beacon(0, index)
        x, y, width, height = beacon.shape.box
        assert 3 / 32 <= max(width, height) / image_size <= 1 / 8
        assert min(x, y) >= 0
        assert max(x + width, y + height) <= image_size
        assert min(x, y, image_size - x - width, image_size - y - height) < image_size / 8
        assert SHAPES[beacon.shape.label] in ("star", "cross")
        occupied = PlacedShapes()
        occupied.add(beacon.shape)
        for shape in scenes.layout(0, index):
            assert not occupied.overlap(shape)
            distance = np.linalg.norm(centre(shape.box) - centre(beacon.shape.box))
            if SHAPES[shape.label] in DEPENDENT_SHAPES:
                assert distance >= image_size / 2 - 1e-9
            else:
                near.append(distance < image_size / 2)
    assert 0.2 < np.mean(near) < 0.8  # the others are anywhere


def test_classes_and_beacons_are_balanced_and_numbers_are_as_in_ordinary_scenes():
    scenes, ordinary = SyntheticScenes(image_size=128, context=1), SyntheticScenes(image_size=128)
    classes, beacons, counts, ordinary_counts = Counter(), Counter(), [], []
    for index in range(600):
        shapes, beacon = scenes.layout(0, index), scenes.beacon(0, index)
        beacons[SHAPES[beacon.shape.label]] += 1
        classes.update(CONTEXT_LABELS[context.context_label(shape, beacon)] for shape in shapes)
        counts.append(len(shapes))
        ordinary_counts.append(len(ordinary.layout(0, index)))
    assert set(classes) == set(NAMES)
    assert abs(beacons["star"] - beacons["cross"]) < 75  # three standard deviations
    total = sum(classes.values())
    for name in DEPENDENT_SHAPES:
        star, cross = (classes[f"{name} ({beacon})"] / total for beacon in ("star", "cross"))
        assert abs(star - 0.15) < 0.03
        assert abs(cross - 0.15) < 0.03
    assert abs(np.mean(counts) - np.mean(ordinary_counts)) < 0.05


def test_exchanging_the_beacon_changes_the_picture_at_its_place_only(monkeypatch):
    """There is no other cue: not in positions, numbers, sizes or colours of the objects, nor in the background."""
    scenes = SyntheticScenes(image_size=128, context=1)
    before = [(scenes.layout(0, i), scenes.beacon(0, i), np.asarray(scenes.paint(0, i))) for i in range(30)]
    monkeypatch.setattr(context, "BEACONS", context.BEACONS[::-1])
    for index, (shapes, beacon, picture) in enumerate(before):
        exchanged = scenes.beacon(0, index)
        assert {SHAPES[beacon.shape.label], SHAPES[exchanged.shape.label]} == {"star", "cross"}
        assert exchanged.place.box == beacon.place.box
        for shape, other in zip(shapes, scenes.layout(0, index), strict=True):
            assert (shape.label, shape.box) == (other.label, other.box)
        x, y, width, height = beacon.place.box
        inside = np.zeros((128, 128), dtype=bool)
        inside[int(y) : int(np.ceil(y + height)), int(x) : int(np.ceil(x + width))] = True
        differs = (np.asarray(scenes.paint(0, index)) != picture).any(axis=2)
        assert not differs[~inside].any()
        assert differs[inside].mean() > 0.1


def test_the_beacon_is_painted_but_not_annotated(monkeypatch):
    data = load(num_samples=20)
    scenes = SyntheticScenes(image_size=128, context=1)
    pictures = [np.asarray(row["image"]).astype(int) for row in data.dataset]
    assert data.report.num_objects == sum(len(scenes.layout(0, index)) for index in range(20))
    monkeypatch.setattr("deperceiver_hf.data.synthetic.scenes.paint_shape", lambda canvas, shape, colour: None)
    for index, picture in enumerate(pictures):
        beacon = scenes.beacon(0, index).shape
        x, y = centre(beacon.box).astype(int)
        empty = np.asarray(scenes.paint(0, index)).astype(int)
        assert np.abs(picture - empty)[y - 1 : y + 1, x - 1 : x + 1].max(axis=2).min() > 30  # star and cross are solid
        for x, y, width, height in data.dataset.with_format(None)[index]["objects"]["bbox"]:
            overlap = np.minimum([x + width, y + height], centre(beacon.box) + 2) - np.maximum(
                [x, y], centre(beacon.box) - 2
            )
            assert (overlap <= 0).any()


@pytest.mark.parametrize(("options", "message"), [({"context": 2}, "0 or 1"), ({"image_size": 64}, "at least 96")])
def test_impossible_context_scenes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)
