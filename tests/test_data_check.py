# SPDX-License-Identifier: Apache-2.0
"""The command that looks a data set over: its report, its page and the training that it recommends."""

import html.parser
import json
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from deperceiver_hf.cli import _parse, main
from deperceiver_hf.data.doctor.loading import load_splits
from deperceiver_hf.data.doctor.objects import TrainedSize
from deperceiver_hf.machine import device_name
from deperceiver_hf.training import command as training_command
from deperceiver_hf.training.data_check.recommendation import recommend
from deperceiver_hf.training.data_check.timing import StepTime
from deperceiver_hf.training.recipes import recipe_options

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def write_data(tmp_path):
    """Writes a COCO directory with nothing wrong, and returns its path."""

    def write(*, count=6, size=(64, 48), objects=3, side=14.0, names=("cat", "dog"), splits=("train", "val")) -> Path:
        root, random = tmp_path / "data", np.random.default_rng(3)
        (root / "annotations").mkdir(parents=True)
        for split in splits:
            (root / split).mkdir()
            content = {"images": [], "annotations": [], "categories": []}
            content["categories"] = [{"id": label, "name": name} for label, name in enumerate(names)]
            for index in range(count):
                noise = PIL.Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8))
                noise.resize(size, PIL.Image.Resampling.BICUBIC).save(root / split / f"{split}-{index}.png")
                content["images"].append(
                    {"id": index, "file_name": f"{split}-{index}.png", "width": size[0], "height": size[1]}
                )
                for _ in range(objects):
                    low = random.uniform(0, np.array(size) - side)
                    number = len(content["annotations"])
                    content["annotations"].append(
                        {
                            "id": number,
                            "image_id": index,
                            "bbox": [*low, side, side],
                            "category_id": number % len(names),
                        }
                    )
            (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
        return root

    return write


def recommended(root: Path, device: str = "cpu", has_validation: bool = True):
    table = load_splits(str(root), "train", "val").tables["train"]
    trained = TrainedSize(None, stride=8, num_queries=60 if device == "cpu" else 200)
    return recommend(table, {"dataset": str(root)}, trained, torch.device(device), has_validation=has_validation)


def prepared(command: str, *more: str):
    """The job of a command line that was recommended."""
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("deperceiver", "train")
    return training_command.prepare(_parse("train", training_command, [*arguments, *more]))


def test_report_and_recommended_command(write_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = write_data()
    assert main(["data", "check", str(root), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"error": 0, "warning": 0, "note": 1}  # few objects
    assert report["splits"]["train"]["objects"] == 18
    assert report["classes"]["cat"]["val"] == {"objects": 9, "images": 6}
    assert report["trained_at"]["by"] == "as recommended below"
    recommendation = report["recommendation"]
    assert recommendation["minutes"] > 0
    assert "an estimate from 3 steps" in recommendation["time"]
    # It is taken as it is printed; no weights are to be had here.
    job = prepared(recommendation["command"], "--no_pretrained_backbone")
    options = job.trainer.options
    assert (options.dataset, options.output_dir) == (str(root), "outputs/data")
    size = report["trained_at"]["size"]
    assert (options.shortest_edge, options.longest_edge) == (size["shortest_edge"], size["longest_edge"])
    assert job.trainer.model.config.num_queries == report["trained_at"]["num_queries"]


@pytest.mark.slow
def test_recommended_command_trains(write_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", str(write_data()), "--quick", "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["recommendation"]["command"]
    words = [*shlex.split(command)[1:], "--max_steps", "1", "--eval_every", "0", "--no_pretrained_backbone"]
    assert main(words) == 0
    assert (tmp_path / "outputs/data/last/config.json").is_file()


def test_errors_end_with_1_and_the_data_stay_readable(write_data, capsys):
    root = write_data()
    (root / "train/train-0.png").unlink()
    assert main(["data", "check", str(root), "--quick"]) == 1
    printed = capsys.readouterr()
    assert "ERROR missing_image_file, train" in printed.out
    assert "-> Put the files where the annotations name them" in printed.out
    assert "repaired while loading" not in printed.err  # said once, as a finding


def test_options_of_the_training_decide_on_sizes(write_data, capsys):
    root = write_data(side=3.0)
    for options, size, stride in (
        (["--recipe", "own-data-cpu", "--shortest_edge", "96"], {"shortest_edge": 96, "longest_edge": 342}, 8),
        (
            ["--fixed_size", "32", "64", "--preset", "large", "--no_pretrained_backbone"],
            {"height": 32, "width": 64},
            4,
        ),
    ):
        assert main(["data", "check", str(root), *options, "--quick", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["trained_at"]["size"] == size
        assert report["trained_at"]["finest_stride"] == stride
        assert report["trained_at"]["by"] == "as asked for"
        assert "small_objects" in {finding["name"] for finding in report["findings"]}


def test_data_set_is_named_once(write_data, capsys):
    assert main(["data", "check", str(write_data()), "--dataset", "other"]) == 2
    assert "name the data set as it is" in capsys.readouterr().err


# --- the recommendation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_recommendation_makes_valid_options(write_data, device):
    choice = recommended(write_data(), device)
    assert choice.options == recipe_options(choice.recipe, **choice.overrides)
    assert choice.options.batch_size <= 6
    assert len(choice.reasons) >= 3


@pytest.mark.parametrize(("side", "edge"), [(90.0, 256), (12.0, 384), (5.0, 448)])
def test_small_objects_ask_for_large_images_but_not_beyond_their_own(write_data, side, edge):
    """Of 480 pixels; a cell has 8."""
    assert recommended(write_data(count=2, size=(640, 480), side=side)).options.shortest_edge == edge


def test_many_objects_ask_for_queries(write_data):
    choice = recommended(write_data(count=2, objects=120))
    assert choice.options.num_queries == 150
    assert "up to 120 objects" in " ".join(choice.reasons)


def test_without_a_split_nothing_is_evaluated(write_data):
    options = recommended(write_data(splits=("train",)), has_validation=False).options
    assert options.eval_every == 0 or options.val_fraction > 0


def test_minutes_of_a_run():
    options = recipe_options("own-data-cpu", batch_size=4, epochs=3, num_workers=0)
    time = StepTime(step=2.0, loading=1.0, steps=3, device=device_name(torch.device("cpu")), precision="float32")
    assert time.minutes(options, num_images=9) == pytest.approx(3 * 3 * 3.0 / 60)
    faster = StepTime(step=2.0, loading=8.0, steps=3, device="a GPU", precision="float32")
    beside = recipe_options("own-data-cpu", batch_size=4, epochs=3, num_workers=2, cache_images=False)
    assert faster.minutes(beside, num_images=9) == pytest.approx(9 * 4.0 / 60)
    assert time.minutes(recipe_options("own-data-cpu", max_minutes=1.5), num_images=900) == 1.5
    assert "About" in time.sentence(options, 9)


# --- the page -----------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags and sources of a page; fails where they are not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "line", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag


def test_page_is_whole_and_nothing_from_the_data_is_obeyed(write_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_data(names=(HOSTILE, "cat"), count=8)
    content = json.loads((root / "annotations/instances_train.json").read_text())
    content["annotations"].append(content["annotations"][0] | {"id": 999})  # twice
    (root / "train/train-0.png").rename(root / 'train/"><img src=x>.png')
    content["images"][0]["file_name"] = '"><img src=x>.png'
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    assert main(["data", "check", str(root), "--quick", "--report", "report"]) == 0
    text = Path("report/index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "&lt;script&gt;" in text
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert (
        len(page.sources) == page.tags.count("img") >= 2 * 6 + 2 * 12
    )  # images of two splits, objects of two classes
    assert not re.search(r"https?://", text)
    assert "duplicate_boxes" in text


def test_a_second_report_takes_the_place_of_the_first(write_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_data()
    for _ in range(2):
        assert main(["data", "check", str(root), "--quick", "--report", "report"]) == 0
    assert [path.name for path in Path("report").iterdir()] == ["index.html"]
    Path("file").touch()
    assert main(["data", "check", str(root), "--quick", "--report", "file"]) == 2
