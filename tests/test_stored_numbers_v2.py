# SPDX-License-Identifier: Apache-2.0
"""The second architecture computes today what it computed when `tests/fixtures/numbers_v2.json` was written.

Every size of the first edition, and the second edition in one, with weights that follow from the names of the
parameters (see `golden`), on a small image and a padded smaller one that has fewer tokens than the model has queries:
predictions, loss, each of its terms, and the norm of the gradient of each part, with denoising queries.

Whoever changes the mathematics of the model on purpose writes the numbers anew:

    python tests/test_stored_numbers_v2.py --write
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from deperceiver_hf import DePerceiverV2Config, DePerceiverV2ForObjectDetection
from deperceiver_hf.models.configuration_deperceiver_v2 import FIRST_EDITION
from golden import FIXTURES, golden_weight

NUMBERS_FILE = FIXTURES / "numbers_v2.json"
FIELDS = {"num_labels": 5, "num_queries": 32, "num_denoising_queries": 30}
FIRST = {**FIRST_EDITION, "min_token_share": 1.0}
SIZES = {size: FIRST for size in ("nano", "small", "base", "large")} | {"small, second edition": {}}
NUM_SAMPLES = 16
# CPUs differ in the order in which their kernels add. Other kernels on one CPU (no oneDNN, eager attention) move
# logits by up to 9e-6 of the largest, terms of the loss by 3e-6 and norms of gradients by 2e-5 of themselves.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 3e-5, 1e-4

Numbers = dict[str, float | list[float] | dict[str, float]]


def stored_model(size: str, **overrides) -> DePerceiverV2ForObjectDetection:
    """A model of a size in training mode. No weight depends on the order in which the parameters are made."""
    fields = {**FIELDS, **SIZES[size], **overrides}
    model = DePerceiverV2ForObjectDetection(DePerceiverV2Config.from_preset(size.partition(",")[0], **fields))
    state = model.state_dict()
    model.load_state_dict({name: golden_weight(name, list(tensor.shape)) for name, tensor in state.items()})
    return model.train()


def stored_inputs() -> dict[str, torch.Tensor | list[dict[str, torch.Tensor]]]:
    """`pixel_values` (2, 3, 96, 128) of an image of that size and one of 14 x 20 pixels, `pixel_mask`, and `labels` of
    four objects and one."""
    random = np.random.default_rng(20260101)
    pixel_values, pixel_mask = torch.zeros(2, 3, 96, 128), torch.zeros(2, 96, 128)
    for image, (height, width) in enumerate(((96, 128), (14, 20))):
        pixels = random.standard_normal((3, height, width)).astype(np.float32)
        pixel_values[image, :, :height, :width] = torch.from_numpy(pixels)
        pixel_mask[image, :height, :width] = 1
    boxes = [[0.5, 0.5, 0.2, 0.4], [0.2, 0.3, 0.1, 0.1], [0.7, 0.6, 0.5, 0.3], [0.9, 0.1, 0.05, 0.06]]
    labels = [
        {"class_labels": torch.tensor([0, 4, 2, 2]), "boxes": torch.tensor(boxes)},
        {"class_labels": torch.tensor([3]), "boxes": torch.tensor([[0.4, 0.6, 0.5, 0.5]])},
    ]
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}


def part_of(parameter_name: str) -> str:
    """What a parameter is summed up under: `class_labels_classifiers.0`, `model.backbone`, `model.layers.2`, ..."""
    names = parameter_name.split(".")
    return ".".join(names[: 3 if names[2].isdecimal() else 2])


def summary(values: torch.Tensor) -> list[float]:
    """Mean, root of the mean square and evenly spread samples of an array."""
    values = values.detach().double().flatten()
    samples = values[torch.linspace(0, len(values) - 1, NUM_SAMPLES).long()]
    return [values.mean().item(), values.square().mean().sqrt().item(), *samples.tolist()]


def compute_numbers(size: str) -> Numbers:
    """What is stored of one training step of a size."""
    model = stored_model(size)
    torch.manual_seed(0)  # of the noise of the denoising queries
    outputs = model(**stored_inputs())
    outputs.loss.backward()
    is_query = outputs.query_mask.bool()
    assert is_query.sum(1)[0] > is_query.sum(1)[1]  # the second image has padding queries, which predict nothing
    squares = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = part_of(name)
            squares[part] = squares.get(part, 0.0) + parameter.grad.double().square().sum().item()
    return {
        "logits": summary(outputs.logits[is_query]),
        "boxes": summary(outputs.pred_boxes[is_query]),
        "selection_logits": summary(outputs.selection_logits[is_query]),
        "loss": outputs.loss.item(),
        "loss_dict": {name: value.item() for name, value in outputs.loss_dict.items()},
        "gradient_norms": {part: math.sqrt(square) for part, square in squares.items()},
    }


@pytest.mark.parametrize("size", SIZES)
def test_numbers_are_the_stored_ones(size):
    expected = json.loads(NUMBERS_FILE.read_text())[size]
    found = compute_numbers(size)
    assert found.keys() == expected.keys()
    for name in ("logits", "boxes", "selection_logits"):
        slack = OUTPUT_TOLERANCE * max(map(abs, expected[name]))
        assert found[name] == pytest.approx(expected[name], rel=OUTPUT_TOLERANCE, abs=slack), name
    assert found["loss"] == pytest.approx(expected["loss"], rel=OUTPUT_TOLERANCE)
    assert found["loss_dict"] == pytest.approx(expected["loss_dict"], rel=OUTPUT_TOLERANCE)
    assert found["gradient_norms"] == pytest.approx(expected["gradient_norms"], rel=GRADIENT_TOLERANCE)


def test_a_saved_configuration_of_the_first_edition_means_what_it_meant(tmp_path):
    """One that does not say what there was no choice of yet, and the same after it is saved again."""
    (tmp_path / "config.json").write_bytes((FIXTURES / "config_v2_first_edition.json").read_bytes())
    for source in (tmp_path, tmp_path / "again"):
        config = AutoConfig.from_pretrained(source)
        assert {name: getattr(config, name) for name in FIRST_EDITION} == FIRST_EDITION
        config.save_pretrained(tmp_path / "again")
    DePerceiverV2Config().save_pretrained(tmp_path / "second")
    second = AutoConfig.from_pretrained(tmp_path / "second")
    assert all(getattr(second, name) != value for name, value in FIRST_EDITION.items())


def write_numbers(path: Path = NUMBERS_FILE) -> None:
    """Store the numbers of every size, with as many digits as float32 has."""

    def rounded(value):
        if isinstance(value, dict):
            return {name: rounded(entry) for name, entry in value.items()}
        return [rounded(entry) for entry in value] if isinstance(value, list) else float(f"{value:.9g}")

    numbers = {size: rounded(compute_numbers(size)) for size in SIZES}
    path.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the stored numbers by today's")
    if parser.parse_args().write:
        write_numbers()
