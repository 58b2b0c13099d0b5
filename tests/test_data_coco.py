# SPDX-License-Identifier: Apache-2.0
"""COCO directories: nothing is lost, shifted or silently changed on the way into the records."""

import json
import logging

import numpy as np
import PIL.Image
import pytest
from datasets import Image

from coco_samples import CATEGORIES, SIZES, annotation, coco_content, write_coco
from deperceiver_hf.data import DETECTION_FEATURES, load_detection_data
from deperceiver_hf.data.annotations import rotate_boxes


def rows_by_id(data) -> dict:
    return {row["image_id"]: row for row in data.dataset}


def test_records_equal_the_annotations(tmp_path):
    data = load_detection_data(str(write_coco(tmp_path)), "val")
    assert data.dataset.features == DETECTION_FEATURES
    rows = rows_by_id(data)
    assert list(rows) == list(SIZES)  # in the file's order, those without annotations too
    assert {image_id: (row["width"], row["height"]) for image_id, row in rows.items()} == SIZES
    assert all(row["image"].size == SIZES[image_id] for image_id, row in rows.items())
    assert rows[7]["objects"] == {
        "id": [11, 13],
        "bbox": [[2.3, 2.5, 10.1, 20.2], [30.3, 10.7, 29.7, 29.3]],  # to the last bit
        "category": [3, 2],
        "area": [123.5, 29.7 * 29.3],
        "iscrowd": [False, False],
    }
    assert rows[25]["objects"]["iscrowd"] == [True]
    assert rows[100]["objects"] == {key: [] for key in rows[7]["objects"]}
    assert data.report.counts == {}
    assert (data.report.num_images, data.report.num_objects) == (4, 4)
    assert (data.report.num_crowds, data.report.num_empty_images) == (1, 1)


def test_labels_are_contiguous_and_lead_back_to_the_category_ids(tmp_path):
    data = load_detection_data(str(write_coco(tmp_path)), "val")
    assert data.category_ids == [1, 11, 13, 90]
    assert data.id2label == {0: "person", 1: "fire hydrant", 2: "stop sign", 3: "toothbrush"}
    of_id = {a["id"]: a["category_id"] for a in coco_content()["annotations"]}
    names = {category["id"]: category["name"] for category in CATEGORIES}
    for row in data.dataset:
        for annotation_id, label in zip(row["objects"]["id"], row["objects"]["category"], strict=True):
            assert data.category_ids[label] == of_id[annotation_id]
            assert data.id2label[label] == names[of_id[annotation_id]]


def test_image_files_are_referenced_not_copied(tmp_path):
    data = load_detection_data(str(write_coco(tmp_path)), "val")
    stored = data.dataset.cast_column("image", Image(decode=False))
    assert stored[0]["image"] == {"bytes": None, "path": str(tmp_path / "val2017" / "000007.png")}


def test_a_changed_annotation_file_is_seen(tmp_path):
    write_coco(tmp_path)
    before = load_detection_data(str(tmp_path), "val")
    content = coco_content()
    content["annotations"][0]["bbox"] = [5, 5, 5, 5]
    write_coco(tmp_path, content)
    after = load_detection_data(str(tmp_path), "val")
    assert before.dataset[0]["objects"]["bbox"][0] == [2.3, 2.5, 10.1, 20.2]
    assert after.dataset[0]["objects"]["bbox"][0] == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("annotation_file", "image_dir", "split"),
    [
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_train.json", "train", "train"),
        ("annotations/instances_val.json", "val", "validation"),
        ("annotations/instances_val2017.json", "images/val2017", "val"),
        ("annotations/instances_test.json", "images", "test"),
        ("valid/_annotations.coco.json", "valid", "val"),
    ],
)
def test_layouts(tmp_path, annotation_file, image_dir, split):
    write_coco(tmp_path, annotation_file=annotation_file, image_dir=image_dir)
    data = load_detection_data(str(tmp_path), split)
    assert len(data.dataset) == 4
    assert data.dataset[0]["image"].size == (60, 40)


def broken_annotation(**change):
    return lambda content: content["annotations"].append(annotation(50, 7, 1, [1, 1, 5, 5]) | change)


def set_first_image(**change):
    return lambda content: content["images"][0].update(change)


