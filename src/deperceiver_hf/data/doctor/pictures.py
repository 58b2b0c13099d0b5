# SPDX-License-Identifier: Apache-2.0
"""Checks on the pixels: what cannot be decoded, pictures that are there twice, in one split or in two, and EXIF.

Every image is decoded once, by `image_hashes`.
"""

import io
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
from tqdm.auto import tqdm

from ..duplicates import ImageHashes, duplicate_groups, image_hashes
from ..images import UnreadableImageError, decode_rgb, read_headers
from .findings import MOST_EXAMPLES, Example, Finding
from .objects import ObjectTable

IMAGES_AT_ONCE = 256
GREY_SIDE = 32  # of the pictures that are compared
ALIKE = 0.7  # correlation of two that are nearly the same


@dataclass(frozen=True)
class _Place:
    split: str
    row: int
    digest: str | None
    file: str

    def is_copy_of(self, other: "_Place") -> bool:
        """Whether this is another file with the same bytes."""
        return self.digest == other.digest and self.file != other.file


def check_pictures(tables: Mapping[str, ObjectTable]) -> list[Finding]:
    """Look at all images."""
    found: list[Finding] = []
    hashes = {}
    for split, table in tables.items():
        hashes[split] = _hashes(table)
        found += _unreadable(table, hashes[split])
        found += _plain(table, hashes[split])
        found += _turned(table)
    return [*found, *_copies(tables, hashes)]


def _hashes(table: ObjectTable) -> ImageHashes:
    """Of all images, with a bar that shows how far it is."""
    content: list[str | None] = []
    perceptual = []
    with tqdm(total=table.num_images, desc=f"Images of {table.split}", leave=False) as bar:
        for start in range(0, table.num_images, IMAGES_AT_ONCE):
            rows = range(start, min(start + IMAGES_AT_ONCE, table.num_images))
            part = image_hashes(replace(table.data, dataset=table.data.dataset.select(rows)))
            content += part.content
            perceptual.append(part.perceptual)
            bar.update(len(rows))
    return ImageHashes(content, np.concatenate(perceptual))


def _unreadable(table: ObjectTable, hashes: ImageHashes) -> list[Finding]:
    rows = [row for row, digest in enumerate(hashes.content) if digest is None]
    if not rows:
        return []
    examples = []
    for row in rows[:MOST_EXAMPLES]:
        reason = ""
        try:
            decode_rgb(table.stored_image(row), table.files[row])
        except UnreadableImageError as error:
            reason = str(error.__cause__ or error)
        examples.append(Example(table.files[row], None, reason, table.split))
    what = f"Images whose headers can be read, and whose pixels cannot: {len(rows)}."
    return [Finding("unreadable_pixels", table.split, what, len(rows), tuple(examples))]


def _plain(table: ObjectTable, hashes: ImageHashes) -> list[Finding]:
    """Images of one colour. Those whose hash has no bit set are candidates."""
    suspects = [
        row for row in np.flatnonzero(~hashes.perceptual.any(axis=1)).tolist() if hashes.content[row] is not None
    ]
    plain = [row for row in suspects if _has_one_colour(table.stored_image(row), table.files[row])]
    if not plain:
        return []
    return [table.finding("plain_images", f"Images of one colour and nothing else: {len(plain)}.", images=plain)]


def _has_one_colour(image: Any, name: str) -> bool:
    return all(low == high for low, high in decode_rgb(image, name).getextrema())


def _turned(table: ObjectTable) -> list[Finding]:
    turned = []
    for start in range(0, table.num_images, IMAGES_AT_ONCE):
        images = [table.stored_image(row) for row in range(start, min(start + IMAGES_AT_ONCE, table.num_images))]
        if not all(isinstance(image, dict) for image in images):
            return []  # made on access
        headers = read_headers([i["path"] if i["bytes"] is None else io.BytesIO(i["bytes"]) for i in images])
        turned += [start + row for row, header in enumerate(headers) if getattr(header, "orientation", 1) != 1]
    if not turned:
        return []
    what = f"Images that EXIF turns or mirrors: {len(turned)}. Boxes are taken for those of the turned image."
    return [table.finding("turned_by_exif", what, images=turned)]


