# SPDX-License-Identifier: Apache-2.0
"""Training in shards (FSDP2), by two processes on the CPU that `accelerate launch` starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from deperceiver_hf.data import load_detection_data
from deperceiver_hf.evaluation import evaluate_detector
from deperceiver_hf.training import DetectionTrainer
from training_runs import TINY_ARCHITECTURES, read_log, tiny_options, train_until_killed

CONFIG = Path(__file__).parents[1] / "examples" / "accelerate" / "fsdp2.yaml"
RUN = {
    "batch_size": 1,
    "gradient_accumulation_steps": 2,
    "eval_every": 1,
    "ema_decay": 0.9,
    "checkpointing_steps": 2,
    "lr_scheduler": "linear",
}


def run_options(output_dir: Path, **options):
    return tiny_options(output_dir, TINY_ARCHITECTURES["deperceiver_v2"], **{**RUN, **options})


def work(directory: Path) -> None:
    """What each of the two processes does."""
    DetectionTrainer(run_options(directory / "sharded")).train()
    with pytest.MonkeyPatch.context() as patch:
        train_until_killed(directory / "resumed", patch, 4, model=TINY_ARCHITECTURES["deperceiver_v2"], **RUN)
    resumed = DetectionTrainer(run_options(directory / "resumed", resume="auto"))
    index = resumed.accelerator.process_index
    shares = [parameter.to_local().numel() / parameter.numel() for parameter in resumed.parameters]
    states = [value.to_local().numel() for state in resumed.optimizer.state.values() for value in [state["exp_avg"]]]
    resumed.train()
    facts = {"step": resumed.progress.step, "state": sum(states), "share": sum(shares) / len(shares)}
    (directory / f"facts-{index}.json").write_text(json.dumps(facts))
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    DetectionTrainer(run_options(directory / "whole")).train()
    try:
        DetectionTrainer(run_options(directory / "sharded", resume="auto"))
    except ValueError as error:
        (directory / f"refusal-{index}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Directory of a run in shards, of one that was killed and resumed, and of one without shards."""
    directory = tmp_path_factory.mktemp("sharded")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG, "--num_processes", "2"]
    launched = subprocess.run(
        [*launcher, __file__, directory],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr
    return directory


pytestmark = pytest.mark.heavy


def test_shards_train_as_whole_models_do(runs):
    whole, sharded = (read_log(runs / name, "train") for name in ("whole", "sharded"))
    assert len(whole) == len(sharded) == 6
    for ours, theirs in zip(sharded, whole, strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_killed_run_in_shards_goes_on_as_if_it_had_not_been(runs):
    files = ["last/model.safetensors", "best/model.safetensors"]
    for name in files:
        assert (runs / "resumed" / name).read_bytes() == (runs / "sharded" / name).read_bytes()
    for kind in ("train", "eval"):
        assert read_log(runs / "resumed", kind) == read_log(runs / "sharded", kind)
    states = [{path.name for path in (runs / name).glob("state-*/*")} for name in ("resumed", "sharded")]
    assert states[0] == states[1]
    assert {"shards_0.safetensors", "shards_1.safetensors", "average.safetensors"} <= states[0]


def test_each_process_holds_its_share_of_weights_and_optimizer(runs):
    facts = [json.loads((runs / f"facts-{index}.json").read_text()) for index in range(2)]
    saved = load_file(runs / "sharded" / "last" / "model.safetensors")
    assert sum(fact["share"] for fact in facts) == pytest.approx(1)
    assert 0.4 < facts[1]["share"] < 0.5 < facts[0]["share"] < 0.6
    states = [fact["state"] for fact in facts]
    assert 0 < states[1] < states[0] < 0.6 * sum(tensor.numel() for tensor in saved.values())


def test_model_of_a_run_in_shards_is_whole_and_was_evaluated(runs):
    best = runs / "sharded" / "best"
    model = AutoModelForObjectDetection.from_pretrained(best)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    data = load_detection_data("synthetic", "val", max_samples=3)
    result = evaluate_detector(model, AutoImageProcessor.from_pretrained(best), data, progress=False)
    logged = json.loads((best / "metrics.json").read_text())
    assert {name: logged[name] for name in result.metrics} == result.metrics


def test_run_in_shards_is_not_resumed_without(runs):
    refusals = [(runs / f"refusal-{index}.txt").read_text() for index in range(2)]
    assert "sharding was 'FSDP2' and is None" in refusals[0]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
