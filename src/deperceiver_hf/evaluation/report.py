# SPDX-License-Identifier: Apache-2.0
"""The schema of the JSON file that `deperceiver evaluate` writes and that model cards read."""

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any, get_args, get_origin

from ..errors import UserError
from ..output_files import as_path, write_json


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The numbers of an evaluation, and of what, how, when and on what they were found.

    The fields are the file's keys, in its order. Those with a default may be missing in a file.

    Attributes:
        metrics: The COCO numbers by name as fractions of 1, see `CocoDetectionMetric`; -1 for nothing to find.
        per_class: AP of each class by name, `None` for a class without objects.
        model: Directory or Hub id of the model.
        dataset: Directory or Hub id of the data set, or `synthetic` with its options.
        split: Of the data set.
        num_images: How many images were evaluated.
        predictions: JSON file of the detections.
        settings: Options of the evaluation, number of processes, device and size of the images.
        versions: Of the packages that the numbers depend on.
        seconds: Wall time.
        date: Day of the evaluation, YYYY-MM-DD.
    """

    metrics: dict[str, float]
    per_class: dict[str, float | None] | None = None
    model: str | None = None
    dataset: str
    split: str
    num_images: int
    predictions: str | None = None
    settings: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    seconds: float | None = None
    date: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of the file; without what is not known."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, content: Any, source: str | os.PathLike = "This") -> "EvaluationReport":
        """A report of the content of a file. Keys that the schema does not have are left out.

        Args:
            content: What the JSON says.
            source: What the content is from, for the messages.

        Raises:
            ValueError: It is no such content: a key is missing, or a value impossible.
        """
        if not isinstance(content, Mapping):
            raise _not_a_report(source, f"it holds a {type(content).__name__} where an object is expected")
        known: dict[str, Any] = {}
        for entry in fields(cls):
            value = content.get(entry.name)
            if value is None:
                if entry.default is MISSING:
                    raise _not_a_report(source, f"it has no {entry.name}")
            elif isinstance(value, bool) or not isinstance(value, _json_types(entry.type)):
                raise _not_a_report(source, f"its {entry.name} cannot be {reprlib.repr(value)}")
            else:
                known[entry.name] = value
        for name, value in known["metrics"].items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not (value == -1 or 0 <= value <= 1):
                raise UserError(
                    f"{source} has {name} = {value!r}; a fraction of 1 is expected, or -1 for nothing to find."
                )
        return cls(**known)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "EvaluationReport":
        """Read a file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a report.
        """
        path = as_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no evaluation {path}.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise _not_a_report(path, f"it is not JSON: {error}") from error
        return cls.from_dict(content, source=path)

    def write(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all."""
        write_json(path, self.to_dict())


def _json_types(hint: Any) -> tuple[type, ...]:
    """The types that JSON's values have in a field: `dict[str, float] | None` -> `(dict, NoneType)`."""
    alternatives = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    types = tuple(get_origin(alternative) or alternative for alternative in alternatives)
    return (*types, int) if float in types else types


def _not_a_report(source: str | os.PathLike, reason: str) -> UserError:
    return UserError(f"{source} is not a report of `deperceiver evaluate`: {reason}.")
