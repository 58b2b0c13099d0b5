# SPDX-License-Identifier: Apache-2.0
"""The one way from a picture or an array of any kind to 8 bit RGB.

Training data, evaluation, prediction and the image processors all go through here, so that the same picture becomes
the same tensor by every road.
"""

import base64
import contextlib
import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image
from transformers.utils import logging

logger = logging.get_logger(f"transformers.{__name__}")  # below the library's, whose handlers and verbosity hold

_ORIENTATION = 0x0112  # the tag of EXIF
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # of `PIL.Image.Image.info`
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRAIGHT_ALPHA = {"La": "LA", "RGBa": "RGBA"}  # modes whose colours are multiplied by the alpha channel
_OVERSHOOT = 0.1  # of floats beyond their range, relative to it: resampling leaves some
_EXPECTED = (
    "Expected integers of 8, 16 or 32 bits from 0, or floats in [0, 1] or [0, 255]; for an image that is normalised "
    "already say do_rescale=False and do_normalize=False."
)


def open_rgb_picture(source: str | os.PathLike, timeout: float | None = None) -> Image.Image:
    """The picture of a file, of an `http(s)://` URL or of base64 (with or without `data:image/...`) as `to_rgb` gives
    it, for which transformers' `load_image` is no substitute: it clips what has more than 8 bits.

    Raises:
        ValueError: it cannot be read; says why.
    """
    shown = os.fspath(source) if len(os.fspath(source)) <= 200 else f"{os.fspath(source)[:200]}..."
    try:
        with Image.open(_readable(source, timeout)) as opened:
            return to_rgb(opened)
    except Exception as error:  # each decoder has its own
        raise ValueError(f"Cannot read an image from {shown}: {type(error).__name__}: {error}") from error


def exif_orientation(image: Image.Image) -> int:
    """How the pixels of a picture are to be turned before it is seen: 1 to 8 as in EXIF, 1 where it does not say.

    Pixels are never decoded and nothing is read from the file for this, so that it serves a look at headers: an EXIF
    block that a PNG holds behind its pixels is not looked for. TIFF is 1, since Pillow turns it while decoding, and
    gives the size as turned before. Whatever else a camera or a program has written into the block is passed over.
    """
    if image.format == "TIFF":
        return 1
    try:
        # A picture of the same metadata: `getexif` of a PNG would decode it, and what is damaged would stay with it.
        stand_in = Image.new("1", (1, 1))
        stand_in.info = {key: image.info[key] for key in _ORIENTATION_KEYS if key in image.info}
        if "xmp" in stand_in.info:  # a name that Pillow 11.0 does not look under
            stand_in.info.setdefault("XML:com.adobe.xmp", stand_in.info["xmp"].decode(errors="replace"))
        orientation = int(stand_in.getexif().get(_ORIENTATION, 1))
    except Exception:  # each entry of an unexpected type has an exception of its own
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says, by moving pixels only; the picture itself if it is upright."""
    orientation = exif_orientation(image)
    return _without_orientation(image.transpose(_TRANSPOSITIONS[orientation])) if orientation > 1 else image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it, in 8 bit RGB, whatever its mode; of several frames or pages the current one,
    which is the first of a file just opened.

    It is turned as its EXIF orientation says, and the result holds no orientation any more. Gray is repeated,
    transparency is dropped. Pictures of 16 bit, of 32 bit integers and of floats are taken by their range as
    `to_uint8` says.

    Raises:
        ValueError: the values have none of those ranges.
    """
    turned = upright(image)
    if turned.mode.startswith("I") or turned.mode == "F":  # Pillow would clip the values to 255
        turned = Image.fromarray(to_uint8(as_tensor(turned)).numpy())
    elif turned.mode in _STRAIGHT_ALPHA:
        turned = turned.convert(_STRAIGHT_ALPHA[turned.mode])
    elif turned.mode == "P" and "transparency" in turned.info:  # Pillow would warn
        turned = turned.convert("RGBA")
    return _without_orientation(turned.convert("RGB"))


