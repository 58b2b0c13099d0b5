# SPDX-License-Identifier: Apache-2.0
"""The COCO metric equals pycocotools, and an evaluation depends on model and data only."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor
from transformers.models.auto import CONFIG_MAPPING

from coco_samples import CATEGORIES, annotation, coco_content, write_coco
from conftest import tiny_config, tiny_v2_model
from deperceiver_hf import DePerceiverForObjectDetection, DePerceiverImageProcessor, DePerceiverV2ImageProcessor
from deperceiver_hf.cli import main
from deperceiver_hf.data import DetectionDataset, load_detection_data
from deperceiver_hf.data.synthetic.shapes import SHAPES
from deperceiver_hf.drawing import contact_sheet_rows
from deperceiver_hf.evaluation.coco_metric import CocoDetectionMetric
from deperceiver_hf.evaluation.evaluator import align_labels, evaluate_detector
from deperceiver_hf.evaluation.job import prepare_evaluation
from deperceiver_hf.evaluation.report import EvaluationReport

SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.py"
NAMES = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
NAMES += ["ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]
LABEL_NAMES = ["person", "fire hydrant", "stop sign", "toothbrush"]


# --- the metric --------------------------------------------------------------------------------------------------


def random_truth_and_detections(seed: int, num_images: int = 12, num_labels: int = 5) -> tuple[list[dict], list[dict]]:
    """References and predictions of all sizes, with crowds, tied scores, images without either, and absent classes."""
    random = np.random.default_rng(seed)
    references, predictions = [], []
    for image_id in range(3, 3 + 7 * num_images, 7):
        count = int(random.integers(0, 9)) if image_id != 10 else 0
        corner, side = random.uniform(0, 300, (count, 2)), random.uniform(4, 200, (count, 2))
        labels = random.integers(0, num_labels - 1, count)  # the last class has no objects
        references.append(
            {
                "image_id": image_id,
                "labels": labels.tolist(),
                "bbox": np.concatenate([corner, side], axis=1).tolist(),
                "area": (side.prod(1) * 0.7).tolist(),
                "iscrowd": (random.random(count) < 0.15).tolist(),
            }
        )
        near = np.concatenate([corner, corner + side], axis=1) + random.normal(0, 6, (count, 4))
        noise = random.uniform(0, 250, (6, 2))
        boxes = np.concatenate([near, np.concatenate([noise, noise + random.uniform(3, 150, (6, 2))], axis=1)])
        boxes = np.zeros((0, 4)) if image_id == 17 else boxes
        predictions.append(
            {
                "image_id": image_id,
                "scores": random.random(len(boxes)).round(1).tolist(),
                "labels": [*labels, *random.integers(0, num_labels, 6)][: len(boxes)],
                "boxes": boxes.tolist(),
            }
        )
    return references, predictions


def pycocotools_evaluation(references: list[dict], predictions: list[dict], num_labels: int = 5) -> COCOeval:
    truth = COCO()
    keys = ("labels", "bbox", "area", "iscrowd")
    rows = [(r["image_id"], *values) for r in references for values in zip(*(r[key] for key in keys), strict=True)]
    truth.dataset = {
        "images": [{"id": r["image_id"]} for r in references],
        "categories": [{"id": label} for label in range(num_labels)],
        "annotations": [
            {"id": i, "image_id": image_id, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for i, (image_id, label, box, area, crowd) in enumerate(rows, start=1)
        ],
    }
    results = [
        {"image_id": p["image_id"], "category_id": int(label), "bbox": [x, y, x1 - x, y1 - y], "score": score}
        for p in predictions
        for score, label, (x, y, x1, y1) in zip(p["scores"], p["labels"], p["boxes"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def compute(references: list[dict], predictions: list[dict], **options) -> dict:
    metric = CocoDetectionMetric([f"class {i}" for i in range(5)], **options)
    return metric.compute(predictions=predictions, references=references)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metric_equals_pycocotools_to_the_last_bit(seed, capsys):
    references, predictions = random_truth_and_detections(seed)
    expected = pycocotools_evaluation(references, predictions)
    capsys.readouterr()
    result = compute(references, predictions)
    assert capsys.readouterr().out == ""
    per_class = result.pop("per_class")
    assert list(result) == NAMES
    assert list(result.values()) == expected.stats.tolist()
    assert 0 < result["ap"] < 1
    precision = expected.eval["precision"][:, :, :, 0, 2]
    assert per_class == {f"class {i}": precision[:, :, i].mean() if i < 4 else None for i in range(5)}


def test_order_in_which_images_are_added_does_not_matter():
    references, predictions = random_truth_and_detections(3)
    expected = compute(references, predictions)
    metric = CocoDetectionMetric([f"class {i}" for i in range(5)])
    order = np.random.default_rng(0).permutation(len(references))
    for i in order[:4]:
        metric.add(prediction=predictions[i], reference=references[i])
    metric.add_batch(predictions=[predictions[i] for i in order[4:]], references=[references[i] for i in order[:3:-1]])
    assert metric.compute() == expected


@pytest.mark.parametrize("as_type", [list, np.array, torch.tensor])
def test_perfect_detections_score_one(as_type):
    references, _ = random_truth_and_detections(4)
    predictions = []
    for reference in references:
        x, y, width, height = np.array(reference["bbox"]).reshape(-1, 4).T
        predictions.append(
            {
                "image_id": reference["image_id"],
                "scores": as_type([0.5] * len(x)),
                "labels": as_type(reference["labels"]),
                "boxes": as_type(np.stack([x, y, x + width, y + height], axis=1).tolist()),
            }
        )
    result = compute(references, predictions, max_detections=(1, 10, 200))
    per_class = result.pop("per_class")
    assert {name: result[name] for name in result if name[:2] == "ap"} == pytest.approx(dict.fromkeys(NAMES[:6], 1.0))
    assert result["ar200"] == pytest.approx(1.0)
    assert [value is None for value in per_class.values()] == [False] * 4 + [True]


def test_no_detections_score_zero_and_no_objects_minus_one():
    references, _ = random_truth_and_detections(5)
    nothing = {"scores": [], "labels": [], "boxes": []}
    result = compute(references, [{"image_id": r["image_id"], **nothing} for r in references])
    assert [result[name] for name in NAMES] == [0.0] * 12
    empty = {"image_id": 1, "labels": [], "bbox": []}
    result = compute([empty], [{"image_id": 1, "scores": [0.5], "labels": [0], "boxes": [[0, 0, 1, 1]]}])
    assert [result[name] for name in NAMES] == [-1.0] * 12
    assert set(result["per_class"].values()) == {None}


@pytest.mark.parametrize(("most", "found"), [(100, 100), (150, 150), (300, 150)])
def test_more_than_a_hundred_detections_count_if_asked_for(most, found):
    boxes = [[10.0 * i, 0.0, 10.0 * i + 8, 8.0] for i in range(150)]
    reference = {"image_id": 1, "labels": [0] * 150, "bbox": [[x, y, 8.0, 8.0] for x, y, _, _ in boxes]}
    prediction = {"image_id": 1, "scores": [0.9] * 150, "labels": [0] * 150, "boxes": boxes}
    result = compute([reference], [prediction], max_detections=(1, most))
    assert result[f"ar{most}"] == pytest.approx(found / 150)
    assert (result["ap"] > 0.99) == (found == 150)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_number_that_counts_changes_nothing_but_a_name_where_it_is_not_reached(seed):
    """pycocotools' own summary knows 100 only: it gives -1 for AP with another number."""
    references, predictions = random_truth_and_detections(seed)
    expected, found = compute(references, predictions), compute(references, predictions, max_detections=(1, 10, 1000))
    expected["ar1000"] = expected.pop("ar100")
    assert found == expected


