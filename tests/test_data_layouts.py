# SPDX-License-Identifier: Apache-2.0
"""What a path holds is recognised by its content: it loads, or the message says what was found and what to give."""

import gzip
import json
import shutil
import unicodedata
from pathlib import Path

import PIL.Image
import pytest

from coco_samples import coco_content, write_coco
from deperceiver_hf.data import load_detection_data
from deperceiver_hf.errors import UserError


def num_images(path, split="val") -> int:
    return len(load_detection_data(path, split, strict=True).dataset)


# (annotation file, directory of the images, prefix of the file names, what is given, split)
UNUSUAL = {
    "result.json of Label Studio": ("result.json", "images", "images/", ".", "train"),
    "beside the images": ("labels.json", ".", "", ".", "train"),
    "in a directory of any name": ("labels.json", "pictures", "", ".", "train"),
    "one file for each split": ("val.json", "val", "", ".", "val"),
    "one directory for each split": ("val/annotations.json", "val/images", "", ".", "val"),
    "a year that is not 2017": ("annotations/instances_val2014.json", "val2014", "", ".", "val"),
    "names with folders": ("annotations/instances_val.json", "pictures/val", "pictures/val/", ".", "val"),
    "keypoints alone": ("annotations/person_keypoints_val.json", "val", "", ".", "val"),
    "the annotation file itself": (
        "annotations/instances_val.json",
        "val",
        "",
        "annotations/instances_val.json",
        "val",
    ),
    "a file of any name": ("my.json", "pictures", "", "my.json", "train"),
    "a file in a split": ("val/_annotations.coco.json", "val", "", "val/_annotations.coco.json", "val"),
    "one directory in another": ("a/b/annotations/instances_val.json", "a/b/val", "", ".", "val"),
}


@pytest.mark.parametrize(("file", "images", "prefix", "given", "split"), UNUSUAL.values(), ids=UNUSUAL)
def test_coco_annotations_are_found_wherever_it_is_plain_which_are_meant(tmp_path, file, images, prefix, given, split):
    write_coco(tmp_path, annotation_file=file, image_dir=images)
    content = coco_content()
    for image in content["images"]:
        image["file_name"] = prefix + image["file_name"]
    (tmp_path / file).write_text(json.dumps(content))
    assert num_images(tmp_path / given, split) == 4


def test_an_annotation_file_stands_for_its_directory(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path, annotation_file=f"annotations/instances_{split}.json", image_dir=split)
    file = tmp_path / "annotations" / "instances_train.json"
    assert "instances_val.json" in load_detection_data(file, "val").report.source
    with pytest.raises(FileNotFoundError, match=r"instances_train.json has the annotations of split train.*'test'"):
        load_detection_data(file, "test")


def test_annotations_packed_by_gzip_or_in_utf_16(tmp_path):
    write_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    text = file.read_text()
    file.write_bytes(gzip.compress(text.encode()))
    assert num_images(tmp_path) == 4
    file.write_text(text, encoding="utf-16")
    assert num_images(tmp_path) == 4
    file.rename(file.with_name("instances_val2017.json.gz")).write_bytes(gzip.compress(text.encode()))
    assert num_images(tmp_path) == 4


def test_several_files_that_could_be_meant_are_named(tmp_path):
    for name in ("val_a.json", "val_b.json"):
        write_coco(tmp_path, annotation_file=name, image_dir="val")
    with pytest.raises(ValueError, match=r"several annotation files.*val_a.json, val_b.json"):
        load_detection_data(tmp_path, "val")


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (20, 20)).save(path)


def text(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def labelme(root):
    image(root / "a.jpg")
    text(root / "a.json", '{"version": "5.0", "shapes": []}')


def create_ml(root):
    image(root / "train" / "a.jpg")
    text(root / "train" / "_annotations.createml.json", '[{"image": "a.jpg", "annotations": []}]')


def model(root):
    text(root / "config.json", '{"model_type": "detr"}')
    text(root / "model.safetensors")


FOREIGN = {
    "LabelMe": (labelme, "LabelMe"),
    "CreateML": (create_ml, "has annotations of CreateML"),
    "images alone": (lambda root: image(root / "train" / "a.jpg"), "holds images alone"),
    "a saved model": (model, "saved model"),
    "nothing": (lambda root: None, "is empty"),
}


@pytest.mark.parametrize(("make", "found"), FOREIGN.values(), ids=FOREIGN)
def test_other_layouts_are_named_with_what_is_expected(tmp_path, make, found):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(OSError, match=rf"{found}.*annotations/instances_SPLIT.json") as error:
        load_detection_data(root, "train")
    assert "\n" not in str(error.value)


FILES = {
    "data.zip": "archive",
    "data.csv": "table without the columns of boxes",
    "data.parquet": "single table",
    "a.jpg": "is an image",
    "a.bin": "no data set known",
    "a.xml": "single file of annotations",
    "a.yaml": "no data.yaml of YOLO",
    "results.json": "list of detections",
    "map.json": "GeoJSON",
    "captions.json": "captions",
    "panoptic.json": "panoptic",
    "empty.json": "is empty",
}
JSON_FILES = {
    "results.json": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}],
    "map.json": {"type": "FeatureCollection", "features": []},
    "captions.json": {"images": [], "annotations": [{"image_id": 1, "caption": "a cat"}]},
    "panoptic.json": {"images": [], "categories": [{"id": 1}], "annotations": [{"segments_info": []}]},
}


