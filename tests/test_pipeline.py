# SPDX-License-Identifier: Apache-2.0
"""Saved models in the hands of transformers: the Auto classes, `pipeline`, the Hub, with this package and without."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING
from transformers.testing_utils import CaptureLogger
from transformers.utils import hub
from transformers.utils.logging import get_logger

from deperceiver_hf import (
    DePerceiverConfig,
    DePerceiverForObjectDetection,
    DePerceiverImageProcessor,
    DePerceiverImageProcessorPil,
    DePerceiverModel,
)

MODEL_FILES = {
    "config.json",
    "model.safetensors",
    "configuration_deperceiver.py",
    "modeling_deperceiver.py",
    "tokens_deperceiver.py",
    "layers_deperceiver.py",
    "loss_deperceiver.py",
}
PROCESSOR_FILES = {
    "preprocessor_config.json",
    "image_processing_deperceiver.py",
    "image_processing_pil_deperceiver.py",
}


def tiny_model() -> DePerceiverForObjectDetection:
    torch.manual_seed(0)
    config = DePerceiverConfig(
        backbone="resnet18",
        num_latents=6,
        d_latents=32,
        d_model=32,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_queries=5,
        id2label={0: "cat", 1: "dog"},
    )
    return DePerceiverForObjectDetection(config).eval()


def tiny_processor(backend: type = DePerceiverImageProcessor):
    return backend(size={"shortest_edge": 48, "longest_edge": 80})


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory with a model and its processor, as a user would push it to the Hub."""
    directory = tmp_path_factory.mktemp("saved") / "tiny-deperceiver"
    tiny_model().save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    picture(60, 90).save(path)
    return path


def test_saved_directory_holds_the_code_of_model_and_processor(saved):
    assert {path.name for path in saved.iterdir()} == MODEL_FILES | PROCESSOR_FILES


def test_auto_classes_restore_model_and_processor(saved):
    assert type(AutoConfig.from_pretrained(saved)) is DePerceiverConfig
    assert type(AutoImageProcessor.from_pretrained(saved)) is DePerceiverImageProcessor
    assert type(AutoImageProcessor.from_pretrained(saved, backend="pil")) is DePerceiverImageProcessorPil
    assert type(AutoModel.from_pretrained(saved)) is DePerceiverModel
    model = AutoModelForObjectDetection.from_pretrained(saved)
    assert type(model) is DePerceiverForObjectDetection
    assert model.config.id2label == {0: "cat", 1: "dog"}
    weights = tiny_model().state_dict()
    restored = model.state_dict()
    assert restored.keys() == weights.keys()
    assert all(torch.equal(restored[name], weights[name]) for name in weights)


def test_auto_classes_make_a_model_from_a_config():
    assert type(AutoModelForObjectDetection.from_config(tiny_model().config)) is DePerceiverForObjectDetection
    assert DePerceiverForObjectDetection in MODEL_FOR_OBJECT_DETECTION_MAPPING.values()


@pytest.mark.parametrize("backend", [DePerceiverImageProcessor, DePerceiverImageProcessorPil])
def test_processor_code_is_saved_by_either_backend(backend, tmp_path):
    tiny_processor(backend).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == PROCESSOR_FILES
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"]["AutoImageProcessor"] == [
        "image_processing_pil_deperceiver.DePerceiverImageProcessorPil",
        "image_processing_deperceiver.DePerceiverImageProcessor",
    ]


def test_pipeline_detects_in_pixels_of_the_image_and_does_not_complain(saved, photo):
    with CaptureLogger(get_logger("transformers.pipelines.base")) as log:
        detector = pipeline("object-detection", model=str(saved))
    assert "not supported" not in log.out
    assert type(detector.model) is DePerceiverForObjectDetection
    assert type(detector.image_processor) is DePerceiverImageProcessor

    detections = detector(str(photo), threshold=0)
    model, processor = tiny_model(), tiny_processor()
    with torch.no_grad():
        outputs = model(**processor(Image.open(photo), return_tensors="pt"))
    expected = processor.post_process_object_detection(outputs, 0, [(60, 90)])[0]
    assert len(detections) == model.config.num_queries
    for detection, score, label, box in zip(detections, *expected.values(), strict=True):
        assert detection["score"] == pytest.approx(score.item(), abs=1e-5)
        assert detection["label"] == model.config.id2label[label.item()]
        assert list(detection["box"].values()) == pytest.approx(box.tolist(), abs=1.01)  # the pipeline truncates


