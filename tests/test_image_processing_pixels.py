# SPDX-License-Identifier: Apache-2.0
"""One picture, every mode, type and road: the same tensor."""

import base64
import io
import logging
import os
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from transformers.utils import logging as transformers_logging

from deperceiver_hf import DePerceiverImageProcessor, DePerceiverV2ImageProcessorPil
from deperceiver_hf.data.images import decode_rgb, open_rgb
from deperceiver_hf.models import pixels_deperceiver
from deperceiver_hf.models.pixels_deperceiver import exif_orientation, open_rgb_picture, to_rgb, to_uint8
from test_image_processing import ORIENTATION, picture

GRAY = np.asarray(picture(48, 60).convert("L"))
COLOURS = picture(48, 60)


@pytest.fixture(params=[DePerceiverImageProcessor, DePerceiverV2ImageProcessorPil], ids=["torchvision", "pil"])
def processor(request):
    return request.param(size={"shortest_edge": 32, "longest_edge": 64})


@pytest.fixture
def log():
    """What transformers logs of images, each message as if for the first time."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    pixels_deperceiver.logger.warning_once.cache_clear()
    transformers_logging.add_handler(handler)
    yield messages
    transformers_logging.remove_handler(handler)
    pixels_deperceiver.logger.warning_once.cache_clear()


def values_of(processor, image, **options) -> torch.Tensor:
    return processor(image, return_tensors="pt", **options)["pixel_values"][0]


def gray_picture(mode: str) -> Image.Image:
    """The gray picture of 8 bits, in another mode and range."""
    if mode.startswith("I;16"):
        order = ">u2" if mode.endswith("B") else "<u2"
        return Image.frombytes(mode, GRAY.shape[::-1], (GRAY.astype(np.uint16) * 257).astype(order).tobytes())
    if mode in ("La", "RGBa"):
        return Image.fromarray(GRAY).convert(mode.upper()).convert(mode)
    arrays = {
        "I": GRAY.astype(np.int32),
        "I of 16 bit": GRAY.astype(np.int32) * 257,
        "I of 31 bit": GRAY.astype(np.int32) << 23,
        "F": GRAY.astype(np.float32),
        "F up to 1": GRAY.astype(np.float32) / 255,
        "F of 16 bit": GRAY.astype(np.float32) * 257,
    }
    return Image.fromarray(arrays[mode]) if mode in arrays else Image.fromarray(GRAY).convert(mode)


GRAY_MODES = (
    *("L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"),
    *("I;16", "I;16L", "I;16B", "I;16N", "I", "I of 16 bit", "I of 31 bit", "F", "F up to 1", "F of 16 bit"),
)
FILES = {  # what can be saved without loss, by the suffix of a format
    **{mode: "png" for mode in ("L", "LA", "P", "RGB", "RGBA", "I;16")},
    **{mode: "tif" for mode in ("CMYK", "I;16B", "I", "I of 31 bit", "F", "F up to 1", "F of 16 bit")},
    "I of 16 bit": "ppm",
}
ARRAYS = (
    "L",
    "LA",
    "RGB",
    "RGBA",
    "I;16",
    "I;16B",
    "I",
    "I of 16 bit",
    "I of 31 bit",
    "F",
    "F up to 1",
    "F of 16 bit",
)


@pytest.mark.parametrize("mode", GRAY_MODES)
def test_gray_of_every_mode_is_the_same_by_every_road(processor, mode, tmp_path, log):
    image = gray_picture(mode)
    expected = values_of(processor, Image.fromarray(GRAY))
    roads = {"picture": image, "data set": decode_rgb(image, 1)}
    if mode in FILES:
        path = tmp_path / f"image.{FILES[mode]}"
        image.save(path)
        roads |= {"path": str(path), "Path": path, "opened": Image.open(path), "predict": open_rgb(path)}
        roads["base64"] = base64.b64encode(path.read_bytes()).decode()
        roads["data URL"] = f"data:image/png;base64,{roads['base64']}"
    if mode in ARRAYS:
        array = np.array(image)
        roads |= {"array": array, "tensor": torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))}
        roads["batch"] = array[None, None] if array.ndim == 2 else array[None]
        if array.ndim == 3:
            roads["channels first"] = array.transpose(2, 0, 1)
    for road, given in roads.items():
        assert torch.equal(values_of(processor, given), expected), road


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [
        *((dtype, 1) for dtype in ("uint8", "int16", "int32", "int64", "uint32", "uint64", "float16", "float64")),
        *((dtype, 257) for dtype in ("uint16", "int32", "int64", "uint32", "uint64", "float32", "float64")),
        *((dtype, 1 / 255) for dtype in ("float16", "float32", "float64", "longdouble")),
        *((dtype, 2**24 + 2**16 + 257) for dtype in ("uint32", "int64", "uint64")),
        (">u2", 257),
        (">f4", 1 / 255),
    ],
)
def test_every_type_and_range_of_an_array_is_the_same_picture(processor, dtype, factor, log):
    pixels = np.asarray(COLOURS)
    array = (pixels.astype(np.float64) * factor).astype(dtype)
    expected = values_of(processor, COLOURS)
    roads = [array, array.transpose(2, 0, 1), np.ascontiguousarray(array[:, ::-1])[:, ::-1]]
    if array.dtype.isnative and dtype != "longdouble":
        roads += [torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1)]
    assert all(torch.equal(values_of(processor, given), expected) for given in roads)


def test_two_levels_are_black_and_white(processor):
    mask = GRAY > 128
    expected = values_of(processor, Image.fromarray(mask.astype(np.uint8) * 255))
    for given in (mask, torch.from_numpy(mask), Image.fromarray(mask)):
        assert torch.equal(values_of(processor, given), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_dark_images_of_integers_are_what_they_are(processor, log, dtype):
    dark = (GRAY > 128).astype(dtype) * (256 if dtype == np.uint16 else 1)
    values = values_of(processor, dark, do_normalize=False)
    assert 0 < values.max() <= 1 / 255
    assert not log


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32])
def test_black_is_black_and_nothing_is_said(processor, log, dtype):
    assert values_of(processor, np.zeros((20, 30, 3), dtype), do_normalize=False).max() == 0
    assert not log


def test_scaled_images_are_understood_and_it_is_said_once(processor, log):
    scaled = np.asarray(COLOURS, dtype=np.float32) / 255
    for _ in range(2):
        assert torch.equal(values_of(processor, scaled), values_of(processor, COLOURS))
    (message,) = log
    assert "already scaled to [0, 1]" in message


def test_16_bit_that_look_like_8_are_said(processor, log):
    for pixels in (GRAY, GRAY // 2):
        assert values_of(processor, pixels.astype(np.uint16), do_normalize=False).max() == 0
    (message,) = log
    assert "no value above 255" in message


def test_who_says_that_an_image_is_scaled_gets_it_as_it_is(processor, log):
    scaled = torch.rand(3, 32, 40)
    given = values_of(processor, scaled, do_rescale=False, do_normalize=False, do_resize=False)
    assert torch.equal(given, scaled)
    bits = (scaled * 65535).round().to(torch.uint16)
    given = values_of(processor, bits, rescale_factor=1 / 65535, do_normalize=False, do_resize=False)
    torch.testing.assert_close(given, scaled, atol=1e-5, rtol=0)
    assert not log


def test_floats_may_overshoot_a_little_as_after_resampling(processor, log):
    for top in (1, 255):
        values = values_of(processor, np.array([[-0.03, 0.5], [1.04, 0.2]]) * top, do_normalize=False, do_resize=False)
        assert values[0].mul(255).round().tolist() == [[0, 128], [255, 51]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 5), np.nan), "nan to nan"),
        (np.array([[0.0, np.inf]]), "0 to inf"),
        (np.array([[-2.1, 2.6]]), r"from -2.1 to 2.6.*\[0, 1\] or \[0, 255\].*do_rescale=False"),
        (np.array([[-1.0, 1.0]]), "from -1 to 1"),
        (np.array([[0.0, 1e6]]), "1e\\+06"),
        (np.array([[-1, 7]]), "int64 with values from -1 to 7"),
        (np.array([[0, 2**33]]), str(2**33)),
        (torch.zeros(4, 5, dtype=torch.complex64), "complex64"),
        (np.zeros((4, 5), complex), "complex128"),
        (Image.fromarray(np.array([[-5.0, 7.0]], np.float32)), "from -5 to 7"),
    ],
)
def test_values_of_no_known_range_are_refused(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor(image, return_tensors="pt")


def test_transparency_of_a_palette_is_dropped_without_a_word(tmp_path):
    image = COLOURS.quantize(16)
    image.save(tmp_path / "palette.png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_rgb_picture(tmp_path / "palette.png")
    assert opened.tobytes() == image.convert("RGB").tobytes()


def exif_block(orientation, *, broken: bool = False) -> bytes:
    """An EXIF block; broken, with a unit in words, which Pillow reads and cannot write again."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    block = exif.tobytes()
    if broken:
        head, count, entry = block[:14], b"\x00\x02", block[16:28]
        return head + count + entry + b"\x01\x28\x00\x02\x00\x00\x00\x04dpi\x00" + bytes(4)
    return block


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "broken.jpg"])
def test_orientation_turns_the_pixels_and_is_gone(suffix, orientation, tmp_path):
    path = tmp_path / f"photo.{suffix}"
    flat = Image.new("RGB", (40, 24))
    flat.paste((255, 255, 255), (0, 0, 8, 8))  # the upper left corner, as stored
    flat.save(path, exif=exif_block(orientation, broken="broken" in suffix))
    with Image.open(path) as opened:
        header = opened.size if exif_orientation(opened) < 5 else opened.size[::-1]
    seen = open_rgb_picture(path)
    assert seen.size == header == ((40, 24) if orientation < 5 else (24, 40))
    bright = np.argwhere(np.asarray(seen)[..., 0] > 128).mean(0) / np.array(seen.size[::-1])
    assert (bright > 0.5).tolist() == {
        **{1: [False, False], 2: [False, True], 3: [True, True], 4: [True, False]},
        **{5: [False, False], 6: [False, True], 7: [True, True], 8: [True, False]},
    }[orientation]
    assert seen.getexif().get(ORIENTATION) is None  # for whoever reads the metadata after us
    assert seen.tobytes() == decode_rgb({"path": str(path), "bytes": None}, 1).tobytes()


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_are_none_leave_the_picture(value):
    image = COLOURS.copy()
    image.info["exif"] = exif_block(value)
    assert exif_orientation(image) == 1


