# SPDX-License-Identifier: Apache-2.0
"""The demonstration goes all the way, and a second time without training."""

import json

import pytest
from PIL import Image
from transformers import pipeline

from deperceiver_hf.data import load_detection_data
from deperceiver_hf.data.images import decode_rgb
from deperceiver_hf.demo import NUM_SCENES, SCENES, run_demo

pytest.importorskip("supervision")


@pytest.mark.slow
def test_demo_leaves_what_it_says_and_is_idempotent(tmp_path):
    first = run_demo(tmp_path / "demo", max_minutes=1e-6)
    assert first.trained_now
    metrics = json.loads(first.metrics.read_text())
    assert metrics["learned_scenes"]["ap"] == first.ap_learned
    assert metrics["other_scenes"]["ap"] == first.ap_other
    with Image.open(first.contact_sheet) as sheet:
        assert min(sheet.size) > 500
    scene = load_detection_data(SCENES, "train", max_samples=NUM_SCENES).dataset[0]
    detector = pipeline("object-detection", model=str(first.model))
    assert isinstance(detector(decode_rgb(scene["image"], scene["image_id"]), threshold=0.0), list)
    for path in (first.model, first.contact_sheet, first.metrics):
        assert str(path) in first.summary()

    second = run_demo(tmp_path / "demo")
    assert not second.trained_now
    assert (second.minutes, second.ap_learned, second.ap_other) == (first.minutes, first.ap_learned, first.ap_other)
