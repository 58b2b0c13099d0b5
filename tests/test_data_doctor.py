# SPDX-License-Identifier: Apache-2.0
"""The doctor finds what is wrong with a data set, and nothing where nothing is."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
from datasets import concatenate_datasets
from transformers.image_utils import SizeDict

from deperceiver_hf.data.doctor.findings import KINDS, LOADING_KINDS, SEVERITIES, Finding
from deperceiver_hf.data.doctor.loading import load_splits
from deperceiver_hf.data.doctor.objects import ObjectTable, TrainedSize
from deperceiver_hf.data.doctor.pictures import check_pictures
from deperceiver_hf.data.doctor.quick import quick_check
from deperceiver_hf.data.doctor.splits import unlisted_images
from deperceiver_hf.data.records import ISSUES

SIZE = (64, 48)
TRAIN, VAL = 24, 8  # images
CLASSES = ("cat", "dog", "owl")
TRAINED = TrainedSize(SizeDict(shortest_edge=48, longest_edge=64), stride=8, num_queries=10)


def picture(random: np.random.Generator, size=SIZE) -> PIL.Image.Image:
    """A picture like no other one."""
    noise = PIL.Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return noise.resize(size, PIL.Image.Resampling.BICUBIC)


class CocoFiles:
    """The files of a data set, to be damaged.

    Attributes:
        root: Its directory.
        content: What the annotation file of each split holds; written by `write`.
    """

    def __init__(self, root: Path):
        self.root = root
        self.content = {
            split: json.loads((root / f"annotations/instances_{split}.json").read_text()) for split in ("train", "val")
        }

    def write(self) -> None:
        for split, content in self.content.items():
            (self.root / f"annotations/instances_{split}.json").write_text(json.dumps(content))

    def image(self, index: int, split: str = "train") -> Path:
        return self.root / split / self.content[split]["images"][index]["file_name"]

    @property
    def objects(self) -> list[dict]:
        return self.content["train"]["annotations"]


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A data set with nothing wrong: images of 64 x 48 pixels with three objects each."""
    root, random = tmp_path_factory.mktemp("clean"), np.random.default_rng(5)
    (root / "annotations").mkdir()
    for split, count in (("train", TRAIN), ("val", VAL)):
        (root / split).mkdir()
        images, annotations = [], []
        for index in range(count):
            picture(random).save(root / split / f"{split}-{index}.jpg", quality=95)
            images.append({"id": index, "file_name": f"{split}-{index}.jpg", "width": SIZE[0], "height": SIZE[1]})
            for _ in range(3):
                low, extent = random.uniform(1, (40, 26)), random.uniform(12, 20, 2)
                annotations.append(
                    {"id": len(annotations), "image_id": index, "bbox": [*low.round(2), *extent.round(2)],
                     "category_id": 1 + len(annotations) % 3, "iscrowd": 0}
                )  # fmt: skip
        categories = [{"id": 1 + label, "name": name} for label, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def files(clean, tmp_path) -> CocoFiles:
    shutil.copytree(clean, tmp_path / "data")
    return CocoFiles(tmp_path / "data")


def examine(root: Path, **options) -> list[Finding]:
    """All findings, as the command collects them."""
    loaded = load_splits(str(root), "train", "val", ("test",), **options)
    findings = [*loaded.findings, *quick_check(loaded.tables, "train", "val", TRAINED, max_detections=100)]
    return [*findings, *check_pictures(loaded.tables), *unlisted_images(loaded.tables)]


def test_nothing_is_found_where_nothing_is_wrong(clean):
    assert examine(clean) == []


# --- planted faults: the name of the finding, where, how many, and what is done to the files ---------------------


def _set_boxes(files: CocoFiles, change) -> None:
    for entry in files.objects:
        entry["bbox"] = change(*entry["bbox"])


def _exif(files: CocoFiles, stated: tuple[int, int] | None) -> None:
    """The first image lies on its side as it is stored, and EXIF turns it."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    with PIL.Image.open(files.image(0)) as image:
        image.copy().save(files.image(0), quality=95, exif=exif)
    entry = files.content["train"]["images"][0]
    entry["width"], entry["height"] = stated or (None, None)
    files.objects[0]["bbox"] = [40, 10, 20, 20]  # within 64 x 48, not within 48 x 64 pixels


def _copy(files: CocoFiles, split: str, *, anew: bool) -> None:
    if not anew:
        shutil.copy(files.image(0), files.image(3, split))
        return
    with PIL.Image.open(files.image(0)) as image:
        image.resize((128, 96)).point(lambda value: min(255, value + 9)).save(files.image(3, split), quality=80)
    files.content[split]["images"][3] |= {"width": 128, "height": 96}
    for entry in files.content[split]["annotations"]:
        if entry["image_id"] == 3:
            entry["bbox"] = [2 * side for side in entry["bbox"]]


def _file_of_another_split(files):
    files.content["val"]["images"][0]["file_name"] = "train/train-0.jpg"


def _listed_twice(files):
    files.content["train"]["images"].append(files.content["train"]["images"][0] | {"id": 99})


def _cut_off(files):
    files.image(0).write_bytes(files.image(0).read_bytes()[:700])


def _no_image(files):
    files.image(0).write_text("not found")


def _wrong_size(files):
    files.content["train"]["images"][0] |= {"width": 200, "height": 48}


def _made_smaller(files):
    for image in files.content["train"]["images"]:
        image |= {"width": 2 * SIZE[0], "height": 2 * SIZE[1]}
    _set_boxes(files, lambda *box: [2 * side for side in box])


def _stretched(files):
    for image in files.content["train"]["images"]:
        image |= {"width": 3 * SIZE[0], "height": 2 * SIZE[1]}
    _set_boxes(files, lambda x, y, width, height: [3 * x, 2 * y, 3 * width, 2 * height])


def _object(**values):
    def change(files: CocoFiles) -> None:
        files.objects[0] |= values

    return change


def _classes_shifted(files):
    for entry in files.objects:
        entry["category_id"] -= 1


def _one_class(files):
    for _ in range(3):
        files.objects.extend([entry | {"id": 1000 + len(files.objects)} for entry in files.objects[:72]])
    random = np.random.default_rng(0)
    for index, entry in enumerate(files.objects):
        entry["category_id"] = 2 if index == 7 else 1
        entry["bbox"][:2] = random.uniform(1, 20, 2).tolist()


def _no_objects_of_a_class(files):
    for entry in files.objects:
        entry["category_id"] = min(entry["category_id"], 2)


def _rare(files):
    for index, entry in enumerate(files.objects):
        entry["category_id"] = 3 if index < 4 else 1 + index % 2


def _no_owl_in_val(files):
    for entry in files.content["val"]["annotations"]:
        entry["category_id"] = min(entry["category_id"], 2)


def _other_names(files):
    files.content["val"]["categories"][0]["name"] = "whale"


def _same_names(files):
    for content in files.content.values():
        content["categories"][1]["name"] = "Cat "


def _crowded(files):
    random = np.random.default_rng(0)
    for _ in range(12):
        box = [*random.uniform(1, 30, 2), 12, 12]
        files.objects.append({"id": 1000 + len(files.objects), "image_id": 5, "category_id": 1, "bbox": box})


def _again(**values):
    def change(files: CocoFiles) -> None:
        files.objects.append(files.objects[4] | {"id": 1000} | values)

    return change


def _few_annotated(files):
    files.content["train"]["annotations"] = [entry for entry in files.objects if entry["image_id"] < 10]


def _broken_json(files):
    (files.root / "annotations/instances_val.json").write_text('{"images": [')
    del files.content["val"]


def _no_val(files):
    (files.root / "annotations/instances_val.json").unlink()
    del files.content["val"]


def _plain(files):
    PIL.Image.new("RGB", SIZE, "white").save(files.image(0))


def _unlisted(files):
    picture(np.random.default_rng(1)).save(files.root / "train/forgotten.jpg")


def _no_objects(files):
    _set_boxes(files, lambda x, y, width, height: [x, y, 0, 0])


def _relative(x, y, width, height):
    return [x / SIZE[0], y / SIZE[1], width / SIZE[0], height / SIZE[1]]


PLANTED = {
    "a file that is not there": ("missing_image_file", "train", 1, lambda files: files.image(0).unlink()),
    "a file that is no image": ("unreadable_image", "train", 1, _no_image),
    "a file that is cut off": ("unreadable_pixels", "train", 1, _cut_off),
    "a white image": ("plain_images", "train", 1, _plain),
    "another size than stated": ("size_mismatch", "train", 1, _wrong_size),
    "images made smaller": ("rescaled_image", "train", TRAIN, _made_smaller),
    "images stretched": ("resized_images", "train", 1, _stretched),
    "EXIF, boxes and size of the stored picture": ("rotated_image", "train", 1, lambda f: _exif(f, SIZE)),
    "EXIF, boxes of the stored picture": ("unturned_boxes", "train", 1, lambda f: _exif(f, None)),
    "EXIF": ("turned_by_exif", "train", 1, lambda f: _exif(f, None)),
    "a copy": ("duplicate_images", "train", 1, lambda f: _copy(f, "train", anew=False)),
    "a copy saved anew": ("near_duplicate_images", "train", 1, lambda f: _copy(f, "train", anew=True)),
    "a copy in val": ("split_leak", "val", 1, lambda f: _copy(f, "val", anew=False)),
    "a file in both splits": ("split_leak", "val", 1, _file_of_another_split),
    "a copy saved anew in val": ("near_split_leak", "val", 1, lambda f: _copy(f, "val", anew=True)),
    "a file listed twice": ("repeated_file", "train", 1, _listed_twice),
    "two images of one id": ("duplicate_image_id", "train", 1, lambda f: f.content["train"]["images"][1].update(id=0)),
    "a file that is not listed": ("unlisted_images", "", 1, _unlisted),
    "a box without numbers": ("invalid_box", "train", 1, _object(bbox=["left", 1, 2, 3])),
    "a box without extent": ("empty_box", "train", 1, _object(bbox=[5, 5, 0, 9])),
    "a box outside": ("box_outside_image", "train", 1, _object(bbox=[70, 5, 9, 9])),
    "a box over the border": ("clamped_box", "train", 1, _object(bbox=[40, 5, 40, 9])),
    "no box": ("invalid_annotation", "train", 1, lambda files: files.objects[0].pop("bbox")),
    "a class that is not listed": ("unknown_category", "train", 1, _object(category_id=77)),
    "an image that is not listed": ("unknown_image", "train", 1, _object(image_id=77)),
    "class ids from 0": ("shifted_category_ids", "train", 72, _classes_shifted),
    "boxes in parts": ("box_format", "train", 1, lambda f: _set_boxes(f, _relative)),
    "corners": ("box_format", "train", 1, lambda f: _set_boxes(f, lambda x, y, w, h: [x, y, x + w, y + h])),
    "boxes at one place": ("same_place", "train", 72, lambda f: _set_boxes(f, lambda *box: [4, 4, 9, 9])),
    "boxes in one corner": ("same_place", "train", 72, lambda f: _set_boxes(f, lambda *box: [s / 6 for s in box])),
    "boxes of whole images": ("whole_images", "train", 72, lambda f: _set_boxes(f, lambda *box: [0, 0, *SIZE])),
    "small boxes": ("small_objects", "train", 72, lambda f: _set_boxes(f, lambda x, y, w, h: [x, y, w / 3, h / 3])),
    "a box twice": ("duplicate_boxes", "train", 1, _again()),
    "a box of two classes": ("contradicting_classes", "train", 1, _again(category_id=3)),
    "one class of 99 %": ("dominant_class", "train", 287, _one_class),
    "a class without objects": ("class_without_objects", "train", 1, _no_objects_of_a_class),
    "a class of val alone": ("only_in_validation", "val", 1, _no_objects_of_a_class),
    "a class of train alone": ("not_in_validation", "val", 1, _no_owl_in_val),
    "a rare class": ("rare_classes", "train", 1, _rare),
    "other classes in val": ("unknown_classes", "val", 1, _other_names),
    "two spellings of a class": ("similar_class_names", "train", 2, _same_names),
    "more objects than queries": ("more_objects_than_queries", "train", 1, _crowded),
    "few images annotated": ("mostly_without_objects", "train", 14, _few_annotated),
    "no objects": ("no_objects", "train", 1, _no_objects),
    "a broken file": ("cannot_be_loaded", "val", 1, _broken_json),
    "no split to evaluate on": ("no_validation", "val", 1, _no_val),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(files, fault):
    name, split, count, plant = PLANTED[fault]
    plant(files)
    files.write()
    (found,) = [finding for finding in examine(files.root) if finding.name == name]
    assert (found.split, found.count) == (split, count)
    assert found.severity in SEVERITIES
    assert found.advice
    assert found.advice in found.sentence()
    json.dumps(found.to_dict(), allow_nan=False)


def test_boxes_that_are_read_as_corners_and_are_none_are_doubted(clean):
    (found,) = [finding for finding in examine(clean, bbox_format="xyxy") if finding.name == "doubtful_boxes"][:1]
    assert "Perhaps they are xywh" in found.what


def test_examples_name_file_and_box(files):
    files.objects.append(files.objects[4] | {"id": 1000})
    files.write()
    (found,) = examine(files.root)
    (example,) = found.examples
    assert example.file == str(files.image(1))
    assert example.box == tuple(files.objects[4]["bbox"])
    assert example.file in str(example)


def test_examples_of_what_loading_left_out_name_the_file(files):
    for entry in files.objects[:7]:
        entry["bbox"] = [5, 5, 0, 9]
    files.write()
    (found,) = examine(files.root)
    assert (found.name, found.count, len(found.examples)) == ("empty_box", 7, 5)
    assert found.examples[3].text.startswith(f"{files.image(1)}, image_id 1, annotation id 3, bbox [5, 5, 0, 9]")


def test_what_is_in_another_format_is_looked_at_all_the_same(files):
    _set_boxes(files, _relative)
    files.objects.append(files.objects[4] | {"id": 1000})
    files.write()
    loaded = load_splits(str(files.root), "train", "val")
    assert loaded.box_format in ("xywh_relative", "cxcywh_relative")
    assert {"box_format", "duplicate_boxes"} <= {finding.name for finding in examine(files.root)}


def test_every_issue_of_loaders_has_a_severity_and_advice():
    assert ISSUES.keys() - LOADING_KINDS.keys() == set()
    assert LOADING_KINDS.keys() <= KINDS.keys()
    assert all(kind.severity in SEVERITIES and kind.advice for kind in KINDS.values())


@pytest.mark.parametrize("place", ["/no/such/directory", "empty"])
def test_what_is_no_data_set_is_an_error_and_no_finding(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match=place):
        load_splits(place, "train", "val")


def test_the_quick_part_takes_a_second_of_ten_thousand_images(clean):
    """It may take no more than that; here it is given room for a slow machine, and what others take does not count."""
    data = load_splits(str(clean), "train", "val").tables["train"].data
    many = concatenate_datasets([data.dataset] * 420)
    assert len(many) > 10_000
    begin = time.process_time()
    table = ObjectTable.of(type(data)(many, data.label_names, data.category_ids, "many", data.report), "train")
    findings = quick_check({"train": table}, "train", "val", TRAINED)
    assert time.process_time() - begin < 5
    assert [finding.name for finding in findings] == ["repeated_file"]


def test_documentation_names_every_kind_of_finding():
    text = (Path(__file__).parents[1] / "docs/data_check.md").read_text(encoding="utf-8")
    assert [name for name in KINDS if f"`{name}`" not in text] == []
