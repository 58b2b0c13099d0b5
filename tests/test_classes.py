# SPDX-License-Identifier: Apache-2.0
"""Classes are their names: in matching two sides, and in the heads of a saved model that is trained on."""

import json
import logging

import pytest
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

from deperceiver_hf.data import load_detection_data
from deperceiver_hf.data.classes import (
    align_labels,
    corresponding_classes,
    match_classes,
    repair_labels,
    with_labels_of,
)
from deperceiver_hf.errors import UserError
from deperceiver_hf.training import build_image_processor, build_model
from training_runs import TINY_ARCHITECTURES, tiny_options

MATCHES = [
    (["red", "blue"], ["blue", "red"], [1, 0]),
    (["Helmet", "helmet"], ["helmet", "Helmet"], [1, 0]),
    (["Helmet", "helmet"], ["helmet"], [None, 0]),
    (["traffic_light"], ["Traffic-Light"], [0]),
    (["no-helmet", "no helmet", "head"], ["head", "no helmet", "no-helmet"], [2, 1, 0]),
    (["Ka\u0308fer"], ["K\u00e4fer"], [0]),  # composed and decomposed
    (["\uff2d\uff4f\uff54\uff4f\uff52"], ["motor"], [0]),  # full-width letters
    (["STRASSE"], ["stra\u00dfe"], [0]),
    (["cat"], ["dog"], [None]),
    ([], ["dog"], []),
]


@pytest.mark.parametrize(("names", "others", "places"), MATCHES)
def test_classes_match_by_name_exact_ones_first(names, others, places):
    assert match_classes(names, others) == places


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["Helmet", "helmet"], ["HELMET"]),
        (["HELMET"], ["Helmet", "helmet"]),
        (["cat", "cat"], ["cat"]),
        (["cat"], ["cat", "cat"]),
        (["cat"], ["CAT", "CAT"]),
    ],
)
def test_a_name_that_stands_for_several_is_refused(names, others):
    with pytest.raises(UserError, match=r"not clear which class|same name"):
        match_classes(names, others)


def test_a_name_of_several_that_is_not_asked_for_is_no_matter():
    assert match_classes(["cat", "dog"], ["N/A", "dog", "N/A", "cat"]) == [3, 1]


@pytest.mark.parametrize(
    ("names", "others", "places"),
    [
        (["LABEL_0", "LABEL_1"], ["cat", "dog"], [0, 1]),
        (["cat", "dog"], ["0", "1"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["0", "1"], [0, 1]),
        (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
        (["LABEL_0"], ["cat", "dog"], [None]),
        (["cat", "LABEL_1"], ["dog", "cow"], [None, None]),
        ([], [], []),
    ],
)
def test_classes_without_names_are_taken_in_their_order(names, others, places):
    assert corresponding_classes(names, others) == places


def test_labels_that_meet_when_folded_are_two_classes():
    assert align_labels({0: "Helmet", 1: "helmet"}, ["helmet", "Helmet"]).tolist() == [1, 0]


class Labels:
    def __init__(self, id2label, label2id):
        self.id2label, self.label2id = id2label, label2id


@pytest.fixture
def heard():
    """Messages of the log, as they come."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    transformers_logging.add_handler(handler)
    logging.getLogger("deperceiver_hf").addHandler(handler)
    yield messages
    transformers_logging.remove_handler(handler)
    logging.getLogger("deperceiver_hf").removeHandler(handler)


@pytest.mark.parametrize("label2id", [{"dog": 0, "cat": 1}, {"cat": 0}, {}, None, 7, ["cat"], {"cat": [0], "dog": 1}])
def test_a_configuration_that_contradicts_itself_is_repaired_from_id2label(heard, label2id):
    config = Labels({0: "cat", 1: "dog"}, label2id)
    repair_labels(config, f"a model with {label2id}")
    assert config.label2id == {"cat": 0, "dog": 1}
    assert any(f"a model with {label2id}" in line for line in heard)


@pytest.mark.parametrize("gap", [{}, {"N/A": 0}, {"N/A": 2}])
def test_a_configuration_whose_names_agree_stays_as_it_is(heard, gap):
    config = Labels({0: "N/A", 1: "dog", 2: "N/A"}, {"dog": 1, **gap})
    repair_labels(config, "a good model")
    assert config.label2id == {"dog": 1, **gap}
    assert not any("a good model" in line for line in heard)


@pytest.mark.parametrize("id2label", [{}, {1: "cat"}, {0: "cat", 2: "dog"}])
def test_labels_with_gaps_are_refused(id2label):
    with pytest.raises(UserError, match="id2label"):
        repair_labels(Labels(id2label, {}), "a model")


def save(tmp_path, name, classes):
    options = tiny_options(tmp_path / "unused", TINY_ARCHITECTURES[name])
    model = build_model(options, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "saved")
    build_image_processor(options).save_pretrained(tmp_path / "saved")
    return model, tiny_options(tmp_path / "unused", {"model": str(tmp_path / "saved")})


def heads(model, other) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weights whose shape depends on the number of classes, their classes first, and those of another model."""
    before, after = model.state_dict(), other.state_dict()
    differing = {name for name in before if before[name].shape != after[name].shape}
    return {name: (before[name], after[name]) for name in differing}


# deimv2 has the heads of d_fine.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.heavy) if n == "deimv2" else n for n in TINY_ARCHITECTURES]
)
def test_rows_of_heads_follow_the_names_of_classes(tmp_path, name, caplog):
    saved, options = save(tmp_path, name, ["red", "blue"])
    with caplog.at_level(logging.WARNING, logger="deperceiver_hf"):
        longer = build_model(options, ["green", "blue", "red"])
    assert "2 kept (blue, red), 1 new (green), 0 left out" in caplog.text
    found = heads(saved, longer)
    assert found
    for before, after in found.values():
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[2], before[0])
        assert torch.equal(after[3:], before[2:])  # no object
        assert not any(torch.equal(after[0], row) for row in before)
    same = saved.state_dict().keys() - found.keys()
    assert all(torch.equal(saved.state_dict()[key], longer.state_dict()[key]) for key in same)

    swapped, others, equal = (
        build_model(options, names) for names in (["blue", "red"], ["cat", "dog"], ["red", "blue"])
    )
    for key, (before, _) in found.items():
        assert torch.equal(swapped.state_dict()[key][:2], before[:2].flip(0))
        assert torch.equal(swapped.state_dict()[key][2:], before[2:])
        assert not torch.equal(others.state_dict()[key][:2], before[:2])
        assert torch.equal(equal.state_dict()[key], before)