def as_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    """The values of a picture or array as they are, copied; of any strides and byte order.

    Raises:
        ValueError: they are no numbers.
    """
    # A copy in C order: torch refuses negative strides (`image[..., ::-1]`) and warns of read-only memory.
    array = np.array(image, order="C")
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"Cannot make an image of an array of {array.dtype}; give PIL images, arrays or tensors of numbers, paths "
            "or URLs."
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def to_uint8(values: torch.Tensor) -> torch.Tensor:
    """The values of an image, of any shape and type, as 8 bit.

    | type | values | taken for |
    |---|---|---|
    | `uint8` | any | 8 bit, as they are |
    | `bool` | any | 0 and 255 |
    | `uint16` | any | 16 bit, which is what the type of a 16 bit picture says |
    | other integers | up to 255, 65,535, 2^31 - 1 (signed only), 2^32 - 1 | 8, 16, 31, 32 bit |
    | floats | up to 1 | scaled to [0, 1] already, which a warning says once |
    | floats | up to 255, 65,535 | 8, 16 bit |

    Of more than 8 bit the upper 8 are kept. Floats are rounded, and may lie beyond [0, 1] or [0, 255] by a tenth, as
    resampling makes them: they are clipped. An image is looked at by itself, whatever others are in its batch.

    Raises:
        ValueError: values are negative, larger than that, complex or not finite.
    """
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    if values.is_complex():
        raise ValueError(f"Cannot make an image of {values.dtype}. {_EXPECTED}")
    return _floats_to_uint8(values) if values.is_floating_point() else _integers_to_uint8(values)


def _readable(source: str | os.PathLike, timeout: float | None) -> Path | io.BytesIO:
    """What Pillow can open."""
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        response = get_session().get(name, timeout=timeout, follow_redirects=True)
        return io.BytesIO(response.raise_for_status().content)
    if name.startswith("data:image/"):
        return io.BytesIO(base64.b64decode(name.partition(",")[2]))
    if isinstance(source, str) and not os.path.exists(os.path.expanduser(name)):
        with contextlib.suppress(ValueError):  # a path of no file, the full stop in which is no base64
            return io.BytesIO(base64.b64decode(name.replace("\n", ""), validate=True))
    return Path(name).expanduser()


def _integers_to_uint8(values: torch.Tensor) -> torch.Tensor:
    kind = str(values.dtype).removeprefix("torch.")
    values = values.to(torch.int64)  # few operations take unsigned types
    low, high = values.min().item(), values.max().item()
    if kind == "uint16":
        if 0 < high < 256:
            logger.warning_once(
                "An image of 16 bit integers has no value above 255 and is nearly black: it is not scaled by its "
                "content. Convert it to 8 bit (uint8) if that is what the values are."
            )
        bits = 16
    else:
        sizes = (8, 16, 32) if kind.startswith("u") else (8, 16, 31, 32)
        bits = next((bits for bits in sizes if high < 2**bits), 0)
    if low < 0 or not bits:
        raise ValueError(f"Got an image of {kind} with values from {low} to {high}. {_EXPECTED}")
    return (values >> (bits - 8)).to(torch.uint8)


def _floats_to_uint8(values: torch.Tensor) -> torch.Tensor:
    values = values.detach().float()
    low, high = values.min().item(), values.max().item()
    if not (math.isfinite(low) and math.isfinite(high) and low >= -_OVERSHOOT * max(high, 1) and high <= 65535):
        raise ValueError(f"Got an image of floats with values from {low:g} to {high:g}. {_EXPECTED}")
    if high <= 1 + _OVERSHOOT:
        if high > 0:
            logger.warning_once(
                "Got an image of floats up to 1: it is taken as already scaled to [0, 1]. do_rescale=False says so "
                "without this warning; give values up to 255 as integers (uint8)."
            )
        values = values * 255
    elif high > 255 * (1 + _OVERSHOOT):
        values = (values / 256).floor()
    return values.round().clamp(0, 255).to(torch.uint8)


def _without_orientation(image: Image.Image) -> Image.Image:
    """The picture, which must be a new one, without the metadata by which another reader would turn it again."""
    for key in _ORIENTATION_KEYS:
        image.info.pop(key, None)
    return image
