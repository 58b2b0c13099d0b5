# SPDX-License-Identifier: Apache-2.0
"""Image files: size and orientation from the header, pixels as RGB."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL.Image

from ..errors import one_line
from ..models.pixels_deperceiver import exif_orientation, to_rgb
from .fields import Id
from .records import LoadingReport

EXIF_ORIENTATION = 0x0112

with contextlib.suppress(ImportError):  # Pillow reads HEIF where this is installed
    import pillow_heif

    pillow_heif.register_heif_opener()


_earlier_limit: list[int | None] = []  # of Pillow, while `limit_pixels` has set another


class UnreadableImageError(OSError):
    """A file that is not there, no image, a broken one or too large; the message is the reason alone."""

    issue = "unreadable_image"  # key of `ISSUES`


class OutsideImageError(UnreadableImageError):
    """A file that is not to be read, since it is not below the data directory."""

    issue = "outside_image_file"


class ImageHeader(NamedTuple):
    """Width and height of the stored image in pixels, and its EXIF orientation (1 to 8)."""

    width: int
    height: int
    orientation: int

    @property
    def seen_size(self) -> tuple[int, int]:
        """Width and height after the EXIF rotation."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(source: str | os.PathLike | BinaryIO) -> ImageHeader:
    """Size and orientation of an image file, without decoding its pixels.

    Raises:
        UnreadableImageError: it is no image.
    """
    with _reasons_of_decoders(), PIL.Image.open(source) as image:
        width, height = image.size
        return ImageHeader(width, height, exif_orientation(image))


def read_headers(sources: Sequence, chunk_size: int = 256) -> list[ImageHeader | UnreadableImageError]:
    """`read_header` of many files, several at a time: on a network disk the waiting takes longest."""
    chunks = [sources[start : start + chunk_size] for start in range(0, len(sources), chunk_size)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        return [header for part in pool.map(lambda chunk: list(map(try_header, chunk)), chunks) for header in part]


def try_header(source: str | os.PathLike | BinaryIO) -> ImageHeader | UnreadableImageError:
    """[`read_header`] for loaders, which go on without the images that have none."""
    try:
        return read_header(source)
    except UnreadableImageError as error:
        return error


def seen_sizes(
    headers: Sequence[ImageHeader],
    stated: Sequence[tuple[int, int] | None],
    describe: Sequence[str],
    report: LoadingReport,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decide each image's size and whether its boxes were annotated before it was turned.

    A stated size equal to the stored one where EXIF turns the image tells that the boxes were drawn on the un-turned
    image; they have to be turned too.

    Returns:
        sizes (N, 2), width and height as seen; rotations (N,), the EXIF orientation to apply to the boxes, or 1; and
        differs (N,), whether the stated size is any other than the file's.
    """
    sizes = np.array([header.seen_size for header in headers], dtype=np.int64).reshape(-1, 2)
    rotations = np.ones(len(headers), dtype=np.int64)
    differs = np.zeros(len(headers), dtype=bool)
    for row, (header, size) in enumerate(zip(headers, stated, strict=True)):
        if size is None or size == header.seen_size:
            continue
        if size == (header.width, header.height):
            rotations[row] = header.orientation
            report.add("rotated_image", describe[row])
        else:
            differs[row] = True
    return sizes, rotations, differs


def open_rgb(source: str | os.PathLike | BinaryIO, of_use: int | None = None) -> PIL.Image.Image:
    """The image in a file as it is seen, in RGB; of several frames or pages the first.

    Args:
        source: the file.
        of_use: pixels a side that are enough. A JPEG is then decoded at an eighth of its size, or a quarter or a half.

    Raises:
        UnreadableImageError: the file is missing, truncated or no image.
    """
    with _reasons_of_decoders(), PIL.Image.open(source) as opened:
        if of_use is not None:
            opened.draft("RGB", (of_use, of_use))
        return to_rgb(opened)


def has_more_frames(source: str | os.PathLike) -> bool:
    """Whether a file, of which [`open_rgb`] takes the first frame or page, has others that a viewer would show.

    Pictures that some cameras put behind the first of a JPEG (depth, gain) are none.
    """
    try:
        with _reasons_of_decoders(), PIL.Image.open(source) as image:
            return image.format != "MPO" and getattr(image, "is_animated", False)
    except UnreadableImageError:  # the first can be read, what is behind it cannot
        return False


def decode_rgb(image: dict | PIL.Image.Image, image_id: Id) -> PIL.Image.Image:
    """[`open_rgb`] of an image in a data set.

    Args:
        image: a PIL image or the storage of a `datasets.Image`, `{"bytes": ..., "path": ...}`.
        image_id: for the message.

    Raises:
        UnreadableImageError: the file is missing, truncated or no image.
    """
    content, path = (None, None) if isinstance(image, PIL.Image.Image) else (image.get("bytes"), image.get("path"))
    try:
        if isinstance(image, PIL.Image.Image):
            with _reasons_of_decoders():
                return to_rgb(image)
        return open_rgb(io.BytesIO(content) if content is not None else path or "")
    except UnreadableImageError as error:
        raise UnreadableImageError(
            f"The image of image_id {image_id} ({path or 'stored in the data set'}) cannot be read: {error}"
        ) from error


def limit_pixels(limit: int | None) -> None:
    """Refuse images of more pixels than `limit` from here on, in this process; `None` restores Pillow's own limit.

    Pillow refuses what has twice as many pixels as its limit says, since a small file can hold an image that fills the
    memory.
    """
    if limit is None:
        if _earlier_limit:
            PIL.Image.MAX_IMAGE_PIXELS = _earlier_limit.pop()
        return
    if not _earlier_limit:
        _earlier_limit.append(PIL.Image.MAX_IMAGE_PIXELS)
    PIL.Image.MAX_IMAGE_PIXELS = -(-limit // 2)


@contextlib.contextmanager
def _reasons_of_decoders() -> Iterator[None]:
    """Whatever a decoder raises (each its own exceptions) becomes an `UnreadableImageError` with the reason."""
    try:
        yield
    except UnreadableImageError:
        raise
    except FileNotFoundError as error:
        raise UnreadableImageError("there is no such file") from error
    except PIL.UnidentifiedImageError as error:
        raise UnreadableImageError("it is no image that Pillow can read") from error
    except PIL.Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{one_line(error)} --max_image_pixels sets another limit.") from error
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {one_line(error)}") from error
