# SPDX-License-Identifier: Apache-2.0
"""Detection on image files, and the pictures of it."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from conftest import tiny_config
from deperceiver_hf import DePerceiverForObjectDetection, DePerceiverImageProcessor
from deperceiver_hf.cli import main
from deperceiver_hf.data import load_detection_data
from deperceiver_hf.drawing import Boxes, contact_sheet_rows, draw_boxes, draw_contact_sheet
from deperceiver_hf.errors import explain
from deperceiver_hf.prediction import PredictionReport, find_images, picture_names, prepare_prediction
from deperceiver_hf.saved_models import load_detector

SCRIPT = Path(__file__).parents[1] / "scripts" / "predict.py"
NAMES = ["cat", "dog", "bird"]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    labels = {"num_labels": 3, "id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    DePerceiverForObjectDetection(tiny_config(**labels)).save_pretrained(directory)
    DePerceiverImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}).save_pretrained(directory)
    return directory


def save_image(path: Path, size: tuple[int, int] = (60, 40), seed: int = 0, mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Images of several sizes and formats in nested directories, two of one name, and three broken files."""
    root = tmp_path / "in"
    for number, size in enumerate([(60, 40), (40, 60), (60, 40), (60, 40), (1, 1), (5, 90)]):
        save_image(root / "a" / f"{number}.png", size, seed=number)
    save_image(root / "a" / "same.jpg", seed=10)
    save_image(root / "b" / "c" / "same.jpg", seed=11)
    save_image(root / "b" / "gray.webp", mode="L")
    save_image(root / "b" / "cmyk.jpg", mode="CMYK")
    turned = Image.Exif()
    turned[0x0112] = 6
    save_image(root / "b" / "turned.jpg", (60, 40), exif=turned)
    (root / "a" / "broken.jpg").write_text("no image")
    (root / "b" / "empty.png").touch()
    (root / "b" / "cut.jpg").write_bytes((root / "b" / "turned.jpg").read_bytes()[:-700])
    (root / "b" / "notes.txt").write_text("not looked at")
    (root / ".hidden").mkdir()
    save_image(root / ".hidden" / "x.png")
    return root


def run(model_directory, inputs, output_dir, **options):
    job = prepare_prediction(
        str(model_directory), [str(entry) for entry in inputs], output_dir=str(output_dir), device="cpu", **options
    )
    return job.run(progress=False)


def read(output_dir: Path) -> dict:
    return json.loads((output_dir / "predictions.json").read_text(encoding="utf-8"))


def within(box: dict, image: dict) -> dict:
    limits = {"xmin": image["width"], "xmax": image["width"], "ymin": image["height"], "ymax": image["height"]}
    return {side: min(max(value, 0), limits[side]) for side, value in box.items()}


def test_broken_files_are_recorded_and_the_others_go_on(model_directory, pictures, tmp_path):
    out = tmp_path / "out"
    report = run(model_directory, [pictures], out, threshold=0.0)
    content = read(out)
    assert content["complete"]
    assert [Path(e["file"]).name for e in content["errors"]] == ["broken.jpg", "cut.jpg", "empty.png"]
    assert all("cannot be read" in e["error"] for e in content["errors"])
    assert len(content["images"]) == 11
    assert all(len(image["detections"]) == 7 for image in content["images"])
    assert content["images"] == report.images
    files = [image["file"] for image in content["images"]]
    assert files == sorted(files)
    size = {Path(image["file"]).name: (image["width"], image["height"]) for image in content["images"]}
    assert size["turned.jpg"] == (40, 60)
    annotated = [image["annotated"] for image in content["images"]]
    assert len(set(annotated)) == 11
    assert {"annotated/a/same.jpg", "annotated/b/c/same.jpg", "annotated/b/gray.webp.png"} <= set(annotated)
    for name in annotated:
        with Image.open(out / name) as picture:
            assert max(picture.size) == 640
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == {"predictions.json", *annotated}


def test_batches_change_nothing_and_the_pipeline_says_the_same(model_directory, pictures, tmp_path):
    results = []
    for batch_size in (1, 3, 8):
        run(model_directory, [pictures], tmp_path / "out", threshold=0.2, draw=False, batch_size=batch_size)
        results.append(read(tmp_path / "out"))
    detector = pipeline("object-detection", model=str(model_directory), device="cpu")
    for images in zip(*(result["images"] for result in results), strict=True):
        alone = detector(images[0]["file"], threshold=0.2)
        for image in images:
            assert (image["file"], image["annotated"]) == (images[0]["file"], None)
            inside = [(d["label"], within(d["box"], image)) for d in alone]
            assert [(d["label"], d["box"]) for d in image["detections"]] == inside
            np.testing.assert_allclose(
                [d["score"] for d in image["detections"]], [d["score"] for d in alone], rtol=1e-5
            )


