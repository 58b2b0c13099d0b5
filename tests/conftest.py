# SPDX-License-Identifier: Apache-2.0
"""What several test files share. Nothing here is downloaded: models are tiny and random, data are drawn."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from deperceiver_hf import (
    DePerceiverConfig,
    DePerceiverForObjectDetection,
    DePerceiverV2Config,
    DePerceiverV2ForObjectDetection,
    DePerceiverV2ImageProcessor,
)
from deperceiver_hf.evaluation.evaluator import EvaluationResult
from deperceiver_hf.training import trainer


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this project's tests."""
    parser.addoption("--fuzz", type=int, default=24, help="How many odd inputs to put through the commands.")
    parser.addoption("--kill-everywhere", action="store_true", help="Kill a run at every file operation, not at some.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """As many seeds as `--fuzz` says, for tests that take one."""
    if "fuzz_seed" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_seed", range(metafunc.config.getoption("--fuzz")))


def tiny_config(**overrides) -> DePerceiverConfig:
    """A model of a fraction of a second: every part is there, every size is small and different."""
    fields = {
        "backbone": "test_resnet",
        "feature_strides": [16],
        "num_latents": 12,
        "d_latents": 24,
        "d_model": 20,
        "num_blocks": 2,
        "num_self_attends_per_block": 3,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 2,
        "num_queries": 7,
        "num_labels": 5,
    }
    return DePerceiverConfig(**{**fields, **overrides})


def tiny_model(**overrides) -> DePerceiverForObjectDetection:
    """A model of [`tiny_config`], the same at every call, in evaluation mode."""
    torch.manual_seed(0)
    return DePerceiverForObjectDetection(tiny_config(**overrides)).eval()


def tiny_v2_config(**overrides) -> DePerceiverV2Config:
    """The same for the second architecture."""
    fields = {
        "backbone": "test_resnet",
        "feature_strides": [8, 16],
        "fusion_dim": 16,
        "d_model": 24,
        "num_attention_heads": 2,
        "num_queries": 9,
        "decoder_layers": 2,
        "widening_factor": 2,
        "num_denoising_queries": 12,
        "num_labels": 5,
    }
    return DePerceiverV2Config(**{**fields, **overrides})


def tiny_v2_model(**overrides) -> DePerceiverV2ForObjectDetection:
    """A model of [`tiny_v2_config`], the same at every call, in evaluation mode, and as if it had been trained: what
    is zero in a new model, and would hide mistakes, is not."""
    torch.manual_seed(0)
    model = DePerceiverV2ForObjectDetection(tiny_v2_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="session")
def cat_and_dog(tmp_path_factory) -> Path:
    """Directory of a saved v2 model of two classes and its image processor. Copy it before changing it."""
    directory = tmp_path_factory.mktemp("models") / "saved"
    names = {0: "cat", 1: "dog"}
    label2id = {name: label for label, name in names.items()}
    torch.manual_seed(0)
    model = DePerceiverV2ForObjectDetection(tiny_v2_config(num_labels=2, id2label=names, label2id=label2id))
    model.save_pretrained(directory)
    DePerceiverV2ImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(directory)
    return directory


@pytest.fixture
def images() -> torch.Tensor:
    """Two images (2, 3, 64, 96)."""
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> list[dict[str, torch.Tensor]]:
    """Three objects in the first image, none in the second."""
    boxes = [[0.5, 0.5, 0.2, 0.4], [0.2, 0.3, 0.1, 0.1], [0.7, 0.6, 0.5, 0.3]]
    return [
        {"class_labels": torch.tensor([0, 4, 2]), "boxes": torch.tensor(boxes)},
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]


@pytest.fixture(autouse=True)
def forget_accelerator():
    """What a test's accelerator was set to, its precision above all, must not reach the next test's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()


@pytest.fixture
def scripted_ap(monkeypatch):
    """Evaluations that find the APs given instead of looking."""

    def script(*values: float) -> None:
        remaining = iter(values)

        def evaluate(*args, **kwargs) -> EvaluationResult:
            return EvaluationResult({"ap": next(remaining)}, {}, [], num_images=1, seconds=0.0)

        monkeypatch.setattr(trainer, "evaluate_detector", evaluate)

    return script
