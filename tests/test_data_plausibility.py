# SPDX-License-Identifier: Apache-2.0
"""Data sets that cannot be as a whole what each annotation alone may be: stopped, repaired or remarked on."""

import json

import numpy as np
import PIL.Image
import pytest

from deperceiver_hf.data import load_detection_data
from deperceiver_hf.data.boxes import BOX_FORMATS, BoxFormat, xywh_to_xyxy
from deperceiver_hf.data.doctor.objects import (
    ObjectTable,
    TrainedSize,
    check_evaluation_objects,
    check_training_objects,
    require_objects,
)
from deperceiver_hf.training import DetectionTrainer
from training_runs import tiny_options

SIZE = (90, 60)


def random_boxes(count: int, size=SIZE, seed=0) -> np.ndarray:
    """Boxes (count, 4) as (x, y, width, height) anywhere in an image."""
    random = np.random.default_rng(seed)
    corners = np.sort(random.uniform(0, 1, (count, 2, 2)), axis=1) * size
    corners[:, 1] += np.minimum(2, np.array(size) - corners[:, 1])  # none is tiny
    corners[:, 0] = np.minimum(corners[:, 0], corners[:, 1] - 1)
    return np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)


def write(root, boxes_of_images, *, file_size=SIZE, stated=None, edit=None, split="val"):
    """A COCO directory with one image for each list of boxes."""
    for name in ("annotations", split):
        (root / name).mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    for index, boxes in enumerate(boxes_of_images):
        PIL.Image.new("RGB", file_size).save(root / split / f"{index}.png")
        width, height = stated or file_size
        content["images"].append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
        for box in boxes:
            number = len(content["annotations"]) + 1
            content["annotations"].append(
                {"id": number, "image_id": index, "category_id": 1, "bbox": list(box), "iscrowd": 0}
            )
    if edit:
        edit(content)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def loaded_boxes(data) -> np.ndarray:
    return np.array([box for row in data.dataset for box in row["objects"]["bbox"]])


