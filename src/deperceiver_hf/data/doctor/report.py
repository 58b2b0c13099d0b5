# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of a data set, as text and as JSON."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .findings import SEVERITIES, Finding, by_severity
from .objects import ObjectTable, TrainedSize, describe_size

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
WIDTH = 110  # of the text
MOST_CLASSES = 30  # in the text; the page and JSON have all


@dataclass(frozen=True)
class Recommendation:
    """How to train on a data set.

    Attributes:
        command: To copy.
        reasons: Why its options are as they are, a sentence each.
        time: How long it will take here, and on what that rests; empty if that was not estimated.
        minutes: The same as a number.
    """

    command: str
    reasons: tuple[str, ...] = ()
    time: str = ""
    minutes: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "reasons": list(self.reasons)}


@dataclass(frozen=True)
class DataReport:
    """What was found in a data set.

    Attributes:
        dataset: As the user named it.
        tables: Of the splits that could be loaded.
        findings: Errors first.
        trained: What the images become.
        trained_by: Where that is from: the user's options, or the recommendation.
        recommendation: How to train; `None` where there is nothing to train on.
        quick: Whether pixels were left alone.
        seconds: That it took.
        page: The HTML page that was written.
    """

    dataset: str
    tables: Mapping[str, ObjectTable] = field(repr=False)
    findings: list[Finding]
    trained: TrainedSize
    trained_by: str
    recommendation: Recommendation | None = None
    quick: bool = False
    seconds: float = 0.0
    page: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", by_severity(self.findings))

    @property
    def exit_code(self) -> int:
        """1 if there are errors."""
        return int(any(finding.severity == "error" for finding in self.findings))

    @property
    def counts(self) -> dict[str, int]:
        """How many findings of each severity."""
        return {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES}

    @property
    def recognised(self) -> str:
        """The format of the files and what it was recognised by; empty where there are none."""
        return next((table.data.report.recognised for table in self.tables.values()), "")

    def class_rows(self) -> list[tuple[str, list[int], list[int]]]:
        """Of each class its name, and its objects and its images in each split."""
        names = dict.fromkeys(name for table in self.tables.values() for name in table.label_names)
        rows = []
        for name in names:
            labels = [(t, t.label_names.index(name) if name in t.label_names else None) for t in self.tables.values()]
            objects = [0 if label is None else int(table.per_class[label]) for table, label in labels]
            images = [0 if label is None else int(table.images_per_class[label]) for table, label in labels]
            rows.append((name, objects, images))
        return rows

    def split_statistics(self, table: ObjectTable) -> dict[str, Any]:
        """The figures of a split."""
        per_image = table.per_image
        sides = table.trained_sides(self.trained)[table.ordinary]
        stride = self.trained.stride
        return {
            "images": table.num_images,
            "images_without_objects": int((per_image == 0).sum()),
            "objects": len(table.ordinary),
            "crowds": int(table.crowds.sum()),
            "objects_per_image": {
                **_quantiles(per_image, (0.5, 0.99)),
                "mean": round(float(per_image.mean()), 2) if len(per_image) else 0.0,
                "max": int(per_image.max(initial=0)),
            },
            "image_sizes": _sizes(table.sizes),
            "sides_when_trained": _quantiles(sides, QUANTILES),
            "smaller_than_a_cell": None
            if stride is None or not len(sides)
            else round(float((sides < stride).mean()), 6),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON: figures by split, classes, findings and the recommendation."""
        return {
            "dataset": self.dataset,
            "recognised": self.recognised or None,
            "splits": {name: self.split_statistics(table) for name, table in self.tables.items()},
            "classes": {
                name: {
                    split: {"objects": o, "images": i}
                    for split, o, i in zip(self.tables, objects, images, strict=True)
                }
                for name, objects, images in self.class_rows()
            },
            "trained_at": {
                "size": None if self.trained.size is None else {k: v for k, v in dict(self.trained.size).items() if v},
                "finest_stride": self.trained.stride,
                "num_queries": self.trained.num_queries,
                "by": self.trained_by,
            },
            "findings": [finding.to_dict() for finding in self.findings],
            "counts": self.counts,
            "recommendation": None if self.recommendation is None else self.recommendation.to_dict(),
            "quick": self.quick,
            "seconds": round(self.seconds, 2),
            "page": self.page,
        }

    def summary(self) -> str:
        """All of it as text."""
        parts = [self._splits(), self._classes(), self._sizes(), self._findings(), self._recommendation()]
        if self.page is not None:
            parts.append(f"Pictures: {self.page}")
        return "\n\n".join(part for part in parts if part)

    def _splits(self) -> str:
        if not self.tables:
            return f"{self.dataset}: nothing could be loaded."
        head = ("split", "images", "without objects", "objects", "crowds", "objects an image: median", "99 %", "most")
        rows: list[tuple[str, ...]] = [head]
        for name, table in self.tables.items():
            s = self.split_statistics(table)
            n = s["objects_per_image"]
            rows.append(
                (
                    name,
                    *(f"{s[k]:,}" for k in ("images", "images_without_objects", "objects", "crowds")),
                    *(f"{n[k]:g}" for k in ("50%", "99%", "max")),
                )
            )
        return f"{self.dataset}{f': {self.recognised}' if self.recognised else ''}\n{_columns(rows)}"

    def _classes(self) -> str:
        if not self.tables:
            return ""
        rows = [("class", *self.tables)]
        classes = self.class_rows()
        ordered = sorted(classes, key=lambda row: -sum(row[1]))
        rows += [(name[:40], *(f"{count:,}" for count in objects)) for name, objects, _ in ordered[:MOST_CLASSES]]
        left = f"\n  ... and {len(classes) - MOST_CLASSES} more" if len(classes) > MOST_CLASSES else ""
        return _columns(rows) + left

    def _sizes(self) -> str:
        lines = []
        for name, table in self.tables.items():
            figures = self.split_statistics(table)
            if not figures["objects"]:
                continue
            sides, small = figures["sides_when_trained"], figures["smaller_than_a_cell"]
            cell = "" if small is None else f"; {small:.1%} below a cell of {self.trained.stride} pixels"
            lines.append(
                f"  {name}: 10 % below {sides['10%']:.0f} pixels, half below {sides['50%']:.0f}, 90 % below "
                f"{sides['90%']:.0f}{cell}"
            )
        if not lines:
            return ""
        queries = "" if self.trained.num_queries is None else f"; {self.trained.num_queries} queries"
        size = describe_size(self.trained.size)
        return "\n".join([f"Objects when images are resized to {size}{queries} ({self.trained_by}):", *lines])

    def _findings(self) -> str:
        counts = self.counts
        listed = ", ".join(f"{counts[s]} {s}{'s' * (counts[s] != 1)}" for s in SEVERITIES)
        lines = [f"Findings: {listed}" + (" (pixels were not looked at)" if self.quick else "")]
        for finding in self.findings:
            split = f", {finding.split}" if finding.split else ""
            lines.append(f"{finding.severity.upper()} {finding.name}{split}")
            lines += _wrapped(finding.what)
            lines += [f"      e.g. {example}" for example in finding.examples[:3]]
            lines += _wrapped(f"-> {finding.advice}")
        return "\n".join(lines)

    def _recommendation(self) -> str:
        if self.recommendation is None:
            return ""
        first = ", once the errors are mended" if self.exit_code else ""
        lines = [f"Recommended{first}:", f"  {self.recommendation.command}"]
        for sentence in (*self.recommendation.reasons, self.recommendation.time):
            lines += _wrapped(sentence) if sentence else []
        return "\n".join(lines)


def _quantiles(values: np.ndarray, quantiles: tuple[float, ...]) -> dict[str, float]:
    """By their name; of no values they are 0."""
    values = values if len(values) else np.zeros(1)
    return {f"{q:.0%}": round(float(np.quantile(values, q)), 2) for q in quantiles}


def _sizes(sizes: np.ndarray) -> dict[str, Any]:
    """The commonest size, and the least and the largest sides, as (width, height)."""
    if not len(sizes):
        return {}
    distinct, times = np.unique(sizes, axis=0, return_counts=True)
    return {
        "commonest": distinct[times.argmax()].tolist(),
        "share": round(float(times.max() / times.sum()), 4),
        "least": sizes.min(axis=0).tolist(),
        "largest": sizes.max(axis=0).tolist(),
    }


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a table, the first column to the left and the others to the right."""
    first, *others = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(["", row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], others, strict=True))])
        for row in rows
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