def test_area_and_crowd_have_defaults_and_boundaries_can_be_moved():
    reference = {"image_id": 1, "labels": [0], "bbox": [[0.0, 0.0, 20.0, 20.0]]}
    prediction = {"image_id": 1, "scores": [1.0], "labels": [0], "boxes": [[0.0, 0.0, 20.0, 20.0]]}
    result = compute([reference], [prediction])
    assert (result["ap_small"], result["ap_medium"]) == (pytest.approx(1), -1)
    result = compute([reference], [prediction], area_boundaries=(100, 10000))
    assert (result["ap_small"], result["ap_medium"]) == (-1, pytest.approx(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, p: p.append(p[0]), "more than once"),
        (lambda r, p: (r.append(r[0]), p.append(p[1])), "more than once"),
        (lambda r, p: p[0].update(image_id=999), "lack one"),
        (lambda r, p: p[0].update(labels=[7] * len(p[0]["labels"])), "outside of the 5"),
        (lambda r, p: p[0].pop("scores"), "scores missing"),
    ],
)
def test_metric_refuses_records_that_do_not_fit(change, message):
    references, predictions = random_truth_and_detections(6)
    change(references, predictions)
    while len(references) < len(predictions):
        references.append({**references[0], "image_id": 1000})
    with pytest.raises(ValueError, match=message):
        compute(references, predictions)


