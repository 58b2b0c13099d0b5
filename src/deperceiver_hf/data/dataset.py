# SPDX-License-Identifier: Apache-2.0
"""From records to batches: the torch data set, and the collation by the image processor."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..errors import UserError
from .boxes import xywh_to_xyxy, xyxy_to_xywh
from .images import decode_rgb
from .records import DetectionData


class DetectionDataset(Dataset):
    """Images and annotations of a data set, augmented on the way.

    An item is `{"image": tv_tensors.Image, "annotations": {"image_id": int, "annotations": [{"bbox", "category_id",
    "area", "iscrowd"}, ...]}}`: uint8 RGB of shape (3, H, W), and what a DETR-style image processor takes; `bbox` is
    xywh in pixels of this image, `category_id` the label.

    The random numbers of the transforms depend on (seed, epoch, index) only: the sample is the same whichever process
    or worker makes it, in whichever order, and after a resume.

    Args:
        data: the records.
        transforms: a v2 transform of the samples described in `transforms`, or `None` to leave images as they are,
            with crowds, for evaluation.
        seed: of the augmentation.
        cache_images: keep every image as it is decoded or painted, 3 bytes a pixel, for the next time that it is asked
            for. Each process keeps its own: worker processes forget theirs when they end.
    """

    def __init__(
        self,
        data: DetectionData,
        transforms: Callable | None = None,
        seed: int = 0,
        *,
        cache_images: bool = False,
    ):
        self.data = data
        self.transforms = transforms
        self.seed = seed
        # Worker processes that live through several epochs see the new epoch through shared memory.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        painted = data.dataset.format["type"] == "custom"  # images made on access, by the data set's own transform
        self._rows = data.dataset if painted else data.dataset.cast_column("image", Image(decode=False))
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

    @property
    def aspect_ratios(self) -> np.ndarray:
        """Width / height of every image, before the transforms."""
        sizes = np.array(self.image_sizes, dtype=np.float64).reshape(-1, 2)
        return sizes[:, 1] / sizes[:, 0]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, image = self._load(int(index))
        objects = row["objects"]
        boxes = torch.from_numpy(xywh_to_xyxy(objects["bbox"]))  # added up in float64, rounded once
        sample = {
            "image": image,
            "boxes": tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=tuple(image.shape[-2:])),
            "labels": torch.tensor(objects["category"], dtype=torch.int64),
            "area": torch.tensor(objects["area"], dtype=torch.float32),
            "iscrowd": torch.tensor(objects["iscrowd"], dtype=torch.bool),
        }
        if self.transforms is not None:
            sample = self._transform(sample, int(index))
        return {"image": sample["image"], "annotations": _to_coco(sample, row["image_id"])}

    def _load(self, index: int) -> tuple[dict[str, Any], tv_tensors.Image]:
        """The record of an image, and the image, which the caller may change."""
        if self._images is not None and index in self._images:
            return self._rows_without_image[index], self._images[index].clone()
        row = self._rows[index]
        image = decode_rgb(row["image"], row["image_id"])
        if image.size != (row["width"], row["height"]):
            raise UserError(
                f"The image of image_id {row['image_id']} ({row['image']}) is {image.size} pixels (width, height), "
                f"its record says {(row['width'], row['height'])}. Was the file replaced after loading? Load it anew."
            )
        image = F.to_image(image)
        if self._images is not None:
            self._images[index] = image.clone()
        return row, image

    def _transform(self, sample: dict[str, Any], index: int) -> dict[str, Any]:
        state = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(state[0] >> 1))  # the CPU's alone: workers must not touch CUDA
            return sample if self.transforms is None else self.transforms(sample)


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
        """`pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W) and `labels`, a list of dictionaries of tensors."""
        batch = self.image_processor(
            images=[item["image"].as_subclass(torch.Tensor) for item in items],
            annotations=[item["annotations"] for item in items],
            do_resize=self.do_resize,
            return_tensors="pt",
        )
        return {**batch, "labels": [dict(label) for label in batch["labels"]]}
