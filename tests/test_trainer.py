# SPDX-License-Identifier: Apache-2.0
"""transformers' own `Trainer` trains and evaluates the model, and gathers nothing but predictions."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    pipeline,
)

from coco_samples import CATEGORIES, annotation, write_coco
from conftest import tiny_model, tiny_v2_model
from deperceiver_hf import DePerceiverImageProcessor, DePerceiverV2ImageProcessor
from deperceiver_hf.data import DetectionDataset, load_detection_data
from deperceiver_hf.evaluation import evaluate_detector
from deperceiver_hf.training.transformers_trainer import (
    TRAINING_ARGUMENTS,
    AugmentationEpochs,
    TrainerCollator,
    TrainerMetrics,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """`examples/transformers_trainer.py`."""
    path = ROOT / "examples" / "transformers_trainer.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # a data class asks for its module
    spec.loader.exec_module(module)
    return module


def write_data(directory: Path, detections: list[dict] | None = None) -> Path:
    """Six images of two sizes of a training split, which are the validation split, too; with two objects each, or with
    every other one of the detections."""
    random = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in range(6):
        width, height = (64, 48) if image_id % 3 else (48, 64)
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height})
        for number in range(2):
            left, top = random.integers(0, 24, 2).tolist()
            box = [left, top, *random.integers(8, 24, 2).tolist()]
            annotations.append(annotation(len(annotations), image_id, (1, 11)[number], box))
    if detections is not None:
        chosen = [found for found in detections[::2] if min(found["bbox"][2:]) > 2]
        annotations = [
            annotation(number, found["image_id"], found["category_id"], [side + 0.2 for side in found["bbox"]])
            for number, found in enumerate(chosen)
        ]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES[1:3]}
    for split in ("train", "val"):
        names = {"annotation_file": f"annotations/instances_{split}2017.json", "image_dir": f"{split}2017"}
        write_coco(directory, content, **names)
    return directory


@pytest.fixture(scope="module")
def run(example, tmp_path_factory) -> SimpleNamespace:
    """Two epochs of the example, from a saved model of other classes."""
    directory = tmp_path_factory.mktemp("trainer")
    tiny_v2_model(num_labels=5).save_pretrained(directory / "model")
    DePerceiverV2ImageProcessor().save_pretrained(directory / "model")
    command_line = [
        *("--model", str(directory / "model"), "--dataset", str(write_data(directory / "data"))),
        *("--shortest_edge", "48", "--longest_edge", "64", "--num_train_epochs", "2", "--learning_rate", "1e-3"),
        *("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "4", "--save_total_limit", "5"),
        *("--use_cpu", "--report_to", "none", "--warmup_steps", "0"),
    ]
    trainer = example.main([*command_line, "--output_dir", str(directory / "out")])
    return SimpleNamespace(trainer=trainer, command_line=command_line, directory=directory, output=directory / "out")


def test_example_trains_and_ends_with_a_model_for_the_pipeline(run):
    evaluations = [entry for entry in run.trainer.state.log_history if "eval_ap" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6, 6]
    assert run.trainer.state.best_metric == max(entry["eval_ap"] for entry in evaluations)
    names = {category["name"] for category in CATEGORIES[1:3]}
    assert {f"eval_ap_of_{name}" for name in names} <= evaluations[0].keys()
    before = load_file(run.directory / "model" / "model.safetensors")
    after = load_file(run.output / "checkpoint-6" / "model.safetensors")
    heads = [name for name in after if before[name].shape != after[name].shape]
    assert heads
    assert all("class" in name for name in heads)
    assert any("backbone" in name and not torch.equal(before[name], after[name]) for name in after)
    detector = pipeline("object-detection", model=str(run.output), device="cpu")
    assert dict(detector.image_processor.size) == {"shortest_edge": 48, "longest_edge": 64}
    found = detector(Image.new("RGB", (64, 48)), threshold=0.0)
    assert {entry["label"] for entry in found} <= names
    assert found


def test_example_resumes_from_a_checkpoint(example, run, tmp_path):
    checkpoint = run.output / "checkpoint-3"
    resumed = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", str(checkpoint)]
    example.main([*run.command_line, *resumed])
    assert not (tmp_path / "checkpoint-3").exists()
    one, other = (load_file(directory / "checkpoint-6" / "model.safetensors") for directory in (run.output, tmp_path))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_scores_in_the_trainer_are_those_of_our_evaluation(run, tmp_path):
    """On images of which the model knows something: what it finds itself, every other time and a little beside it."""
    model = AutoModelForObjectDetection.from_pretrained(run.output)
    processor = AutoImageProcessor.from_pretrained(run.output)
    plain = load_detection_data(str(run.directory / "data"), "val")
    found = evaluate_detector(model, processor, plain, progress=False).predictions
    data = load_detection_data(str(write_data(tmp_path, found)), "val")
    ours = evaluate_detector(model, processor, data, progress=False)
    assert 0.01 < ours.metrics["ap"] < 0.99
    run.trainer.compute_metrics = TrainerMetrics(data, processor)
    theirs = run.trainer.evaluate(DetectionDataset(data))  # batches of 4 and 2, in which images are padded
    assert {name: theirs[f"eval_{name}"] for name in ours.metrics} == pytest.approx(ours.metrics, abs=1e-9)
    assert {name: theirs[f"eval_ap_of_{name}"] for name in ours.per_class} == pytest.approx(ours.per_class, abs=1e-9)
    run.trainer.compute_metrics = TrainerMetrics(data, processor, max_detections=(1, 2))
    assert run.trainer.evaluate(DetectionDataset(data))["eval_ap"] < theirs["eval_ap"]


def test_what_is_pushed_to_the_hub_is_all_that_is_needed(example, run, tmp_path, monkeypatch):
    pushed = {}

    def upload_folder(*api, repo_id, folder_path, **options):
        pushed[repo_id] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **options: setattr(self, "hub_model_id", "me/detector"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload_folder, raising=False)  # of earlier versions
    push = ["--push_to_hub", "--hub_strategy", "end", "--max_steps", "1", "--output_dir", str(tmp_path)]
    example.main([*run.command_line, *push])
    files = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    assert files | {"modeling_deperceiver_v2.py"} <= pushed["me/detector"]


def test_augmentation_is_another_one_in_each_epoch(run):
    dataset = run.trainer.train_dataset
    assert dataset.epoch == 1
    callback = AugmentationEpochs(dataset)
    for epoch, number in ((None, 0), (1.0, 1), (2 - 1e-9, 2), (2.4, 2)):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        assert dataset.epoch == number


def test_trainer_without_its_arguments_is_refused(run):
    data = load_detection_data(str(run.directory / "data"), "val")
    metrics = TrainerMetrics(data, run.trainer.processing_class)
    with pytest.raises(ValueError, match="TRAINING_ARGUMENTS"):
        metrics(EvalPrediction(predictions=(np.zeros(1),), label_ids=[]))


@pytest.mark.heavy
def test_two_processes_of_the_trainer_score_as_one(run, tmp_path):
    """On six images in batches of four for two processes: two of them are seen twice, and count once."""
    processor = AutoImageProcessor.from_pretrained(run.output)
    plain = load_detection_data(str(run.directory / "data"), "val")
    model = AutoModelForObjectDetection.from_pretrained(run.output)
    found = evaluate_detector(model, processor, plain, progress=False).predictions
    data = str(write_data(tmp_path / "data", found))
    config = ROOT / "examples" / "accelerate" / "several_cpu_processes.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    script = [*launch, str(ROOT / "examples" / "transformers_trainer.py"), *run.command_line]
    options = ["--model", str(run.output), "--dataset", data, "--max_steps", "1", "--learning_rate", "1e-9"]
    done = subprocess.run(
        [*script, *options, "--output_dir", str(tmp_path / "out")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    ours = evaluate_detector(model, processor, load_detection_data(data, "val"), progress=False)
    assert ours.metrics["ap"] > 0.01
    theirs = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert {name: theirs[f"eval_{name}"] for name in ours.metrics} == pytest.approx(ours.metrics, abs=1e-9)


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
    collate = TrainerCollator(processor(size=size), do_resize=True)
    model = make_model(num_labels=len(data.label_names), **fields)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        **TRAINING_ARGUMENTS,
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=2,
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
            *(str(Path(__file__).with_name("trainer_without_package.py")), str(source), str(output)),
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