def test_metric_refuses_options_out_of_range_and_nothing():
    for wrong in ((), (0, 10), (10, 10), (100, 10)):
        with pytest.raises(ValueError, match="max_detections"):
            CocoDetectionMetric(max_detections=wrong)
    with pytest.raises(ValueError, match="area_boundaries"):
        CocoDetectionMetric(area_boundaries=(100, 10))
    with pytest.raises(ValueError, match="Nothing to score"):
        CocoDetectionMetric().compute()


# --- labels ------------------------------------------------------------------------------------------------------


def test_labels_are_matched_by_name():
    # As in the authors' checkpoints: the index is the category id, with holes in between.
    model = {0: "N/A", 1: "person", 11: "Fire_Hydrant", 12: "N/A", 13: "stop sign", 90: "toothbrush"}
    table = align_labels(model, LABEL_NAMES)
    assert len(table) == 91
    assert [table[i] for i in (1, 11, 13, 90)] == [0, 1, 2, 3]
    assert set(np.delete(table, [1, 11, 13, 90])) == {-1}


def test_unnamed_labels_are_matched_by_number_only_if_equally_many():
    unnamed = {i: f"LABEL_{i}" for i in range(4)}
    assert align_labels(unnamed, LABEL_NAMES).tolist() == [0, 1, 2, 3]
    for wrong in ({i: f"LABEL_{i}" for i in range(5)}, {0: "cat", 1: "dog", 2: "cow", 3: "hen"}):
        with pytest.raises(ValueError, match="No class of the model") as error:
            align_labels(wrong, LABEL_NAMES)
        assert wrong[0] in str(error.value)
        assert "fire hydrant" in str(error.value)


def test_ambiguous_labels_are_refused():
    with pytest.raises(ValueError, match="not clear which class is which: PERSON, Person on one side"):
        align_labels({0: "PERSON", 1: "Person"}, LABEL_NAMES)
    assert align_labels({0: "person", 1: "Person"}, LABEL_NAMES)[1] == -1  # the equal one is meant