def test_more_objects_are_looked_for_if_asked_to(cat_and_dog, pictures, tmp_path):
    found = [
        len(
            run(cat_and_dog, [pictures / "a"], tmp_path / "out", threshold=0, draw=False, **more).images[0][
                "detections"
            ]
        )
        for more in ({}, {"num_queries": 20})
    ]
    assert found == [9, 20]


def test_second_run_replaces_its_own_files_only(model_directory, pictures, tmp_path):
    out = tmp_path / "in" / "out"  # inside of the input: pictures of the first run are no input of the second
    run(model_directory, [pictures], out)
    (out / "mine.txt").write_text("keep")
    first = read(out)
    before = sorted(out.rglob("*"))
    (pictures / "a" / "0.png").unlink()
    run(model_directory, [pictures], out)
    assert len(read(out)["images"]) == len(first["images"]) - 1
    assert sorted(out.rglob("*")) == before
    assert (out / "mine.txt").read_text() == "keep"


def test_interrupted_run_keeps_what_was_done(model_directory, pictures, tmp_path, monkeypatch):
    job = prepare_prediction(
        str(model_directory), [str(pictures)], output_dir=str(tmp_path / "out"), device="cpu", batch_size=1
    )
    detector, calls = job.detector, []

    def interrupted_after_three(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return detector(*args, **kwargs)

    object.__setattr__(job, "detector", interrupted_after_three)
    interrupted_after_three.model = detector.model
    report = job.run(progress=False)
    assert not report.complete
    assert "Interrupted" in report.summary()
    content = read(tmp_path / "out")
    assert not content["complete"]
    assert [Path(image["file"]).name for image in content["images"]] == ["0.png", "1.png", "2.png"]
    assert all((tmp_path / "out" / image["annotated"]).is_file() for image in content["images"])


class Killed(BaseException):
    """Nothing is caught, as if the process were no more."""


def stop_after(job, count: int, error: type[BaseException]) -> None:
    """Let a job of batches of one image look at so many, and then end by an error."""
    detector, calls = job.detector, []

    def ending(*arguments, **options):
        calls.append(1)
        if len(calls) > count:
            raise error
        return detector(*arguments, **options)

    object.__setattr__(job, "detector", ending)
    ending.model = detector.model


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
def test_run_that_was_stopped_is_gone_on_with(model_directory, pictures, tmp_path, caplog, error):
    given = {"output_dir": str(tmp_path / "out"), "device": "cpu", "batch_size": 1, "threshold": 0.0}
    run(model_directory, [pictures], tmp_path / "whole", batch_size=1, threshold=0.0)
    with contextlib.suppress(Killed):
        job = prepare_prediction(str(model_directory), [str(pictures)], **given)
        stop_after(job, 10, error)
        job.run(progress=False)
    (journal,) = (tmp_path / "out").glob("predictions.partial-*.jsonl")
    journal.write_text(journal.read_text() + '["half a li')
    with caplog.at_level("INFO", logger="deperceiver_hf"):
        job = prepare_prediction(str(model_directory), [str(pictures)], **given)
        stop_after(job, 7, Killed)  # it has no need to look at more than the parts that are left
        report = job.run(progress=False)
    assert "4 of 14 images were looked at by an earlier run" in caplog.text
    assert report.complete
    assert (tmp_path / "out" / "predictions.json").read_text() == (tmp_path / "whole" / "predictions.json").read_text()
    assert not list((tmp_path / "out").glob("*.jsonl"))
    for path in (tmp_path / "whole" / "annotated").rglob("*.*"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("change", ["file", "picture", "threshold", "model", "inputs"])
def test_what_has_changed_since_is_looked_at_again(model_directory, pictures, tmp_path, change):
    model = shutil.copytree(model_directory, tmp_path / "model")
    given = {"output_dir": str(tmp_path / "out"), "device": "cpu", "batch_size": 1, "threshold": 0.0}
    job = prepare_prediction(str(model), [str(pictures / "a" / "?.png")], **given)
    stop_after(job, 4, KeyboardInterrupt)
    job.run(progress=False)
    assert list((tmp_path / "out").glob("*.jsonl"))
    inputs = [str(pictures / "a" / "?.png")]
    match change:
        case "file":
            save_image(pictures / "a" / "0.png", seed=77)
        case "picture":
            (tmp_path / "out" / "annotated" / "0.png").unlink()
        case "threshold":
            given["threshold"] = 0.1
        case "model":
            os.utime(model / "model.safetensors")
        case "inputs":
            inputs = [str(pictures / "a" / "[1-5].png")]
    job = prepare_prediction(str(model), inputs, **given)
    stop_after(job, 4, KeyboardInterrupt)
    assert len(job.run(progress=False).images) == 4  # and not more, as it were if something was taken over


@pytest.mark.heavy
def test_two_processes_find_what_one_finds(model_directory, pictures, tmp_path):
    config = Path(__file__).parents[1] / "examples" / "accelerate" / "several_cpu_processes.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes"]
    inputs = [pictures / "a" / "?.png", pictures / "b"]
    arguments = ["--model", model_directory, "--threshold", "0", "--batch_size", "2", *inputs]
    found = {}
    for count in ("1", "2"):
        command = [*launch, "2", SCRIPT] if count == "2" else [sys.executable, SCRIPT]
        done = subprocess.run(
            [*command, *arguments, "--output_dir", tmp_path / count],
            capture_output=True,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 1, done.stderr  # of the broken files
        assert "2 files failed" in done.stdout
        assert ("2 processes on cpu." in done.stderr) == (count == "2")
        found[count] = {
            str(path.relative_to(tmp_path / count)): path.read_bytes()
            for path in (tmp_path / count).rglob("*")
            if path.is_file()
        }
    assert found["1"] == found["2"]
    assert len(found["1"]) == 1 + 10


def test_image_that_the_model_fails_on_does_not_take_its_batch_along(model_directory, pictures, tmp_path):
    job = prepare_prediction(
        str(model_directory), [str(pictures / "a" / "?.png")], output_dir=str(tmp_path), device="cpu", draw=False
    )
    detector = job.detector
    bad = np.asarray(Image.open(pictures / "a" / "2.png"))

    def fails_on_one(images, **kwargs):
        if any(np.array_equal(np.asarray(image), bad) for image in images):
            raise RuntimeError("out of memory")
        return detector(images, **kwargs)

    object.__setattr__(job, "detector", fails_on_one)
    report = job.run(progress=False)
    assert [Path(e["file"]).name for e in report.errors] == ["2.png"]
    assert "memory" in report.errors[0]["error"]
    assert "60 x 40 pixels" in report.errors[0]["error"]
    assert "--batch_size" in report.errors[0]["error"]
    assert [Path(image["file"]).name for image in report.images] == ["0.png", "1.png", "3.png", "4.png", "5.png"]


def test_inputs_are_found_once_and_in_order(pictures):
    def names(*inputs):
        return [str(path.relative_to(pictures)) for path in find_images([str(pictures / entry) for entry in inputs])]

    assert names("b/notes.txt") == ["b/notes.txt"]  # named, so it is tried
    assert names("b/c", "b/c/same.jpg") == ["b/c/same.jpg"]
    assert names("a/[01].png", "a/0.png") == ["a/0.png", "a/1.png"]
    assert names("**/same.*") == ["a/same.jpg", "b/c/same.jpg"]
    assert names("b/*") == [f"b/{name}" for name in ("cmyk.jpg", "cut.jpg", "empty.png", "gray.webp", "turned.jpg")]
    assert names("b") == [
        f"b/{n}" for n in ("c/same.jpg", "cmyk.jpg", "cut.jpg", "empty.png", "gray.webp", "turned.jpg")
    ]
    literal = save_image(pictures / "img[1].png")
    assert find_images([str(literal)]) == [literal]


def test_pictures_have_different_names(tmp_path):
    files = [tmp_path / name for name in ("x/a.jpg", "y/a.jpg", "x/a.png", "x/a.bmp", "x/a.tif")]
    assert picture_names(files) == ["x/a.jpg", "y/a.jpg", "x/a.png", "x/a.bmp.png", "x/a.tif.png"]
    assert picture_names(files[:1]) == ["a.jpg"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": ["/nowhere/x.jpg"]}, FileNotFoundError, "/nowhere/x.jpg"),
        ({"inputs": ["*.nothing"]}, FileNotFoundError, "No images"),
        ({"inputs": []}, FileNotFoundError, "No inputs"),
        ({"model": "/nowhere/model"}, FileNotFoundError, "/nowhere/model"),
        ({"output_dir": "/proc/none"}, OSError, "/proc/none"),
        ({"threshold": 1.5}, ValueError, "threshold"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"device": "cuda:99"}, ValueError, "cuda:99"),
    ],
)
def test_mistakes_are_found_before_anything_runs(model_directory, pictures, tmp_path, change, error, message):
    arguments = {"model": str(model_directory), "inputs": [str(pictures)], "output_dir": str(tmp_path / "out")}
    arguments |= change
    with pytest.raises(error, match=message):
        prepare_prediction(arguments.pop("model"), arguments.pop("inputs"), **arguments)