def as_format(boxes: np.ndarray, form: BoxFormat, size=SIZE) -> np.ndarray:
    """Boxes (x, y, width, height) in pixels written in another format."""
    if form.layout == "xyxy":
        boxes = xywh_to_xyxy(boxes)
    elif form.layout == "cxcywh":
        boxes = np.concatenate([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)
    return boxes if form.whole is None else boxes / np.array([*size, *size]) * form.whole


@pytest.mark.parametrize("name", [name for name in BOX_FORMATS if name != "voc"])  # of a pixel, which nothing shows
def test_every_format_is_read_when_it_is_named_and_noticed_when_it_is_not(tmp_path, name):
    boxes = random_boxes(60)
    given = as_format(boxes, BoxFormat.parse(name))
    root = write(tmp_path, given.reshape(6, 10, 4))
    for data in (
        load_detection_data(root, "val", bbox_format=name),
        load_detection_data(f"{root}:bbox_format={name}", "val", strict=True),
    ):
        np.testing.assert_allclose(loaded_boxes(data), boxes, atol=1e-9)
    if name == "xywh":
        np.testing.assert_array_equal(loaded_boxes(load_detection_data(root, "val", strict=True)), boxes)
        return
    with pytest.raises(ValueError, match=r"--box_format \w+.* --box_format xywh takes them as they are") as error:
        load_detection_data(root, "val")
    assert name in str(error.value)
    data = load_detection_data(root, "val", bbox_format="xywh")  # as asked for, with a remark
    assert any(name in remark for remark in data.report.remarks)


@pytest.mark.parametrize("wrong", ["xyxy", "xywh_relative", "xyxy_percent"])
def test_a_format_that_was_named_wrongly_is_remarked_on(tmp_path, wrong):
    root = write(tmp_path, random_boxes(60).reshape(6, 10, 4))
    data = load_detection_data(root, "val", bbox_format=wrong)
    assert any("xywh" in remark for remark in data.report.remarks)


def test_percent_in_images_that_are_much_larger_is_noticed(tmp_path):
    size = (640, 480)
    given = as_format(random_boxes(40, size), BoxFormat.parse("xywh_percent"), size)
    root = write(tmp_path, given.reshape(4, 10, 4), file_size=size)
    with pytest.raises(ValueError, match="--box_format xywh_percent"):
        load_detection_data(root, "val")


LEGITIMATE = {
    "a single pixel": [[[0, 0, 1, 1]]],
    "the whole image": [[[0, 0, *SIZE]]] * 5,
    "a large object in the middle": [[[5, 5, 80, 50]]] * 30,
    "carelessly over the border": [[[40, 20, 53, 43]], [[1, 1, 88, 62]], [[10, 10, 5, 5]], [[60, 3, 29, 20]]] * 5,
    "small ones at the top left": [[[x, x, 2, 3]] for x in range(30)],
    "one far out": [[[200, 10, 10, 10]], [[10, 10, 20, 20]], [[50, 30, 20, 20]]],
    "no extent": [[[5, 5, 0, 0]]] * 10,
}


@pytest.mark.parametrize("boxes", LEGITIMATE.values(), ids=LEGITIMATE)
def test_data_in_order_are_not_suspected(tmp_path, boxes):
    data = load_detection_data(write(tmp_path, boxes), "val")
    assert data.report.remarks == []


def test_little_evidence_is_a_remark_that_is_logged(tmp_path, caplog):
    root = write(tmp_path, [[[0.2, 0.1, 0.5, 0.5]]])
    data = load_detection_data(root, "val")
    assert "1 of 1 boxes lie within [0, 1]" in data.report.remarks[0]
    assert any("within [0, 1]" in record.message for record in caplog.records)


@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0, 3.0])
def test_boxes_are_scaled_with_images_that_were_resized(tmp_path, factor):
    """The file is `factor` times as large as stated, and so are objects and areas."""
    boxes = random_boxes(40, (120, 80))
    root = write(
        tmp_path,
        boxes.reshape(8, 5, 4),
        file_size=(round(120 * factor), round(80 * factor)),
        stated=(120, 80),
        edit=lambda content: [a.update(area=100) for a in content["annotations"]],
    )
    data = load_detection_data(root, "val")
    assert data.report.counts == {"rescaled_image": 8}
    np.testing.assert_allclose(loaded_boxes(data), boxes * factor, atol=1e-9)
    assert data.dataset[0]["objects"]["area"] == [100 * factor**2] * 5
    assert (data.dataset[0]["width"], data.dataset[0]["height"]) == (120 * factor, 80 * factor)


def test_a_size_that_is_stated_wrongly_does_not_move_boxes_of_the_file(tmp_path):
    boxes = random_boxes(40)
    for position, stated in enumerate([(180, 120), (900, 600), (45, 30), (91, 60)]):
        root = write(tmp_path / str(position), boxes.reshape(8, 5, 4), stated=stated)
        data = load_detection_data(root, "val")
        assert data.report.counts == {"size_mismatch": 8}
        np.testing.assert_array_equal(loaded_boxes(data), boxes)


def test_images_that_were_stretched_after_annotating_are_refused(tmp_path):
    root = write(tmp_path, random_boxes(40, (300, 200)).reshape(8, 5, 4), file_size=(64, 64), stated=(300, 200))
    with pytest.raises(ValueError, match="64 x 64 pixels instead of 300 x 200"):
        load_detection_data(root, "val")
    relative = write(
        tmp_path / "relative",
        as_format(random_boxes(40), BoxFormat.parse("xywh_relative")).reshape(8, 5, 4),
        file_size=(64, 64),
        stated=(300, 200),
    )  # parts of the image stay what they are
    assert load_detection_data(relative, "val", bbox_format="xywh_relative").report.num_objects == 40


