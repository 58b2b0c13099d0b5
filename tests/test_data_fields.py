# SPDX-License-Identifier: Apache-2.0
"""Values of odd types in annotations: read as what they are meant to be, or counted; ids stay the user's."""

import json

import numpy as np
import pytest

from coco_samples import annotation, coco_content, write_coco
from deperceiver_hf.data import load_detection_data
from deperceiver_hf.data.fields import IdTable, as_boxes, as_id, as_integer, as_truth, category_order, record_ids

NAN, INF = float("nan"), float("inf")


def test_ids_refer_to_their_equals_and_numbers_to_their_texts_where_that_is_plain():
    table = IdTable(["0001", "1", 7, "x", 2**200, 1.5])
    assert [table.find(value) for value in ("0001", "1", 7, 7.0, "7", "007", "x", 2**200, 1.5)] == [
        *(0, 1, 2, 2, 2, 2, 3, 4, 5)
    ]
    # 1 may be the first or the second; the others are no ids or not listed
    assert [table.find(value) for value in (1, True, None, NAN, INF, [7], {}, "X", 8, "7.5")] == [None] * 10
    assert [as_id(value) for value in (True, NAN, "", " ", None, [1], "\ud800")] == [None] * 7


def test_whole_numbers_are_those_of_the_decimal_system():
    assert [as_integer(value) for value in (7, 7.0, "7", " 07 ", "7.0", "-3")] == [7, 7, 7, 7, 7, -3]
    assert [
        as_integer(value) for value in (7.5, "7.5", "1_0", "\u0667", "", True, None, NAN, INF, [], "9" * 5000)
    ] == ([None] * 11)


def test_record_ids_are_the_own_ones_where_those_are_integers_of_64_bits():
    for own in ([5, -(2**63), 2**63 - 1], [3]):
        ids, differing = record_ids(own)
        assert ids.tolist() == own
        assert differing == {}
    for own in ([5, 2**63], ["5", 7], [0.5, 3], ["a"]):
        ids, differing = record_ids(own)
        assert ids.tolist() == list(range(len(own)))
        assert [differing[number] for number in ids.tolist()] == own
    assert repr(record_ids([7.0, 2])[1]) == "{7: 7.0}"


def test_categories_are_in_the_order_of_their_numbers_before_texts():
    assert sorted(["b", 11, "2", "10", 3.5, "a", "02"], key=category_order) == ["02", "2", 3.5, "10", 11, "a", "b"]


TRUTH = {0: False, 1: True, "0.0": False, "0": False, "1": True, "True": True, " false": False, "no": False}


@pytest.mark.parametrize(("value", "meant"), TRUTH.items(), ids=repr)
def test_crowds_are_marked_in_many_ways(value, meant):
    assert as_truth(value) is meant


@pytest.mark.parametrize("value", [NAN, "", "maybe", 2, -1, [], {}, [1]], ids=repr)
def test_what_says_neither_yes_nor_no_is_no_crowd_and_counted(tmp_path, value):
    assert as_truth(value) is None
    content = coco_content()
    content["annotations"][0]["iscrowd"] = value
    data = load_detection_data(write_coco(tmp_path, content), "val")
    assert data.report.counts == {"invalid_crowd": 1}
    assert data.report.num_crowds == 1


BOXES = {
    "text": "[1, 2, 3, 4]",
    "words": "1 2 3.0 4",
    "numbers as text": ["1", "2", "3", "4"],
    "names": {"x": 1, "y": 2, "width": 3, "height": 4},
    "corners": {"xmin": 1, "ymin": 2, "xmax": 4, "ymax": 6},
    "two points": {"x1": "1", "y1": 2, "x2": 4, "y2": 6.0},
    "a centre": {"cx": 2.5, "cy": 4, "w": 3, "h": 4},
}


@pytest.mark.parametrize("value", BOXES.values(), ids=BOXES)
def test_boxes_are_four_numbers_in_many_ways(value):
    boxes, named = as_boxes([[5, 6, 7, 8], value])
    np.testing.assert_array_equal(boxes, [[5, 6, 7, 8], [1, 2, 3, 4]])
    assert named.tolist() == [False, isinstance(value, dict)]


