# SPDX-License-Identifier: Apache-2.0
"""What people are given lies within the picture; what the metric sees is what was predicted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from conftest import tiny_model, tiny_v2_model
from deperceiver_hf import (
    DePerceiverImageProcessor,
    DePerceiverImageProcessorPil,
    DePerceiverV2ImageProcessor,
    DePerceiverV2ImageProcessorPil,
)
from deperceiver_hf.data import load_detection_data
from deperceiver_hf.evaluation.evaluator import evaluate_detector
from deperceiver_hf.prediction import prepare_prediction

PROCESSORS = [
    DePerceiverImageProcessor,
    DePerceiverImageProcessorPil,
    DePerceiverV2ImageProcessor,
    DePerceiverV2ImageProcessorPil,
]
BEYOND = [[0.1, 0.2, 0.6, 0.7], [0.5, 0.5, 2.0, 3.0], [1.4, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.4]]


@pytest.fixture(params=PROCESSORS, ids=lambda processor: processor.__name__)
def processor(request):
    return request.param()


@pytest.fixture(params=[tiny_model, tiny_v2_model], ids=["v1", "v2"])
def detector(request):
    """A model with boxes at and beyond every border."""
    model = request.param()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bbox_predictor" in name and "layers.2" in name:
                parameter.normal_(std=3, generator=torch.Generator().manual_seed(0))
    size = {"shortest_edge": 48, "longest_edge": 80}
    return model, (DePerceiverImageProcessor if request.param is tiny_model else DePerceiverV2ImageProcessor)(
        size=size
    )


def outputs_with(boxes=BEYOND) -> SimpleNamespace:
    logits = torch.full((1, len(boxes), 3), -5.0)
    logits[0, :, 0] = torch.linspace(4, 3, len(boxes))  # in this order also by score
    return SimpleNamespace(logits=logits, pred_boxes=torch.tensor([boxes]))


@pytest.mark.parametrize("target_sizes", [[(60, 90)], torch.tensor([[60, 90]]), None])
def test_boxes_end_at_the_border(processor, target_sizes):
    (found,) = processor.post_process_object_detection(outputs_with(), 0.0, target_sizes)
    scale = torch.tensor([1.0, 1, 1, 1] if target_sizes is None else [90.0, 60, 90, 60])
    expected = torch.tensor([[0, 0, 0.4, 0.55], [0, 0, 1, 1], [1, 0.4, 1, 0.6], [0.4, 0.3, 0.6, 0.7]])
    torch.testing.assert_close(found["boxes"], expected * scale)
    assert len(found["scores"]) == len(found["labels"]) == len(BEYOND)  # the one outside is still there
    assert (found["boxes"] <= scale[2:].repeat(2)).all()
    assert (found["boxes"] >= 0).all()


def test_boxes_as_predicted_on_demand(processor):
    (found,) = processor.post_process_object_detection(outputs_with(), 0.0, [(60, 90)], clip=False)
    x, y, width, height = torch.tensor(BEYOND).T
    expected = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)
    torch.testing.assert_close(found["boxes"], expected * torch.tensor([90.0, 60, 90, 60]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["logits", "pred_boxes"])
def test_predictions_that_are_not_finite_are_refused(processor, name, value):
    outputs = outputs_with()
    getattr(outputs, name)[0, 1, 0] = value
    for threshold in (0.0, 0.5, 1.0):
        with pytest.raises(FloatingPointError, match=rf"not finite \({name}\)"):
            processor.post_process_object_detection(outputs, threshold, [(60, 90)])


def test_a_class_that_was_ruled_out_is_no_damage(processor):
    outputs = outputs_with()
    outputs.logits[..., 1] = -float("inf")
    (found,) = processor.post_process_object_detection(outputs, 0.5)
    assert set(found["labels"].tolist()) == {0}


def test_pipeline_and_prediction_hand_out_boxes_within_the_picture(detector, tmp_path):
    model, processor = detector
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8))
    runner = pipeline("object-detection", model=model, image_processor=processor)
    outputs = model(**processor(picture, return_tensors="pt"))
    (predicted,) = processor.post_process_object_detection(outputs, 0.0, [(61, 90)], clip=False)
    limits = torch.tensor([90, 61, 90, 61])
    assert ((predicted["boxes"] < -1) | (predicted["boxes"] > limits + 1)).any()  # there is something to clip

    picture.save(tmp_path / "picture.png")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    job = prepare_prediction(
        str(tmp_path / "model"),
        [str(tmp_path / "picture.png")],
        output_dir=str(tmp_path / "out"),
        threshold=0,
        draw=False,
    )
    (image,) = job.run(progress=False).images
    for found in (runner(picture, threshold=0.0), image["detections"]):
        assert len(found) == model.config.num_queries
        for box in (detection["box"] for detection in found):
            assert 0 <= box["xmin"] <= box["xmax"] <= 90
            assert 0 <= box["ymin"] <= box["ymax"] <= 61


def test_the_metric_sees_boxes_as_predicted(detector):
    model, processor = detector
    data = load_detection_data("synthetic", "validation", image_size=64, max_samples=2)
    model.config.id2label = dict(enumerate(data.label_names[: model.config.num_labels]))
    result = evaluate_detector(model, processor, data, num_workers=0, progress=False)
    boxes = np.array([prediction["bbox"] for prediction in result.predictions])  # x, y, width, height
    assert ((boxes[:, :2] < -1) | (boxes[:, :2] + boxes[:, 2:] > 65)).any()
