# SPDX-License-Identifier: Apache-2.0
"""A small directory in COCO's layout, for tests of whatever reads one."""

import json
from pathlib import Path

import numpy as np
import PIL.Image

# COCO's own ids of these categories; 12, for instance, is a hole.
CATEGORIES = [
    {"id": 90, "name": "toothbrush"},
    {"id": 1, "name": "person"},
    {"id": 11, "name": "fire hydrant"},
    {"id": 13, "name": "stop sign"},
]
SIZES = {7: (60, 40), 3: (40, 60), 25: (50, 50), 100: (60, 40)}  # image_id: (width, height)


def annotation(annotation_id, image_id, category_id, bbox, **more) -> dict:
    return {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": 0, **more}


def coco_content() -> dict:
    """Four clean images: two with objects, one with a crowd only (25), one without annotations (100)."""
    return {
        "images": [
            {"id": image_id, "file_name": f"{image_id:06d}.png", "width": width, "height": height}
            for image_id, (width, height) in SIZES.items()
        ],
        "annotations": [
            annotation(11, 7, 90, [2.3, 2.5, 10.1, 20.2], area=123.5, segmentation=[[1, 2, 3, 4, 5, 6]]),
            annotation(12, 3, 1, [0, 0, 40, 60], area=2000.0),
            annotation(13, 7, 13, [30.3, 10.7, 29.7, 29.3]),
            annotation(14, 25, 11, [5, 5, 20, 20], area=300.0) | {"iscrowd": 1},
        ],
        "categories": [dict(category) for category in CATEGORIES],
    }


def write_coco(
    root: Path,
    content: dict | None = None,
    *,
    annotation_file: str = "annotations/instances_val2017.json",
    image_dir: str = "val2017",
) -> Path:
    """Write the annotations and a random image for each entry that states a size; returns the directory."""
    content = coco_content() if content is None else content
    for path in (root / annotation_file, root / image_dir / "image"):
        path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for image in content["images"]:
        if {"file_name", "width", "height"} <= image.keys():
            pixels = random.integers(0, 256, size=(image["height"], image["width"], 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(root / image_dir / image["file_name"])
    (root / annotation_file).write_text(json.dumps(content))
    return root
