# SPDX-License-Identifier: Apache-2.0
"""Pictures of detections, drawn with `supervision` (the extra `drawing`)."""

import functools
import logging
import math
import os
import shutil
import subprocess
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from .data.boxes import xywh_to_xyxy
from .data.images import decode_rgb
from .data.records import DetectionData
from .errors import UserError
from .jobs import printable

logger = logging.getLogger(__name__)

# Distinct on photographs, dark enough for white text; neighbouring labels differ most.
COLORS = (
    *("#d62728", "#1f77b4", "#2a8a2a", "#9445c4", "#c75a00", "#00818a", "#c2288a", "#5c5c00", "#3f48cc", "#8c4a2f"),
    *("#b00040", "#006fa6", "#4d7a00", "#6a3d9a", "#a06a00", "#00695c", "#e0389a", "#37474f", "#7b1fa2", "#5d2a1a"),
)
MIN_LONGER_SIDE = 640  # pixels: smaller pictures are enlarged, or their labels could not be read
CAPTION_COLOR, PAGE_COLOR = "#303030", "#ffffff"

FONT_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
FONT_DIRECTORIES = (  # where fontconfig is not there to be asked
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    *(r"%WINDIR%\Fonts", r"%LOCALAPPDATA%\Microsoft\Windows\Fonts"),
)
# Words in the names of fonts that are worse to read on a photograph than the plain one of the same family.
DECORATED = ("bold", "italic", "oblique", "black", "light", "thin", "condensed", "mono", "serif", "math", "nastaliq")
NO_REAL_LETTERS = ("lastresort", "adobeblank")  # fonts with the same sign for whole scripts
ABSENT = "\U0010ffff"  # no character, so every font draws for it what it draws for those that it lacks
DIGITS = " #.0123456789"  # of scores
JOINERS = "\u200c\u200d"  # are not drawn but decide on how their neighbours are
NUMBERS_IN_LEGEND = 50


@dataclass(frozen=True)
class Boxes:
    """Objects to draw on one image.

    Attributes:
        boxes: (n, 4) corners (x_min, y_min, x_max, y_max) in pixels of the image.
        labels: (n,) class of each; decides on its colour.
        scores: (n,) in [0, 1], or `None` for annotated objects.
    """

    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    labels: Sequence[int] | np.ndarray = ()
    scores: Sequence[float] | np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ContactSheetRow:
    """One image of a contact sheet, with what was annotated and what was detected."""

    image: Image.Image
    annotated: Boxes
    detected: Boxes
    caption: str = ""


