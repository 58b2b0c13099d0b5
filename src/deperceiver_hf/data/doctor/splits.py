# SPDX-License-Identifier: Apache-2.0
"""Checks on what several splits have in common, and on files that are listed twice or not at all."""

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from ...errors import UserError
from ..classes import corresponding_classes, listing
from ..image_files import IMAGE_SUFFIXES
from .findings import MOST_EXAMPLES, Example, Finding
from .objects import MANY, ObjectTable


def check_splits(tables: Mapping[str, ObjectTable], train: str, evaluation: str) -> list[Finding]:
    """What is to be known of the splits together, by the names of files and classes."""
    found = []
    for table in tables.values():
        found += _listed_twice(table)
    found += _same_files(tables, train)
    if train in tables and evaluation in tables and train != evaluation:
        found += _classes(tables[train], tables[evaluation])
    return found


def _listed_twice(table: ObjectTable) -> list[Finding]:
    rows = defaultdict(list)
    for row, (file, is_path) in enumerate(zip(table.files, table.is_path.tolist(), strict=True)):
        if is_path:
            rows[os.path.normpath(file)].append(row)
    again = [row for group in rows.values() for row in group[1:]]
    if not again:
        return []
    what = f"Images that are the files of other images of the list: {len(again)}."
    return [table.finding("repeated_file", what, images=again)]


def _same_files(tables: Mapping[str, ObjectTable], train: str) -> list[Finding]:
    """Files that two splits list."""
    found, names = [], [train, *(name for name in tables if name != train)]
    seen: dict[str, str] = {}
    for name in names:
        table = tables.get(name)
        if table is None:
            continue
        shared: dict[str, list[int]] = defaultdict(list)
        for row, (file, is_path) in enumerate(zip(table.files, table.is_path.tolist(), strict=True)):
            other = seen.setdefault(os.path.normpath(file), name) if is_path else name
            if other != name:
                shared[other].append(row)
        for other, rows in shared.items():
            what = f"Images of {name} that are in {other}, too, the same files: {len(rows)} of {table.num_images}."
            found.append(table.finding("split_leak", what, images=rows))
    return found


def _classes(train: ObjectTable, evaluation: ObjectTable) -> list[Finding]:
    """Whether what is evaluated is what was learned."""
    try:
        places = corresponding_classes(evaluation.label_names, train.label_names)
    except UserError as error:
        return [Finding("unknown_classes", evaluation.split, str(error))]
    found = []
    counts = evaluation.per_class
    unknown = [label for label, place in enumerate(places) if place is None and counts[label]]
    if unknown:
        named = listing(f"{evaluation.label_names[label]} ({counts[label]} objects)" for label in unknown)
        what = f"{evaluation.split} has objects of classes that {train.split} does not list: {named}."
        found.append(Finding("unknown_classes", evaluation.split, what, len(unknown)))
    evaluated = {place: int(counts[label]) for label, place in enumerate(places) if place is not None}
    learned, names = train.per_class, train.label_names
    unlearned = [label for label in evaluated if evaluated[label] and not learned[label]]
    if unlearned and len(train.ordinary):
        named = listing(f"{names[label]} ({evaluated[label]})" for label in unlearned)
        what = f"{evaluation.split} has objects of classes of which {train.split} has none: {named}."
        found.append(Finding("only_in_validation", evaluation.split, what, len(unlearned)))
    unmeasured = [names[label] for label in range(len(names)) if learned[label] and not evaluated.get(label)]
    if unmeasured and len(evaluation.ordinary):
        what = (
            f"{evaluation.split} has no object of {len(unmeasured)} classes of {train.split}: {listing(unmeasured)}."
        )
        found.append(Finding("not_in_validation", evaluation.split, what, len(unmeasured)))
    if 0 < evaluation.num_images < MANY and train.num_images >= 2 * MANY:
        what = f"{evaluation.split} has {evaluation.num_images} images beside {train.num_images} to train on."
        found.append(Finding("few_validation_images", evaluation.split, what, evaluation.num_images))
    return found


def unlisted_images(tables: Mapping[str, ObjectTable]) -> list[Finding]:
    """Image files beside those of the data set, in the same directories, that no split lists."""
    listed = {
        os.path.normpath(file)
        for table in tables.values()
        for file, is_path in zip(table.files, table.is_path.tolist(), strict=True)
        if is_path
    }
    unlisted = []
    for directory in sorted({os.path.dirname(path) for path in listed}):
        with os.scandir(directory or ".") as entries:
            names = [
                os.path.normpath(entry.path) for entry in entries if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
            ]
        unlisted += sorted(set(names) - listed)
    if not unlisted:
        return []
    what = f"Image files that lie beside those of the data set and are not in its annotations: {len(unlisted)}."
    examples = tuple(Example(path) for path in unlisted[:MOST_EXAMPLES])
    return [Finding("unlisted_images", "", what, len(unlisted), examples)]
