# SPDX-License-Identifier: Apache-2.0
"""Images that a data set has twice: as the same file, or as nearly the same picture.

Pictures are compared by a difference hash (N. Krawetz, "Kind of Like That", 2013): the image in grey, averaged to 17 x
16 cells, and one bit for each pair of neighbours in a row, set where the right one is brighter. The distance of two
hashes is the share that only one of them has of the bits set in either; since only set bits count, pictures that are
mostly plain are told apart by the rest. Copies that were saved anew, resized or brightened are below `NEAR`, as are
shots of one thing from one place; a copy that was cropped, mirrored or turned is another picture.
"""

import hashlib
import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .images import UnreadableImageError, open_rgb
from .records import DetectionData

NEAR = 0.2
_CELLS = 16  # a side
_IMAGES_AT_ONCE = 256
_PAIRS_AT_ONCE = 2**22


class ImageHashes(NamedTuple):
    """Attributes:
    content: (N,) digest of each file's bytes, equal for copies of a file; `None` for an image that cannot be read.
    perceptual: (N, 4) uint64, the 256 bits of the difference hash; all 0 for an image that cannot be read.
    """

    content: list[str | None]
    perceptual: np.ndarray


def image_hashes(data: DetectionData) -> ImageHashes:
    """Hashes of all images of a data set, in its order. Every image is decoded once, of a JPEG no more than needed."""
    content: list[str | None] = []
    perceptual = np.zeros((len(data.dataset), _CELLS * _CELLS // 64), dtype=np.uint64)
    images = (row["image"] for row in data.stored_images)
    with ThreadPoolExecutor(max_workers=4) as pool:  # decoders let other threads run
        while batch := list(itertools.islice(images, _IMAGES_AT_ONCE)):
            for digest, bits in pool.map(_hashes_of, batch):
                perceptual[len(content)] = bits
                content.append(digest)
    return ImageHashes(content, perceptual)


def duplicate_groups(hashes: ImageHashes, distance: float = NEAR) -> np.ndarray:
    """Which images are nearly the same picture, directly or through others.

    Args:
        hashes: Of N images.
        distance: Largest of two hashes that are nearly the same, in [0, 1]. Copies of a file are so in any case, and
            images that cannot be read never.

    Returns:
        (N,) number of each image's group, in the order in which they first appear; images alone have one of their own.
    """
    readable = np.flatnonzero([digest is not None for digest in hashes.content])
    pairs = [readable[pair] for pair in _near_pairs(hashes.perceptual[readable], distance)]
    first_of: dict[str, int] = {}
    copies = [(row, first_of.setdefault(digest, row)) for row, digest in enumerate(hashes.content) if digest]
    edges = np.concatenate([*pairs, np.array(copies, dtype=np.int64).reshape(-1, 2)])
    count = len(hashes.content)
    graph = coo_array((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(count, count))
    _, groups = connected_components(graph, directed=False)
    _, first, groups = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[groups]


def near_distances(perceptual: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distances (N, M) of hashes (N, 4) and others (M, 4), in [0, 1]."""
    either = np.zeros((len(perceptual), len(others)), dtype=np.int32)
    differing = np.zeros_like(either)
    for word in range(perceptual.shape[1]):  # a word at a time keeps this small
        ours, theirs = perceptual[:, word, None], others[None, :, word]
        either += np.bitwise_count(ours | theirs)
        differing += np.bitwise_count(ours ^ theirs)
    return differing / np.maximum(either, 1)


def _near_pairs(perceptual: np.ndarray, distance: float) -> Iterator[np.ndarray]:
    """(P, 2) indices of those that are near, a part at a time."""
    step = max(1, _PAIRS_AT_ONCE // max(1, len(perceptual)))
    for start in range(0, len(perceptual), step):
        near = near_distances(perceptual[start : start + step], perceptual[start:]) <= distance
        yield np.argwhere(near) + start


def _hashes_of(image: dict | PIL.Image.Image) -> tuple[str | None, np.ndarray]:
    nothing = np.zeros(_CELLS * _CELLS // 64, dtype=np.uint64)
    try:
        if isinstance(image, PIL.Image.Image):
            return _digest(image.tobytes()), _difference_hash(image)
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        return _digest(content), _difference_hash(open_rgb(io.BytesIO(content), of_use=4 * _CELLS))
    except (UnreadableImageError, OSError):
        return None, nothing


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _difference_hash(image: PIL.Image.Image) -> np.ndarray:
    """The 256 bits as (4,) uint64."""
    cells = np.asarray(image.convert("L").resize((_CELLS + 1, _CELLS), PIL.Image.Resampling.BOX))
    return np.packbits(cells[:, 1:] > cells[:, :-1]).view(np.uint64)