def test_boxes_of_other_images_are_remarked_on(tmp_path):
    random = np.random.default_rng(0)
    boxes = np.concatenate([random.uniform(0, 500, (40, 2)), random.uniform(10, 300, (40, 2))], axis=1)
    data = load_detection_data(write(tmp_path, boxes.reshape(8, 5, 4)), "val")
    assert any("resized or exchanged" in remark for remark in data.report.remarks)


def table(root) -> ObjectTable:
    return ObjectTable.of(load_detection_data(root, "val"), "val")


def test_data_without_an_object_to_learn_from_are_refused_with_the_reasons(tmp_path):
    flat = table(write(tmp_path / "flat", [[[5, 5, 0, 0]]] * 3))
    with pytest.raises(ValueError, match=r"no object to learn from: 3 images with 0 objects.*3 boxes of zero"):
        require_objects(flat)
    none = table(write(tmp_path / "none", [[]] * 3))
    with pytest.raises(ValueError, match="list no others"):
        require_objects(none)

    def crowds(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    crowd = table(write(tmp_path / "crowd", [[[5, 5, 9, 9]]] * 3, edit=crowds))
    with pytest.raises(ValueError, match="with 3 objects; they are crowds"):
        require_objects(crowd)
    assert "3 crowds" in check_evaluation_objects(crowd)[0].what
    require_objects(table(write(tmp_path / "one", [[[5, 5, 9, 9]], []])))


def test_objects_are_counted_without_crowds(tmp_path):
    def edit(content):
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["category_id"] = 2

    counts = table(write(tmp_path, [random_boxes(4), [], random_boxes(2)], edit=edit))
    assert counts.per_image.tolist() == [3, 0, 2]
    assert counts.per_class.tolist() == [4, 1]
    assert counts.most_of_a_class.tolist() == [2, 0, 2]


def test_more_objects_than_can_be_found_are_told_with_the_recall_that_is_possible(tmp_path):
    data = table(write(tmp_path, [random_boxes(20), random_boxes(5)]))
    remark = check_training_objects(data, TrainedSize(num_queries=10))[-1].what
    assert "up to 20 objects in an image (12.5 on average)" in remark
    assert "10 queries" in remark
    assert "at most 60 %" in remark  # 10 of 20 and 5 of 5
    assert "--num_queries 20" in remark
    (found,) = check_evaluation_objects(data, max_detections=10)
    assert "up to 20 objects of a class" in found.what
    assert "--max_detections 1 10 20" in found.what
    assert check_evaluation_objects(data, num_queries=20, max_detections=20) == []
    (found,) = check_training_objects(data, TrainedSize(num_queries=20))
    assert "no object of 1 of its 2 classes: b" in found.what


def test_training_says_what_is_wrong_with_its_objects_before_it_begins(tmp_path, caplog):
    root = tmp_path / "data"
    write(root, [[]] * 3, split="val")
    write(root, [[[5, 5, 0, 0]]] * 3, split="train")
    given = {"dataset": str(root), "eval_every": 1, "batch_size": 1}
    with pytest.raises(ValueError, match="no object to learn from"):
        DetectionTrainer(tiny_options(tmp_path / "run", **given))
    write(root, [random_boxes(30)] * 3, split="train")
    DetectionTrainer(tiny_options(tmp_path / "run", **given))
    said = [record.message for record in caplog.records]
    for sentence in ("12 queries", "has no objects (3 images)", "no object of 1 of its 2 classes"):
        assert any(sentence in message for message in said), sentence
    caplog.clear()
    write(root, xywh_to_xyxy(random_boxes(9)).reshape(3, 3, 4).tolist(), split="train")
    run = DetectionTrainer(tiny_options(tmp_path / "corners", **given | {"box_format": "xyxy"}))
    assert not any("queries" in record.message for record in caplog.records)
    np.testing.assert_allclose(loaded_boxes(run.data.train), random_boxes(9), atol=1e-9)