@pytest.mark.parametrize(("before", "after"), [(["0", "1"], ["cat", "dog"]), (["cat", "dog"], ["LABEL_0", "LABEL_1"])])
def test_rows_of_classes_without_names_stay_in_their_order(tmp_path, before, after):
    saved, options = save(tmp_path, "deperceiver_v2", before)
    model = build_model(options, after)
    assert list(model.config.id2label.values()) == after
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_new_rows_are_those_of_the_seed(tmp_path):
    _, options = save(tmp_path, "deperceiver_v2", ["red"])
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_model(options, ["red", "green"]).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def coco(root, categories, category_of_box) -> object:
    """One image with a box of each category named, loaded."""
    (root / "annotations").mkdir(parents=True)
    (root / "val").mkdir()
    Image.new("RGB", (40, 30)).save(root / "val" / "1.png")
    boxes = [
        {
            "id": place + 1,
            "image_id": 1,
            "category_id": category,
            "bbox": [place, 2, 10, 10],
            "area": 100,
            "iscrowd": 0,
        }
        for place, category in enumerate(category_of_box)
    ]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}],
        "annotations": boxes,
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content), encoding="utf-8")
    return load_detection_data(str(root), "val")


def test_splits_that_list_their_classes_differently_are_matched_by_name(tmp_path):
    train = coco(tmp_path / "a", {1: "cat", 2: "dog", 3: "cow"}, [1, 2, 3])
    other = coco(tmp_path / "b", {5: "dog", 9: "Cat"}, [5, 9, 9])
    aligned = with_labels_of(train, other)
    assert aligned.label_names == ["cat", "dog", "cow"]
    assert aligned.category_ids == [9, 5, 3]
    (row,) = aligned.dataset.with_format(None).select_columns("objects")
    assert row["objects"]["category"] == [1, 0, 0]
    assert [box[0] for box in row["objects"]["bbox"]] == [0, 1, 2]
    assert aligned.dataset[0]["image"].size == (40, 30)
    assert with_labels_of(train, train) is train


def test_no_two_classes_get_one_category_id(tmp_path):
    train = coco(tmp_path / "a", {1: "cat", 2: "dog", 3: "cow"}, [1, 2, 3])
    aligned = with_labels_of(train, coco(tmp_path / "b", {3: "dog"}, [3]))
    assert aligned.category_ids == [1, 3, 4]  # the cow has a new one, since 3 is the dog's there

    swapped = with_labels_of(train, coco(tmp_path / "c", {3: "dog", 2: "cow"}, [3]))
    assert swapped.category_ids == [1, 3, 2]


def test_objects_of_a_class_that_training_does_not_know_are_refused(tmp_path):
    train = coco(tmp_path / "a", {1: "cat", 2: "dog"}, [1, 2])
    with pytest.raises(UserError, match=r"does not have: bird \(2 objects\)"):
        with_labels_of(train, coco(tmp_path / "b", {1: "cat", 7: "bird"}, [1, 7, 7]))
    unused = coco(tmp_path / "c", {1: "cat", 7: "bird"}, [1])
    assert with_labels_of(train, unused).label_names == ["cat", "dog"]
