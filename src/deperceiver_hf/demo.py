# SPDX-License-Identifier: Apache-2.0
"""The whole way in a few minutes on a CPU: train on synthetic scenes, evaluate on others, reload as a pipeline, draw.

The model is the smallest preset of DePerceiver v2, from random weights.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

from .data import DetectionData, load_detection_data
from .data.detections import Detections
from .data.images import decode_rgb
from .drawing import contact_sheet_rows, draw_contact_sheet, require_supervision
from .evaluation.evaluator import evaluate_detector
from .jobs import FunctionJob
from .output_files import as_path, atomic_path, write_json
from .saved_models import load_detector
from .training import DetectionTrainer, TrainingOptions
from .training.recipes import recipe_options
from .training.run_directory import RunDirectory

RECIPE = "demo"
NUM_VALIDATION_SCENES = 300
THRESHOLD = 0.5
INTERRUPTED = "Interrupted; another run goes on from here."


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration made.

    Attributes:
        trained_now: `False` if the model of an earlier run was there.
        minutes: Spent training, now or then.
        num_training_scenes: How many scenes it was trained on.
        metrics: COCO metrics on scenes that it was not trained on, as fractions.
        model: Directory of the model.
        contact_sheet: Picture of detections beside the ground truth.
        metrics_file: JSON file with all numbers.
    """

    trained_now: bool
    minutes: float
    num_training_scenes: int | None
    metrics: dict[str, float]
    model: Path
    contact_sheet: Path
    metrics_file: Path

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for the user."""
        trained = "Trained" if self.trained_now else "Kept the model that an earlier run trained"
        ap, ap50 = (100 * self.metrics[name] for name in ("ap", "ap50"))
        return (
            f"{trained} in {self.minutes:.1f} minutes on {self.num_training_scenes} scenes, from random weights.\n"
            f"On {NUM_VALIDATION_SCENES} other scenes: AP {ap:.1f}, AP50 {ap50:.1f}\n"
            f"Contact sheet (annotated | detected): {self.contact_sheet}\n"
            f'Model, for pipeline("object-detection", model=...): {self.model}\n'
            f"All numbers: {self.metrics_file}"
        )


def run_demo(output_dir: str | Path, max_steps: int | None = None) -> DemoResult:
    """Train (unless an earlier run in the directory has), evaluate, detect, draw.

    Args:
        output_dir: Where everything is written.
        max_steps: Length of the training; that of the recipe if not given. It is bounded by steps and not by minutes,
            so that every machine ends with the same model.

    Raises:
        OSError: The directory cannot be written to, or holds something else.
        ValueError: The directory holds an unfinished run of other options.
        ImportError: `supervision` is not installed.
    """
    require_supervision()
    output_dir = as_path(output_dir)
    training = RunDirectory(output_dir / "training")
    options = demo_options(training.path, max_steps)
    trained_now = not training.is_finished
    if trained_now:
        result = DetectionTrainer(options).train()
        if result.interrupted:
            raise KeyboardInterrupt
    seconds = json.loads(training.summary.read_text(encoding="utf-8"))["seconds"]

    model_dir = training.last
    model, processor = load_detector(str(model_dir))
    unseen = load_detection_data(options.dataset, "val", max_samples=NUM_VALIDATION_SCENES)
    # In float32 whatever the training left behind in the process, so that a second run says the same.
    metrics = evaluate_detector(model, processor, unseen, mixed_precision="no").metrics
    metrics_file = output_dir / "metrics.json"
    write_json(metrics_file, metrics)
    shown = load_detection_data(options.dataset, "val", max_samples=8)
    rows = contact_sheet_rows(shown, detect(model_dir, shown), threshold=THRESHOLD, max_images=8)
    contact_sheet = output_dir / "contact_sheet.png"
    with atomic_path(contact_sheet) as temporary:
        draw_contact_sheet(rows, shown.label_names, cell_width=320).save(temporary)
    minutes, scenes = seconds / 60, options.max_train_samples
    return DemoResult(trained_now, minutes, scenes, metrics, model_dir, contact_sheet, metrics_file)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of the command."""
    parser.description = (
        "Train on synthetic scenes for a few minutes, evaluate, reload through the pipeline and draw a contact sheet."
        "\n\nA second run in the same directory keeps the model that the first one trained."
    )
    parser.epilog = "example:\n  deperceiver demo --output_dir outputs/demo"
    parser.add_argument("--output_dir", default="outputs/demo", help="Where everything is written (%(default)s).")
    parser.add_argument("--max_steps", type=int, help="Length of the training, if not that of the recipe `demo`.")


def prepare(arguments: argparse.Namespace) -> FunctionJob[DemoResult]:
    """The demonstration, as the command does it."""
    return FunctionJob(run_demo, vars(arguments))


def demo_options(output_dir: Path, max_steps: int | None = None) -> TrainingOptions:
    """Options of the demonstration's training: those of the recipe `demo`."""
    return recipe_options(
        RECIPE,
        output_dir=str(output_dir),
        resume="auto" if output_dir.exists() else None,
        **({} if max_steps is None else {"max_steps": max_steps}),
    )


def detect(model_dir: str | Path, data: DetectionData) -> list[dict]:
    """Detections of a saved model in COCO's result format, by way of `pipeline("object-detection")`."""
    detector = transformers.pipeline("object-detection", model=str(model_dir))
    label2id = {name: label for label, name in enumerate(data.label_names)}
    results = []
    for record in data.dataset:
        image = decode_rgb(record["image"], record["image_id"])
        found = Detections.from_pipeline(record["image_id"], detector(image, threshold=THRESHOLD), label2id)
        results += found.to_coco(data.category_ids)
    return results