def test_pipeline_batches_give_the_detections_of_single_images(saved):
    detector = pipeline("object-detection", model=str(saved))
    pictures = [picture(60, 90), picture(60, 90).transpose(Image.Transpose.ROTATE_180), picture(60, 90)]
    batched = detector(pictures, threshold=0, batch_size=2)
    for result, image in zip(batched, pictures, strict=True):
        alone = detector(image, threshold=0)
        assert [detection["label"] for detection in result] == [detection["label"] for detection in alone]
        assert [d["score"] for d in result] == pytest.approx([d["score"] for d in alone], abs=1e-5)


def run_without_the_package(code: str, directory: Path) -> subprocess.CompletedProcess:
    """Run Python code in a clean working directory with `deperceiver_hf` made impossible to import."""
    working_directory = directory / "elsewhere"
    working_directory.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(directory / "hf_home"), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_MODULES_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    process = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.modules['deperceiver_hf'] = None\n{code}"],
        cwd=working_directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process


def test_copied_directory_runs_without_the_package(saved, photo, tmp_path):
    copy = tmp_path / "a copy.of" / "the-model_1.0"
    shutil.copytree(saved, copy)
    code = f"""
import json
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, pipeline
try:
    import deperceiver_hf
    raise SystemExit("the package can be imported")
except ModuleNotFoundError:
    pass
detector = pipeline("object-detection", model={str(copy)!r}, trust_remote_code=True)
pil = AutoImageProcessor.from_pretrained({str(copy)!r}, trust_remote_code=True, backend="pil")
detector.model.save_pretrained("again")
pil.save_pretrained("again")
config = AutoConfig.from_pretrained("again", trust_remote_code=True)
again = AutoModelForObjectDetection.from_pretrained("again", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("again", trust_remote_code=True)
found = [type(x) for x in (detector.model, detector.image_processor, pil, config, again, processor)]
print(json.dumps({{
    "classes": [c.__name__ for c in found],
    "remote": [c.__module__.startswith("transformers_modules.") for c in found],
    "detections": detector({str(photo)!r}, threshold=0),
}}))
"""
    process = run_without_the_package(code, tmp_path)
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["classes"] == [
        "DePerceiverForObjectDetection",
        "DePerceiverImageProcessor",
        "DePerceiverImageProcessorPil",
        "DePerceiverConfig",
        "DePerceiverForObjectDetection",
        "DePerceiverImageProcessor",
    ]
    assert all(result["remote"])
    assert "not supported" not in process.stdout + process.stderr
    assert "[ERROR]" not in process.stdout

    expected = pipeline("object-detection", model=str(saved))(str(photo), threshold=0)
    for detection, ours in zip(result["detections"], expected, strict=True):
        assert detection["score"] == pytest.approx(ours["score"], abs=1e-5)
        assert (detection["label"], detection["box"]) == (ours["label"], ours["box"])
    again = tmp_path / "elsewhere" / "again"
    assert {path.name for path in again.iterdir() if path.is_file()} == MODEL_FILES | PROCESSOR_FILES


def test_local_classes_are_used_where_the_package_is_imported(saved):
    detector = pipeline("object-detection", model=str(saved), trust_remote_code=True)
    assert type(detector.model) is DePerceiverForObjectDetection
    assert type(detector.image_processor) is DePerceiverImageProcessor


def test_importing_the_package_says_nothing():
    process = subprocess.run(
        [sys.executable, "-c", "import deperceiver_hf"], capture_output=True, text=True, check=True
    )
    assert process.stdout == ""  # undocumented config fields or arguments would be printed here
    assert "[transformers]" not in process.stderr


def test_model_and_processor_are_pushed_with_their_code(monkeypatch):
    commits = []

    def create_commit(self, repo_id, operations, **kwargs):
        assert all(Path(operation.path_or_fileobj).is_file() for operation in operations)
        commits.append((repo_id, {operation.path_in_repo for operation in operations}))

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **kwargs: huggingface_hub.RepoUrl(repo_id)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(
        hub, "create_and_tag_model_card", lambda *args, **kwargs: huggingface_hub.ModelCard("---\n{}\n---\n")
    )
    tiny_model().push_to_hub("someone/tiny-deperceiver")
    tiny_processor().push_to_hub("someone/tiny-deperceiver")
    (model_repo, model_files), (processor_repo, processor_files) = commits
    assert model_repo == processor_repo == "someone/tiny-deperceiver"
    assert model_files - {"README.md"} == MODEL_FILES
    assert processor_files - {"README.md"} == PROCESSOR_FILES
