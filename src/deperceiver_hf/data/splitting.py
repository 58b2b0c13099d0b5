# SPDX-License-Identifier: Apache-2.0
"""Parts of a data set: by a fraction, with near-duplicates on one side, or by lists of image files.

A list is a text file with the name of an image in each line: its path below the folder that holds all images, or an
end of that, or its name without the suffix.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..output_files import as_path, atomic_path
from .classes import listing
from .duplicates import duplicate_groups, image_hashes
from .records import DetectionData

MOST_OFF = 2.0  # times that a part may be larger or smaller than was asked for


def draw_parts(data: DetectionData, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Draw parts of a data set by chance, near-duplicates (see `duplicates`) always in the same.

    Args:
        data: of N images.
        fractions: of the images, of each part; in (0, 1), their sum less than 1.
        seed: of the drawing.

    Returns:
        The indices of each part, ascending, and of the rest at the end.

    Raises:
        ValueError: the fractions are none, or a part would be empty or of another size by more than `MOST_OFF` times.
    """
    if not all(0 < fraction < 1 for fraction in fractions) or not 0 < sum(fractions) < 1:
        raise UserError(
            f"fractions must be more than 0 and together less than 1, got {', '.join(map(str, fractions))}."
        )
    groups = duplicate_groups(image_hashes(data))
    sizes = np.bincount(groups)
    wanted = [max(1, round(fraction * len(groups))) for fraction in fractions]
    room = list(wanted)
    part_of_group = np.full(len(sizes), len(fractions))
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        part = next((part for part, left in enumerate(room) if sizes[group] <= left), None)
        if part is not None:
            part_of_group[group] = part
            room[part] -= int(sizes[group])
    parts = [np.flatnonzero(part_of_group[groups] == part) for part in range(len(fractions) + 1)]
    for drawn, count in zip(parts, [*wanted, len(groups) - sum(wanted)], strict=True):
        if not count / MOST_OFF <= len(drawn) <= count * MOST_OFF:
            raise UserError(
                f"{data.report.source}: {len(groups)} images are {len(sizes)} different ones, {sizes.max()} of them "
                f"near-duplicates of one, which go to one side: there is no part of about {count} images. Say which "
                "images are for what in lists: --train_list FILE --val_list FILE."
            )
    return parts


def listed_parts(
    data: DetectionData, train_list: str | os.PathLike | None, val_list: str | os.PathLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """The parts for training and validation that lists name; of one list, the other part is the rest.

    Returns:
        Indices of the training images and of the validation images, in the order of the data set.

    Raises:
        OSError: a list cannot be read.
        ValueError: a list names no image of the data, or several by one name, or an image is in both lists.
    """
    names = image_names(data)
    none, everything = np.zeros(0, dtype=np.int64), np.arange(len(names))
    train = none if train_list is None else find_listed(data, train_list, names)
    val = none if val_list is None else find_listed(data, val_list, names)
    train = np.setdiff1d(everything, val) if train_list is None else train
    val = np.setdiff1d(everything, train) if val_list is None else val
    if both := sorted(set(train.tolist()) & set(val.tolist())):
        raise UserError(f"{len(both)} images are in {train_list} and in {val_list}, e.g. {names[both[0]]}.")
    for part, other in ((train, val_list), (val, train_list)):
        if not len(part):
            raise UserError(f"{other} names all {len(names)} images of {data.report.source}; none is left.")
    return train, val


def find_listed(data: DetectionData, file: str | os.PathLike, names: Sequence[str] | None = None) -> np.ndarray:
    """Indices of the images that a list names, ascending.

    Raises:
        OSError: the list cannot be read.
        ValueError: it names an image that is not there, several by one name, or none at all.
    """
    path = as_path(file)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text file with the names of images.") from error
    if not lines:
        raise UserError(f"{path} names no images; a line for each is expected.")
    names = image_names(data) if names is None else names
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        for spelling in _ends(name)[1:]:
            places.setdefault(spelling, []).append(place)
    places |= {name: [place] for place, name in enumerate(names)}
    unknown, found = [], set()
    for line in lines:
        # What is named may have more folders than the data have in common: from another machine, or from above.
        matches = next((places[end] for end in _ends(line) if end in places), [])
        if len(matches) > 1:
            raise UserError(
                f"{path}: {line!r} may be {len(matches)} images of {data.report.source}. Name its folder too."
            )
        found.update(matches)
        if not matches:
            unknown.append(line)
    if unknown:
        raise UserError(
            f"{path} names {len(unknown)} of {len(lines)} images that are not in {data.report.source}: "
            f"{listing(unknown[:3])}. Its images are called {listing(names[:2])}, ..."
        )
    return np.array(sorted(found), dtype=np.int64)


def write_list(path: str | os.PathLike, names: Sequence[str]) -> None:
    """Write the names of images as a list."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def image_names(data: DetectionData) -> list[str]:
    """The name of each image, all different: of a file its path below the folder that holds all, else its id."""
    if data.paints_images:
        return [str(image_id) for image_id in data.dataset.with_format(None)["image_id"]]
    paths: list[str | None] = []
    for batch in data.stored_images.with_format("arrow").iter(batch_size=1000):
        column = batch["image"].combine_chunks()
        paths += column.field("path").to_pylist()
    named = [path for path in paths if path]
    if len(set(named)) < len(paths) or len({os.path.isabs(path) for path in named}) > 1:
        return [str(data.own_image_id(image_id)) for image_id in data.dataset.with_format(None)["image_id"]]
    top = os.path.commonpath([os.path.dirname(path) for path in named]) if named else ""
    return [Path(os.path.relpath(path, top or None)).as_posix() for path in named]


def part_of(data: DetectionData, indices: Sequence[int] | np.ndarray, name: str) -> DetectionData:
    """Some images of a data set as one of its own.

    Args:
        data: of all images. What was repaired while it was loaded is its own.
        indices: of the images, in their new order.
        name: of the part, for messages.
    """
    dataset = data.dataset.select(indices)
    lengths, crowds = [np.zeros(0, dtype=np.int64)], 0
    for batch in dataset.select_columns("objects").with_format("arrow").iter(batch_size=10_000):
        column = batch["objects"].combine_chunks().field("iscrowd")
        lengths.append(pa.compute.list_value_length(column).to_numpy(zero_copy_only=False))
        crowds += pa.compute.sum(column.flatten()).as_py() or 0
    counts = np.concatenate(lengths)
    report = replace(
        data.report,
        source=f"{data.report.source}, {name}",
        num_images=len(dataset),
        num_objects=int(counts.sum()),
        num_crowds=int(crowds),
        num_empty_images=int((counts == 0).sum()),
    )
    return replace(data, dataset=dataset, name=f"{data.name}-{name}", report=report)


def _ends(name: str) -> list[str]:
    """What an image may be called: its path, with less and less folders, and its name without a suffix."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    return list(dict.fromkeys([*ends, PurePosixPath(ends[-1]).stem] if ends else []))