# --- the evaluation ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco_directory(tmp_path_factory) -> Path:
    """Eleven images of three sizes, with objects, crowds and an image without any."""
    random = np.random.default_rng(0)
    sizes = [
        (64, 48),
        (48, 64),
        (64, 48),
        (80, 40),
        (64, 48),
        (48, 64),
        (80, 40),
        (64, 48),
        (64, 48),
        (80, 40),
        (48, 64),
    ]
    ids = random.permutation(1000)[: len(sizes)].tolist()
    images = [
        {"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in zip(ids, sizes, strict=True)
    ]
    annotations = []
    for image in images[1:]:
        for _ in range(int(random.integers(1, 6))):
            width, height = random.uniform(6, 30, 2).round(2)
            x, y = (random.uniform(0, 1, 2) * [image["width"] - width, image["height"] - height]).round(2)
            category_id = int(random.choice([1, 11, 13, 90]))
            box = [float(value) for value in (x, y, width, height)]
            crowd = int(random.random() < 0.1)
            more = {"area": box[2] * box[3], "iscrowd": crowd}
            annotations.append(annotation(len(annotations), image["id"], category_id, box) | more)
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    return write_coco(tmp_path_factory.mktemp("coco"), content)


@pytest.fixture(scope="module")
def data(coco_directory):
    return load_detection_data(str(coco_directory), "val")


def processor(size: int = 48) -> DePerceiverImageProcessor:
    return DePerceiverImageProcessor(size={"shortest_edge": size, "longest_edge": 2 * size})


def labelled(names: list[str]) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def scattering_model() -> DePerceiverForObjectDetection:
    """Random weights, but with predictions that differ between queries and images."""
    torch.manual_seed(1)
    model = DePerceiverForObjectDetection(tiny_config(num_queries=20, num_labels=4, **labelled(LABEL_NAMES))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name and parameter.dim() > 1:
                parameter.mul_(3)
    return model


class Oracle(torch.nn.Module):
    """Detects what is annotated, in images that it knows; its classes are in another order, one more than needed."""

    def __init__(self, data, image_processor, noise: float = 0.0, dropped: int = 0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        names = ["unknown", *reversed(data.label_names)]
        self.config = SimpleNamespace(**labelled(names))
        self.calls = []
        self.answers = {}
        random = np.random.default_rng(0)
        for item in DetectionDataset(data):
            image = item["image"]
            height, width = image.shape[-2:]
            objects = item["annotations"]["annotations"]
            logits, boxes = torch.full((40, len(names) + 1), -10.0), torch.zeros(40, 4)
            logits[:, -1] = 0.0
            for query, found in enumerate(objects):
                if found["iscrowd"] or query < dropped:
                    continue
                x, y, w, h = np.array(found["bbox"]) * random.normal(1, noise, 4)
                boxes[query] = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
                logits[query, len(data.label_names) - found["category_id"]] = float(random.uniform(2, 8))
            pixels = image_processor(images=[image], return_tensors="pt")["pixel_values"]
            self.answers[pixels.numpy().tobytes()] = (logits, boxes)

    @property
    def dtype(self):
        return self.weight.dtype

    def forward(self, pixel_values, pixel_mask=None):
        assert pixel_mask is None, "nothing is padded"
        self.calls.append((len(pixel_values), torch.get_num_threads()))
        logits, boxes = zip(*(self.answers[image[None].numpy().tobytes()] for image in pixel_values), strict=True)
        return SimpleNamespace(logits=torch.stack(logits), pred_boxes=torch.stack(boxes))


def test_knowing_detector_scores_one(data):
    result = evaluate_detector(Oracle(data, processor()), processor(), data, progress=False)
    assert result.metrics["ap"] == pytest.approx(1.0)
    assert result.num_images == 11
    # every query is in the results, but for the class that the data do not have
    assert len(result.predictions) == sum(1 for p in result.predictions if p["category_id"] in (1, 11, 13, 90))
    assert [p["image_id"] for p in result.predictions] == sorted(p["image_id"] for p in result.predictions)


def test_written_predictions_score_the_same_with_pycocotools_alone(data, coco_directory):
    """On the annotation file itself, with its own image and category ids."""
    result = evaluate_detector(Oracle(data, processor(), noise=0.08, dropped=1), processor(), data, progress=False)
    content = json.loads((coco_directory / "annotations" / "instances_val2017.json").read_text())
    for number, entry in enumerate(content["annotations"], start=1):
        entry["id"] = number  # pycocotools cannot count a match with annotation 0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(json.loads(json.dumps(result.predictions))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert 0.05 < result.metrics["ap"] < 0.95
    assert list(result.metrics.values()) == evaluation.stats.tolist()


OWN_IDS = {
    "text with zeros": lambda number: f"{number:06d}",
    "words": lambda number: f"frame {number}",
    "128 bits": lambda number: 2**127 + number,
    "floats": lambda number: number + 0.5,
    "whole floats": float,
    "negative and huge": lambda number: -(2**62) - number,
    "mixed": lambda number: str(number) if number % 2 else number,
}


@pytest.mark.parametrize("own", OWN_IDS.values(), ids=OWN_IDS)
def test_results_have_the_ids_of_the_annotation_file(coco_directory, tmp_path, data, own):
    """The same numbers as with integers, and pycocotools takes the result file on the user's own annotation file."""
    content = json.loads((coco_directory / "annotations" / "instances_val2017.json").read_text())
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").symlink_to(coco_directory / "val2017")
    for image in content["images"]:
        image["id"] = own(image["id"])
    for entry in content["annotations"]:
        entry.update(id=entry["id"] + 1, image_id=own(entry["image_id"]), category_id=own(entry["category_id"]))
    for category in content["categories"]:
        category["id"] = own(category["id"])
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(content))
    given = load_detection_data(tmp_path, "val", strict=True)
    expected = evaluate_detector(Oracle(data, processor()), processor(), data, progress=False)
    result = evaluate_detector(Oracle(given, processor()), processor(), given, progress=False)
    assert result.metrics == expected.metrics
    written = json.loads(json.dumps(result.predictions))
    for key, entries in (("image_id", "images"), ("category_id", "categories")):
        known = {repr(entry["id"]) for entry in content[entries]}
        assert {repr(prediction[key]) for prediction in written} <= known
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCO(str(file)).loadRes(written)
    assert len(found.anns) == len(written) > 0
    rows = contact_sheet_rows(given, result.predictions, threshold=0.5, max_images=3)
    assert [len(row.detected) for row in rows] == [len(row.annotated) for row in rows]
    assert [row.caption for row in rows] == [f"image {image['id']}" for image in content["images"][:3]]


@pytest.mark.parametrize("make", [scattering_model, None], ids=["deperceiver", "detr"])
@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 50, "num_workers": 2}])
def test_batch_size_and_workers_change_no_bit(data, make, options):
    model, image_processor = (make(), processor()) if make else tiny_detr()
    reference = evaluate_detector(model, image_processor, data, batch_size=3, progress=False)
    result = evaluate_detector(model, image_processor, data, progress=False, **options)
    assert dataclasses.replace(result, seconds=0) == dataclasses.replace(reference, seconds=0)
    assert len(reference.predictions) == 11 * 20


