# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a saved model as transformers' example for object detection does, with the code that is saved beside it:
`python trainer_example.py MODEL OUTPUT_DIR`. Nothing of this package is imported."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PilImage
from torchvision.ops import box_convert, box_iou
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    pipeline,
)

NAMES = ["red", "green", "blue"]
SIDE = 96


def make_split(count: int, seed: int) -> Dataset:
    """Images of one to three coloured rectangles."""
    random = np.random.default_rng(seed)
    columns: dict[str, list] = {"image_id": [], "image": [], "objects": []}
    for image_id in range(count):
        pixels = np.full((60, 90, 3), 100, dtype=np.uint8)
        objects: dict[str, list] = {"bbox": [], "category": [], "area": []}
        for _ in range(random.integers(1, 4)):
            (x, y), (width, height) = random.integers(0, 40, 2).tolist(), random.integers(8, 20, 2).tolist()
            category = int(random.integers(3))
            pixels[y : y + height, x : x + width] = 255 * np.eye(3, dtype=np.uint8)[category]
            for name, value in (("bbox", [x, y, width, height]), ("category", category), ("area", width * height)):
                objects[name].append(value)
        for name, value in (("image_id", image_id), ("image", PilImage.fromarray(pixels)), ("objects", objects)):
            columns[name].append(value)
    fields = {
        "bbox": List(List(Value("float32"))),
        "category": List(ClassLabel(names=NAMES)),
        "area": List(Value("int64")),
    }
    return Dataset.from_dict(columns, Features({"image_id": Value("int64"), "image": Image(), "objects": fields}))


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Images of one size, which is the processor's `pad_size`."""
    stacked = {name: torch.stack([item[name] for item in batch]) for name in ("pixel_values", "pixel_mask")}
    return {**stacked, "labels": [item["labels"] for item in batch]}


def main(model_name: str, output_dir: str) -> None:
    trusted = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(
        model_name, id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)}, **trusted
    )
    model = AutoModelForObjectDetection.from_pretrained(
        model_name, config=config, ignore_mismatched_sizes=True, **trusted
    )
    processor = AutoImageProcessor.from_pretrained(
        model_name,
        do_resize=True,
        size={"max_height": SIDE, "max_width": SIDE},
        do_pad=True,
        pad_size={"height": SIDE, "width": SIDE},
        **trusted,
    )

    def prepare(examples: dict[str, list]) -> Any:
        annotations = []
        for image_id, objects in zip(examples["image_id"], examples["objects"], strict=True):
            rows = zip(objects["bbox"], objects["category"], objects["area"], strict=True)
            annotations.append(
                {
                    "image_id": image_id,
                    "annotations": [
                        {"image_id": image_id, "category_id": category, "iscrowd": 0, "area": area, "bbox": bbox}
                        for bbox, category, area in rows
                    ],
                }
            )
        images = [np.array(image.convert("RGB")) for image in examples["image"]]
        return processor(images=images, annotations=annotations, return_tensors="pt")

    def compute_metrics(results: EvalPrediction) -> dict[str, float]:
        best = []
        for outputs, targets in zip(results.predictions, results.label_ids, strict=True):
            sizes = torch.tensor(np.array([target["orig_size"] for target in targets]))
            predicted = SimpleNamespace(logits=torch.tensor(outputs[1]), pred_boxes=torch.tensor(outputs[2]))
            detected = processor.post_process_object_detection(predicted, threshold=0.0, target_sizes=sizes)
            for found, target, (height, width) in zip(detected, targets, sizes.tolist(), strict=True):
                truth = box_convert(torch.tensor(target["boxes"]), "cxcywh", "xyxy")
                truth = truth * torch.tensor([width, height, width, height])
                best += box_iou(truth, found["boxes"]).max(1).values.tolist()
        return {"iou": float(np.mean(best))}

    arguments = TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="iou",
        greater_is_better=True,
        remove_unused_columns=False,
        eval_do_concat_batches=False,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=make_split(4, seed=0).with_transform(prepare),
        eval_dataset=make_split(4, seed=1).with_transform(prepare),
        processing_class=processor,
        data_collator=collate,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate(make_split(2, seed=2).with_transform(prepare), metric_key_prefix="test")
    trainer.create_model_card(finetuned_from=model_name, dataset="squares", tags=["object-detection", "vision"])

    detector = pipeline("object-detection", model=output_dir, **trusted)
    history = [entry["eval_iou"] for entry in trainer.state.log_history if "eval_iou" in entry]
    summary = {
        "history": history,
        "best": trainer.state.best_metric,
        "test": metrics["test_iou"],
        "module": type(detector.model).__module__,
        "num_labels": detector.model.config.num_labels,
        "size": dict(detector.image_processor.size),
        "pad_size": dict(detector.image_processor.pad_size),
        "detections": detector(make_split(1, seed=3)[0]["image"], threshold=0.0),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main(*sys.argv[1:])
