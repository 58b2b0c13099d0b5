# SPDX-License-Identifier: Apache-2.0
"""The one way from a picture of any kind to RGB."""

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def exif_orientation(image: Image.Image) -> int:
    """How a picture is to be turned before it is seen, 1 to 8 as EXIF has it; pixels are not decoded for it."""
    try:
        exif = Image.Exif()
        exif.load(image.info.get("exif") or b"")
        orientation = int(exif.get(_ORIENTATION, 1))
    except Exception:  # whatever a camera or a program has written there
        return 1
    return orientation if orientation in range(1, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as it is seen, in RGB."""
    orientation = exif_orientation(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bit to 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    return image.transpose(_TRANSPOSITIONS[orientation]) if orientation > 1 else image
