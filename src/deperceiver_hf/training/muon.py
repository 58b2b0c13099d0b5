# SPDX-License-Identifier: Apache-2.0
"""Muon for matrices, AdamW for all else, in one optimizer."""

from collections.abc import Callable
from typing import Any

import torch

from ..machine import computes_in_bfloat16

MOMENTUM = 0.95
ITERATIONS = 5
# Of the quintic iteration that brings singular values near 1 (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS_OF_ADAMW = 0.2  # root mean square of an update of AdamW, about, for a learning rate of 1 (arXiv:2502.16982, 2.2)


class MuonAndAdamW(torch.optim.AdamW):
    """AdamW, but for groups with `"muon": True`, whose parameters are matrices.

    These move by the momentum of their gradient (Nesterov's) with all singular values made about 1, scaled so that the
    same learning rate and weight decay fit both. Unlike `torch.optim.Muon`, it computes that in float32 where the
    hardware does not multiply matrices of bfloat16.
    """

    def __init__(self, groups: list[dict[str, Any]], **arguments: Any):
        # Not fused: a GradScaler leaves it to fused optimizers to skip what has overflown.
        super().__init__([{"muon": False, **group} for group in groups], fused=False, **arguments)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        groups: list[dict[str, Any]] = self.param_groups  # type: ignore[has-type]
        for group in groups:
            if group["muon"]:
                self._move_matrices(group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _move_matrices(self, group: dict[str, Any]) -> None:
        for matrix in group["params"]:
            if matrix.grad is None:
                continue
            state = self.state[matrix]
            if not state:
                state["step"] = torch.zeros(())  # which AdamW looks for in every state that it loads
                state["momentum"] = torch.zeros_like(matrix)
            state["step"] += 1
            momentum = state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
            update = orthogonalized(matrix.grad.lerp(momentum, MOMENTUM))
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-group["lr"] * RMS_OF_ADAMW * max(matrix.shape) ** 0.5)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with singular values of about 1 (0.7 to 1.2), by Newton and Schulz' iteration."""
    dtype = torch.bfloat16 if computes_in_bfloat16(matrix.device) else torch.float32
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    result = (wide / wide.norm().clamp(min=1e-7)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = result @ result.T
        result = a * result + (b * square + c * square @ square) @ result
    return (result if wide is matrix else result.T).to(matrix.dtype)
