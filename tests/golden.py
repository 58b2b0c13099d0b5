# SPDX-License-Identifier: Apache-2.0
"""The authors' outputs in `tests/fixtures/`, and the weights, inputs and targets that they belong to.

The weights are drawn from generators seeded by their names, so that no checkpoint has to be kept.
"""

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN_NAMES = ("stride32", "stride16", "stride8", "multiscale", "stride32_aux")


def golden_weight(name: str, shape: list[int]) -> torch.Tensor:
    """The weight of this name in every golden model."""
    leaf, *_ = name.rsplit(".", 1)[::-1]
    parent = name.rsplit(".", 2)[-2] if name.count(".") >= 1 else ""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if leaf == "running_var":
        x = 1 + 0.1 * np.abs(x)
    elif leaf in ("running_mean", "bias"):
        x = 0.1 * x
    elif leaf == "weight" and x.ndim == 1:
        x = (0.2 if ".bn3." in name else 1.0) * (1 + 0.1 * x)
    elif leaf == "weight" and x.ndim == 4:
        x = x * np.sqrt(2 / np.prod(shape[1:]))
    elif leaf == "weight" and x.ndim == 2 and "embed" not in parent:
        x = x / np.sqrt(shape[1])
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


@cache
def golden_record(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The JSON part and the arrays of a golden record."""
    record = json.loads((FIXTURES / f"{name}.json").read_text())
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return record, dict(arrays)


def golden_state_dict(name: str) -> dict[str, torch.Tensor]:
    """A state dict as the authors' code saves it."""
    record, _ = golden_record(name)
    shapes = record["state_dict"]
    state_dict = {key: golden_weight(key, shape) for key, shape in shapes.items() if not key.startswith("criterion.")}
    empty_weight = torch.ones(shapes["criterion.empty_weight"])
    empty_weight[-1] = record["args"]["eos_coef"]
    return {**state_dict, "criterion.empty_weight": empty_weight}


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """`pixel_values` (2, 3, 192, 213) and `pixel_mask` (2, 192, 213) of two padded images."""
    rng = np.random.default_rng(20211210)
    pixel_values, pixel_mask = torch.zeros(2, 3, 192, 213), torch.zeros(2, 192, 213, dtype=torch.long)
    for index, (height, width) in enumerate(((150, 213), (192, 160))):
        image = rng.standard_normal((3, height, width)).astype(np.float32)
        pixel_values[index, :, :height, :width] = torch.from_numpy(image)
        pixel_mask[index, :height, :width] = 1
    return pixel_values, pixel_mask


def golden_targets() -> list[dict[str, torch.Tensor]]:
    """Targets of the two images."""
    boxes = [[0.5, 0.5, 0.2, 0.3], [0.25, 0.3, 0.1, 0.1], [0.7, 0.8, 0.4, 0.2], [0.1, 0.9, 0.05, 0.04]]
    return [
        {"class_labels": torch.tensor([1, 17, 90, 3]), "boxes": torch.tensor(boxes)},
        {"class_labels": torch.tensor([44]), "boxes": torch.tensor([[0.4, 0.6, 0.5, 0.5]])},
    ]