BREAKAGES = {
    "nan": (broken_annotation(bbox=[1, 1, float("nan"), 5]), "invalid_box", 4),
    "three numbers": (broken_annotation(bbox=[1, 1, 5]), "invalid_box", 4),
    "no numbers": (broken_annotation(bbox=["a", 1, 5, 5]), "invalid_box", 4),
    "null box": (broken_annotation(bbox=None), "invalid_box", 4),
    "zero width": (broken_annotation(bbox=[1, 1, 0, 5]), "empty_box", 4),
    "negative height": (broken_annotation(bbox=[1, 10, 5, -5]), "empty_box", 4),
    "outside": (broken_annotation(bbox=[100, 1, 5, 5]), "box_outside_image", 4),
    "touching from outside": (broken_annotation(bbox=[-5, 1, 5, 5]), "box_outside_image", 4),
    "over the border": (broken_annotation(bbox=[50, 30, 30, 30]), "clamped_box", 5),
    "unknown image": (broken_annotation(image_id=8), "unknown_image", 4),
    "unknown category": (broken_annotation(category_id=12), "unknown_category", 4),
    "not an object": (lambda content: content["annotations"].append("x"), "invalid_annotation", 4),
    "repeated annotation id": (broken_annotation(id=11), "invalid_annotation_id", 5),
    "negative area": (broken_annotation(area=-1), "invalid_area", 5),
    "repeated image id": (lambda c: c["images"].append(c["images"][0] | {"width": 60}), "duplicate_image_id", 4),
    "image without id": (lambda c: c["images"].append({"file_name": "a.png"}), "invalid_image_entry", 4),
    "image without name": (lambda c: c["images"].append({"id": 5}), "invalid_image_entry", 4),
    "missing file": (lambda c: c["images"].append({"id": 5, "file_name": "5.png"}), "missing_image_file", 4),
}


@pytest.mark.parametrize(("breakage", "issue", "num_objects"), BREAKAGES.values(), ids=BREAKAGES)
def test_what_is_broken_is_counted_and_reported_once_or_refused(tmp_path, caplog, breakage, issue, num_objects):
    content = coco_content()
    breakage(content)
    write_coco(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        data = load_detection_data(str(tmp_path), "val")
    assert data.report.counts == {issue: 1}
    assert data.report.num_objects == num_objects
    assert len(data.dataset) == 4
    assert [record.message for record in caplog.records if "repaired" in record.message] == [
        f"{data.report.source}: repaired while loading:\n{data.report.summary()}"
    ]
    for row in data.dataset:
        boxes = np.array(row["objects"]["bbox"]).reshape(-1, 4)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] > 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= (row["width"], row["height"])).all()
    ids = [annotation_id for row in data.dataset for annotation_id in row["objects"]["id"]]
    assert len(set(ids)) == len(ids)
    with pytest.raises(ValueError, match="strict=True"):
        load_detection_data(str(tmp_path), "val", strict=True)


def test_only_the_main_process_warns(tmp_path, caplog, monkeypatch):
    content = coco_content()
    BREAKAGES["nan"][0](content)
    write_coco(tmp_path, content)
    monkeypatch.setenv("RANK", "1")
    load_detection_data(str(tmp_path), "val")
    assert not caplog.records


def test_clean_data_pass_strict_without_a_warning(tmp_path, caplog):
    load_detection_data(str(write_coco(tmp_path)), "val", strict=True)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_files_that_are_no_images_are_left_out_with_their_objects(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "val2017" / "000003.png").write_bytes(b"not an image")
    data = load_detection_data(str(tmp_path), "val")
    assert data.report.counts == {"unreadable_image": 1}
    assert 3 not in data.dataset["image_id"]
    assert data.report.num_objects == 3


def test_size_is_read_from_the_file_where_it_is_not_stated(tmp_path):
    content = coco_content()
    write_coco(tmp_path, content)
    for image in content["images"]:
        del image["width"], image["height"]
    write_coco(tmp_path, content)
    data = load_detection_data(str(tmp_path), "val", strict=True)
    assert {row["image_id"]: (row["width"], row["height"]) for row in data.dataset} == SIZES


def test_a_wrongly_stated_size_is_reported_and_the_file_believed(tmp_path):
    content = coco_content()
    write_coco(tmp_path, content)
    set_first_image(width=600, height=400)(content)
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    data = load_detection_data(str(tmp_path), "val")
    assert data.report.counts == {"size_mismatch": 1}
    assert (data.dataset[0]["width"], data.dataset[0]["height"]) == (60, 40)


