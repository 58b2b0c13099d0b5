# SPDX-License-Identifier: Apache-2.0
"""The doctor's report as one HTML file, pictures within: it needs no network, and can be sent as it is.

Whatever comes from the data (names of classes and files, messages that quote them) is escaped.
"""

import base64
import contextlib
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from ...drawing import Boxes, draw_boxes, require_supervision
from ...jobs import printable
from ...output_files import as_path, atomic_path, require_writable_directory
from ..boxes import xywh_to_xyxy
from ..images import UnreadableImageError, decode_rgb
from .findings import Example
from .objects import ObjectTable, describe_size
from .report import DataReport

FILE_NAME = "index.html"
TILE = 220  # pixels a side, of a picture of one object
PICTURE = 520  # pixels, the longer side of a picture of an image
OBJECTS_OF_A_CLASS = 12
OBJECTS_IN_ALL = 600  # of all classes: of many classes fewer are shown of each
FEWEST_OF_A_CLASS = 4
MOST_CLASSES = 150  # that are drawn
IMAGES_OF_A_SPLIT = 6
BARS = 24

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
h3 { font-size: 1rem; margin-bottom: .3rem }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .15rem .8rem .15rem 0; text-align: right }
td:first-child, th:first-child { text-align: left } th { border-bottom: 1px solid #ccc }
pre { background: #f3f3f3; padding: .7rem; overflow-x: auto; white-space: pre-wrap }
.finding { border-left: 5px solid #888; margin: 1rem 0; padding: .1rem .9rem; background: #fafafa }
.error { border-color: #c62828 } .warning { border-color: #e08600 } .note { border-color: #5b7fa6 }
.finding h3 span { font-weight: normal; color: #555 } .advice { color: #333 } ul { margin: .3rem 0 }
.grid { display: flex; flex-wrap: wrap; gap: .6rem }
figure { margin: 0 } figure img { display: block; max-width: 100% }
figcaption { font-size: .75rem; color: #555; max-width: 520px; overflow-wrap: anywhere }
.tile figcaption { max-width: 440px } .charts { display: flex; flex-wrap: wrap; gap: 2rem }
svg text { font: 11px system-ui, sans-serif; fill: #444 }
"""


def check_page(directory: str | Path) -> Path:
    """The file that a report will be written to.

    Raises:
        ImportError: `supervision`, which draws, is not installed.
        OSError: The directory cannot be written to.
    """
    require_supervision()
    return require_writable_directory(as_path(directory)) / FILE_NAME


def write_page(report: DataReport, path: Path) -> None:
    """Write the report with its pictures."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(_page(report))


def _page(report: DataReport) -> Iterator[str]:
    title, album = f"Data: {_text(report.dataset)}", _Album()
    yield (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    )
    yield from _figures(report)
    yield from _findings(report, album)
    yield from _recommendation(report)
    for table in report.tables.values():
        yield from _images(table, album)
    yield from _classes(report, album)
    yield "</body></html>\n"


def _figures(report: DataReport) -> Iterator[str]:
    counts = report.counts
    listed = (f"{count} {severity}{'s' * (count != 1)}" for severity, count in counts.items())
    yield f"<p>{_text(report.recognised)}</p>\n<p>{', '.join(listed)}"
    yield " (pixels were not looked at).</p>\n" if report.quick else ".</p>\n"
    head = ("split", "images", "without objects", "objects", "crowds", "objects an image: median", "99 %", "most")
    rows = []
    for name, table in report.tables.items():
        s = report.split_statistics(table)
        n = s["objects_per_image"]
        keys = ("images", "images_without_objects", "objects", "crowds")
        rows.append((name, *(f"{s[key]:,}" for key in keys), *(f"{n[key]:g}" for key in ("50%", "99%", "max"))))
    yield _table(head, rows)
    yield _table(
        ("class", *(f"{name}: {what}" for name in report.tables for what in ("objects", "images"))),
        [
            (name, *(f"{count:,}" for pair in zip(objects, images, strict=True) for count in pair))
            for name, objects, images in sorted(report.class_rows(), key=lambda row: -sum(row[1]))
        ],
    )
    yield '<div class="charts">'
    for name, table in report.tables.items():
        sides = table.trained_sides(report.trained)[table.ordinary]
        if not len(sides):
            continue
        edges = np.geomspace(max(0.5, sides.min()), max(1.0, sides.max()) * 1.001, BARS + 1)
        yield _histogram(sides, edges, f"{name}: sides of objects in pixels", report.trained.stride)
        most = int(table.per_image.max())
        width = -(-(most + 1) // BARS)
        edges = np.arange(0, most + 1 + width, width)
        yield _histogram(table.per_image, edges, f"{name}: objects in an image", report.trained.num_queries)
    yield "</div>\n"
    marks = []
    if report.trained.stride is not None:
        marks.append(f"a cell of {report.trained.stride} pixels")
    if report.trained.num_queries is not None:
        marks.append(f"the {report.trained.num_queries} queries of the model")
    red = f" Red lines, where they are within a figure: {' and '.join(marks)}." if marks else ""
    yield (
        f"<p>Sides (square roots of areas) are those of images resized to {_text(describe_size(report.trained.size))} "
        f"({_text(report.trained_by)}).{red}</p>\n"
    )


def _findings(report: DataReport, album: "_Album") -> Iterator[str]:
    yield "<h2>Findings</h2>\n"
    if not report.findings:
        yield "<p>None.</p>\n"
    for finding in report.findings:
        split = f", {_text(finding.split)}" if finding.split else ""
        yield (
            f'<div class="finding {finding.severity}"><h3>{_text(finding.name)} '
            f"<span>{finding.severity}{split}, {finding.count:,}</span></h3>\n<p>{_text(finding.what)}</p>\n"
            f'<p class="advice">{_text(finding.advice)}</p>\n'
        )
        if finding.examples:
            yield f"<ul>{''.join(f'<li>{_text(str(example))}</li>' for example in finding.examples)}</ul>\n"
        shown = [e for e in finding.examples if e.row is not None and e.split in report.tables]
        if shown:
            yield from _grid(
                ((album.example(report.tables, e), f"{Path(e.file).name} {e.text}") for e in shown), "tile"
            )
        yield "</div>\n"


def _recommendation(report: DataReport) -> Iterator[str]:
    if (recommended := report.recommendation) is None:
        return
    first = ", once the errors are mended" if report.exit_code else ""
    yield f"<h2>Recommended{first}</h2>\n<pre>{_text(recommended.command)}</pre>\n<ul>"
    yield from (f"<li>{_text(sentence)}</li>" for sentence in (*recommended.reasons, recommended.time) if sentence)
    yield "</ul>\n"


def _images(table: ObjectTable, album: "_Album") -> Iterator[str]:
    """Some images of a split with all their boxes."""
    yield f"<h2>Images of {_text(table.split)}</h2>\n"
    chosen = _spread(np.flatnonzero(table.per_image), IMAGES_OF_A_SPLIT)
    yield from _grid(((album.whole(table, int(row)), table.files[row]) for row in chosen), "whole")


def _classes(report: DataReport, album: "_Album") -> Iterator[str]:
    """A contact sheet of each class, of the first split that has objects of it."""
    names = [name for name, _, _ in report.class_rows()]
    number = int(np.clip(OBJECTS_IN_ALL // max(1, len(names)), FEWEST_OF_A_CLASS, OBJECTS_OF_A_CLASS))
    yield "<h2>Classes</h2>\n<p>Objects of each class, from its smallest to its largest.</p>\n"
    for name in names[:MOST_CLASSES]:
        yield f"<h3>{_text(name)}</h3>\n"
        for table in report.tables.values():
            objects = _of_class(table, name)
            if len(objects):
                chosen = [int(index) for index in _spread(objects, number)]
                yield from _grid(((album.crop(table, i), _object_caption(table, i)) for i in chosen), "tile")
                break
        else:
            yield "<p>No objects.</p>\n"
    if len(names) > MOST_CLASSES:
        yield f"<p>... and {len(names) - MOST_CLASSES} more classes.</p>\n"


def _of_class(table: ObjectTable, name: str) -> np.ndarray:
    """Indices of the objects of a class, from the smallest to the largest."""
    if name not in table.label_names:
        return np.zeros(0, dtype=np.int64)
    objects = table.ordinary[table.labels[table.ordinary] == table.label_names.index(name)]
    return objects[np.argsort(table.boxes[objects, 2:].prod(axis=1), kind="stable")]


def _object_caption(table: ObjectTable, index: int) -> str:
    width, height = table.boxes[index, 2:]
    return f"{Path(table.files[table.rows[index]]).name}, {width:.0f} x {height:.0f}"


class _Album:
    """Draws the images of splits and their parts; the last image that was decoded is kept."""

    def __init__(self) -> None:
        self._last: tuple[tuple[str, int] | None, PIL.Image.Image | None] = (None, None)

    def whole(self, table: ObjectTable, row: int, *, text: bool = True) -> PIL.Image.Image | None:
        """An image with its objects; `None` if it cannot be read."""
        image = self._image(table, row)
        if image is None:
            return None
        objects = np.flatnonzero(table.rows == row)
        drawn = draw_boxes(
            image, Boxes(xywh_to_xyxy(table.boxes[objects]), table.labels[objects]), table.label_names, text=text
        )
        return PIL.ImageOps.contain(drawn, (PICTURE, PICTURE))

    def crop(self, table: ObjectTable, index: int) -> PIL.Image.Image | None:
        """An object and what is around it; `None` if its image cannot be read."""
        image = self._image(table, int(table.rows[index]))
        if image is None:
            return None
        x, y, width, height = table.boxes[index]
        margin = max(0.5 * max(width, height), 12)
        left, top = max(0, int(x - margin)), max(0, int(y - margin))
        right, bottom = (
            min(side, int(np.ceil(end + margin)))
            for side, end in zip(image.size, (x + width, y + height), strict=True)
        )
        box = np.array([[x - left, y - top, x + width - left, y + height - top]])
        part = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
        drawn = draw_boxes(part, Boxes(box, table.labels[[index]]), table.label_names, text=False)
        return PIL.ImageOps.pad(drawn, (TILE, TILE), color="#f0f0f0")

    def example(self, tables: Mapping[str, ObjectTable], example: Example) -> PIL.Image.Image | None:
        """The object of a finding, the image, or the two images."""
        table, row = tables[example.split], int(example.row or 0)
        if example.box is not None:
            return self.crop(table, int(((table.rows == row) & (table.boxes == example.box).all(axis=1)).argmax()))
        places = [(example.split, row), *([example.beside] if example.beside else [])]
        pictures = [self.whole(tables[split], row, text=False) for split, row in places]
        if any(picture is None for picture in pictures):
            return None
        sheet = PIL.Image.new("RGB", (TILE * len(pictures), TILE))
        for place, picture in enumerate(filter(None, pictures)):
            sheet.paste(PIL.ImageOps.pad(picture, (TILE, TILE), color="#f0f0f0"), (TILE * place, 0))
        return sheet

    def _image(self, table: ObjectTable, row: int) -> PIL.Image.Image | None:
        key = (table.split, row)
        if self._last[0] != key:
            image: PIL.Image.Image | None = None
            with contextlib.suppress(UnreadableImageError):
                image = decode_rgb(table.stored_image(row), table.files[row])
            self._last = (key, image)
        return self._last[1]


def _grid(pictures: Iterable[tuple[PIL.Image.Image | None, str]], kind: str) -> Iterator[str]:
    """Pictures beside each other with their captions; those that could not be drawn have captions alone."""
    yield f'<div class="grid {kind}">'
    for picture, caption in pictures:
        drawn = "" if picture is None else f'<img alt="" src="{_as_url(picture)}">'
        yield f"<figure>{drawn}<figcaption>{_text(caption)}</figcaption></figure>\n"
    yield "</div>\n"


def _as_url(picture: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<table><tr>", *(f"<th>{_text(cell)}</th>" for cell in head), "</tr>\n"]
    for row in rows:
        lines += ["<tr>", *(f"<td>{_text(cell)}</td>" for cell in row), "</tr>\n"]
    return "".join([*lines, "</table>\n"])


def _histogram(values: np.ndarray, edges: np.ndarray, title: str, mark: float | None) -> str:
    """Bars of how many values lie between two edges, as SVG; a line at `mark`."""
    width, height, base = 420, 150, 24
    counts, _ = np.histogram(values, edges)
    bar = width / len(counts)
    parts = [f'<svg viewBox="0 -18 {width} {height + base + 18}" width="{width}" role="img">']
    parts.append(f'<text x="0" y="-6">{_text(title)} (highest bar: {int(counts.max()):,})</text>')
    for place, count in enumerate(counts.tolist()):
        tall = height * count / max(1, counts.max())
        span = f"{edges[place]:.3g} to {edges[place + 1]:.3g}: {count:,}"
        parts.append(
            f'<rect x="{place * bar:.1f}" y="{height - tall:.1f}" width="{bar - 1:.1f}" height="{tall:.1f}" '
            f'fill="#5b7fa6"><title>{span}</title></rect>'
        )
    step = max(1, len(edges) // 6)
    for place in range(0, len(edges) - step // 2, step):
        label = f"{edges[place]:.0f}" if edges[place] >= 10 else f"{edges[place]:.2g}"
        parts.append(f'<text x="{place * bar:.1f}" y="{height + 15}">{label}</text>')
    if mark is not None and edges[0] < mark < edges[-1]:
        x = float(np.interp(mark, edges, np.arange(len(edges)))) * bar
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#c62828" stroke-width="2"/>')
    return "".join([*parts, "</svg>\n"])


def _spread(values: np.ndarray, count: int) -> np.ndarray:
    """So many of the values, the first and the last among them, or all."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).astype(int))]


def _text(text: str) -> str:
    """Text of anybody as it may stand in HTML, also within quotes."""
    return html.escape(printable(text), quote=True)
