# SPDX-License-Identifier: Apache-2.0
"""Annotations that are broken at random: either records come out that keep to their schema, with every image and
every object accounted for, or one line says what is wrong.

`python tests/test_fuzz_annotations.py 2000` tries so many of each kind and prints the seeds of those that fail.
"""

import contextlib
import copy
import io
import json
import random
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import data_copies
from coco_samples import coco_content, write_coco
from deperceiver_hf.data import DETECTION_FEATURES, DetectionData, load_detection_data

SAMPLE = 60
ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 3, 7, 7.0, 0.5, 2**31, 2**63, -(2**63) - 1, 2**200, 1e308, 5e-324),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        " ",
        "0",
        "1",
        "7",
        "007",
        "true",
        "x",
        "\ud800",
        "\0",
        "ä" * 3000,
    ),
    *("[1, 2, 3, 4]", "../../x.png", "/etc/hosts", "C:\\x.png", "~nobody/x", "http://[", "a%zz", "?d=%", "000007.PNG"),
    *([], {}, [1], [1, 2, 3, 4], [[1, 2, 3, 4]], [None] * 4, {"x": 1, "y": 1, "width": 5, "height": 5}, {"x": None}),
    *([True, 1, 5, 5], [1, 1, 1e308, 1e308], [-1e308, 1, 1.7e308, 5], [0.1, 0.1, 1e-30, 1e-30], [2**400, 1, 1, 1]),
)
LEFT_OUT_IMAGES = ("invalid_image_entry", "duplicate_image_id", "missing_image_file", "outside_image_file")
LEFT_OUT_IMAGES = (*LEFT_OUT_IMAGES, "unreadable_image")
LEFT_OUT_OBJECTS = ("invalid_annotation", "unknown_image", "unknown_category", "invalid_box", "empty_box")
LEFT_OUT_OBJECTS = (*LEFT_OUT_OBJECTS, "box_outside_image")


def places(value, path=()):
    """The paths to everything in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def mutate(content, rng: random.Random) -> None:
    """Change one thing of a JSON value in place."""
    found = list(places(content))
    if not found:
        return
    *path, key = rng.choice(found)
    parent = content
    for step in path:
        parent = parent[step]
    change = rng.random()
    if change < 0.6:
        parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif change < 0.75:
        del parent[key]
    elif change < 0.85 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    else:
        others = [place for place in found if place[-1] == key] if isinstance(key, str) else found
        source = content
        for step in rng.choice(others):
            source = source[step]
        parent[key] = copy.deepcopy(source)


def spoil(text: str, rng: random.Random) -> bytes:
    """The text, now and then cut off, with a character changed or in another encoding."""
    data = bytearray(text.encode())
    change = rng.random()
    if change < 0.05:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if change < 0.12 and data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    if change > 0.98:
        return text.encode("utf-16")
    return bytes(data)


def check(data: DetectionData, *, num_images: int | None, num_objects: int | None) -> None:
    """The schema's promises, and that nothing has gone without a count."""
    report = data.report
    assert data.dataset.features == DETECTION_FEATURES
    rows = data.dataset.with_format(None).remove_columns("image")[:]
    assert len(set(rows["image_id"])) == report.num_images == len(rows["image_id"]) > 0
    objects = [entry for entry in rows["objects"]]
    counts = [len(entry["bbox"]) for entry in objects]
    assert all(len(column) == count for entry, count in zip(objects, counts, strict=True) for column in entry.values())
    assert sum(counts) == report.num_objects
    for width, height, entry in zip(rows["width"], rows["height"], objects, strict=True):
        boxes = np.array(entry["bbox"], dtype=np.float64).reshape(-1, 4)
        assert np.isfinite(boxes).all()
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] > 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= np.array([width, height]) * (1 + 1e-12)).all()
        assert np.isfinite(np.array(entry["area"], dtype=np.float32)).all()
        assert all(area > 0 for area in entry["area"])
        assert all(0 <= label < len(data.label_names) for label in entry["category"])
    assert len(set(data.label_names)) == len(data.label_names) == len(data.category_ids)
    json.dumps([data.label_names, [data.own_image_id(i) for i in rows["image_id"]]], ensure_ascii=False).encode()
    report.summary().encode()
    lost = {name: sum(report.counts.get(issue, 0) for issue in issues) for name, issues in REPORTED.items()}
    if num_images is not None:
        assert report.num_images + lost["images"] == num_images
    if num_objects is not None and not lost["images"]:
        assert report.num_objects + lost["objects"] == num_objects


TEXT_FORMATS = ("yolo", "voc", "csv")
REPORTED = {"images": LEFT_OUT_IMAGES, "objects": LEFT_OUT_OBJECTS}


def load(path: Path, split: str, **given) -> bool:
    """Load and check; `False` if the data were refused, in one line."""
    refusal = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            data = load_detection_data(path, split)
    except (ValueError, OSError) as error:
        refusal = error
    if refusal is not None:
        assert str(refusal).strip()
        assert "\n" not in str(refusal).strip()
        assert type(refusal).__module__.split(".")[0] in ("builtins", "deperceiver_hf"), type(refusal)
        return False
    check(data, **given)
    return True


