# SPDX-License-Identifier: Apache-2.0
"""From records to batches: the torch data set, and the collation by the image processor."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..errors import UserError
from .boxes import xywh_to_xyxy, xyxy_to_xywh
from .images import UnreadableImageError, decode_rgb, limit_pixels
from .mixing import ImageMixing
from .records import DetectionData

BAD_IMAGE_POLICIES = ("skip", "stop")
MOST_UNREADABLE = 0.1  # of the images, but at least a few: more are no bad images but a bad disk


class SampleKey(NamedTuple):
    """Which sample of a [`DetectionDataset`].

    Attributes:
        place: of the image in the data.
        repeat: how often it came before in the epoch.
        plain: whether it is not to be mixed with others.
    """

    place: int
    repeat: int = 0
    plain: bool = False


class DetectionDataset(Dataset):
    """Images and annotations of a data set, augmented on the way.

    An item is `{"image": tv_tensors.Image, "annotations": {"image_id": int, "annotations": [{"bbox", "category_id",
    "area", "iscrowd"}, ...]}}`: uint8 RGB of shape (3, H, W), and what a DETR-style image processor takes; `bbox` is
    xywh in pixels of this image, `category_id` the label.

    The random numbers of the transforms depend on (seed, epoch, index) only, and on the repeat of a [`SampleKey`]: the
    sample is the same whichever process or worker makes it, in whichever order, and after a resume.

    Args:
        data: the records.
        transforms: a v2 transform of the samples described in `transforms`, or `None` to leave images as they are,
            with crowds, for evaluation.
        seed: of the augmentation.
        mixing: puts other images into an image before its transforms; the item then has `"mixed_with"`, their ids.
        cache_images: keep every image as it is decoded or painted, 3 bytes a pixel, for the next time that it is asked
            for. Each process keeps its own: worker processes forget theirs when they end.
        on_bad_image: what becomes of an image that cannot be read although its header could. `"stop"` raises
            `UnreadableImageError`; `"skip"` takes the next one instead (`index + 1`, or after it), and the item has
            `"unreadable"`, `{index: reason}`. More than a tenth of such images is an error in any case.
        max_image_pixels: see `limit_pixels`.
    """

    def __init__(
        self,
        data: DetectionData,
        transforms: Callable | None = None,
        seed: int = 0,
        *,
        mixing: ImageMixing | None = None,
        cache_images: bool = False,
        on_bad_image: str = "stop",
        max_image_pixels: int | None = None,
    ):
        if on_bad_image not in BAD_IMAGE_POLICIES:
            raise UserError(f"on_bad_image must be one of {BAD_IMAGE_POLICIES}, got {on_bad_image!r}")
        self.data = data
        self.on_bad_image = on_bad_image
        self.max_image_pixels = max_image_pixels
        self.transforms = transforms
        self.mixing = mixing
        self.seed = seed
        # Worker processes that live through several epochs see the new epoch through shared memory.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(data.dataset), dtype=torch.bool).share_memory_()
        self._rows = data.stored
        self._rows_without_image = data.dataset.with_format(None).remove_columns("image")
        self._images: dict[int, tv_tensors.Image] | None = {} if cache_images else None

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the augmentation; call it before the loader's iterator is made."""
        self._epoch.fill_(epoch)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Height and width of every image, before the transforms."""
        plain = self.data.dataset.with_format(None).select_columns(["height", "width"])
        return list(zip(plain["height"], plain["width"], strict=True))

    def image_id(self, index: int) -> int:
        """The id of the image at a place."""
        return self._rows_without_image[index]["image_id"]

    def image_path(self, index: int) -> str | None:
        """The file of the image at a place; `None` of an image that is in no file of its own."""
        image = self._rows[index]["image"]
        return image.get("path") if isinstance(image, dict) else None

    @property
    def aspect_ratios(self) -> np.ndarray:
        """Width / height of every image, before the transforms."""
        sizes = np.array(self.image_sizes, dtype=np.float64).reshape(-1, 2)
        return sizes[:, 1] / sizes[:, 0]

    def __len__(self) -> int:
        return len(self._rows)

    def leave_out(self, indices: Iterable[int]) -> None:
        """Take other images for these, as for those that cannot be read."""
        self._unreadable[torch.tensor(list(indices), dtype=torch.int64)] = True

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        key = key if isinstance(key, SampleKey) else SampleKey(key)
        key = key._replace(place=range(len(self))[key.place])  # an IndexError ends a loop over the data set
        unreadable: dict[int, str] = {}
        mixed_with: list[int] = []
        sample, image_id = self._sample_or_next(key.place, unreadable)
        with self._random_numbers_of(key):
            if self.mixing is not None and not key.plain:
                sample = self.mixing(sample, partial(self._draw, unreadable, mixed_with))
            if self.transforms is not None:
                sample = self.transforms(sample)
        return {
            "image": sample["image"],
            "annotations": _to_coco(sample, image_id),
            **({"unreadable": unreadable} if unreadable else {}),
            **({"mixed_with": mixed_with} if mixed_with else {}),
        }

    def _draw(self, unreadable: dict[int, str], drawn: list[int]) -> dict[str, Any]:
        """A random sample as it is in the data; its id is added to `drawn`."""
        sample, image_id = self._sample_or_next(int(torch.randint(len(self), ())), unreadable)
        drawn.append(image_id)
        return sample

    def _sample_or_next(self, index: int, unreadable: dict[int, str]) -> tuple[dict[str, Any], int]:
        """[`_load_or_next`] as a sample of `transforms`, and its image's id."""
        row, image = self._load_or_next(index, unreadable)
        objects = row["objects"]
        boxes = torch.from_numpy(xywh_to_xyxy(objects["bbox"]))  # added up in float64, rounded once
        sample = {
            "image": image,
            "boxes": tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=tuple(image.shape[-2:])),
            "labels": torch.tensor(objects["category"], dtype=torch.int64),
            "area": torch.tensor(objects["area"], dtype=torch.float32),
            "iscrowd": torch.tensor(objects["iscrowd"], dtype=torch.bool),
        }
        return sample, row["image_id"]

    def _load_or_next(self, index: int, unreadable: dict[int, str]) -> tuple[dict[str, Any], tv_tensors.Image]:
        """[`_load`] of the first image from `index` on that can be read; the others are entered in `unreadable`."""
        limit_pixels(self.max_image_pixels)
        for place in range(index, index + len(self)):
            candidate = place % len(self)
            if self._unreadable[candidate]:  # found before, perhaps by another process
                unreadable[candidate] = f"The image at place {candidate} of the data set cannot be read."
                continue
            try:
                return self._load(candidate)
            except UnreadableImageError as error:
                if self.on_bad_image == "stop":
                    raise
                self._unreadable[candidate] = True
                unreadable[candidate] = str(error)
                count = int(self._unreadable.sum())
                if count > max(3, MOST_UNREADABLE * len(self)):
                    raise UserError(
                        f"{count} of {len(self)} images cannot be read any more, too many to leave out. Is the "
                        f"disk with the images still there? The last one: {error}"
                    ) from error
        raise UserError(f"None of the {len(self)} images can be read.")

    def _load(self, index: int) -> tuple[dict[str, Any], tv_tensors.Image]:
        """The record of an image, and the image, which the caller may change."""
        if self._images is not None and index in self._images:
            return self._rows_without_image[index], self._images[index].clone()
        row = self._rows[index]
        own_id = self.data.own_image_id(row["image_id"])
        image = decode_rgb(row["image"], own_id)
        if image.size != (row["width"], row["height"]):
            raise UnreadableImageError(
                f"The image of image_id {own_id} ({row['image']['path']}) is {image.size} pixels (width, "
                f"height), its record says {(row['width'], row['height'])}: it was replaced after loading, so its "
                "boxes may not fit."
            )
        image = F.to_image(image)
        if self._images is not None:
            self._images[index] = image.clone()
        return row, image

    @contextmanager
    def _random_numbers_of(self, key: SampleKey) -> Iterator[None]:
        numbers = (self.seed, self.epoch, key.place, *([key.repeat] if key.repeat else []))
        state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(state[0] >> 1))  # the CPU's alone: workers must not touch CUDA
            yield