def test_drawing_without_supervision_says_what_to_install(model_directory, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install deperceiver-hf\[drawing\]"):
        run(model_directory, [pictures], tmp_path / "out")
    run(model_directory, [pictures / "a" / "0.png"], tmp_path / "out", draw=False)


@pytest.mark.parametrize(("name", "content"), [("config.json", "{torn"), ("model.safetensors", "torn")])
def test_damaged_files_of_a_model_are_named(model_directory, tmp_path, name, content):
    directory = tmp_path / "damaged"
    shutil.copytree(model_directory, directory)
    (directory / name).write_text(content)
    with pytest.raises((OSError, ValueError), match=r"Cannot load a detector from .*damaged"):
        load_detector(str(directory))


def test_command_exit_codes(model_directory, pictures, tmp_path, capsys):
    def command(place: Path) -> int:
        options = {"model": model_directory, "output_dir": tmp_path / "out", "device": "cpu"}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return main(["predict", *arguments, "--no_draw", str(place)])

    assert command(pictures / "a") == 1
    assert "broken.jpg" in capsys.readouterr().out
    assert len(read(tmp_path / "out")["images"]) == 7
    assert command(pictures / "none.jpg") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# --- what inputs, places and models can be wrong with ------------------------------------------------------------


def test_images_that_meet_on_another_file_system_are_all_drawn(model_directory, tmp_path):
    names = ["a.webp", "a.webp.png", "A.webp.png", "sub/aux.png", "x" * 250 + ".webp"]
    for seed, name in enumerate(names):
        save_image(tmp_path / "in" / name, seed=seed)
    report = run(model_directory, [tmp_path / "in"], tmp_path / "out", threshold=0.0)
    annotated = [image["annotated"] for image in report.images]
    assert not report.errors
    assert len({name.casefold() for name in annotated}) == len(names)
    assert all((tmp_path / "out" / name).is_file() for name in annotated)
    assert len(list((tmp_path / "out" / "annotated").rglob("*.png"))) == len(names)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_file_names_that_are_no_text(model_directory, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        save_image(tmp_path / "in" / name)
    except OSError:
        pytest.skip("this file system refuses them")
    (tmp_path / "in" / "red\x1b[31m\n.png").touch()
    report = run(model_directory, [tmp_path / "in"], tmp_path / "out")
    assert Path(read(tmp_path / "out")["images"][0]["file"]) == tmp_path / "in" / name
    report.summary().encode("utf-8")
    assert r"red\x1b[31m\n.png: cannot be read" in report.summary()
    assert "\x1b" not in report.summary()


def test_pictures_do_not_take_the_place_of_images(model_directory, tmp_path):
    image = save_image(tmp_path / "annotated" / "a.png")
    before = image.read_bytes()
    with pytest.raises(ValueError, match=r"would overwrite .*a\.png; give another --output_dir"):
        run(model_directory, [image], tmp_path)
    run(model_directory, [image], tmp_path, draw=False)
    assert image.read_bytes() == before


def test_images_on_several_drives(monkeypatch, tmp_path):
    def refuse(paths):
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", refuse)
    monkeypatch.setattr(os.path, "splitdrive", lambda path: ("C:" if "one" in path else "D:", path))
    assert picture_names([Path("/one/a.png"), Path("/two/a.png")]) == ["C/one/a.png", "D/two/a.png"]


def test_frames_and_kinds_that_were_not_looked_at_are_said(model_directory, tmp_path):
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green")]
    (tmp_path / "in").mkdir()
    frames[0].save(tmp_path / "in" / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "in" / "b.HEIC").touch()
    (tmp_path / "in" / "c.heic").touch()
    (tmp_path / "clip.mp4").touch()
    report = run(model_directory, [tmp_path / "in", tmp_path / "clip.mp4"], tmp_path / "out", draw=False)
    content = read(tmp_path / "out")
    assert [Path(file).name for file in content["first_frames"]] == ["a.gif"]
    assert content["left_out"] == {".heic": 2}
    assert [Path(error["file"]).name for error in content["errors"]] == ["clip.mp4"]
    assert report.exit_code == 1
    for said in ("a.gif", "2 .heic", "pillow-heif", "clip.mp4", "video"):
        assert said in report.summary()


def test_boxes_lie_within_their_image(model_directory, pictures, tmp_path, monkeypatch):
    job = prepare_prediction(str(model_directory), [str(pictures / "a" / "0.png")], output_dir=str(tmp_path))
    found = [{"score": 0.9, "label": "cat", "box": {"xmin": -5, "ymin": 3, "xmax": 70, "ymax": 900}}]
    monkeypatch.setattr(type(job.detector), "__call__", lambda self, images, **options: [found for _ in images])
    assert job.run(progress=False).images[0]["detections"][0]["box"] == {"xmin": 0, "ymin": 3, "xmax": 60, "ymax": 40}


def test_weights_that_are_not_finite_are_refused(model_directory, pictures, tmp_path):
    damaged = shutil.copytree(model_directory, tmp_path / "damaged")
    model = DePerceiverForObjectDetection.from_pretrained(damaged)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "class" in name)[0] = torch.nan
    model.save_pretrained(damaged)
    with pytest.raises(ValueError, match=r"1 weights of .*damaged.* are not finite"):
        run(damaged, [pictures], tmp_path / "out")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_results_that_are_not_finite_are_errors_and_said_once(model_directory, tmp_path, value):
    for number in range(12):
        save_image(tmp_path / "in" / f"{number:02}.png", seed=number)
    job = prepare_prediction(str(model_directory), [str(tmp_path / "in")], output_dir=str(tmp_path / "out"))
    model = job.detector.model
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "class" in name).fill_(value)
    report = job.run(progress=False)
    assert report.exit_code == 1
    assert not report.images
    assert len(read(tmp_path / "out")["errors"]) == 12
    (line,) = [line for line in report.summary().splitlines() if "not finite" in line]
    assert "all 12 files, such as" in line


