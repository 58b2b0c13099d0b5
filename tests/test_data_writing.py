# SPDX-License-Identifier: Apache-2.0
"""Data sets written in other formats: what comes back is what went in, or it is said what does not."""

import json
import os
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

import data_copies
from coco_samples import coco_content, write_coco
from data_copies import COPIES, NAMES, SCENES, records, text
from deperceiver_hf.cli import main
from deperceiver_hf.data import load_detection_data
from deperceiver_hf.data.writing import data_set
from deperceiver_hf.data.writing.convert import convert
from deperceiver_hf.data.writing.writers import WRITERS
from deperceiver_hf.errors import UserError


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("name", COPIES)
def test_every_format_becomes_every_other_and_nothing_changes(tmp_path, name, to):
    COPIES[name](tmp_path / "in")
    before = contents(tmp_path / "in")
    convert(str(tmp_path / "in"), str(tmp_path / "out"), to=to)
    assert contents(tmp_path / "in") == before
    for split in SCENES:
        data = load_detection_data(tmp_path / "out", split, strict=True)
        assert records(data) == SCENES[split]
        assert data.label_names == NAMES
    pictures = {Path(file).name: content for file, content in before.items() if file.endswith(".png")}
    assert {Path(f).name: c for f, c in contents(tmp_path / "out").items() if f.endswith(".png")} == pictures


def test_coco_carries_ids_areas_and_crowds(tmp_path):
    write_coco(tmp_path / "in")
    result = convert(str(tmp_path / "in"), str(tmp_path / "out"), to="coco")
    before, after = (load_detection_data(tmp_path / name, "val") for name in ("in", "out"))
    columns = [name for name in before.dataset.column_names if name != "image"]
    assert after.dataset.select_columns(columns).to_dict() == before.dataset.select_columns(columns).to_dict()
    assert (after.category_ids, after.label_names) == (before.category_ids, before.label_names)
    assert result.lost == {}


@pytest.mark.parametrize("to", ["yolo", "voc"])
def test_what_a_format_cannot_carry_is_counted_and_said(tmp_path, to, capsys):
    content = coco_content()
    content["annotations"][0]["bbox"][0] = 2.123456789012
    write_coco(tmp_path / "in", content)
    assert main(["data", "convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", to, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["splits"] == {"val": {"images": 4, "objects": 4}}
    assert result["not_carried"] == {
        "crowds": 1,
        "areas": 2,
        "annotation_ids": 4,
        "image_ids": 4,
        "category_ids": 4,
        **({"decimals": 1} if to == "yolo" else {}),  # corners have as many as they need
    }
    data = load_detection_data(tmp_path / "out", "val", strict=True)
    assert data.report.num_objects == 3
    assert data.dataset[0]["objects"]["bbox"][0] == pytest.approx([2.123456789012, 2.5, 10.1, 20.2], abs=1e-9)


def test_order_of_images_that_is_not_that_of_their_names_comes_back(tmp_path):
    write_coco(tmp_path / "in")
    order = [Path(name).stem for name, *_ in records(load_detection_data(tmp_path / "in", "val"))]
    assert order != sorted(order)
    for to in WRITERS:
        convert(str(tmp_path / "in"), str(tmp_path / to), to=to)
        data = load_detection_data(tmp_path / to, "val")
        assert [Path(name).stem for name, *_ in records(data)] == order
    settings = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text())
    assert settings["val"] == "val.txt"
    assert (tmp_path / "yolo" / "val.txt").read_text().splitlines()[0] == f"./images/val/{order[0]}.png"


def test_random_boxes_of_nine_decimals_are_the_same_to_the_last_bit(tmp_path):
    random = np.random.default_rng(0)
    images, annotations = [], []
    (tmp_path / "in" / "train").mkdir(parents=True)
    for number in range(20):
        width, height = (int(side) for side in random.integers(30, 90, 2))
        PIL.Image.new("RGB", (width, height), (number, 0, 0)).save(tmp_path / "in" / "train" / f"{number:02}.png")
        images.append({"id": number, "file_name": f"{number:02}.png", "width": width, "height": height})
        for decimals in range(10):
            low = random.uniform(0, 0.7, 2) * (width, height)
            box = [*low, *(random.uniform(0.05, 0.3, 2) * (width, height))]
            box = [round(float(value), decimals) for value in box]
            entry = {"id": 10 * number + decimals, "image_id": number, "category_id": 0, "bbox": box}
            annotations.append(entry)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "one"}]}
    text(tmp_path / "in" / "annotations" / "instances_train.json", json.dumps(content))
    expected = records(load_detection_data(tmp_path / "in", "train"))
    for to in WRITERS:
        result = convert(str(tmp_path / "in"), str(tmp_path / to), to=to)
        assert "decimals" not in result.lost
        assert records(load_detection_data(tmp_path / to, "train")) == expected


def test_files_that_other_tools_read(tmp_path):
    data_copies.coco(tmp_path / "in")
    convert(str(tmp_path / "in"), str(tmp_path / "yolo"), to="yolo")
    convert(str(tmp_path / "in"), str(tmp_path / "voc"), to="voc")
    settings = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text(encoding="utf-8"))
    expected = {"train": "images/train", "val": "images/val", "nc": 3, "names": dict(enumerate(NAMES))}
    assert settings == expected
    assert (tmp_path / "yolo" / "labels" / "train" / "b.txt").read_text() == ""
    root = ElementTree.parse(tmp_path / "voc" / "Annotations" / "a 1.xml").getroot()
    assert root.findtext("filename") == "a 1.png"
    assert [root.findtext(f"size/{name}") for name in ("width", "height", "depth")] == ["64", "48", "3"]
    boxes = [[box.findtext(side) for side in ("xmin", "ymin", "xmax", "ymax")] for box in root.iter("bndbox")]
    assert boxes == [["2.3", "5.1", "12.4", "25.8"], ["30", "10", "64", "48"]]
    assert (tmp_path / "voc" / "ImageSets" / "Main" / "val.txt").read_text() == "f\ng\n"