@pytest.mark.parametrize(("name", "found"), FILES.items(), ids=FILES)
def test_files_that_are_no_data_set_are_named_for_what_they_are(tmp_path, name, found):
    write_coco(tmp_path / "data")
    if name == "data.zip":
        shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data")
    else:
        text(tmp_path / name, json.dumps(JSON_FILES[name]) if name in JSON_FILES else "")
    with pytest.raises(UserError, match=found):
        load_detection_data(tmp_path / name, "train")


def test_addresses_are_refused():
    with pytest.raises(UserError, match=r"is an address\. Download"):
        load_detection_data("https://example.org/data.zip", "train")


SPELLINGS = {
    "backslashes": lambda name: f"val2017\\{name}",
    "backslashes and a drive": lambda name: f"C:\\data\\val2017\\{name}",
    "a leading slash": lambda name: f"/val2017/{name}",
    "an address": lambda name: f"http://images.example.org/val2017/{name}",
    "an address with a query": lambda name: f"https://example.org/files/?d=val2017/{name}",
    "capitals": str.upper,
    "percent": lambda name: name.replace("é", "%C3%A9").replace(" ", "%20"),
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "folders of another machine": lambda name: f"datasets/mine/val2017/{name}",
    "a home directory": lambda name: f"~/{name}",
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_images_are_found_under_another_spelling_of_their_name(tmp_path, spell):
    content = coco_content()
    for entry in content["images"]:
        entry["file_name"] = f"é {entry['id']}.jpg"
    write_coco(tmp_path, content)
    for entry in content["images"]:
        entry["file_name"] = spell(entry["file_name"])
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    data = load_detection_data(tmp_path, "val")
    assert data.report.counts == {"respelled_image_file": 4}
    assert data.dataset["image_id"][:] == [7, 3, 25, 100]
    assert [row["image"].size for row in data.dataset] == [(row["width"], row["height"]) for row in data.dataset]


def test_a_spelling_that_could_mean_several_files_or_another_image_is_not_taken(tmp_path):
    content = coco_content()
    names = ["000007.png", "000003.PNG", "A.png", "b/000007.PNG"]
    write_coco(tmp_path, content)
    image(tmp_path / "val2017" / "a.PNG")
    image(tmp_path / "val2017" / "a.Png")
    if len(list((tmp_path / "val2017").glob("a.*"))) < 2:
        pytest.skip("this file system knows no capitals")
    for entry, name in zip(content["images"], names, strict=True):
        entry["file_name"] = name
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    data = load_detection_data(tmp_path, "val")
    assert data.report.counts == {"respelled_image_file": 1, "missing_image_file": 2}
    assert data.dataset["image_id"][:] == [7, 3]


@pytest.mark.parametrize("way", ["relative", "absolute", "backslashes"])
def test_names_that_lead_out_of_the_data_are_left_out_unless_allowed(tmp_path, way):
    image(tmp_path / "outside" / "secret.png")
    name = {
        "relative": "../../outside/secret.png",
        "absolute": str(tmp_path / "outside" / "secret.png"),
        "backslashes": "..\\..\\outside\\secret.png",
    }[way]
    content = coco_content()
    root = write_coco(tmp_path / "data", content)
    content["images"][0]["file_name"] = name
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    data = load_detection_data(root, "val")
    assert data.report.counts == {"outside_image_file": 1}
    assert 7 not in data.dataset["image_id"][:]
    for given, options in ((root, {"allow_outside": True}), (f"{root}:outside=true", {})):
        allowed = load_detection_data(given, "val", **options)
        assert allowed.dataset["image_id"][:] == [7, 3, 25, 100]
    for entry in content["images"]:
        entry["file_name"] = name
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"lead out of it.*outside=true"):
        load_detection_data(root, "val")


def test_links_in_the_data_directory_lead_where_the_user_wants(tmp_path):
    root = write_coco(tmp_path / "data")
    (root / "val2017").rename(tmp_path / "elsewhere")
    try:
        (root / "val2017").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "000007.png").rename(tmp_path / "far.png")
        (tmp_path / "elsewhere" / "000007.png").symlink_to(tmp_path / "far.png")
        (tmp_path / "link").symlink_to(root)
        (root / "val2017" / "loop").symlink_to(root)
    except OSError:
        pytest.skip("no links here")
    assert num_images(root) == num_images(tmp_path / "link") == 4
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    for entry in content["images"]:
        entry["file_name"] = entry["file_name"].upper()  # so that the directories are searched
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    assert load_detection_data(root, "val").report.counts == {"respelled_image_file": 4}