def test_few_failures_are_named_and_many_of_one_kind_counted():
    report = PredictionReport("m", 0.5, complete=True, images=[{"detections": []}])
    report.errors = [{"file": f"{number}.png", "error": "broken"} for number in range(11)]
    report.errors.append({"file": "x\n.png", "error": "other"})
    lines = report.summary().splitlines()
    assert "failed: 11 files, such as 0.png, 1.png, 2.png: broken" in lines
    assert r"failed: x\n.png: other" in lines


def test_too_little_memory_for_a_batch_is_said_and_images_go_alone(model_directory, tmp_path, caplog):
    for number in range(3):
        save_image(tmp_path / "in" / f"{number}.png", (64, 33), seed=number)
    job = prepare_prediction(str(model_directory), [str(tmp_path / "in")], output_dir=str(tmp_path / "out"))
    detector = job.detector

    def small(images, **options):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return detector(images, **options)

    small.model = detector.model
    object.__setattr__(job, "detector", small)
    report = job.run(progress=False)
    assert len(report.images) == 3
    assert not report.errors
    (record,) = [record for record in caplog.records if "memory" in record.message]
    assert "3 images of 64 x 33 pixels" in record.message
    assert "--batch_size" in record.message


def test_full_disk_ends_the_run_with_what_was_done(model_directory, pictures, tmp_path, monkeypatch):
    save, calls = Image.Image.save, []

    def full(self, path, **options):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"No space left on device.*annotated"):
        run(model_directory, [pictures], tmp_path / "out", batch_size=1)
    content = read(tmp_path / "out")
    assert not content["complete"]
    assert [image["annotated"] is None for image in content["images"]] == [False, False, True]
    assert explain(OSError(errno.ENOSPC, "No space left on device", "a.png")).code == 2