def tiny_detr():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    backbone = CONFIG_MAPPING["timm_backbone"](backbone="test_resnet", out_indices=[4])
    model = DetrForObjectDetection(DetrConfig(backbone_config=backbone, **sizes, **heads, **labelled(LABEL_NAMES)))
    return model.eval(), DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})


@pytest.mark.parametrize("threads", [1, 2])
def test_each_image_is_computed_alone_in_one_thread(data, threads):
    before = torch.get_num_threads()
    oracle = Oracle(data, processor())
    oracle.train()
    try:
        torch.set_num_threads(threads)
        evaluate_detector(oracle, processor(), data, progress=False)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert oracle.calls == [(1, 1)] * 11
    assert oracle.training


def test_batched_forward_batches_images_of_one_size(data):
    oracle = Oracle(data, processor())
    result = evaluate_detector(oracle, processor(), data, batch_size=4, batched_forward=True, progress=False)
    assert sorted(size for size, _ in oracle.calls) == [1, 3, 3, 4]
    assert result.predictions == evaluate_detector(oracle, processor(), data, progress=False).predictions


def test_boundaries_of_size_can_be_moved(data):
    """The objects have sides of 6 to 30 pixels: all small for COCO."""
    oracle = Oracle(data, processor(), dropped=1)
    plain = evaluate_detector(oracle, processor(), data, progress=False)
    moved = evaluate_detector(oracle, processor(), data, area_boundaries=(15.0**2, 22.0**2), progress=False)
    assert (plain.metrics["ap_medium"], plain.metrics["ap_large"]) == (-1, -1)
    assert all(moved.metrics[f"ap_{size}"] > 0 for size in ("small", "medium", "large"))
    assert moved.metrics["ap"] == plain.metrics["ap"]
    for wrong in ((100, 10), (0, 10), (10,), (10, float("inf"))):
        with pytest.raises(ValueError, match="area_boundaries"):
            evaluate_detector(oracle, processor(), data, area_boundaries=wrong, progress=False)


