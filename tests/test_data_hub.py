# SPDX-License-Identifier: Apache-2.0
"""Data sets of `datasets`, in the ways that detection data are stored in them: one schema comes out."""

import json

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from deperceiver_hf.data import DETECTION_FEATURES, DetectionDataset, load_detection_data
from deperceiver_hf.errors import UserError

BOXES = [[[1.0, 2.0, 10.0, 12.0], [5.0, 5.0, 20.0, 10.0]], [], [[0.0, 0.0, 30.0, 20.0]]]
SIZES = [(40, 30), (30, 40), (50, 20)]


def pictures() -> list[PIL.Image.Image]:
    random = np.random.default_rng(0)
    return [
        PIL.Image.fromarray(random.integers(0, 256, size=(height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


def make_dataset(categories, category_feature=None, key="category", as_list=False, columns=None) -> Dataset:
    objects = [{"bbox": boxes, key: labels} for boxes, labels in zip(BOXES, categories, strict=True)]
    fields = {"bbox": [Value("float32")], key: category_feature or Value("int64")}
    if as_list:
        objects = [[{"bbox": b, key: c} for b, c in zip(o["bbox"], o[key], strict=True)] for o in objects]
        feature = [fields]
    else:
        feature = {name: [value] for name, value in fields.items()}
    columns = columns or {}
    features = {"image": Image(), "objects": feature}
    features |= {name: Value("string" if isinstance(v[0], str) else "int64") for name, v in columns.items()}
    return Dataset.from_dict({"image": pictures(), "objects": objects, **columns}, features=Features(features))


def save(path, **splits) -> str:
    DatasetDict(splits).save_to_disk(path)
    return str(path)


NAMED = ClassLabel(names=["cat", "dog", "mouse"])
WAYS = {
    "class labels": (dict(categories=[[2, 0], [], [2]], category_feature=NAMED), ["cat", "dog", "mouse"], [2, 0, 2]),
    "strings": (dict(categories=[["b", "a"], [], ["b"]], category_feature=Value("string")), ["a", "b"], [1, 0, 1]),
    "integers with holes": (dict(categories=[[7, 3], [], [7]]), ["label_3", "label_7"], [1, 0, 1]),
    "list of objects": (
        dict(categories=[[2, 0], [], [2]], category_feature=NAMED, as_list=True),
        ["cat", "dog", "mouse"],
        [2, 0, 2],
    ),
} | {
    key: (dict(categories=[[1, 0], [], [1]], key=key), ["label_0", "label_1"], [1, 0, 1])
    for key in ("categories", "category_id", "label", "labels")
}


@pytest.mark.parametrize(("options", "names", "labels"), WAYS.values(), ids=WAYS)
def test_every_way_of_storing_objects_gives_the_schema(tmp_path, options, names, labels):
    data = load_detection_data(save(tmp_path / "set", train=make_dataset(**options)), "train", strict=True)
    assert data.dataset.features == DETECTION_FEATURES
    assert data.label_names == names
    assert [label for row in data.dataset for label in row["objects"]["category"]] == labels
    assert [row["objects"]["bbox"] for row in data.dataset] == BOXES
    assert [row["objects"]["area"] for row in data.dataset] == [[w * h for _, _, w, h in boxes] for boxes in BOXES]
    assert [(row["width"], row["height"]) for row in data.dataset] == SIZES
    assert data.dataset["image_id"][:] == [0, 1, 2]
    for row, picture in zip(data.dataset, pictures(), strict=True):
        assert (np.asarray(row["image"]) == np.asarray(picture)).all()


def test_category_ids_lead_back_to_the_stored_values(tmp_path):
    data = load_detection_data(save(tmp_path / "set", train=make_dataset([[7, 3], [], [7]])), "train")
    assert data.category_ids == [3, 7]


@pytest.mark.parametrize("feature", [Value("string"), Value("int64")])
def test_labels_mean_the_same_in_splits_that_lack_classes(tmp_path, feature):
    a, b = ("a", "b") if feature.dtype == "string" else (4, 9)
    path = save(
        tmp_path / "set",
        train=make_dataset([[a, b], [], [b]], feature),
        validation=make_dataset([[b, b], [], [b]], feature),
    )
    train, val = load_detection_data(path, "train"), load_detection_data(path, "val")
    assert val.label_names == train.label_names
    assert val.dataset[0]["objects"]["category"] == [1, 1]


def test_corner_boxes(tmp_path):
    path = save(tmp_path / "set", train=make_dataset([[0, 0], [], [0]]))
    data = load_detection_data(path, "train", bbox_format="xyxy")
    assert data.dataset[0]["objects"]["bbox"] == [[1, 2, 9, 10], [5, 5, 15, 5]]
    with pytest.raises(ValueError, match="bbox_format"):
        load_detection_data(path, "train", bbox_format="yolo")
    named = load_detection_data(f"{path}:bbox_format=xyxy", "train")
    assert named.dataset[0]["objects"] == data.dataset[0]["objects"]
    for wrong in ("bbox_format=yolo", "strict=maybe", "colour=1"):
        with pytest.raises(ValueError, match=f"{wrong}.*there are bbox_format=xywh"):
            load_detection_data(f"{path}:{wrong}", "train")


def test_image_ids_are_kept_where_they_identify(tmp_path):
    stored = make_dataset([[0, 0], [], [0]], columns={"image_id": [15, 3, 9], "width": [40, 30, 50]})
    data = load_detection_data(save(tmp_path / "ids", train=stored), "train", strict=True)
    assert data.dataset["image_id"][:] == [15, 3, 9]
    stored = make_dataset([[0, 0], [], [0]], columns={"image_id": ["x", "0001", "z"]})
    data = load_detection_data(save(tmp_path / "text", train=stored), "train", strict=True)
    assert data.dataset["image_id"][:] == [0, 1, 2]
    assert [data.own_image_id(image_id) for image_id in range(3)] == ["x", "0001", "z"]
    for position, ids in enumerate(([1, 1, 2], ["x", None, "z"], ["x", "y", "x"])):
        stored = make_dataset([[0, 0], [], [0]], columns={"image_id": ids})
        data = load_detection_data(save(tmp_path / str(position), train=stored), "train")
        assert data.dataset["image_id"][:] == [0, 1, 2]
        assert data.own_image_ids == {}
        assert data.report.counts == {"renumbered_images": 1}


def test_optional_fields_are_kept(tmp_path):
    objects = [{"bbox": [[1, 1, 5, 5]], "category": [0], "area": [20], "iscrowd": [True], "id": [77]}]
    dataset = Dataset.from_dict({"image": pictures()[:1], "objects": objects}).cast_column("image", Image())
    data = load_detection_data(save(tmp_path / "set", train=dataset), "train", strict=True)
    bbox = [[1, 1, 5, 5]]
    expected = {"id": [77], "bbox": bbox, "category": [0], "area": [20], "iscrowd": [True]}
    assert data.dataset[0]["objects"] == expected


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    dataset = make_dataset([[0, 0], [], [0]]).cast_column("image", Image(decode=False))
    dataset = dataset.map(lambda row, i: {"image": {"bytes": b"?"}} if i == 0 else row, with_indices=True)
    path = save(tmp_path / "set", train=dataset.cast_column("image", Image()))
    data = load_detection_data(path, "train")
    assert data.dataset["image_id"][:] == [1, 2]
    assert data.report.counts == {"unreadable_image": 1}
    assert (data.report.num_images, data.report.num_objects, data.report.num_empty_images) == (2, 1, 1)
    assert DetectionDataset(data)[1]["annotations"]["annotations"][0]["bbox"] == BOXES[2][0]
    with pytest.raises(ValueError, match="strict=True"):
        load_detection_data(path, "train", strict=True)


def test_image_folder_with_metadata_and_no_stale_cache(tmp_path):
    def write(category):
        for split in ("train", "validation"):
            folder = tmp_path / "folder" / split
            folder.mkdir(parents=True, exist_ok=True)
            lines = []
            for position, (picture, boxes) in enumerate(zip(pictures(), BOXES, strict=True)):
                picture.save(folder / f"{position}.png")
                objects = {"bbox": boxes, "category": [category] * len(boxes)}
                lines.append(json.dumps({"file_name": f"{position}.png", "objects": objects}))
            (folder / "metadata.jsonl").write_text("\n".join(lines))
        return str(tmp_path / "folder")

    data = load_detection_data(write("cat"), "val", cache_dir=str(tmp_path / "cache"), strict=True)
    assert data.label_names == ["cat"]
    assert [row["objects"]["bbox"] for row in data.dataset] == BOXES
    stored = data.dataset.cast_column("image", Image(decode=False))[0]["image"]
    assert stored["bytes"] is None
    assert stored["path"].endswith("validation/0.png")
    data = load_detection_data(write("doggy"), "val", cache_dir=str(tmp_path / "cache"))
    assert data.label_names == ["doggy"]


def test_names_of_classes_lead_back_to_the_stored_values(tmp_path):
    dataset = make_dataset([["b", None], [], ["a"]], Value("string"))
    data = load_detection_data(save(tmp_path / "set", train=dataset), "train")
    assert data.category_ids == ["a", "b"]
    assert data.report.counts == {"unknown_category": 1}


def test_sizes_crowds_and_boxes_of_other_types_are_understood_or_counted(tmp_path):
    objects = [
        {"bbox": ["[1, 2, 3, 4]"], "category": ["a"], "iscrowd": ["1"], "area": ["12"]},
        {"bbox": ["5 5 2 2"], "category": ["a"], "iscrowd": ["maybe"], "area": ["none"]},
        {"bbox": ["1,2"], "category": ["a"], "iscrowd": ["0"], "area": ["1"]},
    ]
    columns = {"width": [40.0, float("nan"), 50.0], "height": [30.0, 40.0, float("inf")]}
    dataset = Dataset.from_dict({"image": pictures(), "objects": objects, **columns}).cast_column("image", Image())
    data = load_detection_data(save(tmp_path / "set", train=dataset), "train")
    assert data.report.counts == {"invalid_size": 2, "invalid_box": 1, "invalid_area": 1, "invalid_crowd": 1}
    assert data.dataset[0]["objects"]["bbox"] == [[1, 2, 3, 4]]
    assert data.dataset[0]["objects"]["iscrowd"] == [True]
    assert data.dataset[1]["objects"]["area"] == [4]


def test_images_stored_as_paths_to_somewhere_else_are_left_out(tmp_path):
    for place in ("inside", "outside"):
        (tmp_path / place).mkdir()
        pictures()[0].save(tmp_path / place / "a.png")
    paths = [str(tmp_path / place / "a.png") for place in ("inside", "outside")]
    objects = [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["a"]}] * 2
    dataset = Dataset.from_dict({"image": paths, "objects": objects}).cast_column("image", Image())
    folder = tmp_path / "inside"
    pyarrow.parquet.write_table(dataset.data.table, folder / "train.parquet")  # `datasets` would store the content
    data = load_detection_data(str(folder), "train", cache_dir=str(tmp_path / "cache"))
    assert data.report.counts == {"outside_image_file": 1}
    stored = data.dataset.cast_column("image", Image(decode=False))
    assert stored[0]["image"]["path"] == paths[0]
    data = load_detection_data(f"{folder}:outside=true", "train", cache_dir=str(tmp_path / "cache"))
    assert len(data.dataset) == 2


@pytest.mark.parametrize("found", ["scripted.py", "broken.parquet", "metadata.jsonl", "dataset_dict.json"])
def test_whatever_datasets_raises_is_one_line(tmp_path, found):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / found).write_text("import datasets\n")
    with pytest.raises((ValueError, OSError), match=r"(could not|cannot) be loaded") as error:
        load_detection_data(str(tmp_path / "data"), "train", cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(error.value)
    assert type(error.value) in (UserError, FileNotFoundError)


def test_one_of_several_configurations_can_be_named(tmp_path):
    for config in ("small", "large"):
        (tmp_path / "data" / config).mkdir(parents=True)
        make_dataset([[0, 0], [], [0]]).to_parquet(tmp_path / "data" / config / "train.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files: {name}/train.parquet\n  default: false\n" for name in ("small", "large")
    )
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    where, cache = str(tmp_path / "data"), str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"small.*large.*NAME:config="):
        load_detection_data(where, "train", cache_dir=cache)
    with pytest.raises(ValueError, match=r"small.*large"):
        load_detection_data(f"{where}:config=middle", "train", cache_dir=cache)
    assert len(load_detection_data(f"{where}:config=small", "train", cache_dir=cache).dataset) == 3


def test_max_samples(tmp_path):
    path = save(tmp_path / "set", train=make_dataset([[0, 5], [], [0]]))
    data = load_detection_data(path, "train", max_samples=1)
    assert len(data.dataset) == 1
    assert data.report.num_objects == 2


def test_a_single_saved_split_is_the_training_split(tmp_path):
    make_dataset([[0, 0], [], [0]]).save_to_disk(tmp_path / "one")
    assert len(load_detection_data(str(tmp_path / "one"), "train").dataset) == 3
    with pytest.raises(FileNotFoundError, match="no split 'val'; its splits are train"):
        load_detection_data(str(tmp_path / "one"), "val")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "no column of images. Columns found: text"),
        ({"image": [None], "text": ["a"]}, "no column `objects`. Columns found: image.*text"),
        ({"image": [None], "objects": [{"category": [1]}]}, "has no boxes.*it has category"),
        ({"image": [None], "objects": [{"bbox": [[1.0, 1.0, 1.0, 1.0]]}]}, "has no categories.*it has bbox"),
    ],
)
def test_data_sets_that_do_not_fit_are_refused_with_their_columns(tmp_path, columns, message):
    dataset = Dataset.from_dict(columns)
    if "image" in columns:
        dataset = dataset.cast_column("image", Image())
    with pytest.raises(ValueError, match=message):
        load_detection_data(save(tmp_path / "set", train=dataset), "train")