def test_results_without_a_place_are_kept_elsewhere(model_directory, pictures, tmp_path, monkeypatch):
    job = prepare_prediction(
        str(model_directory), [str(pictures / "a" / "0.png")], output_dir=str(tmp_path / "out"), draw=False
    )
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match=r"out.predictions\.json cannot be written.*what was found is in ") as raised:
        job.run(progress=False)
    (kept,) = tmp_path.glob("deperceiver-*/predictions.json")
    assert str(kept) in str(raised.value)
    assert len(json.loads(kept.read_text(encoding="utf-8"))["images"]) == 1


def test_picture_that_cannot_be_written_is_an_error_of_its_file(model_directory, pictures, tmp_path, monkeypatch):
    (tmp_path / "out" / "annotated" / "0.png").mkdir(parents=True)
    inputs = [pictures / "a" / f"{number}.png" for number in range(3)]
    report = run(model_directory, inputs, tmp_path / "out", threshold=0.0)
    assert [Path(error["file"]).name for error in report.errors] == ["0.png"]
    assert "cannot be written" in report.errors[0]["error"]
    assert [len(image["detections"]) for image in report.images] == [7, 7, 7]
    assert [image["annotated"] for image in report.images] == [None, "annotated/1.png", "annotated/2.png"]


@pytest.mark.parametrize("name", ["predictions.json", "annotated"])
def test_places_of_results_that_are_taken(model_directory, pictures, tmp_path, name):
    if name == "annotated":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=name):
        run(model_directory, [pictures], tmp_path)