def test_random_state_is_left_alone(data):
    model = scattering_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    evaluate_detector(model, processor(), data, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_numbers_that_are_not_finite_are_refused(data):
    model = scattering_model()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "class" in name).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="image_id"):
        evaluate_detector(model, processor(), data, progress=False)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    scattering_model().save_pretrained(directory)
    processor().save_pretrained(directory)
    return directory


def test_two_processes_give_the_result_of_one(model_directory, coco_directory, tmp_path):
    arguments = ["--model", model_directory, "--dataset", coco_directory, "--num_workers", "0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output = tmp_path / "sub" / "two.json"
    run = subprocess.run(
        [*launch, SCRIPT, *arguments, "--output", output, "--batch_size", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    two = json.loads(output.read_text())
    job = prepare_evaluation(
        str(model_directory), str(coco_directory), output=str(tmp_path / "one.json"), batch_size=3, progress=False
    )
    job.run()
    one = json.loads((tmp_path / "one.json").read_text())
    assert two["settings"]["num_processes"] == 2
    assert (two["metrics"], two["per_class"]) == (one["metrics"], one["per_class"])
    assert Path(two["predictions"]).read_text() == Path(one["predictions"]).read_text()
    assert list(one["metrics"]) == NAMES
    assert (one["num_images"], one["split"], one["model"]) == (11, "val", str(model_directory))
    for name in (*NAMES, *LABEL_NAMES):
        assert any(line.split("  ")[0].strip() == name for line in run.stdout.splitlines()), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "one_predictions.json", "sub"]


def test_boundaries_of_size_are_in_the_settings(model_directory, coco_directory, tmp_path):
    for sizes, areas in (({}, [1024, 9216]), ({"size_boundaries": (15, 22)}, [225, 484])):
        arguments = {"output": str(tmp_path / "x.json"), "progress": False, **sizes}
        result = prepare_evaluation(str(model_directory), str(coco_directory), **arguments).run()
        assert json.loads((tmp_path / "x.json").read_text())["settings"]["area_boundaries"] == areas
        assert (result.metrics["ap_large"] >= 0) == bool(sizes)


def test_settings_are_all_that_the_numbers_may_depend_on(model_directory, coco_directory, tmp_path):
    arguments = {"output": str(tmp_path / "x.json"), "device": "cpu", "progress": False, "batch_size": 3}
    report = prepare_evaluation(str(model_directory), str(coco_directory), **arguments).run().report
    assert EvaluationReport.read(tmp_path / "x.json").metrics == report.metrics
    settings = json.loads((tmp_path / "x.json").read_text())["settings"]
    options = {"mixed_precision", "area_boundaries", "batch_size", "num_workers", "max_detections", "batched_forward"}
    options |= {"on_bad_image"}
    assert settings.keys() == options | {"num_processes", "device", "image_size"}
    assert (settings["batch_size"], settings["num_workers"], settings["max_detections"]) == (3, 0, [1, 10, 100])


def test_a_crowd_needs_more_latents_and_more_detections_and_is_told_so(tmp_path, caplog):
    """300 latents of a model with 9 find what 9 cannot, and AR counts more than 100 of a class if asked to."""
    data = "synthetic:image_size=96,min_objects=110,max_objects=110,min_side=4,max_side=5,num_samples=2"
    tiny_v2_model(num_labels=8, id2label=dict(enumerate(SHAPES))).save_pretrained(tmp_path / "model")
    size = {"height": 96, "width": 96}
    DePerceiverV2ImageProcessor(size=size).save_pretrained(tmp_path / "model")
    given = {"output": str(tmp_path / "x.json"), "progress": False}
    with caplog.at_level("WARNING", logger="deperceiver_hf"):
        few = prepare_evaluation(str(tmp_path / "model"), data, **given).run()
    assert sum("110 objects in an image" in record.message for record in caplog.records) == 1
    assert len(few.predictions) == 2 * 9
    assert "num_queries" not in few.report.settings
    caplog.clear()
    given |= {"num_queries": 300, "max_detections": (1, 10, 150)}
    with caplog.at_level("WARNING", logger="deperceiver_hf"):
        many = prepare_evaluation(str(tmp_path / "model"), data, **given).run()
    assert not any("objects" in record.message for record in caplog.records)
    tokens = 12 * 12 + 6 * 6
    assert len(many.predictions) == 2 * tokens  # fewer than 300
    assert "ar150" in many.metrics
    assert (many.report.settings["num_queries"], many.report.settings["max_detections"]) == (300, (1, 10, 150))


def test_unknown_option_is_refused(data):
    with pytest.raises(TypeError, match="batch_sise"):
        evaluate_detector(Oracle(data, processor()), processor(), data, batch_sise=4)


def test_command_ends_with_one_line_for_a_mistake(coco_directory, tmp_path, capsys):
    options = {"model": tmp_path, "dataset": coco_directory, "output": tmp_path / "x.json"}
    assert main(["evaluate", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]) == 2
    printed = capsys.readouterr().err
    assert "config.json" in printed
    assert len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "/nowhere/model"}, FileNotFoundError, "no directory /nowhere/model"),
        ({"model": __file__}, ValueError, "is a file"),
        ({"dataset": "/nowhere/data"}, (OSError, ValueError), "/nowhere/data"),
        ({"split": "train"}, FileNotFoundError, "train"),
        ({"output": "/proc/none/x.json"}, OSError, "/proc/none"),
        ({"output": os.path.dirname(__file__)}, IsADirectoryError, "is a directory"),
        ({"device": "cuda:77"}, ValueError, "cuda:77"),
        ({"device": "toaster"}, ValueError, "toaster"),
        ({"mixed_precision": "int3"}, ValueError, "int3"),
        ({"max_detections": (10, 1)}, ValueError, "max_detections"),
        ({"size_boundaries": (96, 32)}, ValueError, "size_boundaries .* 96 32"),
        ({"size_boundaries": (32,)}, ValueError, "size_boundaries"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"num_workers": -1}, ValueError, "num_workers"),
    ],
)
def test_mistakes_are_found_before_anything_runs(model_directory, coco_directory, tmp_path, change, error, message):
    arguments = {"model": str(model_directory), "dataset": str(coco_directory), "output": str(tmp_path / "x.json")}
    with pytest.raises(error, match=message):
        prepare_evaluation(**{**arguments, **change})
    assert not list(tmp_path.iterdir())


def test_weights_that_are_missing_are_refused(model_directory, coco_directory, tmp_path):
    config = json.loads((model_directory / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("model.safetensors", "preprocessor_config.json"):
        (broken / name).write_bytes((model_directory / name).read_bytes())
    (broken / "config.json").write_text(json.dumps({**config, "num_self_attends_per_block": 9}))
    with pytest.raises(ValueError, match=r"lacks \d+ weights"):
        prepare_evaluation(str(broken), str(coco_directory), output=str(tmp_path / "x.json"))


def test_classes_that_do_not_fit_are_refused_before_anything_runs(model_directory, tmp_path):
    content = coco_content()
    for category in content["categories"]:
        category["name"] = f"kind of {category['name']}"
    directory = write_coco(tmp_path / "data", content)
    with pytest.raises(ValueError, match="No class of the model"):
        prepare_evaluation(str(model_directory), str(directory), output=str(tmp_path / "x.json"))
