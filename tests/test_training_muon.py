# SPDX-License-Identifier: Apache-2.0
"""Muon beside AdamW: what each of them moves, and how far."""

import pytest
import torch

from deperceiver_hf.training import DetectionTrainer, muon
from deperceiver_hf.training.muon import MuonAndAdamW, orthogonalized
from deperceiver_hf.training.optimization import hidden_matrices
from training_runs import (
    TINY_ARCHITECTURES,
    assert_equal_weights,
    read_log,
    tiny_options,
    train_until_killed,
    weights_of,
)

V2 = TINY_ARCHITECTURES["deperceiver_v2"]


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(muon, "computes_in_bfloat16", lambda device: False)


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_singular_values_become_about_one(monkeypatch, shape, bfloat16):
    monkeypatch.setattr(muon, "computes_in_bfloat16", lambda device: bfloat16)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = torch.linalg.svdvals(orthogonalized(matrix))
    assert found.min() > 0.3
    assert found.max() < 1.3
    # Its directions are the matrix's.
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert (left.T @ orthogonalized(matrix) @ right.T).diag().min() > 0.3
    assert orthogonalized(torch.zeros(shape)).isfinite().all()


def test_matrices_move_as_those_of_torch_and_the_rest_as_by_adamw(in_float32):
    """Where torch computes in bfloat16, up to its rounding."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 10, generator=generator), torch.randn(10, generator=generator)]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    optimizer = MuonAndAdamW([{"params": ours[:1], "muon": True}, {"params": ours[1:]}], lr=0.1, weight_decay=0.02)
    references = [
        torch.optim.Muon(theirs[:1], lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[1:], lr=0.1, weight_decay=0.02),
    ]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for each in (optimizer, *references):
            each.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0.004)
    assert (ours[0] - weights[0]).abs().mean() > 0.02
    assert torch.equal(ours[1], theirs[1])


def test_killed_and_resumed_a_run_with_muon_is_the_same(tmp_path, monkeypatch):
    options = {"model": V2, "optimizer": "muon", "checkpointing_steps": 2, "dropout": 0.1, "max_steps": 4}
    straight = DetectionTrainer(tiny_options(tmp_path / "straight", **options))
    assert len(straight.optimizer.param_groups) == 3  # the backbone has no linear layer
    straight.train()
    train_until_killed(tmp_path / "resumed", monkeypatch, 3, **options)
    resumed = DetectionTrainer(tiny_options(tmp_path / "resumed", **options, resume="auto"))
    resumed.train()
    assert_equal_weights(weights_of(straight), weights_of(resumed))
    lines = read_log(tmp_path / "resumed", "train")
    assert lines == read_log(tmp_path / "straight", "train")
    assert {"lr", "lr_backbone"} <= lines[0].keys()


def test_layers_that_give_scores_and_boxes_are_no_hidden_matrices(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, V2, optimizer="muon"))
    model = run.accelerator.unwrap_model(run.model)
    matrices = hidden_matrices(model)
    outputs = {4, model.config.num_labels}
    assert len(matrices) > 10
    assert {model.get_parameter(name).dim() for name in matrices} == {2}
    assert not {model.get_parameter(name).shape[0] for name in matrices} & outputs
