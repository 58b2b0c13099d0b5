# SPDX-License-Identifier: Apache-2.0
"""Parts of a data set: drawn by chance with near-duplicates on one side, or listed; a resumed run has the same."""

import json
import logging
import shutil

import numpy as np
import pytest

import data_copies
from data_copies import NAMES, records, text
from deperceiver_hf.cli import main
from deperceiver_hf.data import load_detection_data, splitting
from deperceiver_hf.data.splitting import draw_parts, find_listed, image_names, listed_parts, part_of
from deperceiver_hf.errors import UserError
from deperceiver_hf.training import DetectionTrainer
from training_runs import read_log, tiny_options


@pytest.fixture(scope="module")
def pile(tmp_path_factory):
    """Twenty images in two folders as one split, of which 3, 4 and 5 are nearly the same."""
    root = tmp_path_factory.mktemp("pile")
    images, annotations = [], []
    for number in range(20):
        name = f"{'day' if number < 10 else 'night'}/{number}.png"
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        seed = "3" if number in (4, 5) else str(number)
        picture = data_copies.picture(f"picture {seed}", 64, 48)
        picture = picture.point(lambda value, brighter=4 * number: min(255, value + brighter % 20))
        picture.save(root / "images" / name)
        images.append({"id": 100 + number, "file_name": name, "width": 64, "height": 48})
        box = {"bbox": [4, 4, 20 + number, 20], "category_id": number % 3}
        annotations.append({"id": number, "image_id": 100 + number, "iscrowd": 0, "area": 400 + 20 * number, **box})
    categories = [{"id": label, "name": name} for label, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    text(root / "annotations" / "instances_all.json", json.dumps(content))
    return root


def test_a_fraction_is_drawn_with_near_duplicates_on_one_side(pile):
    data = load_detection_data(pile, "train")
    seen = set()
    for seed in range(12):
        val, train = draw_parts(data, [0.2], seed)
        assert len(val) == 4
        assert sorted([*val, *train]) == list(range(20))
        assert len({3, 4, 5} & set(val.tolist())) in (0, 3)
        assert draw_parts(data, [0.2], seed)[0].tolist() == val.tolist()
        seen.add(tuple(val))
    assert len(seen) > 6
    assert {len({3, 4, 5} & set(val)) for val in seen} == {0, 3}
    test, val, train = draw_parts(data, [0.1, 0.25], 0)
    assert [len(part) for part in (test, val, train)] == [2, 5, 13]


def test_impossible_fractions_are_refused(pile):
    data = load_detection_data(pile, "train")
    for fractions in ([0.0], [1.0], [0.5, 0.5], [-0.1], [float("nan")]):
        with pytest.raises(UserError, match="fractions must be more than 0"):
            draw_parts(data, fractions, 0)
    alike = part_of(data, [3, 4, 5], "alike")
    with pytest.raises(UserError, match=r"3 images are 1 different ones.*--train_list FILE --val_list FILE"):
        draw_parts(alike, [0.3], 0)


def test_a_part_is_a_data_set_of_its_own(pile):
    data = load_detection_data(pile, "train")
    part = part_of(data, [7, 2], "val")
    assert records(part) == [records(data)[7], records(data)[2]]
    assert (part.report.num_images, part.report.num_objects, part.report.num_empty_images) == (2, 2, 0)
    assert data.report.num_images == 20
    assert image_names(part) == ["7.png", "2.png"]
    assert image_names(data)[9:11] == ["day/9.png", "night/10.png"]


LINES = {
    "paths": ["day/3.png", "night/15.png"],
    "names": ["3.png", "15.png"],
    "without suffixes": ["3", "15", ""],
    "of another machine": ["C:\\data\\day\\3.png", "/home/me/images/night/15.png"],
    "twice": ["3.png", "day/3.png", "15.png"],
}


@pytest.mark.parametrize("lines", LINES.values(), ids=LINES)
def test_lists_name_images(pile, tmp_path, lines):
    data = load_detection_data(pile, "train")
    text(tmp_path / "list.txt", "\ufeff" + "\r\n".join(lines))
    assert find_listed(data, tmp_path / "list.txt").tolist() == [3, 15]
    train, val = listed_parts(data, None, tmp_path / "list.txt")
    assert (val.tolist(), len(train)) == ([3, 15], 18)
    train, val = listed_parts(data, tmp_path / "list.txt", None)
    assert (train.tolist(), len(val)) == ([3, 15], 18)


def test_lists_that_do_not_fit_are_refused_in_a_line(pile, tmp_path):
    data = load_detection_data(pile, "train")
    wrong = {
        "": "names no images",
        "3.png\n99.png\nx.png": r"names 2 of 3 images that are not in .*99.png, x.png. Its images are called day/0",
        "\n".join(map(str, range(20))): "names all 20 images",
    }
    for content, message in wrong.items():
        text(tmp_path / "list.txt", content)
        with pytest.raises(UserError, match=message) as error:
            listed_parts(data, None, tmp_path / "list.txt")
        assert "\n" not in str(error.value)
    text(tmp_path / "a.txt", "1\n2\n")
    text(tmp_path / "b.txt", "2\n3\n")
    with pytest.raises(UserError, match=r"1 images are in .*a.txt and in .*b.txt, e.g. day/2.png"):
        listed_parts(data, tmp_path / "a.txt", tmp_path / "b.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no text file"):
        find_listed(data, tmp_path / "binary.txt")


def test_a_run_divides_its_split_writes_it_down_and_is_resumed_with_it(pile, tmp_path):
    shutil.copytree(pile, tmp_path / "data")
    given = {"dataset": str(tmp_path / "data"), "max_train_samples": None, "max_eval_samples": None, "eval_every": 2}
    given |= {"val_fraction": 0.2, "batch_size": 4}
    whole = DetectionTrainer(tiny_options(tmp_path / "whole", **given))
    whole.train()
    lists = [(tmp_path / "whole" / f"{side}_images.txt").read_text().split() for side in ("train", "val")]
    assert [len(names) for names in lists] == [16, 4]
    assert image_names(whole.data.train) == lists[0]
    assert {name.split("/")[-1] for name in lists[1]} == {
        name.split("/")[-1] for name in image_names(whole.data.require_evaluation())
    }

    stopped = DetectionTrainer(tiny_options(tmp_path / "stopped", **given, max_steps=4))
    stopped.train()
    # Images that come later are on neither side.
    content = json.loads((tmp_path / "data" / "annotations" / "instances_all.json").read_text())
    content["images"].insert(0, {"id": 1, "file_name": "new.png"})
    data_copies.picture("new", 64, 48).save(tmp_path / "data" / "images" / "new.png")
    text(tmp_path / "data" / "annotations" / "instances_all.json", json.dumps(content))
    resumed = DetectionTrainer(tiny_options(tmp_path / "stopped", **given, resume="auto"))
    resumed.train()
    for kind in ("train", "eval"):
        assert read_log(tmp_path / "stopped", kind)[-1] == read_log(tmp_path / "whole", kind)[-1]
    for change, message in (
        ({"val_fraction": 0.3}, r"val_fraction was 0\.2 and is 0\.3"),
        ({"val_seed": 7}, r"val_seed was None and is 7"),
    ):
        with pytest.raises(ValueError, match=message):
            DetectionTrainer(tiny_options(tmp_path / "stopped", **given | change, resume="auto", epochs=3))
    with pytest.raises(UserError, match=r"divided its images.*--recipe .*options\.yaml"):
        DetectionTrainer(tiny_options(tmp_path / "stopped", **given | {"val_fraction": None}, resume="auto"))


def test_runs_by_lists_and_evaluation_by_a_list(pile, tmp_path, caplog, capsys):
    text(tmp_path / "val.txt", "1\n2\n")
    given = {"dataset": str(pile), "max_train_samples": None, "max_eval_samples": None, "max_steps": 1}
    run = DetectionTrainer(tiny_options(tmp_path / "run", **given, val_list=str(tmp_path / "val.txt"), eval_every=1))
    run.train()
    assert len(run.data.train.dataset) == 18
    assert records(run.data.require_evaluation()) == records(load_detection_data(pile, "train"))[1:3]
    text(tmp_path / "val.txt", "1\n3\n")
    state = {"resume": "auto", "val_list": str(tmp_path / "val.txt"), "eval_every": 1, "max_steps": 2}
    resumed = DetectionTrainer(tiny_options(tmp_path / "run", **given | state))  # goes by what it has written down
    assert image_names(resumed.data.require_evaluation()) == ["1.png", "2.png"]
    with caplog.at_level(logging.INFO):
        code = main(
            [
                *("evaluate", "--model", str(tmp_path / "run" / "last"), "--dataset", str(pile), "--split", "train"),
                *(
                    "--image_list",
                    str(tmp_path / "run" / "val_images.txt"),
                    "--output",
                    str(tmp_path / "metrics.json"),
                ),
                *("--num_workers", "0", "--json"),
            ]
        )
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_images"], report["settings"]["image_list"]) == (2, str(tmp_path / "run" / "val_images.txt"))


OPTIONS = {
    "both sources": ({"dataset": "x", "annotations": "a.json"}, "--dataset: stands for both splits"),
    "images alone": ({"images": "x"}, "--images: is where the images of --annotations are"),
    "val_images alone": ({"annotations": "a", "val_images": "x"}, "--val_images: is where"),
    "val_annotations alone": ({"val_annotations": "x"}, "--val_annotations: goes with --annotations"),
    "fraction and list": ({"val_fraction": 0.1, "val_list": "x"}, "--val_list: says what is evaluated on"),
    "fraction": ({"val_fraction": 1.0}, "--val_fraction must be more than 0 and less than 1, not 1.0"),
    "seed alone": ({"val_seed": 1}, "--val_seed: is the seed of --val_fraction"),
    "fraction and split": ({"val_fraction": 0.1, "eval_split": "test"}, "--eval_split: contradicts"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UserError, match=message):
        tiny_options("unused", **options)


def test_a_run_on_annotations_apart_from_their_images(pile, tmp_path):
    annotations, images = str(pile / "annotations" / "instances_all.json"), str(pile / "images")
    given = {"annotations": annotations, "images": images, "max_steps": 1, "eval_every": 1, "max_train_samples": 4}
    with pytest.raises(UserError, match=r"Give --val_annotations FILE.*--val_fraction 0\.1"):
        DetectionTrainer(tiny_options(tmp_path / "run", **given))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run = DetectionTrainer(tiny_options(tmp_path / "run", **given, val_annotations=annotations, val_images=images))
    assert (len(run.data.train.dataset), len(run.data.require_evaluation().dataset)) == (4, 3)
    shutil.rmtree(tmp_path / "run")
    run = DetectionTrainer(tiny_options(tmp_path / "run", **given, val_fraction=0.1))
    assert (len(run.data.train.dataset), len(run.data.require_evaluation().dataset)) == (4, 2)


def test_command_split(pile, tmp_path, capsys):
    assert (
        main(["data", "split", str(pile), str(tmp_path / "out"), "--val_fraction", "0.2", "--test_fraction", "0.1"])
        == 0
    )
    assert "val: 4 images, 4 objects" in capsys.readouterr().out
    counts = [len(load_detection_data(tmp_path / "out", split).dataset) for split in ("train", "val", "test")]
    assert counts == [14, 4, 2]
    data = load_detection_data(tmp_path / "out", "val")
    everything = {scene[0]: scene for scene in records(load_detection_data(pile, "train"))}
    assert all(scene == everything[scene[0]] for scene in records(data))
    assert main(["data", "split", str(tmp_path / "out"), str(tmp_path / "again"), "--val_fraction", "0.2"]) == 2
    assert "has splits already: train, val, test. --split says" in capsys.readouterr().err
    text(tmp_path / "val.txt", "1\n2\n")
    lists = ["--val_list", str(tmp_path / "val.txt"), "--to", "yolo", "--link"]
    assert main(["data", "split", str(pile), str(tmp_path / "listed"), *lists]) == 0
    assert len(load_detection_data(tmp_path / "listed", "val").dataset) == 2
    assert main(["data", "split", str(pile), str(tmp_path / "x")]) == 2
    assert main(["data", "split", str(pile), str(tmp_path / "x"), "--val_fraction", "0.5", *lists]) == 2
    assert not (tmp_path / "x").exists()


def test_drawing_is_uniform(monkeypatch):
    """Every image is as likely to be drawn, with no duplicates among them."""
    data = load_detection_data("synthetic", "train", num_samples=10, image_size=64)
    monkeypatch.setattr(splitting, "duplicate_groups", lambda hashes: np.arange(10))
    monkeypatch.setattr(splitting, "image_hashes", lambda data: None)
    times = np.zeros(10)
    for seed in range(200):
        times[draw_parts(data, [0.3], seed)[0]] += 1
    assert np.abs(times / 200 - 0.3).max() < 0.12
