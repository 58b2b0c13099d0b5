# SPDX-License-Identifier: Apache-2.0
"""From a picture of any kind to 8 bit RGB, and from an array of any kind to values from 0 to 255.

Training data, evaluation, prediction and the image processors all go through here, so that the same picture is the
same tensor whichever way it comes.
"""

import numpy as np
import torch
from PIL import Image, ImageCms
from transformers.utils import logging

logger = logging.get_logger(__name__)

_ORIENTATION = 0x0112  # tag of EXIF
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_RANGES = {"uint16": 65535, "uint32": 2**32 - 1}  # of arrays whose type says it
_ACCEPTED = "Give 8 or 16 bit integers, or numbers from 0 to 1 or from 0 to 255"


def exif_orientation(image: Image.Image) -> int:
    """How a picture is to be turned before it is seen: 1 to 8, as EXIF has it; 1 where it does not say.

    Pixels are not decoded for it, as a PNG's own `getexif` does: a block behind its pixels is not looked for. Whatever
    else a camera or a program has written into the block is passed over.
    """
    try:
        orientation = int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # of an entry of an unexpected kind: there are many
        return 1
    return orientation if orientation in range(1, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it, in 8 bit RGB: turned as EXIF says; of several frames or pages, the current one.

    Gray is repeated, transparency dropped, 16 bit become the upper 8 of them. Pictures of 32 bit integers or of floats
    are taken by their range, see `to_pixels`.

    Raises:
        ValueError: the values have no such range.
    """
    orientation = exif_orientation(image)  # before a conversion loses it
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip them to 255
        pixels = to_pixels(torch.from_numpy(_as_array(image)))
        image = Image.fromarray(pixels.round().to(torch.uint8).numpy())
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
    elif image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if orientation > 1:
        image = image.transpose(_TRANSPOSITIONS[orientation])
    image.info = {}  # nobody is to turn it once more
    return image


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """An image of any shape and number type with values from 0 to 255.

    | values | are taken for |
    |---|---|
    | `uint8` | what they are |
    | `bool` | 0 and 255 |
    | `uint16`, `uint32` | 16 or 32 bit |
    | other integers up to 255, 65,535, 2^32 - 1 | 8, 16, 32 bit |
    | floats up to 1 | scaled to [0, 1] already; a warning says so once |
    | floats up to 255, 65,535 | 8, 16 bit |

    Of 16 or 32 bit the upper 8 are left.

    Raises:
        ValueError: values are negative, larger than that, or not finite.
    """
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    of_type = _RANGES.get(str(image.dtype).removeprefix("torch."))
    if not image.is_floating_point():
        image = image.to(torch.int64)
    low, high = image.min().item(), image.max().item()
    if not (0 <= low <= high < float("inf")):
        raise ValueError(
            f"An image has values from {low:g} to {high:g}. {_ACCEPTED}; of images that are normalised already, say "
            "do_rescale=False and do_normalize=False."
        )
    if image.is_floating_point() and high <= 1:
        if high > 0:
            logger.warning_once(
                "An image has values from 0 to 1, so it is taken as scaled already and not scaled again. "
                "do_rescale=False says so without this warning; an image of bytes should be of integers."
            )
        return image.float() * 255
    limit = of_type or next((limit for limit in (255, 65535, 2**32 - 1) if high <= limit), None)
    if limit is None or (image.is_floating_point() and limit > 65535):
        raise ValueError(f"An image has values up to {high:g}. {_ACCEPTED}.")
    if image.is_floating_point():
        return image.float() if limit == 255 else torch.floor(image.float() / 256)
    return (image >> {255: 0, 65535: 8, 2**32 - 1: 24}[limit]).to(torch.uint8)


def _as_array(image: Image.Image) -> np.ndarray:
    pixels = np.array(image)
    if image.mode.startswith("I;16"):  # whatever its byte order
        return pixels.astype(np.uint16)
    return pixels