def _to_coco(sample: dict[str, Any], image_id: int) -> dict[str, Any]:
    boxes = xyxy_to_xywh(sample["boxes"].numpy(), dtype=np.float32)
    columns = (boxes, sample["labels"], sample["area"], sample["iscrowd"])
    annotations = [
        {"bbox": box, "category_id": label, "area": area, "iscrowd": int(crowd)}
        for box, label, area, crowd in zip(*(column.tolist() for column in columns), strict=True)
    ]
    return {"image_id": image_id, "annotations": annotations}


class DetectionCollator:
    """Makes a batch of items with the image processor, the only place that normalises, pads and converts boxes.

    Args:
        image_processor: a DETR-style image processor.
        do_resize: `True` in evaluation; `False` in training, where the transforms have resized.
    """

    def __init__(self, image_processor, do_resize: bool):
        self.image_processor = image_processor
        self.do_resize = do_resize

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W), `labels`, a list of dictionaries of tensors, and
        `unreadable`, the images that others have taken the place of (index in the data set: reason). Where images were
        mixed also `mixed_with`, the ids of the others by the image's own."""
        batch = self.image_processor(
            images=[item["image"].as_subclass(torch.Tensor) for item in items],
            annotations=[item["annotations"] for item in items],
            do_resize=self.do_resize,
            do_convert_annotations=True,  # as losses take boxes, whatever the processor does for others
            input_data_format="channels_first",
            return_tensors="pt",
        )
        unreadable = {index: reason for item in items for index, reason in item.get("unreadable", {}).items()}
        mixed = {item["annotations"]["image_id"]: item["mixed_with"] for item in items if "mixed_with" in item}
        return {
            **batch,
            "labels": [dict(label) for label in batch["labels"]],
            "unreadable": unreadable,
            **({"mixed_with": mixed} if mixed else {}),
        }