def test_voc_of_our_own_is_never_taken_for_one_that_counts_from_one(tmp_path):
    content = data_copies.coco_content("train")
    for annotation in content["annotations"]:
        annotation["bbox"] = [1, 1, 20, 20]
    data_copies.write_images(tmp_path / "in" / "train", "train")
    text(tmp_path / "in" / "annotations" / "instances_train.json", json.dumps(content))
    convert(str(tmp_path / "in"), str(tmp_path / "out"), to="voc")
    assert records(load_detection_data(tmp_path / "out", "train"))[0][3][0] == (0, 1, 1, 20, 20)


def test_images_of_equal_names_get_their_own(tmp_path):
    images = []
    for number, name in enumerate(["a/x.png", "b/x.png", "a_x.png", "b/x.jpg", "b/X.JPG"]):
        (tmp_path / "in" / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        data_copies.picture(name, 64, 48).save(tmp_path / "in" / "train" / name)
        images.append({"id": number, "file_name": name})
    if len(list((tmp_path / "in" / "train" / "b").iterdir())) < 3:
        pytest.skip("this file system knows no capitals")
    annotations = [{"id": i, "image_id": i, "category_id": 0, "bbox": [i, 0, 9, 9]} for i in range(5)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "one"}]}
    text(tmp_path / "in" / "annotations" / "instances_train.json", json.dumps(content))
    for to in WRITERS:
        convert(str(tmp_path / "in"), str(tmp_path / to), to=to)
        data = load_detection_data(tmp_path / to, "train", strict=True)
        assert [objects[0][1] for _, _, _, objects in records(data)] == [0, 1, 2, 3, 4]


def test_data_of_datasets_and_scenes_are_written_too(tmp_path):
    features = Features(
        {"image": Image(), "objects": {"bbox": [[Value("float64")]], "category": [ClassLabel(names=["cat", "dog"])]}}
    )
    rows = {
        "image": [data_copies.picture(name, 40, 32) for name in "ab"],
        "objects": [{"bbox": [[1.5, 2, 10, 12]], "category": [1]}, {"bbox": [], "category": []}],
    }
    DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk(str(tmp_path / "in"))
    for source, split in ((str(tmp_path / "in"), "train"), ("synthetic:num_samples=2,image_size=64", "val")):
        given = load_detection_data(source, split)
        for to in WRITERS:
            out = tmp_path / f"{split} {to}"
            convert(source, str(out), to=to, splits=[split])
            data = load_detection_data(out, split, strict=True)
            assert data.label_names == given.label_names
            for ours, theirs in zip(data.dataset, given.dataset, strict=True):
                boxes = [np.reshape(row["objects"]["bbox"], (-1, 4)) for row in (ours, theirs)]
                np.testing.assert_allclose(*boxes, atol=1e-8)
                assert ours["objects"]["category"] == theirs["objects"]["category"]
                np.testing.assert_array_equal(np.asarray(ours["image"]), np.asarray(theirs["image"].convert("RGB")))
        with pytest.raises(UserError, match="images in itself"):
            convert(source, str(tmp_path / f"{split} linked"), to="yolo", splits=[split], link=True)


def test_links_are_of_the_files(tmp_path):
    data_copies.coco(tmp_path / "in")
    convert(str(tmp_path / "in"), str(tmp_path / "out"), to="yolo", link=True)
    linked, original = tmp_path / "out" / "images" / "train" / "b.png", tmp_path / "in" / "train" / "b.png"
    assert os.path.samefile(linked, original)
    assert records(load_detection_data(tmp_path / "out", "val")) == SCENES["val"]


def test_nothing_is_overwritten(tmp_path, capsys):
    data_copies.coco(tmp_path / "in")
    (tmp_path / "out").mkdir()
    text(tmp_path / "out" / "mine.txt", "precious")
    text(tmp_path / "file", "precious")
    for place in ("out", "file", "in"):
        before = contents(tmp_path)
        assert main(["data", "convert", str(tmp_path / "in"), str(tmp_path / place), "--to", "voc"]) == 2
        assert "nothing is overwritten" in capsys.readouterr().err
        assert contents(tmp_path) == before
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()  # empty
    convert(str(tmp_path / "in"), str(tmp_path / "out"), to="voc")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch, error):
    data_copies.coco(tmp_path / "in")
    copied = []

    def copy(source, target):
        copied.append(target)
        if len(copied) == 3:
            raise error
        Path(target).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr(data_set.shutil, "copyfile", copy)
    with pytest.raises((KeyboardInterrupt, OSError)):
        convert(str(tmp_path / "in"), str(tmp_path / "out"), to="yolo")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_repairs_are_told_and_the_rest_written(tmp_path, capsys):
    data_copies.coco(tmp_path / "in")
    (tmp_path / "in" / "train" / "b.png").write_bytes(b"no image")
    assert main(["data", "convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "yolo"]) == 0
    printed = capsys.readouterr().out
    assert "1 image files that cannot be read as an image, left out" in printed
    assert len(load_detection_data(tmp_path / "out", "train", strict=True).dataset) == 4


def test_classes_that_voc_cannot_hold_are_refused(tmp_path):
    content = coco_content()
    content["categories"][0]["name"] = "two\nlines"
    write_coco(tmp_path / "in", content)
    with pytest.raises(UserError, match="cannot hold"):
        convert(str(tmp_path / "in"), str(tmp_path / "out"), to="voc")
    assert not (tmp_path / "out").exists()
