# SPDX-License-Identifier: Apache-2.0
"""Odd annotation files, models, images, recipes, checkpoints and reports through the commands: each ends soon, with a
known code and without a traceback, and what it calls done is right.

`--fuzz 300` takes more seeds.
"""

import copy
import io
import json
import math
import random
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from deperceiver_hf.cli import main

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="a hang is ended by SIGALRM")

SECONDS = 180  # the cards of all documented models take half a minute
ODD = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        7,
        0.5,
        1.5,
        -0.0,
        1e-300,
        1e300,
        2**31,
        2**63,
        2**70,
        math.inf,
        -math.inf,
        math.nan,
    ),
    *(
        "",
        "0",
        "1",
        "nan",
        "false",
        "café",
        "红",
        "a\nb",
        "\x1b[31m",
        "\ud800",
        "x" * 300,
        "../../x.png",
        "/etc/hostname",
    ),
    *([], {}, [[]], [0, 0, 0, 0], [1, 2], {"a": 1}, [None] * 4, ["1", "2", "3", "4"], [1e400] * 4),
]
IMAGES = [
    ("PNG", "RGB"),
    ("PNG", "I;16"),
    ("PNG", "P"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("GIF", "P"),
    ("WEBP", "RGBA"),
]
IMAGES += [("TIFF", "F"), ("TIFF", "I"), ("BMP", "1"), ("PNG", "LA")]


class HangError(BaseException):
    """A command did not end in time."""


def picture(generator: random.Random) -> Image.Image:
    side = generator.choice([(48, 32), (1, 40), (64, 64), (33, 47)])
    seed = generator.randrange(1000)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*side[::-1], 3), dtype=np.uint8))


def coco_content(sizes: dict[str, tuple[int, int]]) -> dict:
    images, annotations = [], []
    for number, (name, (width, height)) in enumerate(sizes.items(), start=1):
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for place in range(2):
            box = [width / 8 + place, height / 8, width / 2, height / 2]
            entry = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0, "category_id": place + 1}
            annotations.append({"id": 2 * number + place, "image_id": number, **entry})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_data(root: Path, generator: random.Random) -> dict:
    sizes = {}
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        for number in range(4):
            image = picture(generator)
            image.save(root / split / f"{number}.png")
            sizes[f"{number}.png"] = image.size
        content = coco_content(sizes)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return content


def mutate(content, generator: random.Random) -> None:
    """Change something somewhere in JSON: another value, a missing or a doubled entry."""
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = generator.choice(keys)
        child = node[key]
        if isinstance(child, (dict, list)) and child and generator.random() < 0.8:
            node = child
            continue
        action = generator.random()
        if action < 0.6:
            node[key] = copy.deepcopy(generator.choice(ODD))
        elif action < 0.8:
            del node[key]
        elif isinstance(node, list):
            node.append(
                json.loads(json.dumps(child)) if generator.random() < 0.5 else copy.deepcopy(generator.choice(ODD))
            )
        else:
            node[f"{key}_"] = copy.deepcopy(child)
        return


def mutate_text(text: str, generator: random.Random) -> bytes:
    content = json.loads(text)
    for _ in range(generator.choice([1, 1, 2, 5])):
        mutate(content, generator)
    data = json.dumps(content).encode()
    return mutate_bytes(data, generator) if generator.random() < 0.2 else data


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.choice([0, 1, 4, 30])):
        if changed:
            changed[generator.randrange(len(changed))] = generator.randrange(256)
    if generator.random() < 0.4 and changed:
        del changed[generator.randrange(len(changed)) :]
    return bytes(changed)


def run(arguments: list, capsys) -> tuple[int, str]:
    """Exit code and what was said on stderr; in time."""

    def hang(number, frame):
        raise HangError

    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main([str(argument) for argument in arguments])
    except SystemExit as ended:  # of argparse
        code = ended.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return code, capsys.readouterr().err


def training(saved: Path, data: Path, output: Path, *options: object) -> list:
    command = [
        "train",
        "--model",
        saved,
        "--dataset",
        data,
        "--output_dir",
        output,
        "--max_steps",
        1,
        "--num_workers",
        0,
    ]
    return [*command, "--batch_size", 2, "--augmentation", "none", "--mixed_precision", "no", *options]


