# SPDX-License-Identifier: Apache-2.0
"""Formats of data sets: recognised by their content, read to the same records, and refused with what was found."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import supervision

import data_copies
from data_copies import COPIES, NAMES, SCENES, records, text, write_images
from deperceiver_hf.data import load_detection_data
from deperceiver_hf.data.sources import dataset_format, dataset_splits
from deperceiver_hf.errors import UserError
from deperceiver_hf.training import DetectionTrainer
from training_runs import read_log, tiny_options

TITLES = {"coco": "COCO", "roboflow": "COCO", "yolo": "YOLO", "voc": "Pascal VOC", "csv": "CSV"}


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> dict[str, Path]:
    """The same data in every format; nothing may be written there."""
    roots = {name: tmp_path_factory.mktemp(name) for name in COPIES}
    for name, write in COPIES.items():
        write(roots[name])
    return roots


# --- the same data in every format --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("split", SCENES)
def test_every_format_gives_the_same_records_and_says_in_a_line_what_it_is(copies, name, split, caplog):
    with caplog.at_level(logging.INFO, logger="deperceiver_hf"):
        data = load_detection_data(copies[name], split, strict=True)
    assert records(data) == SCENES[split]  # to the last bit
    assert data.label_names == NAMES  # also those of which the split has no object
    (line,) = [record.getMessage() for record in caplog.records if "recognised as" in record.getMessage()]
    assert f"recognised as {TITLES[name]} (" in line
    assert f"{len(SCENES[split])} images" in line
    assert dataset_splits(copies[name]) == ["train", "val"]
    assert dataset_format(copies[name]) == {"roboflow": "coco"}.get(name, name)


def test_copies_in_all_formats_train_to_the_same_losses(copies, tmp_path):
    losses = {}
    for name, root in copies.items():
        options = {"batch_size": 2, "epochs": 2, "max_steps": 3, "max_train_samples": None, "augmentation": "original"}
        run = DetectionTrainer(tiny_options(tmp_path / name, dataset=str(root), eval_every=1, **options))
        run.train()
        logged = [{k: v for k, v in line.items() if "time" not in k} for line in read_log(tmp_path / name, "train")]
        evaluated = read_log(tmp_path / name, "eval")
        losses[name] = (logged, [{k: v for k, v in line.items() if k.startswith("AP")} for line in evaluated])
    assert len(losses["coco"][0]) == 3
    for name in COPIES:
        assert losses[name] == losses["coco"], name


@pytest.mark.parametrize("name", COPIES)
def test_a_split_that_is_not_there_is_an_error_that_names_those_that_are(copies, name, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_detection_data(copies[name], "test")
    assert "train" in str(error.value)
    shutil.copytree(copies[name], tmp_path / "data")
    for path in (*tmp_path.rglob("val*"), *tmp_path.rglob("*_val.json")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    settings = tmp_path / "data" / "data.yaml"
    if settings.exists():
        settings.write_text(settings.read_text().replace("val: ../valid/images\n", ""))
    with pytest.raises(FileNotFoundError, match=r"--val_fraction 0\.1"):
        load_detection_data(tmp_path / "data", "val")


def as_supervision(root: Path, name: str):
    if name == "coco":
        return supervision.DetectionDataset.from_coco(
            str(root / "train"), str(root / "annotations" / "instances_train.json")
        )
    if name == "yolo":
        train = root / "train"
        return supervision.DetectionDataset.from_yolo(
            str(train / "images"), str(train / "labels"), str(root / "data.yaml")
        )
    return supervision.DetectionDataset.from_pascal_voc(str(root / "JPEGImages"), str(root / "Annotations"))


@pytest.mark.parametrize(
    ("name", "options"), [("coco", {}), ("yolo", {}), ("voc", {"bbox_format": "voc"})], ids=["coco", "yolo", "voc"]
)
def test_readers_agree_with_those_of_supervision(copies, name, options):
    """supervision counts pixels of Pascal VOC from 1 in any case."""
    theirs = as_supervision(copies[name], name)
    ours = {file: objects for file, _, _, objects in records(load_detection_data(copies[name], "train", **options))}
    compared = 0
    for path, _, detections in theirs:
        if Path(path).name not in ours:
            continue  # of the other split
        objects = ours[Path(path).name]
        assert [theirs.classes[label] for label in detections.class_id] == [NAMES[label] for label, *_ in objects]
        corners = np.array([[x, y, x + w, y + h] for _, x, y, w, h in objects]).reshape(-1, 4)
        if name == "yolo":
            assert np.abs(detections.xyxy - corners).max(initial=0) <= 1  # of whole pixels there
        else:
            np.testing.assert_allclose(detections.xyxy.clip(0), corners, atol=1e-4)
        compared += len(objects)
    assert compared == 6


# --- what decides, and what is ambiguous --------------------------------------------------------------------------


def test_annotations_in_two_formats_are_an_error_that_names_both_and_the_option(copies, tmp_path):
    shutil.copytree(copies["yolo"], tmp_path / "both")
    data_copies.coco(tmp_path / "both")
    expected = r"COCO \(annotations/instances_train.json.*YOLO \(data.yaml\).*--format coco or yolo.*NAME:format=coco"
    with pytest.raises(UserError, match=expected) as error:
        load_detection_data(tmp_path / "both", "train")
    assert "\n" not in str(error.value)
    for name in ("coco", "yolo"):
        for source, options in ((tmp_path / "both", {"format": name}), (f"{tmp_path / 'both'}:format={name}", {})):
            assert records(load_detection_data(source, "train", **options)) == SCENES["train"]


def test_a_format_that_is_none_is_refused(copies):
    with pytest.raises(UserError, match="format must be one of coco, yolo, voc, csv, datasets, got 'darknet'"):
        load_detection_data(copies["coco"], "train", format="darknet")
    with pytest.raises(UserError, match="config=large is for data sets of `datasets`"):
        load_detection_data(copies["yolo"], "train", config="large")


def test_annotations_apart_from_their_images(copies, tmp_path):
    for split in SCENES:
        write_images(tmp_path / "pictures", split)
    apart = {
        "coco": copies["coco"] / "annotations" / "instances_train.json",
        "csv": copies["csv"] / "train.csv",
        "yolo": tmp_path / "text",
        "voc": tmp_path / "xml",
    }
    for name, width, height, objects in SCENES["train"]:
        text(apart["yolo"] / f"{name[:-4]}.txt", data_copies.yolo_rows(width, height, objects))
        text(apart["voc"] / f"{name[:-4]}.xml", data_copies.voc_xml(name, width, height, objects))
    text(apart["yolo"] / "classes.txt", "\n".join(NAMES))
    text(apart["voc"] / "labels.txt", "\n".join(NAMES))
    for name, annotations in apart.items():
        for split in ("train", "val"):  # whatever it is called
            data = load_detection_data(annotations, split, images=tmp_path / "pictures")
            expected = SCENES["train"] + [(*scene[:3], []) for scene in SCENES["val"]] * (name == "yolo")
            assert records(data) == expected, name
    with pytest.raises(FileNotFoundError, match="no directory of images"):
        load_detection_data(apart["coco"], "train", images=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="None of the 5 images"):
        load_detection_data(apart["coco"], "train", images=copies["coco"] / "val")


def test_an_annotation_file_alone_is_of_the_split_that_is_asked_for(copies):
    file = copies["coco"] / "annotations" / "instances_val.json"
    assert records(load_detection_data(file, "train", alone=True)) == SCENES["val"]
    assert records(load_detection_data(file, "train")) == SCENES["train"]


def test_a_directory_in_another_is_found_in_every_format(copies, tmp_path):
    for name in COPIES:
        shutil.copytree(copies[name], tmp_path / name / "export" / "set one")
        assert records(load_detection_data(tmp_path / name, "val")) == SCENES["val"], name


# --- YOLO ---------------------------------------------------------------------------------------------------------


def yolo_set(root: Path, settings: str | None, rows: str = "0 0.5 0.5 0.25 0.5\n", name: str = "a.jpg") -> Path:
    """One image of 64 x 48 pixels with these rows."""
    (root / "images" / "train").mkdir(parents=True, exist_ok=True)
    data_copies.picture("a", 64, 48).save(root / "images" / "train" / name)
    text(root / "labels" / "train" / f"{Path(name).stem}.txt", rows)
    if settings is not None:
        text(root / "data.yaml", settings)
    return root


def boxes_of(root, **options) -> list[tuple]:
    (record,) = records(load_detection_data(root, "train", **options))
    return record[3]


SETTINGS = {
    "list of names": "train: images/train\nnames: [cat, dog]\n",
    "dictionary of names": "train: images/train\nnames:\n  0: cat\n  1: dog\n",
    "path": "path: .\ntrain: images/train\nnames: [cat, dog]\nnc: 2\n",
    "path of another machine": "path: ../datasets/mine\ntrain: /home/me/data/images/train\nnames: [cat, dog]\n",
    "list of folders": "train: [images/train]\nval:\ntest: ''\nnames: [cat, dog]\n",
    "Windows": "train: .\\images\\train\nnames: [cat, dog]\n",
    "leads out": "train: ../images/train\nnames: [cat, dog]\n",
    "text file": "train: list.txt\nnames: [cat, dog]\n",
    "BOM": "\ufefftrain: images/train\nnames: [cat, dog]\n",
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_spellings_of_data_yaml(tmp_path, settings):
    root = yolo_set(tmp_path, settings)
    text(root / "list.txt", "./images/train/a.jpg\n")
    assert boxes_of(root, strict=True) == [(0, 24, 12, 16, 24)]
    assert boxes_of(root / "data.yaml", strict=True) == [(0, 24, 12, 16, 24)]


def test_data_yaml_without_names_is_followed_and_says_so(tmp_path):
    root = yolo_set(tmp_path, "train: images/train\nnc: 2\n", "1 0.5 0.5 0.25 0.5\n")
    yolo_set(root / "images" / "more", None)  # in no split
    data = load_detection_data(root, "train")
    assert (len(data.dataset), data.label_names) == (1, ["class_0", "class_1"])
    assert "data.yaml, 1 text files, no names of classes" in data.report.recognised


def test_lists_keep_their_order_and_find_images_of_another_machine(copies, tmp_path):
    shutil.copytree(copies["yolo"], tmp_path / "data")
    names = [name for name, *_ in SCENES["train"]][::-1]
    lines = [f"C:\\work\\train\\images\\{name}" for name in names]
    text(tmp_path / "data" / "train.txt", "\n".join([*lines, "gone.png"]))
    text(tmp_path / "data" / "data.yaml", f"train: train.txt\nval: valid/images\nnames: {json.dumps(NAMES)}")
    data = load_detection_data(tmp_path / "data", "train")
    assert records(data) == SCENES["train"][::-1]
    assert data.report.counts == {"respelled_image_file": 5, "missing_image_file": 1}


@pytest.mark.parametrize("where", ["images/S and labels/S", "S/images and S/labels", "beside", "without a split"])
def test_layouts_without_settings(tmp_path, where):
    images, labels = {
        "images/S and labels/S": ("images/train2017", "labels/train2017"),
        "S/images and S/labels": ("train/images", "train/labels"),
        "beside": ("train", "train"),
        "without a split": ("images", "labels"),
    }[where]
    (tmp_path / images).mkdir(parents=True)
    data_copies.picture("a", 64, 48).save(tmp_path / images / "A.JPG")
    text(tmp_path / labels / "A.txt", "2 0.5 0.5 0.25 0.5\n")
    data = load_detection_data(tmp_path, "train")
    assert data.label_names == ["class_0", "class_1", "class_2"]
    assert "no names of classes, as classes.txt would give them" in data.report.recognised
    text(tmp_path / "classes.txt", "cat\ndog\nmouse\n")
    data = load_detection_data(tmp_path, "train", strict=True)
    assert (data.label_names, records(data)[0][3]) == (["cat", "dog", "mouse"], [(2, 24, 12, 16, 24)])
    with pytest.raises(FileNotFoundError, match="no split 'val'; there are train"):
        load_detection_data(tmp_path, "val")


ROWS = {  # rows, boxes, what is counted
    "polygon": ("0 0.25 0.25 0.75 0.5 0.5 0.75\n", [(0, 16, 12, 32, 24)], {}),
    "upright polygon": ("1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n", [(1, 16, 12, 32, 24)], {}),
    "polygons of four corners": (
        "0 0.25 0.3 0.7 0.25 0.75 0.75 0.2 0.7\n0 0.1 0.1 0.4 0.2 0.5 0.6 0.2 0.5\n0 .1 .1 .5 .12 .4 .5 .2 .3\n",
        3,
        {},
    ),
    "empty file": ("", [], {}),
    "blank lines and tabs": ("\n0\t0.5 0.5  0.25 0.5 \r\n\n", [(0, 24, 12, 16, 24)], {}),
    "BOM": ("\ufeff0 0.5 0.5 0.25 0.5", [(0, 24, 12, 16, 24)], {}),
    "class as a decimal": ("1.0 0.5 0.5 0.25 0.5", [(1, 24, 12, 16, 24)], {}),
    "class by its name": ("dog 0.5 0.5 0.25 0.5", [(1, 24, 12, 16, 24)], {}),
    "a row of text": ("no objects here\n0 0.5 0.5 0.25 0.5", [(0, 24, 12, 16, 24)], {"invalid_annotation": 1}),
    "too few numbers": ("0 0.5 0.5 0.25", [], {"invalid_annotation": 1}),
    "class out of range": ("2 0.5 0.5 0.25 0.5\n-1 0.5 0.5 0.2 0.2", [], {"unknown_category": 2}),
    "over the border": ("0 0.9 0.5 0.4 0.5", [(0, 44.8, 12, 19.2, 24)], {"clamped_box": 1}),
    "outside": ("0 1.9 0.5 0.4 0.5", [], {"box_outside_image": 1}),
    "no size": ("0 0.5 0.5 0 0.5", [], {"empty_box": 1}),
    "nan": ("0 nan 0.5 0 0.5", [], {"invalid_annotation": 1}),
}


@pytest.mark.parametrize(("rows", "boxes", "counts"), ROWS.values(), ids=ROWS)
def test_rows_of_yolo(tmp_path, rows, boxes, counts):
    root = yolo_set(tmp_path, SETTINGS["list of names"], rows)
    data = load_detection_data(root, "train")
    found = records(data)[0][3]
    assert len(found) == (len(boxes) if isinstance(boxes, list) else boxes)
    for ours, expected in zip(found, boxes if isinstance(boxes, list) else (), strict=False):
        assert ours == pytest.approx(expected)
    assert data.report.counts == counts


def test_keypoints_are_boxes_where_their_shape_is_stated(tmp_path):
    root = yolo_set(tmp_path, SETTINGS["list of names"] + "kpt_shape: [2, 3]\n", "0 .5 .5 .25 .5 .1 .1 2 .2 .2 0\n")
    assert boxes_of(root, strict=True) == [(0, 24, 12, 16, 24)]


ROTATED = "0 0.5 0.2 0.8 0.5 0.5 0.8 0.2 0.5\n1 0.3 0.1 0.5 0.3 0.4 0.4 0.2 0.2\n"
REFUSED = {
    "rotated corners": (SETTINGS["path"], ROTATED, r"rotated boxes, by their four corners \(2 rows, e.g. .*line 1"),
    "an angle": (SETTINGS["path"], "0 0.5 0.5 0.2 0.2 1.57", "the last is the angle.*Boxes of four"),
    "pixels": (SETTINGS["path"], "0 32 24 16 12\n" * 5, "--box_format cxcywh"),
    "corners": (SETTINGS["path"], "0 0.7 -0.000001 0.9 0.9\n" * 5, "look like xyxy_relative"),
    "nc": ("train: images/train\nnc: 3\nnames: [cat, dog]", "", "nc says 3 classes, names has 2"),
    "a name twice": ("train: images/train\nnames: [cat, cat]", "", "names the class 'cat' 2 times"),
    "gaps in names": ("train: images/train\nnames: {0: cat, 2: dog}", "", "must have the numbers 0 to 1"),
    "names of another kind": ("train: images/train\nnames: cat", "", "names must be a list"),
    "tabs in YAML": ("train:\timages/train\n", "", "data.yaml is not YAML"),
    "broken YAML": ("train: images/train\nnames: [cat", "", "data.yaml is not YAML"),
    "no folder": ("train: pictures\nnames: [cat]", "", "there is no 'pictures'"),
    "no such split": ("val: images/train\nnames: [cat]", "", "no split 'train'; there are val"),
    "keypoints of no shape": (SETTINGS["path"] + "kpt_shape: 3", "", r"kpt_shape must be two numbers"),
}


@pytest.mark.parametrize(("settings", "rows", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_yolo_is_refused_in_a_line(tmp_path, settings, rows, message):
    with pytest.raises((UserError, FileNotFoundError), match=message) as error:
        load_detection_data(yolo_set(tmp_path, settings, rows), "train")
    assert "\n" not in str(error.value)


def test_no_text_file_at_all_is_an_error_and_binary_ones_are_counted(tmp_path):
    root = yolo_set(tmp_path, SETTINGS["path"])
    file = root / "labels" / "train" / "a.txt"
    file.write_bytes(b"\xff\xfe\x00\x80")
    assert load_detection_data(root, "train").report.counts == {"invalid_annotation": 1}
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the 1 images has a text file.*labels.train.a\.txt"):
        load_detection_data(root, "train")


def test_images_outside_the_directory_of_data_yaml_are_refused_unless_allowed(tmp_path):
    yolo_set(tmp_path / "elsewhere", None)
    text(tmp_path / "data" / "data.yaml", f"path: {tmp_path / 'elsewhere'}\ntrain: images/train\nnames: [cat]\n")
    with pytest.raises(FileNotFoundError, match=r"leads out of its directory.*outside=true"):
        load_detection_data(tmp_path / "data", "train")
    assert boxes_of(f"{tmp_path / 'data'}:outside=true") == [(0, 24, 12, 16, 24)]


# --- Pascal VOC ---------------------------------------------------------------------------------------------------

VOC_LAYOUTS = {  # directories of XML and images, and what is before the name of an image in its XML
    "beside the images": ("", "", ""),
    "Roboflow": ("train", "train", ""),
    "folders in a split": ("train/annotations", "train/images", ""),
    "splits in folders": ("annotations/train", "images/train", ""),
    "VOC2012": ("VOCdevkit/VOC2012/Annotations", "VOCdevkit/VOC2012/JPEGImages", ""),
    "names of another machine": ("xmls", "images", "C:\\data\\"),
}


@pytest.mark.parametrize(("xml", "images", "prefix"), VOC_LAYOUTS.values(), ids=VOC_LAYOUTS)
def test_layouts_of_voc(tmp_path, xml, images, prefix):
    write_images(tmp_path / images, "train")
    for name, *rest in SCENES["train"]:
        text(tmp_path / xml / f"{name[:-4]}.xml", data_copies.voc_xml(prefix + name, *rest))
    data = load_detection_data(tmp_path, "train", strict=True)
    assert data.label_names == sorted(NAMES)
    assert [(*scene[:3], len(scene[3])) for scene in records(data)] == [
        (*scene[:3], len(scene[3])) for scene in SCENES["train"]
    ]
    with pytest.raises(FileNotFoundError, match="no split 'val'; there are train"):
        load_detection_data(tmp_path, "val")


def test_voc_classes_are_those_of_all_splits(copies, tmp_path):
    shutil.copytree(copies["voc"], tmp_path / "data")
    (tmp_path / "data" / "labels.txt").unlink()
    train, val = (load_detection_data(tmp_path / "data", split) for split in SCENES)
    assert train.label_names == val.label_names == sorted(NAMES)  # val has no ant
    text(tmp_path / "data" / "labelmap.txt", "# label:color\nbackground:0,0,0::\nred moth:1,2,3::\nant:::\nzebra:::\n")
    assert load_detection_data(tmp_path / "data", "val").label_names == ["red moth", "ant", "zebra"]


def test_broken_files_of_voc_are_counted_and_the_others_read(copies, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(copies["voc"], root)
    xml = root / "Annotations"
    (xml / "a 1.xml").write_text("<annotation><object>")
    (xml / "b.xml").unlink()
    (xml / "d.xml").write_text("<html/>")
    content = (xml / "c é.xml").read_text(encoding="utf-8")
    content = content.replace("<xmin>7</xmin>", "<xmin>seven</xmin>").replace("<name>ant</name>", "<name>cow</name>")
    text(xml / "c é.xml", content.replace("</annotation>", "<object><name>ant</name></object></annotation>"))
    data = load_detection_data(root, "train")
    assert [name for name, *_ in records(data)] == ["c é.png", "e.png"]
    assert data.report.counts == {
        "invalid_annotation_file": 2,
        "unknown_category": 1,
        "invalid_annotation": 1,
        "image_without_annotations": 1,
        "invalid_box": 1,
    }
    for file in xml.glob("*.xml"):
        file.write_text("")
    with pytest.raises((UserError, FileNotFoundError)):
        load_detection_data(root, "train", format="voc")


def test_voc_that_counts_pixels_from_one_is_told_by_objects_at_the_border(tmp_path):
    """supervision writes the numbers of pixels, as the original has them."""
    objects = [(0, 0, 5, 20, 21), (1, 7, 0, 20, 48), (2, 0, 0, 64, 48), (0, 12, 20, 13, 14)]
    (tmp_path / "JPEGImages").mkdir()
    paths = [str(tmp_path / "JPEGImages" / f"{index}.png") for index in range(2)]
    corners = np.array([[x, y, x + w, y + h] for _, x, y, w, h in objects], dtype=np.float32)
    labels = np.array([label for label, *_ in objects])
    images = {path: np.asarray(data_copies.picture(path, 64, 48)) for path in paths}
    annotations = {path: supervision.Detections(xyxy=corners, class_id=labels) for path in paths}
    dataset = supervision.DetectionDataset(classes=sorted(NAMES), images=paths, annotations=annotations)
    for path, image in images.items():
        data_copies.PIL.Image.fromarray(image).save(path)
    dataset.as_pascal_voc(annotations_directory_path=str(tmp_path / "Annotations"))
    data = load_detection_data(tmp_path, "train")
    assert "pixels counted from 1" in data.report.recognised
    assert [scene[3] for scene in records(data)] == [objects, objects]
    written = load_detection_data(tmp_path, "train", bbox_format="xyxy")
    assert records(written)[0][3][0] == (0, 1, 6, 19, 20)


# --- CSV ----------------------------------------------------------------------------------------------------------

HEADERS = {
    "ours": ("file,xmin,ymin,xmax,ymax,label", lambda n, x, y, w, h, c: [n, x, y, x + w, y + h, c]),
    "TensorFlow": (
        "filename,width,height,class,xmin,ymin,xmax,ymax",
        lambda n, x, y, w, h, c: [n, 64, 48, c, x, y, x + w, y + h],
    ),
    "sides": ("image_path,x,y,width,height,class_name", lambda n, x, y, w, h, c: [n, x, y, w, h, c]),
    "capitals and semicolons": (
        "Image Name;Label;X_Min;Y_Min;X_Max;Y_Max",
        lambda n, x, y, w, h, c: [n, c, x, y, x + w, y + h],
    ),
}


@pytest.mark.parametrize(("header", "row"), HEADERS.values(), ids=HEADERS)
def test_headers_of_csv(tmp_path, header, row):
    data_copies.picture("a", 64, 48).save(tmp_path / "a.JPG")
    delimiter = ";" if ";" in header else ","
    rows = [row("a.JPG", 8, 9, 20, 30, "dog"), row("a.JPG", 1, 2, 3, 4, "cat, black" if delimiter == ";" else "cat")]
    lines = [header, *(delimiter.join(map(str, fields)) for fields in rows)]
    (tmp_path / "boxes.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    for given in (tmp_path, tmp_path / "boxes.csv"):
        assert boxes_of(given, strict=True) == [(1, 8, 9, 20, 30), (0, 1, 2, 3, 4)]


def test_broken_rows_of_csv_are_counted(tmp_path):
    data_copies.picture("a", 64, 48).save(tmp_path / "a.png")
    rows = ["a.png,8,9,28,39,dog", "a.png,8,9,28", "a.png,x,9,28,39,dog", ",8,9,28,39,dog", "gone.png,1,1,9,9,dog"]
    text(tmp_path / "boxes.csv", "\n".join(["file,xmin,ymin,xmax,ymax,label", *rows, "", "a.png,28,9,8,39,dog"]))
    data = load_detection_data(tmp_path, "train")
    assert records(data)[0][3] == [(0, 8, 9, 20, 30)]
    assert data.report.counts == {
        "unknown_category": 1,
        "invalid_annotation": 1,
        "missing_image_file": 1,
        "invalid_box": 1,
        "empty_box": 1,
    }


def test_tables_of_a_split_and_those_that_may_be(copies, tmp_path):
    file = copies["csv"] / "train.csv"
    assert records(load_detection_data(file, "val")) == SCENES["val"]  # from the table beside it
    shutil.copytree(copies["csv"], tmp_path / "data")
    shutil.copy(file, tmp_path / "data" / "train_old.csv")
    with pytest.raises(UserError, match=r"several tables that may be of split 'train': train.csv, train_old.csv"):
        load_detection_data(tmp_path / "data", "train")
    text(tmp_path / "relative.csv", "file,xmin,ymin,xmax,ymax,label\n" + "a.png,.1,.1,.5,.5,cat\n" * 5)
    data_copies.picture("a", 64, 48).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="boxes lie within"):
        load_detection_data(tmp_path / "relative.csv", "train")
    assert len(boxes_of(tmp_path / "relative.csv", bbox_format="xyxy_relative")) == 5


# --- exports of other tools ---------------------------------------------------------------------------------------


def test_coco_exports_of_cvat_and_label_studio(tmp_path):
    content = data_copies.coco_content("train")
    write_images(tmp_path / "cvat" / "images" / "default", "train")
    text(tmp_path / "cvat" / "annotations" / "instances_default.json", json.dumps(content))
    write_images(tmp_path / "studio" / "images", "train")
    for image in content["images"]:
        image["file_name"] = f"images\\{image['file_name']}"
    text(tmp_path / "studio" / "result.json", json.dumps(content))
    for name in ("cvat", "studio"):
        assert records(load_detection_data(tmp_path / name, "train")) == SCENES["train"]


def test_notes_of_label_studio_are_no_annotations(copies, tmp_path):
    shutil.copytree(copies["yolo"] / "train", tmp_path / "studio")
    text(tmp_path / "studio" / "classes.txt", "\n".join(NAMES))
    notes = {"categories": [{"id": label, "name": name} for label, name in enumerate(NAMES)], "info": {"year": 2026}}
    text(tmp_path / "studio" / "notes.json", json.dumps(notes, indent=2))
    assert records(load_detection_data(tmp_path / "studio", "train")) == SCENES["train"]


def test_one_split_of_roboflow_by_itself_is_for_training(copies):
    data = load_detection_data(copies["roboflow"] / "valid", "train")
    assert (records(data), data.label_names) == (SCENES["val"], NAMES)
    with pytest.raises(FileNotFoundError, match=r"'val'"):
        load_detection_data(copies["roboflow"] / "valid", "val")


def test_a_group_of_roboflow_that_has_objects_is_a_class(copies, tmp_path):
    shutil.copytree(copies["roboflow"], tmp_path / "data")
    file = tmp_path / "data" / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 0
    file.write_text(json.dumps(content))
    assert load_detection_data(tmp_path / "data", "train").label_names == ["animals", *NAMES]
    left_out = load_detection_data(copies["roboflow"], "train").report
    assert "without the group 'animals'" in left_out.recognised
    assert not left_out.remarks


@pytest.mark.skipif(os.name == "nt", reason="names that Windows does not take")
@pytest.mark.parametrize("name", ["a.b.c.JPG", "two  spaces .png", "日本語.png", "x#y?.png", "train.png"])
def test_odd_names_of_images_in_every_format(tmp_path, name):
    yolo_set(tmp_path / "yolo", SETTINGS["path"], name=name)
    voc = data_copies.voc_xml(name.replace("&", "&amp;"), 64, 48, [(0, 24, 12, 16, 24)])
    text(tmp_path / "voc" / f"{Path(name).stem}.xml", voc)
    text(tmp_path / "csv" / "boxes.csv", f'file,xmin,ymin,xmax,ymax,label\n"{name}",24,12,40,36,zebra\n')
    for root in (tmp_path / "voc", tmp_path / "csv"):
        data_copies.picture("a", 64, 48).save(root / name)
    for root in ("yolo", "voc", "csv"):
        assert boxes_of(tmp_path / root) == [(0, 24, 12, 16, 24)], root
