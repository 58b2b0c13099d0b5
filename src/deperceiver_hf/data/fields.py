# SPDX-License-Identifier: Apache-2.0
"""Values as annotation files hold them, numbers as text and the like among them, read as what they are meant to be."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

Id: TypeAlias = int | float | str
"""An id as the user's file has it."""

INT64 = range(-(2**63), 2**63)

_WHOLE = re.compile(r"\s*([+-]?[0-9]+)(\.0*)?\s*")
_YES, _NO = {"1", "true", "yes", "t", "y", "1.0"}, {"0", "false", "no", "f", "n", "0.0"}
_NAMED_BOXES = (  # keys of a box with names, and whether they are corners or a centre
    (("x", "y", "width", "height"), "xywh"),
    (("x", "y", "w", "h"), "xywh"),
    (("left", "top", "width", "height"), "xywh"),
    (("xmin", "ymin", "xmax", "ymax"), "xyxy"),
    (("x_min", "y_min", "x_max", "y_max"), "xyxy"),
    (("x1", "y1", "x2", "y2"), "xyxy"),
    (("left", "top", "right", "bottom"), "xyxy"),
    (("cx", "cy", "w", "h"), "cxcywh"),
    (("cx", "cy", "width", "height"), "cxcywh"),
)


def as_id(value: Any) -> Id | None:
    """A value that can be an id, as it is: a number that is finite or a text that is not blank; else `None`."""
    if isinstance(value, str):
        return value if value.strip() and is_text(value) else None
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    return value if isinstance(value, float) and math.isfinite(value) else None


def as_integer(value: Any) -> int | None:
    """A whole number: `7`, `7.0`, `"7"` and `"7.0"` are 7; anything else is `None`."""
    try:
        if isinstance(value, str):
            match = _WHOLE.fullmatch(value)
            return int(match[1]) if match else None
        if isinstance(value, bool) or value is None:
            return None
        number = int(value)
        return number if number == value else None
    except (TypeError, ValueError, OverflowError):
        return None


def as_number(value: Any) -> float:
    """A number, also one that is written as text; NaN for anything else, `None` and truth values included."""
    if value is None or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def as_truth(value: Any) -> bool | None:
    """Yes or no, as 0 and 1, as truth values or as text of either; `None` for what says neither."""
    if isinstance(value, str):
        text = value.strip().lower()
        return True if text in _YES else False if text in _NO else None
    try:
        return bool(value) if value in (0, 1) else None
    except (TypeError, ValueError):  # an array
        return None


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON may hold halves of characters, `"\\ud800"`."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(value: Any) -> str:
    """Anything as a text that can be written as UTF-8."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def as_boxes(values: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as four numbers each, from lists, text (`"[1, 2, 3, 4]"`) and dictionaries (`{"x": 1, "y": 2, ...}`).

    Returns:
        (N, 4) float64, NaN for a box that is none of these, and (N,) whether a box had names for its numbers; those
        are (x, y, width, height), the others in the order in which they were.
    """
    named = np.zeros(len(values), dtype=bool)
    if all(type(value) is list and len(value) == 4 for value in values):
        kinds = {type(number) for value in values for number in value}
        if kinds <= {int, float}:
            try:
                return np.array(values, dtype=np.float64).reshape(-1, 4), named
            except OverflowError:  # an integer beyond the floats
                pass
    boxes = np.full((len(values), 4), np.nan)
    for row, value in enumerate(values):
        if isinstance(value, dict):
            boxes[row], named[row] = _named_box(value), True
        else:
            boxes[row] = _listed_box(value)
    return boxes, named


def _listed_box(value: Any) -> Sequence[float]:
    if isinstance(value, str):
        value = value.strip().strip("[]()").replace(",", " ").replace(";", " ").split()
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != 4:
        return [math.nan] * 4
    return [as_number(number) for number in value]


def _named_box(value: dict) -> Sequence[float]:
    numbers = {str(key).lower(): as_number(number) for key, number in value.items() if number is not None}
    for keys, layout in _NAMED_BOXES:
        if set(keys) <= numbers.keys():
            a, b, c, d = (numbers[key] for key in keys)
            if layout == "xyxy":
                return [a, b, c - a, d - b]
            return [a - c / 2, b - d / 2, c, d] if layout == "cxcywh" else [a, b, c, d]
    return [math.nan] * 4


class IdTable:
    """Ids that a file lists, and which of them another id in it refers to.

    An id refers to its equal. If there is none, numbers and their texts refer to each other (`7`, `"7"`, `"007"`),
    unless that is more than one of those listed.

    Args:
        ids: All different.
    """

    def __init__(self, ids: Iterable[Id]):
        self._places = {own: place for place, own in enumerate(ids)}
        self._numbers: dict[int, int | None] | None = None  # made when it is first needed

    def find(self, value: Any) -> int | None:
        """The place in `ids` of the one that a value refers to; `None` if there is none or more than one."""
        own = as_id(value)
        if own is None:
            return None
        place = self._places.get(own)
        if place is not None:
            return place
        if self._numbers is None:
            self._numbers = {}
            for listed, place in self._places.items():
                if (number := as_integer(listed)) is not None:
                    self._numbers[number] = None if number in self._numbers else place
        number = as_integer(own)
        return None if number is None else self._numbers.get(number)


def record_ids(own: Sequence[Id]) -> tuple[np.ndarray, dict[int, Id]]:
    """Ids for records, which are 64-bit integers, for images that have any ids of their own.

    Args:
        own: (N,) all different.

    Returns:
        (N,) the ids themselves where all are such integers, else the numbers 0 to N - 1; and the id as the user has it
        of each of these, where that is another value or of another type.
    """
    whole = (None if isinstance(value, str) else as_integer(value) for value in own)
    numbers = [number for number in whole if number is not None and number in INT64]
    if len(numbers) == len(own):
        differing = {number: value for number, value in zip(numbers, own, strict=True) if type(value) is not int}
        return np.array(numbers, dtype=np.int64), differing
    return np.arange(len(own), dtype=np.int64), dict(enumerate(own))


def category_order(own: Id) -> tuple:
    """Key that sorts ids: numbers, and texts that are numbers, by their value; then the other texts."""
    number = as_integer(own) if isinstance(own, str) else own
    return (True, 0, own) if number is None else (False, number, str(own))
