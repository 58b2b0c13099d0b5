# SPDX-License-Identifier: Apache-2.0
"""Saved models in the hands of transformers: the Auto classes, `pipeline`, the Hub, with this package and without."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    ObjectDetectionPipeline,
    pipeline,
)
from transformers.models.auto import CONFIG_MAPPING
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
    DePerceiverV2Config,
    DePerceiverV2ForObjectDetection,
    DePerceiverV2ImageProcessor,
    DePerceiverV2ImageProcessorPil,
    DePerceiverV2Model,
)

V1_MODEL_FILES = {
    "config.json",
    "model.safetensors",
    "configuration_deperceiver.py",
    "modeling_deperceiver.py",
    "layers_deperceiver.py",
    "loss_deperceiver.py",
    "configuration_backbone_deperceiver.py",
    "backbone_deperceiver.py",
    "attention_deperceiver.py",
    "matching_deperceiver.py",
}
V1_PROCESSOR_FILES = {
    "preprocessor_config.json",
    "image_processing_deperceiver.py",
    "detection_processing_deperceiver.py",
    "pixels_deperceiver.py",
}


class Architecture(NamedTuple):
    """An architecture as its users see it."""

    config: type
    model: type
    detector: type
    processor: type
    pil_processor: type
    fields: dict
    model_files: set[str]
    processor_files: set[str]

    def tiny_model(self):
        torch.manual_seed(0)
        config = self.config(backbone="resnet18", num_queries=5, id2label={0: "cat", 1: "dog"}, **self.fields)
        return self.detector(config).eval()

    def tiny_processor(self, pil: bool = False):
        backend = self.pil_processor if pil else self.processor
        return backend(size={"shortest_edge": 48, "longest_edge": 80})


ARCHITECTURES = {
    "v1": Architecture(
        DePerceiverConfig,
        DePerceiverModel,
        DePerceiverForObjectDetection,
        DePerceiverImageProcessor,
        DePerceiverImageProcessorPil,
        {
            "num_latents": 6,
            "d_latents": 32,
            "d_model": 32,
            "num_blocks": 1,
            "num_self_attends_per_block": 1,
            "num_self_attention_heads": 2,
        },
        V1_MODEL_FILES,
        V1_PROCESSOR_FILES,
    ),
    "v2": Architecture(
        DePerceiverV2Config,
        DePerceiverV2Model,
        DePerceiverV2ForObjectDetection,
        DePerceiverV2ImageProcessor,
        DePerceiverV2ImageProcessorPil,
        {"d_model": 32, "num_attention_heads": 2, "decoder_layers": 1},
        # Everything that the files import from their siblings: what both share, and nothing of the first's own.
        V1_MODEL_FILES
        - {"configuration_deperceiver.py", "modeling_deperceiver.py", "layers_deperceiver.py", "loss_deperceiver.py"}
        | {
            "configuration_deperceiver_v2.py",
            "modeling_deperceiver_v2.py",
            "tokens_deperceiver_v2.py",
            "layers_deperceiver_v2.py",
            "loss_deperceiver_v2.py",
            "denoising_deperceiver_v2.py",
            "detector_features_deperceiver_v2.py",
            "token_encoder_deperceiver_v2.py",
        },
        V1_PROCESSOR_FILES - {"image_processing_deperceiver.py"} | {"image_processing_deperceiver_v2.py"},
    ),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request) -> Architecture:
    return ARCHITECTURES[request.param]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def saved(architecture, tmp_path_factory) -> Path:
    """A directory with a model and its processor, as a user would push it to the Hub."""
    directory = tmp_path_factory.mktemp("saved") / "tiny-deperceiver"
    architecture.tiny_model().save_pretrained(directory)
    architecture.tiny_processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    picture(60, 90).save(path)
    return path


def test_saved_directory_holds_the_code_of_model_and_processor(architecture, saved):
    assert {path.name for path in saved.iterdir()} == architecture.model_files | architecture.processor_files


def test_auto_classes_restore_model_and_processor(architecture, saved):
    assert type(AutoConfig.from_pretrained(saved)) is architecture.config
    assert type(AutoImageProcessor.from_pretrained(saved)) is architecture.processor
    assert type(AutoImageProcessor.from_pretrained(saved, backend="pil")) is architecture.pil_processor
    assert type(AutoModel.from_pretrained(saved)) is architecture.model
    model = AutoModelForObjectDetection.from_pretrained(saved)
    assert type(model) is architecture.detector
    assert model.config.id2label == {0: "cat", 1: "dog"}
    weights = architecture.tiny_model().state_dict()
    restored = model.state_dict()
    assert restored.keys() == weights.keys()
    assert all(torch.equal(restored[name], weights[name]) for name in weights)


def test_auto_classes_make_a_model_from_a_config(architecture):
    config = architecture.tiny_model().config
    assert type(AutoModelForObjectDetection.from_config(config)) is architecture.detector
    assert architecture.detector in MODEL_FOR_OBJECT_DETECTION_MAPPING.values()


@pytest.mark.parametrize("pil", [False, True])
def test_processor_code_is_saved_by_either_backend(architecture, pil, tmp_path):
    architecture.tiny_processor(pil).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == architecture.processor_files
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"]["AutoImageProcessor"] == [
        f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
        for cls in (architecture.pil_processor, architecture.processor)
    ]
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is architecture.processor
    assert loaded.size == {"shortest_edge": 48, "longest_edge": 80}


def test_pipeline_detects_in_pixels_of_the_image_and_does_not_complain(architecture, saved, photo):
    with CaptureLogger(get_logger("transformers.pipelines.base")) as log:
        detector = pipeline("object-detection", model=str(saved))
    assert "not supported" not in log.out
    assert type(detector.model) is architecture.detector
    assert type(detector.image_processor) is architecture.processor

    detections = detector(str(photo), threshold=0)
    model, processor = architecture.tiny_model(), architecture.tiny_processor()
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


def test_copied_directory_runs_without_the_package(architecture, saved, photo, tmp_path):
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
        cls.__name__
        for cls in (
            architecture.detector,
            architecture.processor,
            architecture.pil_processor,
            architecture.config,
            architecture.detector,
            architecture.processor,
        )
    ]
    assert all(result["remote"])
    assert "not supported" not in process.stdout + process.stderr
    assert "[ERROR]" not in process.stdout

    expected = pipeline("object-detection", model=str(saved))(str(photo), threshold=0)
    for detection, ours in zip(result["detections"], expected, strict=True):
        assert detection["score"] == pytest.approx(ours["score"], abs=1e-5)
        assert (detection["label"], detection["box"]) == (ours["label"], ours["box"])
    again = {path.name for path in (tmp_path / "elsewhere" / "again").iterdir() if path.is_file()}
    assert again == architecture.model_files | architecture.processor_files


def test_local_classes_are_used_where_the_package_is_imported(architecture, saved):
    detector = pipeline("object-detection", model=str(saved), trust_remote_code=True)
    assert type(detector.model) is architecture.detector
    assert type(detector.image_processor) is architecture.processor


def test_importing_the_package_says_nothing():
    process = subprocess.run(
        [sys.executable, "-c", "import deperceiver_hf"], capture_output=True, text=True, check=True
    )
    assert process.stdout == ""  # undocumented config fields or arguments would be printed here
    assert "[transformers]" not in process.stderr


def test_model_and_processor_are_pushed_with_their_code(architecture, monkeypatch):
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
    architecture.tiny_model().push_to_hub("someone/tiny-deperceiver")
    architecture.tiny_processor().push_to_hub("someone/tiny-deperceiver")
    (model_repo, model_files), (processor_repo, processor_files) = commits
    assert model_repo == processor_repo == "someone/tiny-deperceiver"
    assert model_files - {"README.md"} == architecture.model_files
    assert processor_files - {"README.md"} == architecture.processor_files


@pytest.fixture(scope="module")
def detector(saved):
    return pipeline("object-detection", model=str(saved))


def assert_same_detections(found, expected):
    for detection, other in zip(found, expected, strict=True):
        assert detection["label"] == other["label"]
        assert detection["score"] == pytest.approx(other["score"], abs=1e-5)
        assert list(detection["box"].values()) == pytest.approx(list(other["box"].values()), abs=1)  # truncated


@pytest.mark.parametrize("options", [{}, {"do_pad": False}, {"pad_size": {"height": 100, "width": 100}}])
def test_pictures_of_any_size_share_a_batch_and_are_found_as_alone(architecture, options):
    model, processor = architecture.tiny_model(), architecture.tiny_processor()
    for name, value in options.items():
        setattr(processor, name, value)
    runner = pipeline("object-detection", model=model, image_processor=processor)
    pictures = [picture(60, 90), picture(90, 60), picture(64, 64), picture(50, 100), picture(200, 80)]
    alone = [runner(image, threshold=0) for image in pictures]
    for batch_size in (2, 3, 5):
        for found, expected in zip(runner(pictures, threshold=0, batch_size=batch_size), alone, strict=True):
            assert_same_detections(found, expected)


def test_pictures_of_any_kind_are_opened_as_by_the_image_processor(detector, tmp_path):
    gray = picture(60, 90).convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    gray.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    deep.save(tmp_path / "deep.png")
    expected = detector(gray, threshold=0)
    kinds = [deep, tmp_path / "deep.png", str(tmp_path / "deep.png"), gray.convert("RGBA"), gray.convert("LA")]
    kinds += [Image.fromarray(np.asarray(gray, dtype=np.float32) / 255), Image.open(tmp_path / "turned.png")]
    for kind in [*kinds, str(tmp_path / "turned.png")]:
        assert detector(kind, threshold=0) == expected
    for found in detector([str(tmp_path / "deep.png"), gray], threshold=0, batch_size=2):
        assert_same_detections(found, expected)


def test_what_is_no_picture_is_refused_in_one_sentence(detector, tmp_path):
    with pytest.raises(TypeError, match="Got a ndarray as an image; expected a path"):
        detector(np.zeros((5, 5, 3), dtype=np.uint8))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"Cannot read an image from .*text\.png"):
        detector(str(tmp_path / "text.png"))


def test_other_models_have_the_pipeline_of_transformers():
    config = DetrConfig(
        backbone_config=CONFIG_MAPPING["resnet"](
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_indices=[1]
        ),
        **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 3, "num_labels": 2},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8},
    )
    model, processor = DetrForObjectDetection(config).eval(), DetrImageProcessor(size={"height": 64, "width": 64})
    ours = pipeline("object-detection", model=model, image_processor=processor)
    theirs = ObjectDetectionPipeline(model=model, image_processor=processor)
    pictures = [picture(60, 90), picture(90, 60)]
    assert ours(pictures, threshold=0, batch_size=2) == theirs(pictures, threshold=0, batch_size=2)