@pytest.mark.parametrize(
    ("orientation", "stated"),
    # Orientations 2 to 4 leave the size as it is: nothing could tell that boxes are not of the image as seen.
    [(orientation, "seen") for orientation in range(1, 9)] + [(orientation, "stored") for orientation in range(5, 9)],
)
def test_boxes_and_size_are_those_of_the_image_as_seen(tmp_path, orientation, stated):
    """A white rectangle stays inside its box, whichever way EXIF turns the image."""
    x, y, width, height = box = (8, 4, 16, 12)  # on the stored image, or on the seen one
    stored = np.zeros((40, 60), dtype=np.uint8)
    swapped = orientation >= 5
    image = PIL.Image.fromarray(stored)
    exif = image.getexif()
    exif[0x0112] = orientation
    if stated == "stored":
        image.paste(255, (x, y, x + width, y + height))
    else:
        seen = PIL.Image.new("L", (40, 60) if swapped else (60, 40))
        seen.paste(255, (x, y, x + width, y + height))
        inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
        image = seen.transpose(PIL.Image.Transpose(inverse[orientation])) if orientation > 1 else seen
    (tmp_path / "val2017").mkdir()
    image.save(tmp_path / "val2017" / "a.png", exif=exif)
    size = (40, 60) if swapped and stated == "seen" else (60, 40)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}],
        "annotations": [annotation(1, 1, 1, list(box))],
        "categories": CATEGORIES,
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    data = load_detection_data(str(tmp_path), "val")
    row = data.dataset[0]
    assert row["image"].size == (row["width"], row["height"])
    assert (row["width"], row["height"]) == ((40, 60) if swapped else (60, 40))
    ys, xs = np.nonzero(np.asarray(row["image"]))
    assert row["objects"]["bbox"] == [[xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]]
    assert data.report.counts == ({"rotated_image": 1} if swapped and stated == "stored" else {})


def test_rotating_boxes_leaves_other_orientations_alone():
    boxes = np.array([[1.0, 2.0, 3.0, 4.0]] * 4)
    assert (rotate_boxes(boxes, np.arange(1, 5), np.array([[10, 20]] * 4)) == boxes).all()


def test_categories_that_share_a_name_stay_apart(tmp_path):
    content = coco_content()
    content["categories"][0]["name"] = "person"
    data = load_detection_data(str(write_coco(tmp_path, content)), "val")
    assert data.label_names == ["person (1)", "fire hydrant", "stop sign", "person (90)"]
    assert data.report.counts == {"duplicate_category_name": 2}


def test_a_category_id_with_two_names_is_refused(tmp_path):
    content = coco_content()
    content["categories"].append({"id": 1, "name": "cat"})
    with pytest.raises(ValueError, match="category id 1 is given twice, as 'person' and 'cat'"):
        load_detection_data(str(write_coco(tmp_path, content)), "val")


def test_max_samples_takes_the_first_images(tmp_path):
    write_coco(tmp_path)
    data = load_detection_data(str(tmp_path), "val", max_samples=2, strict=True)
    assert data.dataset["image_id"][:] == [7, 3]
    assert data.report.num_objects == 3
    with pytest.raises(ValueError, match="max_samples"):
        load_detection_data(str(tmp_path), "val", max_samples=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', r"instances_val2017.json is not valid JSON: .* line 1, column 13"),
        ("[]", "must hold a JSON object"),
        ('{"images": [], "annotations": []}', "no list 'categories'.* images, annotations"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no categories"),
        ('{"images": [], "annotations": [], "categories": [{"name": "a"}]}', "no integer id"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "has no images"),
    ],
)
def test_broken_annotation_files_are_refused_by_name(tmp_path, text, message):
    write_coco(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_detection_data(str(tmp_path), "val")


def test_missing_pieces_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        load_detection_data(str(tmp_path / "nowhere"), "val")
    with pytest.raises(FileNotFoundError, match="is empty"):
        load_detection_data(str(tmp_path), "val")
    write_coco(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"instances_train2017.json.*found: annotations/instances_val2017.json"
    ):
        load_detection_data(str(tmp_path), "train")
    (tmp_path / "val2017").rename(tmp_path / "pictures")
    with pytest.raises(FileNotFoundError, match=r"none of the image directories val2017.*pictures/"):
        load_detection_data(str(tmp_path), "val")
    (tmp_path / "val2017").mkdir()
    with pytest.raises(FileNotFoundError, match="None of the 4 images"):
        load_detection_data(str(tmp_path), "val")


def test_options_of_other_kinds_are_refused(tmp_path):
    write_coco(tmp_path)
    with pytest.raises(ValueError, match="image_size"):
        load_detection_data(str(tmp_path), "val", image_size=64)