def test_names_of_classes_that_the_models_config_confuses(model_directory, pictures, tmp_path):
    job = prepare_prediction(
        str(model_directory), [str(pictures / "a" / "0.png")], output_dir=str(tmp_path / "out"), threshold=0.0
    )
    job.detector.model.config.id2label = {0: "红", 1: "\x1b[31m", 2: "bird"}  # label2id is that of before
    report = job.run(progress=False)
    assert not report.errors
    assert report.images[0]["annotated"] == "annotated/0.png"


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 30), (640, 480), (3000, 2000), (8, 900)])
def test_boxes_are_drawn_where_they_are(size):
    image = Image.new("RGB", size, "black")
    width, height = size
    box = [width * 0.25, height * 0.25, width * 0.75, height * 0.75]
    picture = draw_boxes(image, Boxes(np.array([box]), [2], [0.7]), NAMES, text=False)
    scale = max(1, 640 / max(size))
    assert picture.size == tuple(round(side * scale) for side in size)
    rows, columns = np.nonzero(np.asarray(picture).sum(-1))
    drawn = [columns.min(), rows.min(), columns.max(), rows.max()]
    np.testing.assert_allclose(drawn, np.array(box) * scale, atol=max(2, max(picture.size) / 200))
    assert np.asarray(image).sum() == 0  # the image itself is left alone


def test_objects_at_and_over_the_border_and_none_at_all():
    image = Image.new("L", (50, 50))
    assert draw_boxes(image, Boxes(), NAMES).size == (640, 640)
    boxes = np.array([[-20, -20, 500, 500], [0, 0, 0, 0], [49, 49, 50, 50]])
    draw_boxes(image, Boxes(boxes, [0, 1, 2]), NAMES)


def test_contact_sheet_shows_objects_and_detections_above_the_threshold():
    data = load_detection_data("synthetic", "val", num_samples=3, image_size=64)
    record = data.dataset[0]
    predictions = [
        {"image_id": record["image_id"], "category_id": data.category_ids[1], "bbox": [1, 2, 30, 40], "score": score}
        for score in (0.9, 0.6, 0.2)
    ]
    rows = contact_sheet_rows(data, predictions, threshold=0.5, max_images=2)
    assert [len(row.detected) for row in rows] == [2, 0]
    assert [len(row.annotated) for row in rows] == [len(data.dataset[i]["objects"]["category"]) for i in range(2)]
    np.testing.assert_array_equal(rows[0].detected.boxes[0], [1, 2, 31, 42])
    assert rows[0].detected.labels == [1, 1]
    sheet = draw_contact_sheet(rows, data.label_names, columns=1, cell_width=160)
    empty = draw_contact_sheet(
        [type(row)(row.image, Boxes(), Boxes()) for row in rows], data.label_names, columns=1, cell_width=160
    )
    assert sheet.size == empty.size
    half = sheet.width // 2
    for side in (slice(0, half), slice(half, None)):
        assert (np.asarray(sheet)[:, side] != np.asarray(empty)[:, side]).any()
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_contact_sheet([], NAMES)
