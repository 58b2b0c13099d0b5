# SPDX-License-Identifier: Apache-2.0
"""The model that comes with the repository: it loads everywhere, is as small as promised, and finds cells."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, ImageDraw, ImageFilter
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

EXAMPLE = Path(__file__).parents[1] / "examples" / "blood-cells"


@pytest.fixture(scope="module")
def smear():
    """A drawn smear of 640 x 480 pixels, and the boxes of its cells: four red ones and a white one."""
    image = Image.new("RGB", (640, 480), (225, 215, 210))
    draw = ImageDraw.Draw(image)
    red = [(x - 45, y - 45, x + 45, y + 45) for x, y in ((120, 100), (300, 220), (480, 340), (150, 350))]
    for left, top, right, bottom in red:
        draw.ellipse((left, top, right, bottom), fill=(205, 150, 145), outline=(190, 130, 130))
        draw.ellipse((left + 27, top + 27, right - 27, bottom - 27), fill=(222, 190, 185))
    white = (430, 55, 570, 185)
    draw.ellipse(white, fill=(190, 150, 190))
    draw.ellipse((450, 75, 545, 170), fill=(110, 50, 150))
    return image.filter(ImageFilter.GaussianBlur(2)), [("RBC", box) for box in red] + [("WBC", white)]


def test_it_finds_the_cells_of_a_drawn_smear(smear):
    image, cells = smear
    found = pipeline("object-detection", model=str(EXAMPLE))(image, threshold=0.5)
    assert sorted(detection["label"] for detection in found) == sorted(name for name, _ in cells)
    for name, box in cells:
        best = min(
            max(abs(side - edge) for side, edge in zip(detection["box"].values(), box, strict=True))
            for detection in found
            if detection["label"] == name
        )
        assert best < 20  # pixels; the rim of a drawn cell is as blurred as it is


def test_it_is_small_computes_in_float32_and_says_where_it_is_from():
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 12e6
    model = AutoModelForObjectDetection.from_pretrained(EXAMPLE)
    assert model.dtype == torch.float32
    assert model.config.id2label == {0: "RBC", 1: "WBC", 2: "Platelets"}
    assert AutoImageProcessor.from_pretrained(EXAMPLE).size["shortest_edge"] == 320
    card = ModelCard.load(EXAMPLE / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results
