# SPDX-License-Identifier: Apache-2.0
"""Image files: size and orientation from the header, pixels as RGB."""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

from .records import LoadingReport

EXIF_ORIENTATION = 0x0112
# What Pillow raises for broken files: besides OSError, its PNG and TIFF readers raise SyntaxError and friends.
_READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    PIL.Image.DecompressionBombError,
)


class ImageHeader(NamedTuple):
    """Width and height of the stored image in pixels, and its EXIF orientation (1 to 8)."""

    width: int
    height: int
    orientation: int

    @property
    def seen_size(self) -> tuple[int, int]:
        """Width and height after the EXIF rotation."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(source) -> ImageHeader | None:
    """Size and orientation of an image file (a path or a binary file object); `None` if it is not a readable image."""
    try:
        with PIL.Image.open(source) as image:
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            width, height = image.size
            return ImageHeader(width, height, orientation if orientation in range(1, 9) else 1)
    except _READ_ERRORS:
        return None


def read_headers(sources: Sequence, chunk_size: int = 256) -> list[ImageHeader | None]:
    """`read_header` of many files, several at a time: on a network disk the waiting takes longest."""
    chunks = [sources[start : start + chunk_size] for start in range(0, len(sources), chunk_size)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        return [header for part in pool.map(lambda chunk: [read_header(s) for s in chunk], chunks) for header in part]


def seen_sizes(
    headers: Sequence[ImageHeader],
    stated: Sequence[tuple[int, int] | None],
    describe: Sequence[str],
    report: LoadingReport,
) -> tuple[np.ndarray, np.ndarray]:
    """Decide each image's size and the frame that its boxes were annotated in.

    A stated size equal to the stored one where EXIF turns the image tells that the boxes were drawn on the un-turned
    image; they have to be turned too. Any other difference is reported, and the file is believed.

    Returns:
        sizes (N, 2), width and height as seen, and rotations (N,), the EXIF orientation to apply to the boxes, or 1.
    """
    sizes = np.array([header.seen_size for header in headers], dtype=np.int64).reshape(-1, 2)
    rotations = np.ones(len(headers), dtype=np.int64)
    for row, (header, size) in enumerate(zip(headers, stated, strict=True)):
        if size is None or size == header.seen_size:
            continue
        if size == (header.width, header.height):
            rotations[row] = header.orientation
            report.add("rotated_image", describe[row])
        else:
            report.add("size_mismatch", f"{describe[row]} is {header.seen_size}, stated {size} (width, height)")
    return sizes, rotations


def open_rgb(path: str | os.PathLike) -> PIL.Image.Image:
    """The image in a file as it is seen, in RGB: see [`decode_rgb`].

    Raises:
        OSError: the file is missing, truncated or no image; the message is the decoder's.
    """
    try:
        with PIL.Image.open(path) as opened:
            return _to_rgb(opened)
    except _READ_ERRORS as error:
        raise OSError(f"{error}") from error


def decode_rgb(image: dict | PIL.Image.Image, image_id: int) -> PIL.Image.Image:
    """The image as it is seen, in RGB: turned as EXIF says, whatever its mode (gray, 16 bit, palette, alpha, CMYK).

    Args:
        image: a PIL image or the storage of a `datasets.Image`, `{"bytes": ..., "path": ...}`.
        image_id: for the message.

    Raises:
        OSError: the file is missing, truncated or no image.
    """
    path = None
    try:
        if isinstance(image, PIL.Image.Image):
            return _to_rgb(image)
        content, path = image.get("bytes"), image.get("path")
        with PIL.Image.open(path if content is None else io.BytesIO(content)) as opened:
            return _to_rgb(opened)
    except _READ_ERRORS as error:
        raise OSError(
            f"The image of image_id {image_id} ({path or 'stored in the data set'}) cannot be read: "
            f"{type(error).__name__}: {error}. Replace the file or remove the image from the annotations."
        ) from error


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bit to 8
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