def _copies(tables: Mapping[str, ObjectTable], hashes: Mapping[str, ImageHashes]) -> list[Finding]:
    """Pictures that are there twice; plain ones are not compared."""
    places = [
        _Place(split, row, digest, os.path.normpath(file))
        for split, table in tables.items()
        for row, (digest, file) in enumerate(zip(hashes[split].content, table.files, strict=True))
    ]
    together = ImageHashes(
        [digest for part in hashes.values() for digest in part.content],
        np.concatenate([part.perceptual for part in hashes.values()] or [np.zeros((0, 4), dtype=np.uint64)]),
    )
    exact: dict[str, list[int]] = defaultdict(list)
    for index, digest in enumerate(together.content):
        if digest is not None:
            exact[digest].append(index)
    # An image without structure is like any other one.
    has_structure = [any(words) for words in together.perceptual.tolist()]
    structured = [digest if bits else None for digest, bits in zip(together.content, has_structure, strict=True)]
    groups = duplicate_groups(ImageHashes(structured, together.perceptual))
    near: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups.tolist()):
        near[group].append(index)
    copies = [[places[index] for index in group] for group in exact.values() if len(group) > 1]
    alike = [[places[index] for index in group] for group in near.values() if len(group) > 1]
    vectors = [_grey_values(group, tables) for group in alike]

    found = []
    order = list(tables)
    for later, split in enumerate(order):
        for other in order[:later]:
            pairs = [pair for group in copies for pair in _copied(group, split, other)]
            what = f"{len(pairs)} of {tables[split].num_images} images of {split} are copies of images of {other}."
            found += _of_pairs("split_leak", split, what, pairs, tables)
            pairs = [p for group, grey in zip(alike, vectors, strict=True) for p in _near(group, grey, split, other)]
            what = (
                f"{len(pairs)} of {tables[split].num_images} images of {split} are nearly the same pictures as images "
                f"of {other}."
            )
            found += _of_pairs("near_split_leak", split, what, pairs, tables)
    for split, table in tables.items():
        pairs = [pair for group in copies for pair in _copied(group, split, split)]
        what = f"{len(pairs)} of {table.num_images} images of {split} are copies of others of it."
        found += _of_pairs("duplicate_images", split, what, pairs, tables)
        pairs = [p for group, grey in zip(alike, vectors, strict=True) for p in _near(group, grey, split, split)]
        what = f"{len(pairs)} of {table.num_images} images of {split} are nearly the same pictures as others of it."
        found += _of_pairs("near_duplicate_images", split, what, pairs, tables)
    return found


def _grey_values(group: Sequence[_Place], tables: Mapping[str, ObjectTable]) -> np.ndarray:
    """(n, GREY_SIDE ** 2) vectors of length 1 whose products are correlations of pictures.

    Hashes say which pictures may be alike, these whether they are.
    """
    vectors = np.zeros((len(group), GREY_SIDE**2), dtype=np.float32)
    for vector, place in zip(vectors, group, strict=True):
        image = decode_rgb(tables[place.split].stored_image(place.row), place.file)
        grey = np.asarray(image.convert("L").resize((GREY_SIDE, GREY_SIDE), PIL.Image.Resampling.BOX), np.float32)
        # Without what all rows or all columns have in common: stripes, sky and floor make pictures alike that are not.
        vector[:] = (grey - grey.mean(axis=0) - grey.mean(axis=1, keepdims=True) + grey.mean()).reshape(-1)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def _copied(group: Sequence[_Place], split: str, other: str) -> Iterator[tuple[_Place, _Place]]:
    """Files of a split that `other` has with the same content; of one split, each with an earlier one."""
    for place_of_ours, ours in enumerate(group):
        candidates = group if split != other else group[:place_of_ours]
        if ours.split != split:
            continue
        theirs = next((place for place in candidates if place.split == other and ours.is_copy_of(place)), None)
        if theirs is not None:
            yield ours, theirs


def _near(group: Sequence[_Place], vectors: np.ndarray, split: str, other: str) -> Iterator[tuple[_Place, _Place]]:
    """Images of a split with the one of `other` that is most alike, unless that has a copy of them."""
    of_other = np.array([place.split == other for place in group])
    digests = np.array([place.digest for place in group])
    for number, ours in enumerate(group):
        candidates = np.flatnonzero(of_other if split != other else of_other[:number])
        if ours.split != split or not len(candidates) or (digests[candidates] == ours.digest).any():
            continue
        likeness = vectors[candidates] @ vectors[number]
        if likeness.max() >= ALIKE:
            yield ours, group[candidates[likeness.argmax()]]


def _of_pairs(
    name: str, split: str, what: str, pairs: Sequence[tuple[_Place, _Place]], tables: Mapping[str, ObjectTable]
) -> list[Finding]:
    return [Finding(name, split, what, len(pairs), _pair_examples(pairs, tables))] if pairs else []


def _pair_examples(pairs: Sequence[tuple[_Place, _Place]], tables: Mapping[str, ObjectTable]) -> tuple[Example, ...]:
    return tuple(
        replace(
            tables[place.split].image_example(place.row, f"as {tables[other.split].files[other.row]}"),
            beside=(other.split, other.row),
        )
        for place, other in pairs[:MOST_EXAMPLES]
    )
