# SPDX-License-Identifier: Apache-2.0
"""Optimizer and learning rate of a training run, counted in optimizer steps."""

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from .arguments import TrainingOptions
from .building import backbone_parameters

DEFAULT_LR_DROP = 33


def create_optimizer(model: PreTrainedModel, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW with a group "model" and, unless all of it is frozen, a group "backbone" of its own learning rate.

    Raises:
        ValueError: The model has no parameter to train.
    """
    backbone = backbone_parameters(model)
    groups = [
        {
            "name": "model",
            "params": [p for name, p in model.named_parameters() if p.requires_grad and name not in backbone],
            "lr": options.lr,
        },
        {"name": "backbone", "params": [p for p in backbone.values() if p.requires_grad], "lr": options.lr_backbone},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("every parameter of the model is frozen: there is nothing to train.")
    return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)


def create_scheduler(
    optimizer: torch.optim.Optimizer, options: TrainingOptions, steps_per_epoch: int, total_steps: int
) -> LambdaLR:
    """Learning rate for each optimizer step; call `.step()` after each.

    `step` multiplies the rate by 0.1 at the beginning of every `lr_drop`-th epoch (torch's `StepLR` with its epochs
    written in steps); the others are those of transformers. A warm-up rises linearly from 0, and counts into both.
    """
    if options.lr_scheduler != "step":
        name = "constant_with_warmup" if options.lr_scheduler == "constant" else options.lr_scheduler
        return get_scheduler(name, optimizer, num_warmup_steps=options.warmup_steps, num_training_steps=total_steps)
    steps_per_drop = steps_per_epoch * (options.lr_drop or DEFAULT_LR_DROP)

    def factor(step: int) -> float:
        warm = min(1.0, step / options.warmup_steps) if options.warmup_steps else 1.0
        return warm * 0.1 ** (step // steps_per_drop)

    return LambdaLR(optimizer, factor)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rates in effect for the next step: `lr`, and `lr_backbone` if the backbone is trained."""
    names = {"model": "lr", "backbone": "lr_backbone"}
    return {names[group["name"]]: group["lr"] for group in optimizer.param_groups}