@pytest.mark.parametrize("name", ["./not_here", "/not/here", "no_such_owner/no_such_data"])
def test_what_does_not_exist_is_named(name):
    with pytest.raises(FileNotFoundError, match=name):
        load_detection_data(name, "train")


COLUMNS = {  # a column of objects and the fields that hold boxes and categories; or these as columns
    "annotations": ("annotations", "bbox", "category_id"),
    "labels": ("labels", "boxes", "class"),
    "instances": ("instances", "bounding_box", "name"),
    "columns": (None, "bboxes", "labels"),
    "columns in the singular": (None, "bbox", "category"),
}


@pytest.mark.parametrize(("column", "box", "category"), COLUMNS.values(), ids=COLUMNS)
def test_objects_in_other_columns(tmp_path, column, box, category):
    objects = {box: BOXES, category: [["b", "a"], [], ["b"]]}
    if column is not None:
        objects = {column: [{box: b, category: c} for b, c in zip(*objects.values(), strict=True)]}
    dataset = Dataset.from_dict({"image": pictures(), "text": ["x"] * 3, **objects}).cast_column("image", Image())
    data = load_detection_data(save(tmp_path / "set", train=dataset), "train", strict=True)
    assert data.label_names == ["a", "b"]
    assert [row["objects"]["bbox"] for row in data.dataset] == BOXES
    assert [row["objects"]["category"] for row in data.dataset] == [[1, 0], [], [1]]
    assert f"{box} and {category}" in data.report.recognised


