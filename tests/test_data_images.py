# SPDX-License-Identifier: Apache-2.0
"""Opening images: whatever is wrong with one is a reason, in the data, in training, evaluation and prediction."""

import io
import json
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL import Image

from deperceiver_hf.cli import main
from deperceiver_hf.data import DetectionDataset, load_detection_data
from deperceiver_hf.data.images import (
    UnreadableImageError,
    decode_rgb,
    limit_pixels,
    open_rgb,
    read_header,
    read_headers,
)
from deperceiver_hf.errors import UserError
from deperceiver_hf.training import DetectionTrainer
from training_runs import read_log, tiny_options


@pytest.fixture(autouse=True)
def pillows_limit():
    yield
    limit_pixels(None)


def encoded(kind: str = "PNG", size=(60, 40), **options) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


BROKEN = {
    "empty": b"",
    "text": b"<html>not found</html>",
    "png cut in its header": encoded()[:20],
    "png cut in its pixels": encoded()[:2000],
    "jpeg cut in its pixels": encoded("JPEG", quality=95)[:900],
    "webp cut off": encoded("WEBP", lossless=True)[:900],
    "tiff cut off": encoded("TIFF")[:500],
    "gif cut off": encoded("GIF")[:300],
    "a broken checksum": encoded().replace(b"IDAT", b"IDAX", 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_has_a_reason_without_a_path(tmp_path, name):
    path = tmp_path / "image.png"
    path.write_bytes(BROKEN[name])
    with pytest.raises(UnreadableImageError) as raised:
        open_rgb(path)
    assert "\n" not in str(raised.value)
    assert str(raised.value)
    with pytest.raises(UnreadableImageError, match=r"image_id 7 .*image\.png"):
        decode_rgb({"path": str(path), "bytes": None}, 7)
    with pytest.raises(UnreadableImageError, match="stored in the data set"):
        decode_rgb({"path": None, "bytes": BROKEN[name]}, 7)


@pytest.mark.parametrize(
    "error", [RuntimeError("codec"), MemoryError(), ZeroDivisionError("0/0"), AttributeError("x")]
)
def test_any_exception_of_a_decoder_is_a_reason(tmp_path, monkeypatch, error):
    def refuse(*arguments, **keywords):
        raise error

    path = tmp_path / "image.png"
    path.write_bytes(encoded())
    monkeypatch.setattr(PIL.Image, "open", refuse)
    with pytest.raises(UnreadableImageError, match=type(error).__name__):
        open_rgb(path)
    (header,) = read_headers([path])
    assert isinstance(header, UnreadableImageError)


def test_a_missing_file_and_a_directory_are_reasons(tmp_path):
    missing, directory = read_headers([tmp_path / "no.png", tmp_path])
    assert str(missing) == "there is no such file"
    assert isinstance(directory, UnreadableImageError)


def test_a_header_is_read_without_decoding(tmp_path, monkeypatch):
    files = [encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("pixels were decoded"))
    for data in files:
        assert read_header(io.BytesIO(data))[:2] == (60, 40)


def test_a_header_of_a_large_png_takes_no_time():
    data = encoded(size=(3000, 2000), compress_level=0)
    start = time.perf_counter()
    read_header(io.BytesIO(data))
    headers = time.perf_counter() - start
    start = time.perf_counter()
    open_rgb(io.BytesIO(data))
    assert headers < (time.perf_counter() - start) / 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_orientation_is_that_of_the_header(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(kind, exif=exif)
    assert read_header(io.BytesIO(data)).seen_size == (40, 60)
    assert open_rgb(io.BytesIO(data)).size == (40, 60)


def test_the_limit_of_pixels_names_both_numbers_and_the_option(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded())
    limit_pixels(2000)
    for read in (open_rgb, read_header):
        with pytest.raises(UnreadableImageError, match=r"2400 pixels.*2000 pixels.*--max_image_pixels"):
            read(path)
    limit_pixels(2400)
    assert open_rgb(path).size == (60, 40)
    before = PIL.Image.MAX_IMAGE_PIXELS
    limit_pixels(None)
    assert before != PIL.Image.MAX_IMAGE_PIXELS


# --- in data, training, evaluation and prediction --------------------------------------------------------------------


def write_data(root: Path, broken: dict[int, bytes], count: int = 40, splits=("train", "val")) -> Path:
    """Images of which those at some places have a good header and broken pixels."""
    (root / "annotations").mkdir(parents=True)
    for split in splits:
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            name = f"{number}.jpg"
            (root / split / name).write_bytes(broken.get(number, encoded("JPEG", quality=95)))
            images.append({"id": 100 + number, "file_name": name, "width": 60, "height": 40})
            entry = {"bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0, "category_id": 1 + number % 2}
            annotations.append({"id": number + 1, "image_id": 100 + number, **entry})
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


TORN = encoded("JPEG", quality=95)[:900]


def test_an_image_that_cannot_be_read_is_counted_with_its_reason(tmp_path):
    write_data(tmp_path, {3: b"no image"}, splits=("val",))
    report = load_detection_data(str(tmp_path), "val").report
    assert report.counts == {"unreadable_image": 1}
    assert "3.jpg: it is no image" in report.examples["unreadable_image"]


def test_a_broken_image_is_replaced_by_the_next_one_that_can_be_read(tmp_path):
    data = load_detection_data(str(write_data(tmp_path, {3: TORN, 4: TORN, 39: TORN})), "train")
    dataset = DetectionDataset(data, on_bad_image="skip")
    item = dataset[3]
    assert item["annotations"]["image_id"] == 105
    assert list(item["unreadable"]) == [3, 4]
    assert "image_id 103" in item["unreadable"][3]
    assert list(dataset[4]["unreadable"]) == [4]  # not looked at once more
    assert dataset[39]["annotations"]["image_id"] == 100
    assert "unreadable" not in dataset[5]
    assert len(list(dataset)) == 40
    with pytest.raises(UnreadableImageError, match="image_id 103"):
        DetectionDataset(data)[3]


def test_a_disk_that_is_gone_is_no_bad_image(tmp_path):
    data = load_detection_data(str(write_data(tmp_path, {})), "train")
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"5 of 40 images cannot be read any more.*disk"):
        DetectionDataset(data, on_bad_image="skip")[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_breaks_in_a_run_is_said_once_and_stays_out(tmp_path, caplog, num_workers):
    root = write_data(tmp_path / "data", {3: TORN})
    options = {"dataset": str(root), "max_train_samples": None, "batch_size": 4, "num_workers": num_workers}
    options |= {"augmentation": "none"}
    straight = DetectionTrainer(tiny_options(tmp_path / "straight", **options))
    straight.train()
    said = [record.getMessage() for record in caplog.records if "Another one takes its place" in record.getMessage()]
    assert len(said) == 1
    assert "image_id 103" in said[0]
    assert straight.progress.unreadable == [3]

    DetectionTrainer(tiny_options(tmp_path / "run", **options, max_steps=11)).train()
    (root / "train" / "3.jpg").write_bytes(encoded("JPEG", quality=95))  # mended, but out for this run
    resumed = DetectionTrainer(tiny_options(tmp_path / "run", **options, max_steps=20, resume="auto"))
    assert "unreadable" in resumed.data.dataset[3]
    resumed.train()
    lines = read_log(tmp_path / "run", "train")
    expected = read_log(tmp_path / "straight", "train")
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]


def test_a_run_can_stop_at_bad_images(tmp_path):
    options = {"max_train_samples": None, "augmentation": "none", "on_bad_image": "stop"}
    torn = write_data(tmp_path / "torn", {3: TORN})
    with pytest.raises(UnreadableImageError, match="image_id 103"):
        DetectionTrainer(tiny_options(tmp_path / "a", dataset=str(torn), **options)).train()
    none = write_data(tmp_path / "none", {3: b"no image"})
    with pytest.raises(UserError, match="--on_bad_image skip"):
        DetectionTrainer(tiny_options(tmp_path / "b", dataset=str(none), **options))


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_an_evaluation_leaves_out_what_cannot_be_read(cat_and_dog, tmp_path, capsys, num_workers):
    data = write_data(tmp_path / "data", {1: TORN, 2: b"no image"}, count=6, splits=("val",))
    arguments = ["evaluate", "--model", str(cat_and_dog), "--dataset", str(data), "--output", str(tmp_path / "e.json")]
    arguments += ["--num_workers", num_workers]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "left out: The image of image_id 101" in said.out
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["num_images"] == 4
    found = json.loads((tmp_path / "e_predictions.json").read_text(encoding="utf-8"))
    assert {detection["image_id"] for detection in found} == {100, 103, 104, 105}
    assert main([*arguments, "--on_bad_image", "stop"]) == 2
    assert "2.jpg" in capsys.readouterr().err.splitlines()[-1]


def test_commands_take_the_limit_of_pixels(cat_and_dog, tmp_path, capsys):
    data = write_data(tmp_path / "data", {0: encoded("JPEG", size=(80, 80))}, count=3, splits=("val",))
    limit = ["--max_image_pixels", "2400"]
    evaluate = ["evaluate", "--model", str(cat_and_dog), "--dataset", str(data), "--output", str(tmp_path / "e.json")]
    assert main([*evaluate, *limit, "--num_workers", "0"]) == 0
    assert "6400 pixels" in capsys.readouterr().err
    predict = ["predict", str(data / "val"), "--model", str(cat_and_dog), "--output_dir", str(tmp_path / "out")]
    assert main([*predict, *limit, "--no_draw"]) == 1
    assert "6400 pixels" in capsys.readouterr().out
    assert main([*predict, "--no_draw"]) == 0
