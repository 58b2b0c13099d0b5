# SPDX-License-Identifier: Apache-2.0
"""Checks on the pixels: what cannot be decoded, pictures that are there twice, in one split or in two, and EXIF.

Every image is decoded once, by `image_hashes`.
"""

import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..duplicates import ImageHashes, duplicate_groups, image_hashes
from ..images import UnreadableImageError, decode_rgb, read_headers
from .findings import MOST_EXAMPLES, Example, Finding
from .objects import ObjectTable

IMAGES_AT_ONCE = 256


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
        hashes[split] = image_hashes(table.data)
        found += _unreadable(table, hashes[split])
        found += _plain(table, hashes[split])
        found += _turned(table)
    return [*found, *_copies(tables, hashes)]


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
    what = f"The pixels of {len(rows)} images cannot be read, though their headers can."
    return [Finding("unreadable_pixels", table.split, what, len(rows), tuple(examples))]


def _plain(table: ObjectTable, hashes: ImageHashes) -> list[Finding]:
    """Images of one colour. Those whose hash has no bit set are candidates."""
    suspects = [
        row for row in np.flatnonzero(~hashes.perceptual.any(axis=1)).tolist() if hashes.content[row] is not None
    ]
    plain = [row for row in suspects if _has_one_colour(table.stored_image(row), table.files[row])]
    if not plain:
        return []
    return [table.finding("plain_images", f"{len(plain)} images have one colour and nothing else.", images=plain)]


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
    what = f"{len(turned)} images are turned or mirrored by EXIF; boxes are taken for those of the turned image."
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
    copies = [group for group in exact.values() if len(group) > 1]
    alike = [group for group in near.values() if len({together.content[index] for index in group}) > 1]

    found = []
    for name, sets in (("split_leak", copies), ("near_split_leak", alike)):
        found += _across_splits(name, sets, places, tables)
    for name, sets in (("duplicate_images", copies), ("near_duplicate_images", alike)):
        found += _within_a_split(name, sets, places, tables)
    return found


def _across_splits(
    name: str, sets: Sequence[list[int]], places: Sequence[_Place], tables: Mapping[str, ObjectTable]
) -> list[Finding]:
    """Images of each split that an earlier split has, too."""
    found, order, near = [], list(tables), name == "near_split_leak"
    for later, split in enumerate(order):
        for other in order[:later]:
            pairs = []
            for group in sets:
                theirs = [places[index] for index in group if places[index].split == other]
                for ours in (places[index] for index in group if places[index].split == split):
                    same = [place for place in theirs if place.digest == ours.digest]
                    if near and theirs and not same:
                        pairs.append((ours, theirs[0]))
                    elif not near:
                        pairs += [(ours, place) for place in same if ours.is_copy_of(place)][:1]
            if pairs:
                kind = "nearly the same pictures as images" if near else "copies of images"
                what = f"{len(pairs)} of {tables[split].num_images} images of {split} are {kind} of {other}."
                found.append(Finding(name, split, what, len(pairs), _pair_examples(pairs, tables)))
    return found


def _within_a_split(
    name: str, sets: Sequence[list[int]], places: Sequence[_Place], tables: Mapping[str, ObjectTable]
) -> list[Finding]:
    """Images that the same split has before."""
    found, near = [], name == "near_duplicate_images"
    for split, table in tables.items():
        pairs = []
        for group in sets:
            before: list[_Place] = []
            for place in (places[index] for index in group if places[index].split == split):
                same = [other for other in before if place.digest == other.digest]
                if near and before and not same:
                    pairs.append((place, before[0]))
                elif not near:
                    pairs += [(place, other) for other in same if place.is_copy_of(other)][:1]
                before.append(place)
        if pairs:
            kind = "nearly the same pictures as others" if near else "copies of others"
            what = f"{len(pairs)} of {table.num_images} images of {split} are {kind} of it."
            found.append(Finding(name, split, what, len(pairs), _pair_examples(pairs, tables)))
    return found


def _pair_examples(pairs: Sequence[tuple[_Place, _Place]], tables: Mapping[str, ObjectTable]) -> tuple[Example, ...]:
    return tuple(
        tables[place.split].image_example(place.row, f"as {tables[other.split].files[other.row]}")
        for place, other in pairs[:MOST_EXAMPLES]
    )