@pytest.mark.parametrize(
    "value", [None, 5, "x", "1,2,3", [1, 2, 3], [True, 2, 3, 4], [[1, 2, 3, 4]], {"x": 1}, {}, [10**400, 1, 1, 1]]
)
def test_boxes_that_are_not_are_counted(tmp_path, value):
    content = coco_content()
    content["annotations"][0]["bbox"] = value
    data = load_detection_data(write_coco(tmp_path, content), "val")
    assert data.report.counts == {"invalid_box": 1}


def changed(kind, index=0, **values):
    return lambda content: content[kind][index].update(values)


ODD = {
    "width as text": (changed("images", width="60", height="40.0"), {}),
    "width of no number": (changed("images", width=NAN), {"invalid_size": 1}),
    "no width": (changed("images", width=0, height="x"), {"invalid_size": 1}),
    "a width beyond all": (changed("images", width=2**70), {"invalid_size": 1}),
    "area as text": (changed("annotations", area="12.5"), {}),
    "area of no number": (changed("annotations", area=NAN), {"invalid_area": 1}),
    "area as a truth value": (changed("annotations", area=True), {"invalid_area": 1}),
    "area beyond float32": (changed("annotations", area=1e308), {"invalid_area": 1}),
    "image id as a truth value": (changed("annotations", image_id=True), {"unknown_image": 1}),
    "category as text": (changed("annotations", category_id="90"), {}),
    "category of no number": (changed("annotations", category_id=NAN), {"unknown_category": 1}),
    "no category": (changed("annotations", category_id=None), {"unknown_category": 1}),
    "an annotation id of 128 bits": (changed("annotations", id=2**127), {"invalid_annotation_id": 1}),
    "the largest annotation id": (changed("annotations", id=2**63 - 1), {}),
    "a name of half a character": (changed("categories", name="a\ud800"), {}),
    "a name that is no text": (changed("categories", name=5), {}),
    "an endless box": (changed("annotations", bbox=[1, 1, 1e308, 1e308]), {"clamped_box": 1}),
    "a box of no visible extent": (changed("annotations", bbox=[50, 30, 1e-20, 5]), {"empty_box": 1}),
}


@pytest.mark.parametrize(("edit", "counts"), ODD.values(), ids=ODD)
def test_odd_values_are_understood_or_counted(tmp_path, edit, counts):
    root, content = write_coco(tmp_path), coco_content()
    edit(content)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    data = load_detection_data(root, "val")
    assert data.report.counts == counts
    "".join(data.label_names).encode()


def test_keys_that_an_object_has_twice_are_counted(tmp_path):
    root = write_coco(tmp_path)
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"iscrowd": 1', '"iscrowd": 0, "iscrowd": 1'))
    data = load_detection_data(root, "val")
    assert data.report.counts == {"repeated_key": 1}
    assert data.report.num_crowds == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"images": ' + "1" * 5000, "Exceeds the limit"),
        ("  ", "is empty"),
        (b"\x1f\x8b\x08\x00cut", "is cut off|cannot be read"),
        (b'{"\xff"', "not UTF-8"),
    ],
    ids=["deep", "digits", "blank", "packed", "bytes"],
)
def test_files_that_cannot_be_parsed_are_refused_in_a_line(tmp_path, text, message):
    root = write_coco(tmp_path)
    text = text.encode() if isinstance(text, str) else text
    (root / "annotations" / "instances_val2017.json").write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        load_detection_data(root, "val")
    assert "\n" not in str(error.value)


def test_an_image_id_as_text_and_as_a_number_are_two_images(tmp_path):
    content = coco_content()
    content["images"][1]["id"] = "7"
    content["annotations"] = [annotation(1, 7, 1, [1, 1, 5, 5]), annotation(2, "7", 1, [2, 2, 5, 5])]
    data = load_detection_data(write_coco(tmp_path, content), "val", strict=True)
    boxes = {repr(data.own_image_id(row["image_id"])): row["objects"]["bbox"] for row in data.dataset}
    assert boxes["7"] == [[1, 1, 5, 5]]
    assert boxes["'7'"] == [[2, 2, 5, 5]]
