# SPDX-License-Identifier: Apache-2.0
"""Optimizer and learning rate of a training run, counted in optimizer steps."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ..errors import UserError
from .arguments import DEFAULT_DECAY_FRACTION, TrainingOptions
from .building import backbone_parameters
from .muon import MuonAndAdamW

DEFAULT_LR_DROP = 33


def create_optimizer(model: PreTrainedModel, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW with a group "model" and, unless all of it is frozen, a group "backbone" of its own learning rate; with
    `muon`, each has a second group of its matrices (see `hidden_matrices`).

    Raises:
        ValueError: The model has no parameter to train.
    """
    backbone = backbone_parameters(model)
    matrices = hidden_matrices(model) if options.optimizer == "muon" else set()
    groups = [
        {
            "name": "backbone" if in_backbone else "model",
            "lr": options.lr_backbone if in_backbone else options.lr,
            "muon": muon,
            "params": [
                p
                for name, p in model.named_parameters()
                if p.requires_grad and (name in backbone, name in matrices) == (in_backbone, muon)
            ],
        }
        for in_backbone in (False, True)
        for muon in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("every parameter of the model is frozen: there is nothing to train.")
    shared = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer == "muon":
        return MuonAndAdamW(groups, **shared)
    for group in groups:
        del group["muon"]
    return torch.optim.AdamW(groups, fused=True, **shared)


def hidden_matrices(model: PreTrainedModel) -> set[str]:
    """Names of the weights of linear layers between others: of those whose outputs are scores or boxes none."""
    outputs = (4, model.config.num_labels, model.config.num_labels + 1)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features not in outputs
    }


def create_scheduler(
    optimizer: torch.optim.Optimizer,
    options: TrainingOptions,
    steps_per_epoch: int,
    total_steps: int,
    time_used: Callable[[], float] = lambda: 0.0,
    early_decay: Callable[[], tuple[int, int] | None] = lambda: None,
) -> LambdaLR:
    """Learning rate for each optimizer step; call `.step()` after each.

    `step` multiplies the rate by 0.1 at the beginning of every `lr_drop`-th epoch (torch's `StepLR` with its epochs
    written in steps). `linear`, `cosine` (both as in transformers) and `wsd` (warm-up, stable, decay; Hu et al. 2024,
    arXiv:2404.06395, with a linear decay) are 0 at the end, which comes by steps or by time, whichever is nearer. A
    warm-up rises linearly from 0, and counts into all of them.

    Args:
        time_used: Gives the part of the time allowed that is over, in [0, 1]; the same on all processes.
        early_decay: Gives first and last step of a decay of `wsd` that begins before its time, if one does.
    """
    warmup = options.warmup_steps
    steps_per_drop = steps_per_epoch * (options.lr_drop or DEFAULT_LR_DROP)
    decay_steps = total_steps * (options.decay_fraction or DEFAULT_DECAY_FRACTION)
    falling_steps = max(1, total_steps - warmup)

    def factor(step: int) -> float:
        warm = step / warmup if step < warmup else 1.0
        left = max(0.0, total_steps - max(step, total_steps * time_used()))  # steps, as if time passed in them
        match options.lr_scheduler:
            case "step":
                return warm * 0.1 ** (step // steps_per_drop)
            case "linear":
                return warm * min(1.0, left / falling_steps)
            case "cosine":
                return warm * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left / falling_steps)))
            case "wsd":
                start, end = early_decay() or (0, 0)
                early = 1.0 if end == 0 else max(0, end - step) / (end - start)
                return warm * min(1.0, left / decay_steps, early)
        return warm

    return LambdaLR(optimizer, factor)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rates in effect for the next step: `lr`, and `lr_backbone` if the backbone is trained."""
    names = {"model": "lr", "backbone": "lr_backbone"}
    return {names[group["name"]]: group["lr"] for group in optimizer.param_groups}
