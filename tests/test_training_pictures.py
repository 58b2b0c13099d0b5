# SPDX-License-Identifier: Apache-2.0
"""Curves and predictions of a run: drawn from its log and its evaluations, without any effect on it."""

import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from deperceiver_hf.training import DetectionTrainer, pictures
from deperceiver_hf.training.pictures import make_curves
from training_runs import assert_equal_weights, read_log, tiny_options, train_until_killed, weights_of

pytest.importorskip("supervision")
pytest.importorskip("matplotlib")

OPTIONS = {"eval_every": 1, "dropout": 0.1, "max_train_samples": 4, "checkpointing_steps": 1, "pictures": 2}


def test_a_run_is_drawn_and_does_not_change(tmp_path, monkeypatch):
    plain = DetectionTrainer(tiny_options(tmp_path / "plain", **{**OPTIONS, "pictures": 0}))
    plain.train()
    assert not (tmp_path / "plain" / "curves.png").exists()
    drawn = DetectionTrainer(tiny_options(tmp_path / "drawn", **OPTIONS))
    drawn.train()
    assert_equal_weights(weights_of(plain), weights_of(drawn))
    assert read_log(tmp_path / "plain", "train") == read_log(tmp_path / "drawn", "train")
    assert sorted(path.name for path in (tmp_path / "drawn" / "predictions").iterdir()) == ["best.jpg", "latest.jpg"]

    train_until_killed(tmp_path / "killed", monkeypatch, 3, **OPTIONS)
    DetectionTrainer(tiny_options(tmp_path / "killed", **OPTIONS, resume="auto")).train()
    for name in ("curves.png", "predictions/best.jpg", "predictions/latest.jpg"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "drawn" / name).read_bytes(), name
        assert Image.open(tmp_path / "drawn" / name).width > 500

    DetectionTrainer(tiny_options(tmp_path / "drawn", max_train_samples=4, max_steps=1, overwrite_output_dir=True))
    assert not (tmp_path / "drawn" / "predictions").exists()


def test_the_best_picture_stays_that_of_the_best_model(tmp_path, scripted_ap, monkeypatch):
    steps = []
    draw = pictures.RunPictures.draw_predictions
    monkeypatch.setattr(
        pictures.RunPictures,
        "draw_predictions",
        lambda self, result, step, *, best: (steps.append((step, best)), draw(self, result, step, best=best)),
    )
    scripted_ap(0.2, 0.1, 0.2, 0.1)
    DetectionTrainer(tiny_options(tmp_path, **{**OPTIONS, "epochs": 4, "pictures": 0})).train()
    assert steps == [(2, True), (4, False), (6, True), (8, False)]


def test_what_cannot_be_drawn_is_a_warning_and_no_end(tmp_path, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(pictures, "draw_contact_sheet", fail)
    monkeypatch.setattr(pictures, "make_curves", fail)
    result = DetectionTrainer(tiny_options(tmp_path, **OPTIONS)).train()
    assert result.step == 4
    warnings = [record.message for record in caplog.records if "could not be drawn" in record.message]
    assert len(warnings) == 2  # once each, of two evaluations
    assert all("no space left" in warning for warning in warnings)
    assert caplog.records[-1].levelno >= logging.INFO


def test_curves_show_the_log(tmp_path):
    lines = [
        {"kind": "train", "step": step, "loss": 3 / step, "loss_bbox": 1 / step, "loss_bbox_0": 9.0, "lr": 0.1}
        for step in (1, 2, 3)
    ]
    lines[1]["loss"] = None  # not finite, in a run of float16
    lines += [{"kind": "eval", "step": step, "ap": ap, "ap50": 0.5, "ap75": -1} for step, ap in ((2, 0.2), (3, -1))]
    figure = make_curves(lines)
    shown = {
        line.get_label(): [tuple(point) for point in line.get_xydata()] for axes in figure.axes for line in axes.lines
    }
    assert shown.keys() == {"loss", "loss_bbox", "ap", "ap50", "lr"}
    assert shown["loss"] == [(1, 3), (3, 1)]
    assert shown["ap"] == [(2, 20)]
    assert make_curves([]) is None


def test_pictures_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    DetectionTrainer(tiny_options(tmp_path, **OPTIONS, report_to=["tensorboard"], project="shapes")).train()
    events = EventAccumulator(str(tmp_path / "shapes")).Reload()
    assert [event.step for event in events.Images("predictions")] == [2, 4]
    assert events.Images("predictions")[0].width == Image.open(tmp_path / "predictions" / "latest.jpg").width


def test_pictures_reach_other_trackers(monkeypatch):
    """As their interfaces are in accelerate and, where that has no way, in the packages themselves."""
    sent = []
    sheet = Image.new("RGB", (6, 4))
    tracker = SimpleNamespace(name="wandb", log_images=lambda images, step: sent.append((images, step)))
    pictures._send(sheet, tracker, 7)
    assert sent[0][1] == 7
    assert [np.asarray(image).shape for image in sent[0][0]["predictions"]] == [(4, 6, 3)]

    package = SimpleNamespace(log_image=lambda image, key, step: sent.append((key, step)), Image=lambda image: "image")
    for name in ("mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, package)
    pictures._send(sheet, SimpleNamespace(name="mlflow"), 8)
    pictures._send(sheet, SimpleNamespace(name="trackio", log=lambda values, step: sent.append((values, step))), 9)
    pictures._send(sheet, SimpleNamespace(name="dvclive"), 10)
    assert sent[1:] == [("predictions", 8), ({"predictions": "image"}, 9)]


def test_the_bar_says_what_is_left(tmp_path, capsys):
    DetectionTrainer(tiny_options(tmp_path, epochs=1)).train()
    last = [line for line in capsys.readouterr().err.split("\r") if "6/6" in line][-1]
    assert "images/s=" in last
    assert "left=0:00" in last
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["images_per_second"] > 0