def evaluation(saved: Path, data: Path, output: Path) -> list:
    return ["evaluate", "--model", saved, "--dataset", data, "--output", output / "e.json", "--num_workers", 0]


def prediction(saved: Path, pictures: Path, output: Path) -> list:
    return ["predict", pictures, "--model", saved, "--output_dir", output, "--threshold", 0]


def fuzz_annotations(saved: Path, work: Path, generator: random.Random) -> list:
    write_data(work / "data", generator)
    for split in ("train", "val"):
        file = work / "data" / "annotations" / f"instances_{split}.json"
        file.write_bytes(mutate_text(file.read_text(encoding="utf-8"), generator))
    command = generator.choice([training, evaluation])
    return command(saved, work / "data", work / "out")


def fuzz_model(saved: Path, work: Path, generator: random.Random) -> list:
    write_data(work / "data", generator)
    directory = shutil.copytree(saved, work / "model")
    name = generator.choice(["config.json", "preprocessor_config.json", "model.safetensors"])
    content = (directory / name).read_bytes()
    changed = mutate_bytes(content, generator) if name.endswith("s") else mutate_text(content.decode(), generator)
    (directory / name).write_bytes(changed)
    command = generator.choice([training, evaluation, prediction])
    return command(directory, work / "data" / ("val" if command is prediction else ""), work / "out")


def fuzz_images(saved: Path, work: Path, generator: random.Random) -> list:
    write_data(work / "data", generator)
    for file in sorted((work / "data").glob("*/*.png")):
        if generator.random() < 0.5:
            kind, mode = generator.choice(IMAGES)
            image, buffer = Image.open(file), io.BytesIO()
            if mode == "I;16":
                image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
            elif mode in ("F", "I"):
                image = image.convert("L").convert(mode)
            else:
                image = image.convert("RGB").convert(mode)
            image.save(buffer, kind)
            data = buffer.getvalue()
            file.write_bytes(mutate_bytes(data, generator) if generator.random() < 0.7 else data)
    command = generator.choice([training, evaluation, prediction])
    return command(saved, work / "data" / ("val" if command is prediction else ""), work / "out")


def fuzz_recipe(saved: Path, work: Path, generator: random.Random) -> list:
    write_data(work / "data", generator)
    recipe = {
        "lr": 1e-4,
        "epochs": 1,
        "batch_size": 2,
        "lr_scheduler": "cosine",
        "seed": 3,
        "size_boundaries": [32, 96],
    }
    mutate(recipe, generator)
    text = yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", errors="surrogatepass")
    (work / "recipe.yaml").write_bytes(mutate_bytes(text, generator) if generator.random() < 0.5 else text)
    return training(saved, work / "data", work / "out", "--recipe", work / "recipe.yaml")


def fuzz_checkpoint(saved: Path, work: Path, generator: random.Random) -> list:
    odd = generator.choice([b"", b"PK\x03\x04", b"\x80\x02}q\x00.", bytes(999), json.dumps({"model": 1}).encode()])
    if generator.random() < 0.5:
        buffer = io.BytesIO()
        weights = {name: torch.zeros(2, 2) for name in ("a.weight", "transformer.latents", "class_embed.bias")}
        torch.save(generator.choice([weights, {"model": weights}, [1, 2], {"model": [3]}, None]), buffer)
        odd = mutate_bytes(buffer.getvalue(), generator)
    (work / "checkpoint.pth").write_bytes(odd)
    return ["convert", work / "checkpoint.pth", work / "out"]


def fuzz_report(saved: Path, work: Path, generator: random.Random) -> list:
    report = {
        "metrics": {"ap": 0.3, "ap50": 0.5},
        "dataset": "d",
        "split": "val",
        "num_images": 7,
        "per_class": {"a": 0.1},
    }
    (work / "report.json").write_bytes(mutate_text(json.dumps(report), generator))
    return ["cards", "--metrics", f"v2-nano={work / 'report.json'}", "--output_dir", work / "out"]


