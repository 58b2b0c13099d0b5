# SPDX-License-Identifier: Apache-2.0
"""The demonstration ends with the same model in every precision: two trainings of many minutes, run by hand with

pytest -m benchmark tests/test_demo_precision.py
"""

import pytest

from deperceiver_hf.data import load_detection_data
from deperceiver_hf.demo import NUM_VALIDATION_SCENES, RECIPE
from deperceiver_hf.evaluation.evaluator import evaluate_detector
from deperceiver_hf.saved_models import load_detector
from deperceiver_hf.training import DetectionTrainer
from deperceiver_hf.training.recipes import recipe_options

LEAST_AP, LEAST_AP50, LARGEST_DIFFERENCE = 0.70, 0.90, 0.03


@pytest.mark.benchmark
def test_float32_and_bfloat16_end_alike(tmp_path):
    scores = {}
    for precision in ("no", "bf16"):
        options = recipe_options(RECIPE, output_dir=str(tmp_path / precision), mixed_precision=precision)
        DetectionTrainer(options).train()
        detector, image_processor = load_detector(str(tmp_path / precision / "last"))
        scenes = load_detection_data(options.dataset, "val", max_samples=NUM_VALIDATION_SCENES)
        scores[precision] = evaluate_detector(detector, image_processor, scenes, mixed_precision="no").metrics
    for metrics in scores.values():
        assert metrics["ap"] >= LEAST_AP
        assert metrics["ap50"] >= LEAST_AP50
    assert abs(scores["no"]["ap"] - scores["bf16"]["ap"]) <= LARGEST_DIFFERENCE
