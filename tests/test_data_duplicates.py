# SPDX-License-Identifier: Apache-2.0
"""Copies of an image are found, whatever was done to the file; other pictures are none."""

import shutil

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from coco_samples import write_coco
from deperceiver_hf.data import load_detection_data
from deperceiver_hf.data.duplicates import NEAR, ImageHashes, duplicate_groups, image_hashes, near_distances


def photograph(seed: int, side: int = 96) -> Image.Image:
    """Something as smooth as a photograph: noise of a few pixels, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def load(root, images: list[Image.Image | bytes], suffix: str = "jpg"):
    """A data set of these images, in their order."""
    names = [f"{index}.{suffix}" for index in range(len(images))]
    (root / "val").mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images, strict=True):
        if isinstance(image, bytes):
            (root / "val" / name).write_bytes(image)
        else:
            image.save(root / "val" / name)
    content = {
        "images": [{"id": index, "file_name": name} for index, name in enumerate(names)],
        "annotations": [],
        "categories": [{"id": 1, "name": "one"}],
    }
    return load_detection_data(write_coco(root, content, annotation_file="annotations/instances_val.json"), "val")


def test_copies_are_found_and_other_pictures_are_not(tmp_path):
    picture = photograph(0)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    copies = [picture, picture.resize((48, 48)), ImageEnhance.Brightness(picture).enhance(1.2), picture.convert("L")]
    data = load(tmp_path, [photograph(1), *copies, photograph(2), turned])
    hashes = image_hashes(data)
    assert duplicate_groups(hashes).tolist() == [0, 1, 1, 1, 1, 2, 3]
    assert len(set(hashes.content)) == 7
    distances = near_distances(hashes.perceptual[1:2], hashes.perceptual)[0]
    assert distances[1] == 0
    assert distances[[0, 5, 6]].min() > 2 * NEAR


def test_near_through_another_is_near():
    bits = np.zeros((4, 256), dtype=np.uint8)
    for row, start in enumerate((0, 10, 20, 150)):
        bits[row, start : start + 100] = 1
    perceptual = np.packbits(bits, axis=1).view(np.uint64)
    assert near_distances(perceptual, perceptual)[0] == pytest.approx([0, 20 / 110, 40 / 120, 1])
    assert duplicate_groups(ImageHashes(list("abcd"), perceptual)).tolist() == [0, 0, 0, 1]


def test_copies_of_a_file_are_one_group_and_broken_files_none(tmp_path):
    data = load(tmp_path, [photograph(0), photograph(1), photograph(2), photograph(3)], suffix="png")
    shutil.copy(tmp_path / "val" / "0.png", tmp_path / "val" / "2.png")
    for name in ("1.png", "3.png"):
        (tmp_path / "val" / name).write_bytes(b"broken since it was loaded")
    hashes = image_hashes(data)
    assert hashes.content[1] is hashes.content[3] is None
    assert hashes.content[0] == hashes.content[2]
    assert duplicate_groups(hashes).tolist() == [0, 1, 0, 2]


def test_plain_pictures_differ_by_what_little_is_on_them(tmp_path):
    def plain(x: int) -> Image.Image:
        image = Image.new("RGB", (96, 96), "white")
        image.paste("black", (x, 20, x + 20, 60))
        return image

    data = load(tmp_path, [plain(10), plain(60), plain(10), Image.new("RGB", (96, 96), "grey")], suffix="png")
    assert duplicate_groups(image_hashes(data)).tolist() == [0, 1, 0, 2]


def test_painted_images_have_hashes():
    data = load_detection_data("synthetic", "train", num_samples=3, image_size=64)
    hashes = image_hashes(data)
    assert None not in hashes.content
    assert duplicate_groups(hashes).tolist() == [0, 1, 2]