def try_coco(root: Path, seed: int) -> bool:
    """Break the annotations of a COCO directory (made before), and load it."""
    rng = random.Random(seed)
    content = coco_content()
    for _ in range(rng.randrange(1, 4)):
        mutate(content, rng)
    text = json.dumps(content)
    spoiled = spoil(text, rng)
    (root / "annotations" / "instances_val2017.json").write_bytes(spoiled)
    intact = spoiled == text.encode()
    given = [content.get(key) if intact else None for key in ("images", "annotations")]
    num_images, num_objects = (len(value) if isinstance(value, list) else None for value in given)
    return load(root, "val", num_images=num_images, num_objects=num_objects)


def image_folder(root: Path) -> list[dict]:
    rows = []
    for index in range(3):
        (root / "train").mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (40, 30), (90, 9 * index, 9)).save(root / "train" / f"{index}.png")
        objects = {"bbox": [[1, 2, 10, 12], [5.5, 5, 20, 10]], "category": ["a", "b"], "iscrowd": [0, 1], "id": [1, 2]}
        rows.append({"file_name": f"{index}.png", "image_id": index, "width": 40, "height": 30, "objects": objects})
    return rows


def try_datasets(root: Path, seed: int) -> bool:
    """Break the metadata of an image folder in every row alike or in one, and load it."""
    rng = random.Random(seed)
    rows = image_folder(root)
    for _ in range(rng.randrange(1, 3)):
        if rng.random() < 0.5:  # a column of another type
            rng_of_rows = rng.randrange(10**6)
            for row in rows:
                mutate(row, random.Random(rng_of_rows))
        else:
            mutate(rng.choice(rows), rng)
    text = "\n".join(json.dumps(row) for row in rows)
    (root / "train" / "metadata.jsonl").write_bytes(spoil(text, rng))
    return load(root, "train", num_images=None, num_objects=None)


ODD_WORDS = [
    *(
        "",
        " ",
        "-1",
        "0",
        "1.5",
        "1e400",
        "-inf",
        "nan",
        "7" * 30,
        "0x1",
        "\x00",
        "\ud800",
        "a,b",
        '"',
        "'",
        "é",
        "红",
        "<",
    ),
    *(
        "../../x.png",
        "C:\\x.png",
        "[",
        "{}",
        "null",
        "~",
        "&amp;",
        "]]>",
        "<!--",
        "names:",
        "train.txt",
        "\u202e",
        "#",
    ),
]


def try_text(root: Path, seed: int) -> bool:
    """Break a data set of YOLO, Pascal VOC or a CSV (made before), in one of its text files, and load it."""
    rng = random.Random(seed)
    source = root / rng.choice(TEXT_FORMATS)
    work = root / f"{seed}"
    shutil.copytree(source, work)
    files = [path for path in sorted(work.rglob("*")) if path.suffix in (".txt", ".xml", ".csv", ".yaml")]
    for file in rng.sample(files, min(len(files), rng.randrange(1, 4))):
        parts = re.split(r"(\s+|[,<>:\[\]]+)", file.read_text(encoding="utf-8"))
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(parts))
            parts[place : place + rng.randrange(1, 3)] = rng.choice([[rng.choice(ODD_WORDS)], [], [parts[place]] * 2])
        text = "".join(parts).encode("utf-8", "replace").decode()
        file.write_bytes(spoil(text, rng))
    try:
        return load(work, "train", num_images=None, num_objects=None)
    finally:
        shutil.rmtree(work)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_coco_annotations_broken_at_random_load_or_are_refused_in_a_line(tmp_path):
    write_coco(tmp_path)
    loaded = [try_coco(tmp_path, seed) for seed in range(SAMPLE)]
    assert SAMPLE / 4 < sum(loaded) < SAMPLE  # both ends are tried


def test_metadata_broken_at_random_load_or_are_refused_in_a_line(tmp_path):
    loaded = [try_datasets(tmp_path / str(seed), seed) for seed in range(SAMPLE // 4)]
    assert 0 < sum(loaded) < SAMPLE // 4


def write_text_formats(root: Path) -> None:
    for name in TEXT_FORMATS:
        data_copies.COPIES[name](root / name)


def test_text_formats_broken_at_random_load_or_are_refused_in_a_line(tmp_path):
    write_text_formats(tmp_path)
    loaded = [try_text(tmp_path, seed) for seed in range(SAMPLE)]
    assert SAMPLE / 4 < sum(loaded) < SAMPLE


def main(count: int) -> int:
    """Try many, with a line for each that fails."""
    failures = 0
    for attempt in (try_coco, try_text, try_datasets):
        loaded = 0
        for seed in range(count // 10 if attempt is try_datasets else count):
            with tempfile.TemporaryDirectory() as work, contextlib.redirect_stderr(io.StringIO()):
                root = Path(work)
                if attempt is try_coco:
                    write_coco(root)
                elif attempt is try_text:
                    write_text_formats(root)
                try:
                    loaded += attempt(root, seed)
                except Exception as error:
                    failures += 1
                    print(f"{attempt.__name__} {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        print(f"{attempt.__name__}: {loaded} loaded")
    return failures


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]))))