def draw_boxes(
    image: Image.Image,
    objects: Boxes,
    label_names: Mapping[int, str] | Sequence[str],
    *,
    text: bool = True,
    font_size: int | None = None,
) -> Image.Image:
    """Draw objects with their names and scores on a copy of an image.

    An image with a longer side below 640 pixels is enlarged to that. Objects of higher score lie on top. Names are
    written in a font of this machine that has their letters; where none has, the number of the class is written
    (`#3`), and a warning says which name it stands for. Long names are shortened.

    Args:
        image: any PIL image.
        objects: what to draw.
        label_names: name of each label.
        text: write names and scores; otherwise boxes only.
        font_size: size of the text in pixels, to which lines are proportional. By default it grows with the image.

    Raises:
        ImportError: `supervision` is not installed.
    """
    sv = require_supervision()
    image = image.convert("RGB")
    scale = max(1.0, MIN_LONGER_SIDE / max(image.size))
    if scale > 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    else:
        image = image.copy()
    if not len(objects):
        return image

    boxes = np.asarray(objects.boxes, dtype=np.float32).reshape(-1, 4) * np.float32(scale)
    boxes = np.clip(boxes, 0, np.array([*image.size, *image.size], dtype=np.float32) - 1)
    labels = np.asarray(objects.labels, dtype=int)
    scores = np.ones(len(labels)) if objects.scores is None else np.asarray(objects.scores, dtype=float)
    order = np.argsort(scores, kind="stable")
    detections = sv.Detections(xyxy=boxes[order], class_id=labels[order], confidence=scores[order])
    font_size = font_size or max(12, round(math.hypot(*image.size) / 62))
    palette = sv.ColorPalette.from_hex(list(COLORS))
    image = sv.BoxAnnotator(color=palette, thickness=max(2, round(font_size / 7))).annotate(image, detections)
    if not text:
        return image
    items = label_names.items() if isinstance(label_names, Mapping) else enumerate(label_names)
    names = _written_names(tuple((label, str(name)) for label, name in items))
    written = [names.get(label, _Written(f"#{label}")) for label in labels[order].tolist()]
    for font_path in dict.fromkeys(name.font for name in written):
        font, width = _font(font_path, font_size), max(image.width // 2, 10 * font_size)
        chosen = np.array([name.font == font_path for name in written])
        captions = [
            _fitting(name.text, font, width)
            + (f" {score:.2f}" if objects.scores is not None and name.with_score else "")
            for name, score in zip(written, scores[order].tolist(), strict=True)
            if name.font == font_path
        ]
        annotator = sv.RichLabelAnnotator(
            color=palette,
            font_path=font_path,
            font_size=font_size,
            text_padding=max(2, font_size // 5),
            smart_position=True,
        )
        image = annotator.annotate(image, detections[chosen], labels=captions)
    return image


def draw_contact_sheet(
    rows: Sequence[ContactSheetRow],
    label_names: Mapping[int, str] | Sequence[str],
    *,
    columns: int = 2,
    cell_width: int = 480,
) -> Image.Image:
    """Pairs of pictures in a grid: on the left what is annotated, beside it what was detected.

    Args:
        rows: the images.
        label_names: name of each label.
        columns: pairs side by side.
        cell_width: width in pixels of one picture; its height follows the commonest aspect ratio.

    Raises:
        ImportError: `supervision` is not installed.
        ValueError: there are no rows.
    """
    if not rows:
        raise UserError("There is nothing to draw: a contact sheet needs at least one image.")
    columns = min(columns, len(rows))
    aspect = float(np.clip(np.median([row.image.height / row.image.width for row in rows]), 0.5, 1.0))
    cell = (cell_width, round(cell_width * aspect))
    font_size = max(12, cell_width // 30)
    line, gap = round(font_size * 1.7), max(6, cell_width // 40)
    pair = (2 * cell[0] + gap, cell[1] + line)
    grid_rows = math.ceil(len(rows) / columns)
    width = columns * pair[0] + (columns + 1) * 2 * gap
    sheet = Image.new("RGB", (width, grid_rows * (pair[1] + 2 * gap) + 2 * gap), PAGE_COLOR)
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        left = 2 * gap + (index % columns) * (pair[0] + 2 * gap)
        top = 2 * gap + (index // columns) * (pair[1] + 2 * gap)
        for x, objects, kind in ((left, row.annotated, "annotated"), (left + cell[0] + gap, row.detected, "detected")):
            title = f"{row.caption}: " if row.caption and objects is row.annotated else ""
            caption, font = _written_line(f"{title}{len(objects)} {kind}", font_size)
            draw.text((x, top), _fitting(caption, font, cell[0]), fill=CAPTION_COLOR, font=font)
            # Drawn at twice the size: smooth lines.
            image, enlarged = _resized(row.image, objects, (2 * cell[0], 2 * cell[1]))
            picture = _fit(draw_boxes(image, enlarged, label_names, font_size=max(20, cell_width // 20)), cell)
            sheet.paste(picture, (x, top + line))
    return sheet


def contact_sheet_rows(
    data: DetectionData, predictions: Sequence[dict], *, threshold: float = 0.5, max_images: int = 12
) -> list[ContactSheetRow]:
    """The first images of a data set with their objects and detections, for `draw_contact_sheet`.

    Args:
        data: images and annotated objects; crowds are left out.
        predictions: detections in COCO's result format, as in `EvaluationResult.predictions`.
        threshold: detections with a lower score are left out.
        max_images: number of images.
    """
    labels = {category_id: label for label, category_id in enumerate(data.category_ids)}
    rows = []
    for record in data.dataset.select(range(min(max_images, len(data.dataset)))):
        objects = record["objects"]
        kept = [index for index, crowd in enumerate(objects["iscrowd"]) if not crowd]
        annotated = Boxes(
            boxes=xywh_to_xyxy([objects["bbox"][index] for index in kept]),
            labels=[objects["category"][index] for index in kept],
        )
        image_id = data.own_image_id(record["image_id"])
        shown = [p for p in predictions if p["image_id"] == image_id and p["score"] >= threshold]
        detected = Boxes(
            boxes=xywh_to_xyxy([p["bbox"] for p in shown]),
            labels=[labels[p["category_id"]] for p in shown],
            scores=[p["score"] for p in shown],
        )
        image = decode_rgb(record["image"], image_id)
        rows.append(ContactSheetRow(image, annotated, detected, caption=f"image {image_id}"))
    return rows


def require_supervision():
    """The module `supervision`, or an `ImportError` that says how to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it draws with numpy where there is no OpenCV
            import supervision
    except ImportError as error:
        raise ImportError(
            "Drawing needs the package `supervision`, which is not installed: pip install deperceiver-hf[drawing]"
        ) from error
    return supervision


def _resized(image: Image.Image, objects: Boxes, limits: tuple[int, int]) -> tuple[Image.Image, Boxes]:
    """Image and boxes as large as fits into the limits, so that lines and text are the same in all pictures."""
    scale = min(limits[0] / image.width, limits[1] / image.height)
    size = [max(1, round(scale * side)) for side in image.size]
    factors = np.array(size * 2) / np.array([*image.size, *image.size])
    boxes = np.asarray(objects.boxes, dtype=float).reshape(-1, 4) * factors
    resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return resized, Boxes(boxes, objects.labels, objects.scores)


def _fit(picture: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """The picture in the middle of a cell."""
    scale = min(cell[0] / picture.width, cell[1] / picture.height)
    size = [max(1, round(scale * side)) for side in picture.size]
    canvas = Image.new("RGB", cell, "#f0f0f0")
    offset = ((cell[0] - size[0]) // 2, (cell[1] - size[1]) // 2)
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), offset)
    return canvas


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    text = text if len(text) <= 200 else f"{text[:200]}..."
    while font.getlength(text) > width and len(text) > 4:
        text = text[:-4] + "..."
    return text


# --- fonts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Written:
    """How a class is written on pictures.

    Attributes:
        text: its name, or `#` and its number.
        font: file of the font; `None` is Pillow's own.
        with_score: whether the font has digits.
    """

    text: str
    font: str | None = None
    with_score: bool = True


@functools.lru_cache(maxsize=16)
def _written_names(names: tuple[tuple[int, str], ...]) -> dict[int, _Written]:
    """How each class is written; kept, so that what cannot be written is said once."""
    texts = {label: _drawable(name) or f"#{label}" for label, name in names}
    fonts = _fonts_with(texts.values())
    written = {
        label: _Written(text, *fonts[text]) if text in fonts else _Written(f"#{label}")
        for label, text in texts.items()
    }
    if missing := [f"#{label} is {text}" for label, text in texts.items() if text not in fonts]:
        others = [f"and {len(missing) - NUMBERS_IN_LEGEND} more"] if len(missing) > NUMBERS_IN_LEGEND else []
        logger.warning(
            f"No font of this machine has the letters of these class names; their numbers are drawn instead: "
            f"{', '.join([*missing[:NUMBERS_IN_LEGEND], *others])}. Install a font that has them, such as Noto Sans "
            "(fonts.google.com/noto; Debian and Ubuntu: apt install fonts-noto-cjk fonts-noto-core)."
        )
        if not features.check("raqm") and any(map(_is_right_to_left, texts.values())):
            logger.warning("Names written from right to left also need the library FriBiDi beside Pillow.")
    return written


def _written_line(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """A line of text and a font that has its letters; with escapes if there is none."""
    text = _drawable(text)
    fonts = _fonts_with([text])
    if text not in fonts:
        text = text.encode("ascii", "backslashreplace").decode("ascii")
    return text, _font(fonts.get(text, (None, True))[0], size)


def _drawable(text: str) -> str:
    """Text with nothing in it that is not seen, accents and letters joined as fonts have them."""
    return printable(unicodedata.normalize("NFC", text).translate({0xFE0E: None, 0xFE0F: None})).strip()


def _fonts_with(texts: Iterable[str]) -> dict[str, tuple[str | None, bool]]:
    """A font for each text that one has all letters of, and whether it has digits too: as few fonts as will do.

    Pillow's own comes first; of the others, one with digits before one without, and then the plainest.
    """
    own, _ = _covered(None, set(texts))
    found: dict[str, tuple[str | None, bool]] = dict.fromkeys(own, (None, True))
    waiting = {text for text in texts if text not in found}
    if not features.check("raqm"):  # letters would stand in the wrong order, and unjoined
        waiting = {text for text in waiting if not _is_right_to_left(text)}
    while waiting:
        best: tuple[set[str], bool] = (set(), False)
        chosen = None
        for path in font_files():
            covered = _covered(path, waiting)
            if (len(covered[0]), covered[1]) > (len(best[0]), best[1]):
                best, chosen = covered, path
            if best == (waiting, True):
                break
        if not best[0]:
            break
        found |= dict.fromkeys(best[0], (chosen, best[1]))
        waiting -= best[0]
    return found


def _covered(path: str | None, texts: Collection[str]) -> tuple[set[str], bool]:
    """Those texts that a font has all letters of, and whether it has the digits of scores."""
    try:
        font = _font(path, 16, ImageFont.Layout.BASIC)
        absent = _shape(font, ABSENT)
        needed = {letter for letter in {*DIGITS, *"".join(texts)} if not letter.isspace()} - {*JOINERS}
        lacking = {letter for letter in needed if _shape(font, letter) == absent}
    except (OSError, ValueError):  # no font, a broken one, or one of pictures that have another size
        return set(), False
    return {text for text in texts if lacking.isdisjoint(text)}, lacking.isdisjoint(DIGITS)


def _shape(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _is_right_to_left(text: str) -> bool:
    return any(unicodedata.bidirectional(letter) in ("R", "AL", "AN") for letter in text)


def _font(path: str | None, size: int, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size, layout_engine=layout)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's own is one, where a size is given
    return font


@functools.cache
def font_files() -> tuple[str, ...]:
    """Font files of this machine, the plain upright ones first."""
    found = _listed_by_fontconfig()
    if not found:
        places = [os.path.expanduser(os.path.expandvars(place)) for place in FONT_DIRECTORIES]
        found = [os.path.join(at, name) for place in places for at, _, names in os.walk(place) for name in names]
    letters = [path for path in found if path.lower().endswith(FONT_SUFFIXES)]
    return tuple(sorted({path for path in letters if not _is_any(NO_REAL_LETTERS, path)}, key=_decoration))


def _listed_by_fontconfig() -> list[str]:
    program = shutil.which("fc-list")
    if program is None:
        return []
    try:
        listed = subprocess.run([program, "--format", r"%{file}\n"], capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [os.fsdecode(line) for line in listed.stdout.splitlines() if line]


def _is_any(words: tuple[str, ...], path: str) -> bool:
    return any(word in Path(path).stem.lower() for word in words)


def _decoration(path: str) -> tuple[int, bool, str]:
    name = Path(path).stem.lower()
    return sum(word in name for word in DECORATED), "sans" not in name, path
