# SPDX-License-Identifier: Apache-2.0
"""The image files of a data set, copied or linked to where a format wants them."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import PIL.Image

from ...errors import UserError
from ...output_files import unique_names
from ..records import DetectionData
from ..splitting import image_names


def file_names(
    data: DetectionData, *, flat: bool = False, own_stems: bool = False, taken: set[str] | None = None
) -> list[str]:
    """Names for the image files of a data set, all different, those that they have where possible.

    Args:
        data: the data set.
        flat: without folders.
        own_stems: different without their suffixes, too, since annotation files are called after them.
        taken: stems that others have; those of these names are added.
    """
    names = image_names(data)
    suffixes = _suffixes(data)
    named = [
        name if PurePosixPath(name).suffix else f"{name}{suffix}" for name, suffix in zip(names, suffixes, strict=True)
    ]
    if flat:
        named = [name.replace("/", "_") for name in named]
    named = unique_names(named)
    stems = set() if taken is None else taken
    for place, name in enumerate(named) if own_stems else ():
        path = PurePosixPath(name)
        stem, number = path.stem, 1
        while str(path.with_name(stem)).casefold() in stems:
            number += 1
            stem = f"{path.stem}_{number}"
        stems.add(str(path.with_name(stem)).casefold())
        named[place] = str(path.with_name(f"{stem}{path.suffix}"))
    return named


def write_images(
    data: DetectionData, names: list[str], directory: Path, link: bool, step: Callable[[], object]
) -> None:
    """Write the image files of a data set under these names; files as they are, images that are none as PNG.

    Args:
        data: the data set.
        names: of the files, below the directory.
        directory: to write to.
        link: make links to the files instead of copies.
        step: is called after each image.

    Raises:
        ValueError: links are asked for, and an image is no file.
        OSError: a file cannot be read or written.
    """
    for row, name in zip(data.stored_images, names, strict=True):
        image, target = row["image"], directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(image, PIL.Image.Image) and image["bytes"] is None:
            _link(Path(image["path"]), target) if link else shutil.copyfile(image["path"], target)
        elif link:
            raise UserError(f"{data.report.source} has its images in itself, not in files that could be linked to.")
        elif isinstance(image, PIL.Image.Image):
            image.save(target)
        else:
            target.write_bytes(image["bytes"])
        step()


def _link(source: Path, target: Path) -> None:
    """A link that needs no rights: to the file itself where it is on the same disk, else to its path."""
    with contextlib.suppress(OSError):
        os.link(os.path.realpath(source), target)
        return
    try:
        os.symlink(os.path.realpath(source), target)
    except OSError as error:
        raise UserError(
            f"{target} cannot be a link to {source}: {error.strerror}. Copy the images: leave out --link."
        ) from error


def _suffixes(data: DetectionData) -> list[str]:
    """The suffix of each image's kind, for those that have no name with one."""
    if data.paints_images:
        return [".png"] * len(data.dataset)
    suffixes = []
    for row in data.stored_images:
        path, content = row["image"]["path"], row["image"]["bytes"]
        if content is None or (path and PurePosixPath(path).suffix):
            suffixes.append(PurePosixPath(path or "").suffix)
            continue
        with PIL.Image.open(io.BytesIO(content)) as image:
            suffixes.append(
                {"JPEG": ".jpg", "TIFF": ".tif"}.get(image.format or "PNG", f".{(image.format or 'png').lower()}")
            )
    return suffixes
