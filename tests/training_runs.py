# SPDX-License-Identifier: Apache-2.0
"""Tiny training runs that several test files make."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deperceiver_hf.training import DetectionTrainer, TrainingOptions

TINY_DEPERCEIVER = {
    "architecture": "deperceiver",
    "backbone": "test_resnet",
    "no_pretrained_backbone": True,
    "num_latents": 8,
    "enc_blocks": 1,
    "enc_layers_per_block": 1,
    "hidden_dim": 16,
    "nheads": 2,
    "num_queries": 12,
}
TINY_DETR = {
    "architecture": "detr",
    "backbone": "test_resnet",
    "no_pretrained_backbone": True,
    "enc_layers": 1,
    "dec_layers": 3,
    "dim_feedforward": 16,
    "hidden_dim": 16,
    "nheads": 2,
    "num_queries": 12,
}
_TINY_RIVAL = {
    "backbone": "test_resnet",
    "no_pretrained_backbone": True,
    "dec_layers": 2,
    "hidden_dim": 16,
    "nheads": 2,
    "num_queries": 12,
}
TINY_ARCHITECTURES = {
    "deperceiver": TINY_DEPERCEIVER,
    "deperceiver_v2": {**_TINY_RIVAL, "architecture": "deperceiver_v2", "preset": "nano"},
    "detr": TINY_DETR,
    "deformable_detr": {**_TINY_RIVAL, "architecture": "deformable_detr", "enc_layers": 1, "hidden_dim": 64},
    "rt_detr_v2": {**_TINY_RIVAL, "architecture": "rt_detr_v2"},
    "d_fine": {**_TINY_RIVAL, "architecture": "d_fine"},
    "deimv2": {**_TINY_RIVAL, "architecture": "deimv2"},
    "lw_detr": {**_TINY_RIVAL, "architecture": "lw_detr", "backbone": "test_vit"},
    "rf_detr": {**_TINY_RIVAL, "architecture": "rf_detr", "backbone": "test_vit"},
}


def tiny_options(output_dir: Path, model: dict[str, Any] = TINY_DEPERCEIVER, **options: Any) -> TrainingOptions:
    """Two epochs of six steps on synthetic scenes, without evaluation."""
    defaults = {
        "output_dir": str(output_dir),
        "shortest_edge": 64,
        "max_train_samples": 12,
        "max_eval_samples": 3,
        "num_workers": 0,
        "epochs": 2,
        "eval_every": 0,
        "log_every": 1,
        "pictures": 0,
        "lr": 1e-3,
    }
    # The same numbers whatever the machine is fast in.
    if not options.keys() & {"amp", "use_bfloat"}:
        defaults["mixed_precision"] = "no"
    defaults["attn_implementation"] = "sdpa"
    return TrainingOptions(**{**defaults, **model, **options})


def read_log(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind in a run's log, without what depends on the clock."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second")
    return [{key: line[key] for key in line if key not in clock} for line in lines if line["kind"] == kind]


def weights_of(run: DetectionTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def assert_equal_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def stop_at(monkeypatch, step: int, action) -> None:
    """Let `action` happen when `step` optimizer steps have been done and the next one begins."""
    original = DetectionTrainer.optimizer_step

    def step_or_stop(self, batches, count):
        if self.progress.step == step:
            action()
        return original(self, batches, count)

    monkeypatch.setattr(DetectionTrainer, "optimizer_step", step_or_stop)


def kill() -> None:
    raise RuntimeError("killed")


def train_until_killed(output_dir: Path, monkeypatch, step: int, **options) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step, kill)
        run = DetectionTrainer(tiny_options(output_dir, **options))
        with pytest.raises(RuntimeError, match="killed"):
            run.train()
