# SPDX-License-Identifier: Apache-2.0
"""The second architecture's image processor: what goes in is prepared as for the first, what comes out is scored by
sigmoids."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoImageProcessor

from deperceiver_hf import (
    DePerceiverImageProcessor,
    DePerceiverImageProcessorPil,
    DePerceiverV2ImageProcessor,
    DePerceiverV2ImageProcessorPil,
)
from test_image_processing import SMALL, coco, picture

BACKENDS = {
    "torchvision": (DePerceiverV2ImageProcessor, DePerceiverImageProcessor),
    "pil": (DePerceiverV2ImageProcessorPil, DePerceiverImageProcessorPil),
}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture
def processor(backend):
    return BACKENDS[backend][0](size=SMALL)


def predictions(batch=2, queries=7, classes=4, seed=0, dtype=torch.float32) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        logits=torch.randn(batch, queries, classes, generator=generator).to(dtype),
        pred_boxes=(torch.rand(batch, queries, 4, generator=generator) * 0.5 + 0.2).to(dtype),
    )


def naive_detections(outputs, image, threshold, top_k, size=(1, 1)) -> list[tuple[float, int, list[float]]]:
    """Score, label and corners of every pair of a query and a class, best first."""
    pairs = []
    for logits, box in zip(outputs.logits[image].float(), outputs.pred_boxes[image].float(), strict=True):
        x, y, width, height = box.tolist()
        relative = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        corners = [min(max(value, 0), 1) * side for value, side in zip(relative, size[::-1] * 2, strict=True)]
        pairs += [(score, label, corners) for label, score in enumerate(logits.sigmoid().tolist())]
    best = sorted(pairs, key=lambda pair: -pair[0])[:top_k]
    return [pair for pair in best if pair[0] >= threshold]


def check(result, expected):
    assert result["scores"].dtype == result["boxes"].dtype == torch.float32
    assert result["labels"].dtype == torch.int64
    assert result["scores"].tolist() == pytest.approx([pair[0] for pair in expected], abs=1e-6)
    assert result["labels"].tolist() == [pair[1] for pair in expected]
    assert result["boxes"].shape == (len(expected), 4)
    boxes = torch.tensor([pair[2] for pair in expected]).view(-1, 4)
    torch.testing.assert_close(result["boxes"], boxes, rtol=0, atol=1e-3)


@pytest.mark.parametrize("top_k", [None, 1, 3, 28, 1000])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_detections_are_the_best_pairs_of_query_and_class(processor, threshold, top_k):
    outputs, sizes = predictions(), [(480, 640), (500, 333)]
    results = processor.post_process_object_detection(outputs, threshold, sizes, top_k)
    for image, result in enumerate(results):
        # By default as many detections as queries.
        check(result, naive_detections(outputs, image, threshold, 7 if top_k is None else top_k, sizes[image]))
    relative = processor.post_process_object_detection(outputs, threshold, top_k=top_k)
    for image, result in enumerate(relative):
        check(result, naive_detections(outputs, image, threshold, 7 if top_k is None else top_k))


def test_a_query_can_be_found_with_several_classes(processor):
    outputs = SimpleNamespace(
        logits=torch.tensor([[[3.0, 2.0, -9.0], [-9.0, 1.0, -9.0]]]), pred_boxes=torch.rand(1, 2, 4)
    )
    (result,) = processor.post_process_object_detection(outputs, top_k=3)
    assert result["labels"].tolist() == [0, 1, 1]
    assert torch.equal(result["boxes"][0], result["boxes"][1])
    assert not torch.equal(result["boxes"][0], result["boxes"][2])


def test_default_threshold_is_a_half(processor):
    outputs = predictions()
    for result in processor.post_process_object_detection(outputs):
        assert (result["scores"] >= 0.5).all()
    assert sum(len(result["scores"]) for result in processor.post_process_object_detection(outputs)) > 0


def test_target_sizes_may_be_a_list_or_tensors(processor):
    outputs, sizes = predictions(), [(480, 640), (500, 333)]
    expected = processor.post_process_object_detection(outputs, 0.0, sizes)
    for target_sizes in (torch.tensor(sizes), [torch.tensor(size) for size in sizes], [list(size) for size in sizes]):
        for result, reference in zip(
            processor.post_process_object_detection(outputs, 0.0, target_sizes), expected, strict=True
        ):
            assert torch.equal(result["boxes"], reference["boxes"])


@pytest.mark.parametrize(
    ("target_sizes", "message"),
    [([(10, 10)], "1 target sizes for 2 images"), (torch.ones(2, 3), r"\(2, 2\).*\(2, 3\)"), ([10, 20], r"\(2, 2\)")],
)
def test_target_sizes_that_do_not_fit_the_batch_are_refused(processor, target_sizes, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process_object_detection(predictions(), target_sizes=target_sizes)


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_of_nothing_is_refused(processor, top_k):
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {top_k}"):
        processor.post_process_object_detection(predictions(), top_k=top_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_scored_and_scaled_in_float32(processor, dtype):
    outputs = predictions(batch=1, dtype=dtype)
    (result,) = processor.post_process_object_detection(outputs, 0, [(1001, 1333)], top_k=5)
    scores = sorted(outputs.logits.float().sigmoid().flatten().tolist(), reverse=True)[:5]
    assert result["scores"].dtype == result["boxes"].dtype == torch.float32
    assert result["scores"].tolist() == pytest.approx(scores, abs=1e-7)


def test_latents_that_are_none_are_not_detected(processor):
    """What a model says of a latent that an image of few tokens has no token for."""
    outputs = predictions(batch=1, queries=3)
    outputs.logits[0, 1:] = -1e4
    (result,) = processor.post_process_object_detection(outputs, threshold=1e-6)
    assert len(result["scores"]) == 3
    assert (result["boxes"] == result["boxes"][0]).all()


def test_images_and_annotations_are_prepared_as_for_the_first_architecture(backend):
    ours, theirs = (cls(size=SMALL) for cls in BACKENDS[backend])
    images = [picture(100, 200), picture(60, 50)]
    annotations = [coco((20, 10, 100, 40), (0, 0, 5, 5)), coco()]
    first, second = (processor(images, annotations, return_tensors="pt") for processor in (ours, theirs))
    assert first.keys() == second.keys() == {"pixel_values", "pixel_mask", "labels"}
    for name in ("pixel_values", "pixel_mask"):
        assert torch.equal(first[name], second[name])
    for label, other in zip(first["labels"], second["labels"], strict=True):
        assert label.keys() == other.keys()
        assert all(torch.equal(label[name], other[name]) for name in label)


def test_predictions_equal_to_the_targets_give_back_the_annotated_boxes(processor):
    sizes, boxes = [(100, 200), (173, 59)], [(20.5, 10.25, 100.0, 40.0), (3.0, 100.0, 40.0, 60.0)]
    batch = processor([picture(*size) for size in sizes], [coco(box) for box in boxes], return_tensors="pt")
    outputs = SimpleNamespace(
        logits=torch.tensor([[[9.0, -9.0]], [[9.0, -9.0]]]),
        pred_boxes=torch.stack([label["boxes"] for label in batch["labels"]]),
    )
    target_sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
    for result, (x, y, w, h) in zip(
        processor.post_process_object_detection(outputs, target_sizes=target_sizes), boxes, strict=True
    ):
        torch.testing.assert_close(result["boxes"], torch.tensor([[x, y, x + w, y + h]]), atol=1e-4, rtol=0)


def test_settings_survive_saving(processor, tmp_path):
    changed = type(processor)(size={"max_height": 30, "max_width": 40}, do_normalize=False, image_mean=[0.1, 0.2, 0.3])
    changed.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert loaded.to_dict() == changed.to_dict()
    image = picture(50, 50)
    assert torch.equal(
        loaded(image, return_tensors="pt")["pixel_values"], changed(image, return_tensors="pt")["pixel_values"]
    )
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "DePerceiverV2ImageProcessor"
    for backend, (cls, _) in BACKENDS.items():
        auto = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert type(auto) is cls
        assert auto.size == changed.size
