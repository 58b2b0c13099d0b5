# SPDX-License-Identifier: Apache-2.0
"""The demonstration goes all the way, and a second time without training."""

import json

import pytest
from PIL import Image
from transformers import pipeline

from deperceiver_hf.data import load_detection_data
from deperceiver_hf.data.images import decode_rgb
from deperceiver_hf.demo import RECIPE, run_demo
from deperceiver_hf.training.recipes import read_recipe

pytest.importorskip("supervision")


@pytest.mark.slow
def test_demo_leaves_what_it_says_and_is_idempotent(tmp_path):
    first = run_demo(tmp_path / "demo", max_steps=1)
    assert first.trained_now
    assert json.loads(first.metrics_file.read_text()) == first.metrics
    assert 0 <= first.metrics["ap"] <= first.metrics["ap50"] < 0.5  # a model of one step has learned nothing
    with Image.open(first.contact_sheet) as sheet:
        assert min(sheet.size) > 500
    scene = load_detection_data(read_recipe(RECIPE)["dataset"], "val", max_samples=1).dataset[0]
    detector = pipeline("object-detection", model=str(first.model))
    assert isinstance(detector(decode_rgb(scene["image"], scene["image_id"]), threshold=0.0), list)
    for path in (first.model, first.contact_sheet, first.metrics_file):
        assert str(path) in first.summary()

    second = run_demo(tmp_path / "demo")
    assert not second.trained_now
    assert (second.minutes, second.metrics) == (first.minutes, first.metrics)