@pytest.mark.parametrize("info", [{"exif": b"Exif\0\0MM"}, {"exif": 7}, {"xmp": 7}, {"Raw profile type exif": "\n"}])
def test_damaged_metadata_leave_the_picture(info):
    image = COLOURS.copy()
    image.info |= info
    assert exif_orientation(image) == 1
    assert to_rgb(image).tobytes() == COLOURS.tobytes()


def test_orientation_in_xmp_and_in_a_raw_profile_counts():
    xmp = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    profile = exif_block(8)
    for info, expected in (
        ({"XML:com.adobe.xmp": xmp}, 6),
        ({"xmp": xmp.encode()}, 6),
        ({"Raw profile type exif": f"\nexif\n{len(profile):8}\n{profile.hex()}\n"}, 8),
    ):
        image = COLOURS.copy()
        image.info |= info
        assert exif_orientation(image) == expected
        assert exif_orientation(to_rgb(image)) == 1


def test_a_look_at_the_orientation_decodes_nothing(monkeypatch, tmp_path):
    COLOURS.save(tmp_path / "plain.png")

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with Image.open(tmp_path / "plain.png") as opened:
        assert exif_orientation(opened) == 1


def test_the_frame_that_a_picture_is_at_is_taken(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "tif"):
        path = tmp_path / f"frames.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert open_rgb_picture(path).getpixel((3, 3)) == (255, 0, 0)
        with Image.open(path) as opened:
            opened.seek(1)
            assert to_rgb(opened).getpixel((3, 3)) == (0, 0, 255)