def fuzz_comparison(saved: Path, work: Path, generator: random.Random) -> list:
    write_data(work / "data", generator)
    if generator.random() < 0.5:
        file = work / "data" / "annotations" / "instances_train.json"
        file.write_bytes(mutate_text(file.read_text(encoding="utf-8"), generator))
    odd = [
        "",
        ",",
        "=",
        "detr,",
        "a=b=c",
        "deperceiver_v2,preset=red",
        "detr,enc_layers=-1",
        f"x=deperceiver_v2,model={saved}",
    ]
    models = [generator.choice([*odd, f"y=deperceiver_v2,model={saved}"]) for _ in range(2)]
    command = ["compare", "--output_dir", work / "out", "--models", *models, "--dataset", work / "data"]
    command += [
        "--steps",
        generator.choice([1, 1, 1, 0, "x"]),
        "--lrs",
        generator.choice(["1e-4", "1e-4", "nan", "-1"]),
    ]
    return [*command, "--batch_size", 2, "--num_workers", 0, "--mixed_precision", "no"]


def fuzz_options(saved: Path, work: Path, generator: random.Random) -> list:
    values = [
        "0",
        "-1",
        "1",
        "64",
        "65",
        "nan",
        "",
        "x",
        "10**9",
        "café",
        str(work),
        str(work / "no" / "file"),
        "None",
    ]
    if generator.random() < 0.3:
        (work / "file").write_bytes(b"")
        return ["demo", "--output_dir", work / "file", "--max_steps", generator.choice(values)]
    command = [
        "benchmark",
        "cost",
        "--models",
        generator.choice(["detr-32", "detr-32", "deperceiver-v2-nano", *values]),
    ]
    command += ["--backbone", generator.choice(["resnet18", "resnet18", "resnet18", "no_such", ""])]
    for option in ("--height", "--width", "--output"):
        command += [option, generator.choice([*values, "96", "128"])]
    return command


FUZZED = [fuzz_comparison, fuzz_options, fuzz_annotations, fuzz_annotations, fuzz_model, fuzz_images, fuzz_images]
FUZZED += [fuzz_recipe, fuzz_checkpoint, fuzz_report]


def check_done(arguments: list, work: Path) -> None:
    """What a command that ended with 0 has written."""
    if arguments[0] == "predict":
        content = json.loads((work / "out" / "predictions.json").read_text(encoding="utf-8"))
        for image in content["images"]:
            assert image["detections"]
            for found in image["detections"]:
                box = found["box"]
                assert 0 <= found["score"] <= 1
                assert 0 <= box["xmin"] <= box["xmax"] <= image["width"]
                assert 0 <= box["ymin"] <= box["ymax"] <= image["height"]
    elif arguments[0] == "evaluate":
        report = json.loads((work / "out" / "e.json").read_text(encoding="utf-8"))
        assert all(value == -1 or 0 <= value <= 1 for value in report["metrics"].values())
        detections = json.loads((work / "out" / "e_predictions.json").read_text(encoding="utf-8"))
        assert report["num_images"] >= 1
        assert all(math.isfinite(value) for found in detections for value in (*found["bbox"], found["score"]))
        listed = json.loads((work / "data" / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
        ids = [image["id"] for image in listed["images"] if isinstance(image, dict) and "id" in image]
        assert all(found["image_id"] in ids for found in detections)
    elif arguments[0] == "compare":
        assert list((work / "out").glob("runs/*/*/*/last/model.safetensors"))
    elif arguments[0] == "train":
        state = torch.load(next(work.glob("out/state-*/optimizer.bin")), weights_only=True)
        assert all(torch.isfinite(moment).all() for entry in state["state"].values() for moment in entry.values())
        assert (work / "out" / "last" / "model.safetensors").is_file()


def check(seed: int, saved: Path, work: Path, capsys) -> None:
    generator = random.Random(seed)
    work.mkdir()
    arguments = generator.choice(FUZZED)(saved, work, generator)
    code, said = run(arguments, capsys)
    # The log of an earlier line may end in the bar of a progress, which has no end of line.
    last = said.replace("\r", "\n").strip().splitlines()[-1:]
    assert "Traceback" not in said, said
    assert "unexpected" not in said, said
    assert code in (0, 1, 2), said
    assert code != 2 or "error: " in last[0], said
    if code == 0:
        check_done(arguments, work)
    shutil.rmtree(work)


def test_odd_input_ends_in_a_line_or_is_done_right(fuzz_seed, cat_and_dog, tmp_path, capsys):
    check(fuzz_seed, cat_and_dog, tmp_path / "work", capsys)
