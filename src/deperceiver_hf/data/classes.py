# SPDX-License-Identifier: Apache-2.0
"""Which class of one side is which of the other: of a saved model and new data, of a model and data to evaluate on, of
two splits. Classes are their names; labels and category ids are places, which differ between any two of these.
"""

import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, concatenate_datasets
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..errors import UserError
from .records import DetectionData, is_main_process

logger = logging.get_logger(__name__)


def match_classes(names: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """The place in `others` of each of `names`, `None` for those that have none there.

    Equal names belong together. Of the rest, those do that are equal but for case, `_` and `-` for spaces and the form
    of their Unicode letters, so that `Helmet` and `helmet` are two classes where both sides have both.

    Raises:
        ValueError: a name stands for several on the other side.
    """
    exact = {name: place for place, name in enumerate(others)}
    times, other_times = Counter(names), Counter(others)
    if twice := [name for name in exact if name in times and times[name] + other_times[name] > 2]:
        raise UserError(f"Several classes have the same name: {listing(twice)}. Give each a name of its own.")
    matched = [exact.get(name) for name in names]
    taken = {place for place in matched if place is not None}
    rest: dict[str, list[int]] = {}
    for place, other in enumerate(others):
        if place not in taken:
            rest.setdefault(folded(other), []).append(place)
    claims = Counter(folded(name) for name, place in zip(names, matched, strict=True) if place is None)
    for label, name in enumerate(names):
        places = rest.get(folded(name), [])
        if matched[label] is not None or not places:
            continue
        if claims[folded(name)] > 1 or len(places) > 1:
            mine = [n for n, place in zip(names, matched, strict=True) if place is None and folded(n) == folded(name)]
            theirs = [others[place] for place in places]
            raise UserError(
                f"It is not clear which class is which: {listing(mine)} on one side, {listing(theirs)} on the other. "
                "Rename them so that they are equal or different in more than case."
            )
        matched[label] = places[0]
    return matched


def corresponding_classes(names: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """[`match_classes`], also where one side has no names (`LABEL_0`, `0`, ...).

    If both have equally many classes, the first is then taken for the first and so on, with a warning.

    Raises:
        ValueError: a name stands for several on the other side.
    """
    places = match_classes(names, others)
    unnamed = any(all(_is_generic(name) for name in side) for side in (names, others))
    if unnamed and len(names) == len(others) and not any(place is not None for place in places):
        _warn_once(
            f"The classes {listing(names)} are taken for {listing(others)} in their order: one side has no names of "
            "them that could be compared."
        )
        return list(range(len(others)))
    return places


def align_labels(id2label: Mapping[int, str], label_names: Sequence[str]) -> np.ndarray:
    """Match the classes of a model with those of a data set, see [`corresponding_classes`].

    Returns:
        (number of the model's classes,) label of the data set for each label of the model, -1 where it has none.

    Raises:
        ValueError: no class is in both, or it is not clear which is which.
    """
    model_names = {int(label): str(name) for label, name in sorted(id2label.items(), key=lambda item: int(item[0]))}
    places = corresponding_classes(list(model_names.values()), label_names)
    table = np.full(max(model_names, default=-1) + 1, -1, dtype=np.int64)
    for label, place in zip(model_names, places, strict=True):
        table[label] = -1 if place is None else place

    matched = set(table[table >= 0].tolist())
    if not matched:
        raise UserError(
            f"No class of the model is in the data. The model's {len(model_names)}: {listing(model_names.values())}. "
            f"The data's {len(label_names)}: {listing(label_names)}. Correct id2label in the model's config.json, or "
            "evaluate on data with its classes."
        )
    if unknown := [name for label, name in enumerate(label_names) if label not in matched]:
        _warn_once(f"{len(unknown)} classes of the data are not among the model's: {listing(unknown)}.")
    return table


def with_labels_of(reference: DetectionData, data: DetectionData) -> DetectionData:
    """The data with the labels of other data, so that the same label means the same class in both.

    Classes belong together by name, see [`corresponding_classes`]; their order and their category ids may differ, and
    `data` need not have all. The category ids of classes that `data` has stay its own.

    Raises:
        ValueError: `data` has objects of a class that the reference does not know, or it is not clear which is which.
    """
    if data.label_names == reference.label_names:
        return data
    places = corresponding_classes(data.label_names, reference.label_names)
    rows = data.dataset.with_format(None).select_columns("objects")
    objects: list[dict] = [row["objects"] for row in rows]
    counts = Counter(label for entry in objects for label in entry["category"])
    unknown = {data.label_names[label]: counts[label] for label, place in enumerate(places) if place is None}
    if found := {name: count for name, count in unknown.items() if count}:
        described = listing(f"{name} ({count} objects)" for name, count in found.items())
        raise UserError(
            f"{data.report.source} has classes that {reference.report.source} does not have: {described}. The classes "
            f"there are {listing(reference.label_names)}. Give the classes the same names in both, or leave these out."
        )
    left_out = f" Its classes {listing(unknown)}, without objects, are left out." if unknown else ""
    _warn_once(
        f"{data.report.source} lists its classes otherwise than {reference.report.source}; names decide.{left_out}"
    )
    for entry in objects:
        entry["category"] = [places[label] for label in entry["category"]]
    column = Dataset.from_dict({"objects": objects}, features=Features({"objects": data.dataset.features["objects"]}))
    dataset = concatenate_datasets([data.dataset.remove_columns("objects"), column], axis=1)
    own_ids = {place: own for own, place in zip(data.category_ids, places, strict=True) if place is not None}
    taken = {*data.category_ids, *reference.category_ids}
    unused = (number for number in itertools.count(1) if number not in taken)
    category_ids = [
        own_ids[label] if label in own_ids else next(unused) if theirs in data.category_ids else theirs
        for label, theirs in enumerate(reference.category_ids)
    ]
    return replace(data, dataset=dataset, label_names=list(reference.label_names), category_ids=category_ids)


def require_class_names(stated: Mapping[str, Any], source: str) -> None:
    """Refuse the content of a `config.json` from which transformers would make other classes than are meant.

    Raises:
        ValueError: `id2label` has not one name for each number, or not as many as `num_labels` says.
    """
    names, count = stated.get("id2label"), stated.get("num_labels")
    if names is None:
        return
    if not isinstance(names, Mapping) or not all(
        str(label).isdecimal() and isinstance(name, str | int | float) for label, name in names.items()
    ):
        raise UserError(
            f'{source}: id2label in config.json must name every label, as in {{"0": "cat", "1": "dog"}}; it is '
            f"{str(names)[:200]}."
        )
    if count is not None and count != len(names):
        raise UserError(
            f"{source}: config.json has num_labels {count}, but {len(names)} classes in id2label "
            f"({listing(names.values())}). Correct the one that is wrong, or leave num_labels out."
        )


def repair_labels(config: PreTrainedConfig, source: str) -> None:
    """Make the names of a saved configuration agree, in place: `id2label` decides, `label2id` is made of it.

    Of a name that several labels have, as `N/A` in models of COCO, `label2id` may say any of them, or none.

    Raises:
        ValueError: `id2label` has not one name for each of the labels 0 to K - 1.
    """
    names = {int(label): str(name) for label, name in config.id2label.items()}
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(
            f"{source}: id2label in config.json must name the labels 0 to {max(len(names) - 1, 0)}, it names "
            f"{listing(sorted(names))}."
        )
    config.id2label = names
    stated = config.label2id if isinstance(config.label2id, Mapping) else {}
    unique = {name for name, count in Counter(names.values()).items() if count == 1}
    fits = all(type(label) is int and names.get(label) == str(name) for name, label in stated.items())
    if not fits or not unique <= {str(name) for name in stated}:
        _warn_once(
            f"{source}: label2id in config.json is not the inverse of id2label, which decides: "
            f"{listing(names.values())}."
        )
        config.label2id = {name: label for label, name in sorted(names.items())}


def listing(names: Iterable[object]) -> str:
    """Names for a message, the first twenty of them."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:20]) + (f", ... ({len(shown)} in all)" if len(shown) > 20 else "")


def folded(name: str) -> str:
    text = unicodedata.normalize("NFKC", name).replace("_", " ").replace("-", " ").casefold()
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _is_generic(name: str) -> bool:
    words = folded(name).split()
    return words[-1:] != [] and words[-1].isdigit() and words[:-1] in ([], ["label"], ["class"], ["category"])


def _warn_once(message: str) -> None:
    if is_main_process():
        logger.warning_once(message)