def test_pictures_are_turned_without_conversion_too(processor):
    image = gray_picture("I;16")
    image.info["exif"] = exif_block(6)
    values = values_of(processor, image, do_convert_rgb=False, do_normalize=False, do_resize=False)
    np.testing.assert_array_equal(values[0].mul(255).round(), np.rot90(GRAY, -1))


@pytest.mark.parametrize("source", ["nothing/there.png", "no picture.txt", "bm8gcGljdHVyZQ=="])
def test_what_cannot_be_read_is_named_with_the_reason(processor, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("no picture.txt").write_text("no picture")
    with pytest.raises(ValueError, match=f"Cannot read an image from {source}: .*Error: .*(No such file|identify)"):
        processor(source)


def test_urls_are_read_at_full_depth(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    gray_picture("I;16").save(tmp_path / "gray.png")
    handler = partial(SimpleHTTPRequestHandler, directory=os.fspath(tmp_path))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            assert torch.equal(
                values_of(processor, f"{address}/gray.png"), values_of(processor, Image.fromarray(GRAY))
            )
            with pytest.raises(ValueError, match=r"Cannot read an image from http.*404"):
                processor(f"{address}/other.png")
        finally:
            server.shutdown()


def test_8_bit_tensors_are_not_touched():
    values = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    assert to_uint8(values) is values


def test_bytes_of_a_file_in_memory_are_a_picture():
    content = io.BytesIO()
    gray_picture("I;16").save(content, "png")
    assert open_rgb(io.BytesIO(content.getvalue())).tobytes() == Image.fromarray(GRAY).convert("RGB").tobytes()
