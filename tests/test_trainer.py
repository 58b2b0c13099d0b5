# SPDX-License-Identifier: Apache-2.0
"""transformers' own `Trainer` trains and evaluates the model, and gathers nothing but predictions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from conftest import tiny_model, tiny_v2_model
from deperceiver_hf import DePerceiverImageProcessor, DePerceiverV2ImageProcessor
from deperceiver_hf.data import DetectionCollator, DetectionDataset, load_detection_data


@pytest.mark.parametrize(
    ("make_model", "fields", "processor", "logits_shape"),
    [
        (tiny_model, {"decoder_type": "cross_attention"}, DePerceiverImageProcessor, (7, 1)),
        (tiny_model, {"decoder_type": "layered"}, DePerceiverImageProcessor, (7, 1)),
        (tiny_v2_model, {}, DePerceiverV2ImageProcessor, (9, 0)),
        (tiny_v2_model, {"query_selection": False}, DePerceiverV2ImageProcessor, (9, 0)),
    ],
    ids=["cross_attention", "layered", "v2", "v2_learned"],
)
def test_trainer_trains_and_gathers_predictions_only(tmp_path, make_model, fields, processor, logits_shape):
    data = load_detection_data("synthetic", "train", image_size=64, max_samples=4)
    size = {"shortest_edge": 64, "longest_edge": 64}
    collate = DetectionCollator(processor(size=size), do_resize=True)
    model = make_model(num_labels=len(data.label_names), **fields)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=2,
        remove_unused_columns=False,
        label_names=["labels"],
        eval_do_concat_batches=False,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    gathered = []
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=DetectionDataset(data),
        eval_dataset=DetectionDataset(data),
        compute_metrics=lambda prediction: gathered.append(prediction.predictions) or {},
    )
    result = trainer.train()
    assert result.training_loss > 0
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any("class_labels_classifier" in name for name in changed)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    (batches,) = gathered
    for batch in batches:
        losses, logits, boxes = batch  # in the order of DETR, which transformers' example for detection expects
        assert "loss_bbox" in losses
        queries, no_object = logits_shape
        assert logits.shape == (2, queries, len(data.label_names) + no_object)
        assert boxes.shape == (2, queries, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_model", "processor"),
    [
        pytest.param(tiny_model, DePerceiverImageProcessor, marks=pytest.mark.heavy, id="v1"),
        pytest.param(tiny_v2_model, DePerceiverV2ImageProcessor, id="v2"),
    ],
)
def test_the_detection_example_of_transformers_runs_on_a_saved_model(tmp_path, make_model, processor):
    """A process that knows nothing of this package takes another data set's classes, trains, evaluates each epoch by
    entries 1 and 2 of the predictions, goes back to the best model, writes a card and detects."""
    source, output = tmp_path / "source", tmp_path / "output"
    make_model(num_labels=5).save_pretrained(source)
    processor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(source)
    without_the_package = "import runpy, sys; sys.modules['deperceiver_hf'] = None; sys.argv.pop(0)"
    process = subprocess.run(
        [
            *(sys.executable, "-c", f"{without_the_package}; runpy.run_path(sys.argv[0], run_name='__main__')"),
            *(str(Path(__file__).with_name("trainer_example.py")), str(source), str(output)),
        ],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf_home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    summary = json.loads(process.stdout.splitlines()[-1])
    assert len(summary["history"]) == 2
    assert summary["best"] == max(summary["history"])
    assert 0 <= summary["test"] <= 1
    assert summary["module"].startswith("transformers_modules.")
    assert summary["num_labels"] == 3
    assert summary["size"] == {"max_height": 96, "max_width": 96}
    assert summary["pad_size"] == {"height": 96, "width": 96}
    assert {found["label"] for found in summary["detections"]} <= {"red", "green", "blue"}
    assert len(summary["detections"]) > 0
    assert "object-detection" in (output / "README.md").read_text(encoding="utf-8")
