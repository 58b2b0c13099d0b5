# SPDX-License-Identifier: Apache-2.0
"""Training by two processes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from deperceiver_hf.data import load_detection_data
from deperceiver_hf.evaluation.evaluator import evaluate_detector
from deperceiver_hf.training import DetectionTrainer, NonFiniteLossError, pace
from deperceiver_hf.training.optimization import learning_rates
from training_runs import TINY_DEPERCEIVER, read_log, tiny_options

# Images of one size, so that none is padded, and nothing that is random or depends on the rest of the batch.
RUN = {
    "no_aux_loss": True,
    "augmentation": "none",
    "eval_every": 1,
    "checkpointing_steps": 2,
    "max_train_samples": 8,
}


def run_options(output_dir: Path, **options):
    weights = output_dir.parent / "weights.safetensors"
    model = {**TINY_DEPERCEIVER, "no_pretrained_backbone": False, "pretrained_backbone": str(weights)}
    return tiny_options(output_dir, model, **{**RUN, "batch_size": 1, **options})


def work(directory: Path) -> None:
    """What each of the two processes does."""
    broken = DetectionTrainer(run_options(directory / "broken"))
    if broken.accelerator.process_index == 1:  # the other process sees nothing wrong with its own loss
        forward = broken.model.forward

        def forward_then_break(pixel_values, **inputs):
            return forward(pixel_values * (float("nan") if broken.progress.step == 2 else 1), **inputs)

        broken.model.forward = forward_then_break
    try:
        broken.train()
    except NonFiniteLossError as error:
        (directory / f"error-{broken.accelerator.process_index}.txt").write_text(str(error))
    DetectionTrainer(run_options(directory / "run")).train()
    scratch = DetectionTrainer(tiny_options(directory / "scratch", eval_every=1, max_steps=2))
    scratch.train()
    save_file(
        scratch.model.module.state_dict(), directory / f"scratch-{scratch.accelerator.process_index}.safetensors"
    )
    if scratch.accelerator.process_index == 1:
        pace.time = SimpleNamespace(perf_counter=lambda: 0.0)  # its clock stands still
    timed = DetectionTrainer(
        run_options(directory / "timed", epochs=1000, max_minutes=0.01, lr_scheduler="linear", eval_every=0)
    )
    timed.train()
    outcome = [timed.progress.step, learning_rates(timed.optimizer)]
    (directory / f"timed-{scratch.accelerator.process_index}.json").write_text(json.dumps(outcome))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Directory of a finished run of two processes, and of one in which a process met a loss that is not finite."""
    directory = tmp_path_factory.mktemp("distributed")
    save_file(timm.create_model("test_resnet", features_only=True).state_dict(), directory / "weights.safetensors")
    launched = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, directory],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    try:
        assert launched.wait(timeout=600) == 0
    finally:  # if the processes wait for each other for ever, the launcher ends them
        launched.terminate()
        launched.wait()
    AcceleratorState._reset_state(reset_partial_state=True)
    return directory


def test_two_processes_see_the_batch_of_one(two_processes, tmp_path):
    (tmp_path / "weights.safetensors").symlink_to(two_processes / "weights.safetensors")
    DetectionTrainer(run_options(tmp_path / "joint", batch_size=2, max_steps=1)).train()
    joint, split = read_log(tmp_path / "joint", "train"), read_log(two_processes / "run", "train")
    assert len(split) == 2 * 4  # epochs x steps
    for term in ("loss_bbox", "loss_giou"):  # the class loss is a weighted mean of each process
        assert split[0][term] == pytest.approx(joint[0][term], rel=1e-4)


def test_metrics_of_two_processes_are_those_of_the_saved_model(two_processes):
    best = two_processes / "run" / "best"
    model = AutoModelForObjectDetection.from_pretrained(best)
    data = load_detection_data("synthetic", "val", max_samples=3)
    result = evaluate_detector(model, AutoImageProcessor.from_pretrained(best), data)
    logged = json.loads((best / "metrics.json").read_text())
    assert {name: logged[name] for name in result.metrics} == result.metrics
    assert len(list((two_processes / "run").glob("state-*/random_states_*.pkl"))) == 2


def test_all_processes_stop_when_the_loss_of_one_is_not_finite(two_processes):
    reports = [(two_processes / f"error-{index}.txt").read_text() for index in range(2)]
    assert reports[0] == reports[1]
    assert "at step 3" in reports[0]
    assert "process 1: matching needs finite numbers" in reports[0]
    assert [path.name for path in (two_processes / "broken").glob("state-*")] == ["state-00000002-0000"]


def test_processes_evaluate_the_model_that_is_saved(two_processes):
    saved = load_file(two_processes / "scratch" / "best" / "model.safetensors")
    assert any("running_mean" in name for name in saved)
    for index in range(2):
        held = load_file(two_processes / f"scratch-{index}.safetensors")
        assert held.keys() == saved.keys()
        assert [name for name in saved if not torch.equal(saved[name], held[name])] == []


def test_processes_go_by_one_clock(two_processes):
    outcomes = [json.loads((two_processes / f"timed-{index}.json").read_text()) for index in range(2)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == {"lr": 0, "lr_backbone": 0}


def test_another_number_of_processes_cannot_resume(two_processes):
    with pytest.raises(ValueError, match="processes was 2 and is 1"):
        DetectionTrainer(run_options(two_processes / "run", resume="auto"))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
