# SPDX-License-Identifier: Apache-2.0
"""The whole way in a few minutes on a CPU: train on synthetic scenes, evaluate, reload as a pipeline, draw.

The first architecture learns slowly (the paper trained it for 50 epochs of COCO), so in this time it can only learn a
few scenes by heart. That it does so shows that every part works; the AP on other scenes shows what it is not.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import transformers

from .data import DetectionData, load_detection_data
from .data.images import decode_rgb
from .drawing import contact_sheet_rows, draw_contact_sheet, require_supervision
from .evaluation import evaluate_detector
from .output_files import write_json
from .saved_models import load_detector
from .training import DetectionTrainer, TrainingOptions

SCENES = "synthetic:image_size=128,min_objects=2,max_objects=6"
NUM_SCENES = 16
THRESHOLD = 0.5


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration made.

    Attributes:
        trained_now: `False` if the model of an earlier run was there.
        minutes: Spent training, now or then.
        ap_learned: AP on the scenes that it was trained on.
        ap_other: AP on other scenes.
        model: Directory of the model.
        contact_sheet: Picture of detections beside the ground truth.
        metrics: JSON file with all numbers.
    """

    trained_now: bool
    minutes: float
    ap_learned: float
    ap_other: float
    model: Path
    contact_sheet: Path
    metrics: Path

    def summary(self) -> str:
        """A few lines for the user."""
        trained = "Trained" if self.trained_now else "Kept the model that an earlier run trained"
        return (
            f"{trained} in {self.minutes:.1f} minutes on {NUM_SCENES} synthetic scenes.\n"
            f"AP on these scenes, learned by heart: {100 * self.ap_learned:.1f}\n"
            f"AP on other scenes, for which it would have to train for much longer: {100 * self.ap_other:.1f}\n"
            f"Contact sheet (annotated | detected): {self.contact_sheet}\n"
            f'Model, for pipeline("object-detection", model=...): {self.model}\n'
            f"All numbers: {self.metrics}"
        )


def run_demo(output_dir: str | Path, max_minutes: float = 4.5) -> DemoResult:
    """Train (unless an earlier run in the directory has), evaluate, detect, draw.

    Args:
        output_dir: Where everything is written.
        max_minutes: Limit of the training.

    Raises:
        OSError: The directory cannot be written to, or holds something else.
        ValueError: The directory holds an unfinished run of other options.
        ImportError: `supervision` is not installed.
    """
    require_supervision()
    output_dir = Path(output_dir)
    training_dir = output_dir / "training"
    summary = training_dir / "summary.json"
    trained_now = not summary.is_file()
    if trained_now:
        result = DetectionTrainer(demo_options(training_dir, max_minutes)).train()
        if result.interrupted:
            raise KeyboardInterrupt
    seconds = json.loads(summary.read_text(encoding="utf-8"))["seconds"]

    model_dir = training_dir / "last"
    model, processor = load_detector(str(model_dir))
    learned = load_detection_data(SCENES, "train", max_samples=NUM_SCENES)
    other = load_detection_data(SCENES, "val", max_samples=100)
    metrics = {
        name: evaluate_detector(model, processor, data).metrics
        for name, data in (("learned_scenes", learned), ("other_scenes", other))
    }
    write_json(output_dir / "metrics.json", metrics)
    rows = contact_sheet_rows(learned, detect(model_dir, learned), threshold=THRESHOLD, max_images=8)
    contact_sheet = output_dir / "contact_sheet.png"
    draw_contact_sheet(rows, learned.label_names, cell_width=320).save(contact_sheet)
    return DemoResult(
        trained_now=trained_now,
        minutes=seconds / 60,
        ap_learned=metrics["learned_scenes"]["ap"],
        ap_other=metrics["other_scenes"]["ap"],
        model=model_dir,
        contact_sheet=contact_sheet,
        metrics=output_dir / "metrics.json",
    )


def demo_options(output_dir: Path, max_minutes: float) -> TrainingOptions:
    """Options of the demonstration's training: a small model that has time to learn its scenes by heart."""
    return TrainingOptions(
        dataset=SCENES,
        max_train_samples=NUM_SCENES,
        output_dir=str(output_dir),
        resume="auto" if output_dir.exists() else None,
        backbone="test_resnet",
        no_pretrained_backbone=True,
        downsample_factor=16,
        hidden_dim=128,
        num_latents=64,
        enc_blocks=1,
        enc_layers_per_block=2,
        num_queries=30,
        dropout=0.0,
        shortest_edge=128,
        longest_edge=128,
        augmentation="none",
        batch_size=8,
        num_workers=0,
        lr=7e-4,
        lr_backbone=7e-4,
        clip_max_norm=1.0,
        warmup_steps=50,
        epochs=1300,
        lr_drop=1100,
        max_minutes=max_minutes,
        eval_every=0,
        save_every=100,
    )


def detect(model_dir: str | Path, data: DetectionData) -> list[dict]:
    """Detections of a saved model in COCO's result format, by way of `pipeline("object-detection")`."""
    detector = transformers.pipeline("object-detection", model=str(model_dir))
    labels = {name: category for name, category in zip(data.label_names, data.category_ids, strict=True)}
    results = []
    for record in data.dataset:
        image = decode_rgb(record["image"], record["image_id"])
        for found in detector(image, threshold=THRESHOLD):
            left, top, right, bottom = (found["box"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
            results.append(
                {
                    "image_id": record["image_id"],
                    "category_id": labels[found["label"]],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": found["score"],
                }
            )
    return results
