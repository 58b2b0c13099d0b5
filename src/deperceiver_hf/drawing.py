# SPDX-License-Identifier: Apache-2.0
"""Pictures of detections, drawn with `supervision` (the extra `drawing`)."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .data.boxes import xywh_to_xyxy
from .data.images import decode_rgb
from .data.records import DetectionData
from .errors import UserError

# Distinct on photographs, dark enough for white text; neighbouring labels differ most.
COLORS = (
    *("#d62728", "#1f77b4", "#2a8a2a", "#9445c4", "#c75a00", "#00818a", "#c2288a", "#5c5c00", "#3f48cc", "#8c4a2f"),
    *("#b00040", "#006fa6", "#4d7a00", "#6a3d9a", "#a06a00", "#00695c", "#e0389a", "#37474f", "#7b1fa2", "#5d2a1a"),
)
MIN_LONGER_SIDE = 640  # pixels: smaller pictures are enlarged, or their labels could not be read
CAPTION_COLOR, PAGE_COLOR = "#303030", "#ffffff"


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

    An image with a longer side below 640 pixels is enlarged to that. Objects of higher score lie on top.

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
    captions = [
        str(label_names[label]) + ("" if objects.scores is None else f" {score:.2f}")
        for label, score in zip(labels[order].tolist(), scores[order].tolist(), strict=True)
    ]
    font_size = font_size or max(12, round(math.hypot(*image.size) / 62))
    palette = sv.ColorPalette.from_hex(list(COLORS))
    image = sv.BoxAnnotator(color=palette, thickness=max(2, round(font_size / 7))).annotate(image, detections)
    if text:
        annotator = sv.RichLabelAnnotator(
            color=palette, font_size=font_size, text_padding=max(2, font_size // 5), smart_position=True
        )
        image = annotator.annotate(image, detections, labels=captions)
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
    font = ImageFont.load_default(max(12, cell_width // 30))
    line, gap = round(font.size * 1.7), max(6, cell_width // 40)
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
            caption = _fitting(f"{title}{len(objects)} {kind}", font, cell[0])
            draw.text((x, top), caption, fill=CAPTION_COLOR, font=font)
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
        shown = [p for p in predictions if p["image_id"] == record["image_id"] and p["score"] >= threshold]
        detected = Boxes(
            boxes=xywh_to_xyxy([p["bbox"] for p in shown]),
            labels=[labels[p["category_id"]] for p in shown],
            scores=[p["score"] for p in shown],
        )
        image = decode_rgb(record["image"], record["image_id"])
        rows.append(ContactSheetRow(image, annotated, detected, caption=f"image {record['image_id']}"))
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


def _fitting(text: str, font, width: int) -> str:
    while font.getlength(text) > width and len(text) > 4:
        text = text[:-4] + "..."
    return text
