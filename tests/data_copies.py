# SPDX-License-Identifier: Apache-2.0
"""The same images and objects in every format that is read, written by hand as other tools write them."""

import json
from pathlib import Path

import numpy as np
import PIL.Image

NAMES = ["zebra", "ant", "red moth"]
# Of each split: name, width, height, objects as (label, x, y, width, height). An image without objects, another size.
SCENES = {
    "train": [
        ("a 1.png", 64, 48, [(0, 2.3, 5.1, 10.1, 20.7), (2, 30, 10, 34, 38)]),
        ("b.png", 48, 64, []),
        ("c é.png", 64, 48, [(1, 0, 0, 64, 48), (0, 7, 9, 13, 11)]),
        ("d.png", 60, 60, [(1, 10.25, 3.75, 20.5, 41.5)]),
        ("e.png", 64, 48, [(2, 1, 1, 9, 9)]),
    ],
    "val": [("f.png", 64, 48, [(0, 5, 6, 20, 21)]), ("g.png", 64, 48, [(2, 8.4, 8.8, 16.2, 30)])],
}


def picture(name: str, width: int, height: int) -> PIL.Image.Image:
    seed = [ord(letter) for letter in name]
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)


def write_images(directory: Path, split: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, width, height, _ in SCENES[split]:
        picture(name, width, height).save(directory / name)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def coco_content(split: str, first_id: int = 0) -> dict:
    images, annotations = [], []
    for number, (name, width, height, objects) in enumerate(SCENES[split], start=1):
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for label, *box in objects:
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": label + first_id, "bbox": box}
            annotations.append({**entry, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": label + first_id, "name": name} for label, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco(root: Path) -> None:
    for split in SCENES:
        write_images(root / split, split)
        text(root / "annotations" / f"instances_{split}.json", json.dumps(coco_content(split)))


def roboflow(root: Path) -> None:
    """COCO as Roboflow exports it, with the group of the classes as the first category."""
    for split, folder in (("train", "train"), ("val", "valid")):
        write_images(root / folder, split)
        content = coco_content(split, first_id=1)
        content["categories"] = [
            {"id": 0, "name": "animals", "supercategory": "none"},
            *({**category, "supercategory": "animals"} for category in content["categories"]),
        ]
        text(root / folder / "_annotations.coco.json", json.dumps(content))
    text(root / "README.roboflow.txt", "An export.\n")


def yolo_rows(width: int, height: int, objects: list) -> str:
    rows = [(label, (x + w / 2) / width, (y + h / 2) / height, w / width, h / height) for label, x, y, w, h in objects]
    return "".join(" ".join(map(str, row)) + "\n" for row in rows)


def yolo(root: Path) -> None:
    """As Roboflow exports it: a folder for each split, and paths that lead out of the directory."""
    for split, folder in (("train", "train"), ("val", "valid")):
        write_images(root / folder / "images", split)
        for name, width, height, objects in SCENES[split]:
            if objects:
                text(root / folder / "labels" / f"{name[:-4]}.txt", yolo_rows(width, height, objects))
    text(root / "data.yaml", f"train: ../train/images\nval: ../valid/images\nnc: 3\nnames: {json.dumps(NAMES)}\n")


def voc_xml(name: str, width: int, height: int, objects: list) -> str:
    described = "".join(
        f"<object><name>{NAMES[label]}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
        f"<xmax>{round(x + w, 6)}</xmax><ymax>{round(y + h, 6)}</ymax></bndbox></object>"
        for label, x, y, w, h in objects
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><folder>x</folder><filename>{name}</filename>{size}{described}</annotation>"


def voc(root: Path) -> None:
    for split, scenes in SCENES.items():
        write_images(root / "JPEGImages", split)
        for scene in scenes:
            text(root / "Annotations" / f"{scene[0][:-4]}.xml", voc_xml(*scene))
        text(root / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{scene[0][:-4]}\n" for scene in scenes))
    text(root / "labels.txt", "\n".join(NAMES))


def csv_rows(split: str) -> list[list]:
    rows = []
    for name, _, _, objects in SCENES[split]:
        rows += [[name, x, y, round(x + w, 6), round(y + h, 6), NAMES[label]] for label, x, y, w, h in objects]
        rows += [] if objects else [[name, "", "", "", "", ""]]
    return rows


def csv(root: Path) -> None:
    """As Keras-RetinaNet reads it."""
    for split in SCENES:
        write_images(root / "images", split)
        text(root / f"{split}.csv", "".join(",".join(map(str, row)) + "\n" for row in csv_rows(split)))
    text(root / "classes.csv", "".join(f"{name},{label}\n" for label, name in enumerate(NAMES)))


COPIES = {"coco": coco, "roboflow": roboflow, "yolo": yolo, "voc": voc, "csv": csv}


def records(data) -> list[tuple]:
    """What a data set says of its images: name, size, boxes and classes."""
    names = [Path(image["path"]).name for image in data.stored_images["image"]]
    rows = data.dataset.with_format(None).remove_columns("image")
    return [
        (
            name,
            row["width"],
            row["height"],
            [(label, *box) for label, box in zip(row["objects"]["category"], row["objects"]["bbox"], strict=True)],
        )
        for name, row in zip(names, rows, strict=True)
    ]
