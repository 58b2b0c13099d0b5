# SPDX-License-Identifier: Apache-2.0
"""A look at a data set as a whole: annotations of which each alone may be right, and all together cannot be.

Two kinds of rules. Those on boxes are asked while data are loaded (`made_smaller_or_larger`, `check_box_format`): are
the numbers those of another format of boxes, or of images of another size? They stop only on evidence that no data set
in order gives (several boxes, and nearly all of them), and only where another reading fits nearly all boxes; on less
they remark on it. Those on objects are asked of loaded data, see `doctor`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .boxes import BOX_FORMATS, UNITS, BoxFormat
from .fields import Id
from .records import LoadingReport

FEW_BOXES = 4  # fewer are no evidence
MANY_BOXES = 20  # that many are, even if most of them could be read either way
NEARLY_ALL = 0.99
SOME, OFTEN = 0.1, 0.3  # shares of boxes that do not fit their images: may be carelessness; cannot be
ROUNDING = 0.005  # of the side, and a pixel: what a box that fits may pass the border by
FAR_OUT = 0.05  # of the side: by which a box that does not fit passes it


class ImplausibleBoxesError(UserError):
    """Boxes that are plainly not what they are read as.

    Attributes:
        formats: Names in `BOX_FORMATS` of those that fit them; none if the images do not fit.
    """

    def __init__(self, message: str, formats: Sequence[str] = ()):
        super().__init__(message)
        self.formats = tuple(formats)


def made_smaller_or_larger(
    boxes: np.ndarray,  # (N, 4) xywh in pixels
    image_index: np.ndarray,  # (N,)
    sizes: np.ndarray,  # (K, 2) width, height of the files
    stated: np.ndarray,  # (K, 2) other sizes that the annotations state, 0 where they do not
    report: LoadingReport,
) -> np.ndarray:
    """Whether images were resized after they had been annotated: (K,) those whose boxes are of the stated size.

    That an image has another size than stated says nothing of its boxes. They are of the stated size if that is the
    file's times one factor, nearly all such boxes fit it, and, where the file is smaller, at least a tenth pass the
    file's border by far; where it is larger, so many boxes would hardly keep to the stated part of it by chance.

    Raises:
        ValueError: boxes are of the stated size, and the images were stretched or cropped.
    """
    known = np.all(stated > 0, axis=1)
    factors = np.where(known[:, None], sizes / np.maximum(stated, 1), 1.0)
    # Equal in both directions but for the rounding to whole pixels.
    difference = np.abs(sizes[:, 0] * stated[:, 1] - sizes[:, 1] * stated[:, 0])
    even = known & (difference <= stated.sum(axis=1))
    fits_stated = _fits(boxes, stated[image_index], ROUNDING)
    leaves_file = ~_fits(boxes, sizes[image_index], FAR_OUT)

    smaller, larger = even & (factors.mean(axis=1) < 1), even & (factors.mean(axis=1) > 1)
    resized = np.zeros(len(sizes), dtype=bool)
    chosen = smaller[image_index]
    if chosen.any() and fits_stated[chosen].mean() >= NEARLY_ALL and leaves_file[chosen].mean() >= SOME:
        resized |= smaller
    chosen = larger[image_index]
    outside = 1 - 1 / np.maximum(factors, 1).prod(axis=1)  # part of the file that the stated size does not reach
    if chosen.any() and fits_stated[chosen].mean() >= NEARLY_ALL and outside[image_index[chosen]].sum() >= 3:
        resized |= larger

    uneven = known & ~even
    chosen = uneven[image_index]
    if (
        uneven.mean() >= 0.5
        and (leaves_file & chosen).sum() >= FEW_BOXES
        and fits_stated[chosen].mean() >= NEARLY_ALL
        and leaves_file[chosen].mean() >= OFTEN
    ):
        row = int(uneven.argmax())
        raise ImplausibleBoxesError(
            f"{report.source}: the images were stretched or cropped after they had been annotated: "
            f"{int((leaves_file & chosen).sum())} boxes do not fit the size of their file but the stated one, e.g. "
            f"{_size(sizes[row])} pixels instead of {_size(stated[row])}. Give the original images, or write width, "
            "height and boxes anew."
        )
    return resized


def check_box_format(
    boxes: np.ndarray,  # (N, 4) as given
    named: np.ndarray,  # (N,) given with names for the numbers, in the order x, y, width, height
    sizes: np.ndarray,  # (N, 2) of the image of each box
    image_index: np.ndarray,  # (N,)
    form: BoxFormat,
    asked_for: bool,
    report: LoadingReport,
) -> None:
    """Refuse boxes that are plainly in another format than `form`, or remark on it where it is less plain.

    Args:
        asked_for: The user has named the format: whatever is found is a remark then.

    Raises:
        ValueError: they are, and the format was not asked for; the message names the one that fits.
    """
    finite = np.isfinite(boxes).all(axis=1)
    boxes, named, sizes, image_index = boxes[finite], named[finite], sizes[finite], image_index[finite]
    if not len(boxes):
        return
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers at the end of the floats
        found = (
            _fractions(boxes, named, sizes, form)
            or _another_format(boxes, named, sizes, form)
            or _part_of_the_image(boxes, named, sizes, image_index, form)
        )
    if found is None:
        return
    if not found.formats:
        report.remarks.append(found.what)
        return
    choice = " or ".join(f"{name} ({name.description})" for name in found.formats)
    option = found.formats[0]
    if asked_for or not found.certain:
        hint = f"--box_format {option} reads them so" if not asked_for else f"they are read as {form}, as asked for"
        report.remarks.append(f"{found.what} Perhaps they are {choice}; {hint}.")
        return
    raise ImplausibleBoxesError(
        f"{report.source}: {found.what} They look like {choice}. Give --box_format {option}, or load "
        f"NAME:bbox_format={option}; --box_format {form} takes them as they are.",
        [str(name) for name in found.formats],
    )


def drawn_before_turning(
    boxes: np.ndarray,  # (N, 4) xywh in pixels
    image_index: np.ndarray,  # (N,)
    sizes: np.ndarray,  # (K, 2) width, height as seen
    turned: np.ndarray,  # (K,) bool, by EXIF and with it their sides exchanged
) -> np.ndarray:
    """(K,) turned images whose boxes all fit the picture as it is stored, and some not as it is seen."""
    fits_stored, leaves = np.ones(len(sizes), dtype=bool), np.zeros(len(sizes), dtype=bool)
    of_turned = turned[image_index]
    index, chosen = image_index[of_turned], boxes[of_turned]
    np.logical_and.at(fits_stored, index, _fits(chosen, sizes[index][:, ::-1], ROUNDING))
    np.logical_or.at(leaves, index, ~_fits(chosen, sizes[index], FAR_OUT))
    return turned & fits_stored & leaves


def check_category_ids(used: Iterable[Id], known: Iterable[Id], report: LoadingReport) -> None:
    """Report ids of categories that would all be known if they were counted from one number higher or lower.

    Args:
        used: Of each annotation.
        known: Of the categories that are listed.
        report: Is told.
    """
    used = list(used)
    distinct, listed = set(used), set(known)
    if distinct <= listed or not all(isinstance(number, int) for number in distinct | listed):
        return
    for step in (1, -1):
        if {int(number) + step for number in distinct} <= listed:
            example = f"ids {min(distinct)} to {max(distinct)} are used, {min(listed)} to {max(listed)} are listed"
            report.add("shifted_category_ids", example, len(used))


@dataclass(frozen=True)
class _Finding:
    what: str  # a sentence
    formats: list[BoxFormat]  # that fit
    certain: bool


def _fractions(boxes: np.ndarray, named: np.ndarray, sizes: np.ndarray, form: BoxFormat) -> _Finding | None:
    """Boxes that are all within [0, 1], of larger images. One of whole numbers may be the first pixel."""
    if form.unit == "relative":
        return None
    within = ((boxes >= -ROUNDING) & (boxes <= 1 + ROUNDING)).all(axis=1) & (sizes.min(axis=1) > 4)
    fractional = within & (boxes != np.round(boxes)).any(axis=1)
    share = within.mean()
    if share < SOME or not (fractional.any() or within.sum() >= FEW_BOXES):
        return None
    example = boxes[int((fractional if fractional.any() else within).argmax())].tolist()
    return _Finding(
        f"{int(within.sum())} of {len(boxes)} boxes lie within [0, 1], where pixels were expected, e.g. {example}.",
        _fitting(boxes[within], named[within], sizes[within], ("relative",)),
        bool(share >= NEARLY_ALL and fractional.sum() >= FEW_BOXES),
    )


def _another_format(boxes: np.ndarray, named: np.ndarray, sizes: np.ndarray, form: BoxFormat) -> _Finding | None:
    """Boxes that leave their images or have no extent as they are read, and fit them as something else."""
    misfit = ~_fits(form.to_xywh(boxes, sizes, named), sizes, FAR_OUT)
    share, count = misfit.mean(), int(misfit.sum())
    if share < SOME:
        return None
    within = ((boxes >= -ROUNDING) & (boxes <= 1 + ROUNDING)).all(axis=1)  # fit as pixels in any way, and mean none
    units = (("relative",),) if within.mean() >= NEARLY_ALL else (("pixels",), tuple(UNITS)[1:])
    formats = next(filter(None, (_fitting(boxes, named, sizes, kinds) for kinds in units)), [])
    formats = [other for other in formats if other != form]
    what = f"{count} of {len(boxes)} boxes have no extent or leave their image when they are read as {form}"
    if formats:
        return _Finding(
            f"{what} ({form.description}), e.g. {boxes[int(misfit.argmax())].tolist()}.",
            formats,
            count >= FEW_BOXES and bool(share >= OFTEN or len(boxes) >= MANY_BOXES),
        )
    leaves = misfit & (boxes[:, 2:] > 0).all(axis=1)
    if leaves.sum() >= FEW_BOXES and leaves.mean() >= OFTEN:
        return _Finding(f"{what}. Were the images resized or exchanged after they had been annotated?", [], False)
    return None


def _part_of_the_image(
    boxes: np.ndarray, named: np.ndarray, sizes: np.ndarray, image_index: np.ndarray, form: BoxFormat
) -> _Finding | None:
    """Boxes in pixels that reach to 100 or to 1000 in both directions and not beyond, in larger images."""
    if form.whole is not None or len(boxes) < MANY_BOXES or len(np.unique(image_index)) < 3:
        return None
    for unit, whole in (("percent", 100), ("permille", 1000)):
        formats = _fitting(boxes, named, sizes, (unit,)) if sizes.min() >= 1.5 * whole else []
        reach = [_reach(other, boxes, named) for other in formats]
        if formats and max(reach) >= 0.95:
            return _Finding(
                f"All {len(boxes)} boxes keep to the first {whole} pixels of larger images, and reach up to there.",
                formats,
                bool(sizes.min() >= 3 * whole),
            )
    return None


def _fitting(boxes: np.ndarray, named: np.ndarray, sizes: np.ndarray, units: tuple[str, ...]) -> list[BoxFormat]:
    """The formats of these units in which nearly all boxes fit their images, and use more than a corner of them."""
    formats = [form for form in map(BoxFormat.parse, BOX_FORMATS) if form.unit in units and form.origin == 0]
    return [
        form
        for form in formats
        if _fits(form.to_xywh(boxes, sizes, named), sizes, ROUNDING).mean() >= NEARLY_ALL
        and (form.unit in ("pixels", "relative") or _reach(form, boxes, named) >= 0.9)
    ]


def _reach(form: BoxFormat, boxes: np.ndarray, named: np.ndarray) -> float:
    """How far to the right and down boxes of a unit other than pixels reach, 1 for the border; the lesser of both."""
    boxes = BoxFormat(form.layout).to_xywh(boxes, np.ones((len(boxes), 2)), named) / form.whole
    return float((boxes[:, :2] + boxes[:, 2:]).max(axis=0).min())


def _fits(boxes: np.ndarray, sizes: np.ndarray, tolerance: float) -> np.ndarray:
    """(N,) whether boxes (x, y, width, height) have an extent and lie within their images.

    Args:
        tolerance: Part of the side by which they may pass the border, besides a pixel.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        margin = 1 + tolerance * sizes
        low, extent = boxes[:, :2], boxes[:, 2:]
        return ((extent > 0) & (low >= -margin) & (low + extent <= sizes + margin)).all(axis=1)


def _size(size: np.ndarray) -> str:
    return " x ".join(str(int(side)) for side in size)