def test_streaming_reads_the_first_images(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("streamed")  # `datasets` would take "test" in a path for the split
    dataset = make_dataset([[2, 0], [], [2]], NAMED)
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train-00000.parquet")
    name, cache = f"{tmp_path}:streaming=true", {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match="streaming=true reads as many images as are asked for"):
        load_detection_data(name, "train", **cache)
    data = load_detection_data(name, "train", max_samples=2, strict=True, **cache)
    whole = load_detection_data(tmp_path, "train", **cache)
    assert data.label_names == whole.label_names
    assert "streamed" in data.report.recognised
    for ours, theirs in zip(data.dataset, whole.dataset.select(range(2)), strict=True):
        np.testing.assert_array_equal(np.asarray(ours.pop("image")), np.asarray(theirs.pop("image")))
        assert ours == theirs
    assert len(DetectionDataset(data)) == 2
    with pytest.raises(UserError, match="leave out streaming"):
        load_detection_data(f"{save(tmp_path / 'saved', train=dataset)}:streaming=true", "train", max_samples=2)


def test_a_name_that_is_neither_here_nor_on_the_hub_is_said_to_be_no_directory(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("no connection")

    monkeypatch.setattr("deperceiver_hf.data.formats.hub.load_dataset", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no directory mine/typo, and .*: ConnectionError: no conn"):
        load_detection_data("mine/typo", "train")
