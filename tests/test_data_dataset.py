# SPDX-License-Identifier: Apache-2.0
"""From records to batches: odd images, and samples that depend on seed, epoch and index alone."""

import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from coco_samples import CATEGORIES, annotation, coco_content, write_coco
from deperceiver_hf import DePerceiverImageProcessor
from deperceiver_hf.data import (
    DetectionCollator,
    DetectionDataset,
    SyntheticScenes,
    TrainingBatchSampler,
    load_detection_data,
    make_train_transforms,
)
from deperceiver_hf.data.images import decode_rgb

SIZE = {"shortest_edge": 48, "longest_edge": 80}


@pytest.fixture(scope="module")
def data():
    return load_detection_data("synthetic", "train", num_samples=7, image_size=64, max_objects=4)


@pytest.fixture
def processor():
    return DePerceiverImageProcessor(size=SIZE)


def make_dataset(data, seed=0) -> DetectionDataset:
    return DetectionDataset(data, make_train_transforms("original", 48), seed=seed)


def equal(first, second) -> bool:
    same_image = first["image"].shape == second["image"].shape and (first["image"] == second["image"]).all()
    return bool(same_image) and first["annotations"] == second["annotations"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_do_not_depend_on_workers_order_or_the_global_random_state(data, num_workers):
    dataset = make_dataset(data)
    dataset.set_epoch(3)
    expected = [make_and_set(data, 3)[index] for index in range(7)]
    torch.manual_seed(num_workers)
    state = torch.random.get_rng_state()
    dataset[0]
    assert (torch.random.get_rng_state() == state).all()
    order = [4, 0, 6, 1]
    loader = DataLoader(dataset, sampler=order, batch_size=None, num_workers=num_workers)
    for index, item in zip(order, loader, strict=True):
        assert equal(item, expected[index])


def make_and_set(data, epoch, seed=0) -> DetectionDataset:
    dataset = make_dataset(data, seed)
    dataset.set_epoch(epoch)
    return dataset


def test_samples_change_with_epoch_seed_and_index(data):
    first = [make_and_set(data, 0)[index] for index in range(7)]
    for other in (make_and_set(data, 1), make_and_set(data, 0, seed=1)):
        assert not any(equal(other[index], first[index]) for index in range(7))
    assert len({item["image"].shape for item in first}) > 1


def test_workers_that_live_on_see_the_next_epoch(data):
    dataset = make_dataset(data)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 5):
        dataset.set_epoch(epoch)
        expected = make_and_set(data, epoch)
        assert all(equal(item, expected[index]) for index, item in enumerate(loader))


@pytest.mark.parametrize("augmentation", ["original", "crop_any_orientation", None])
@pytest.mark.parametrize("painted", [False, True])
def test_cached_images_change_no_bit_and_are_read_once(data, tmp_path, monkeypatch, augmentation, painted):
    data = data if painted else load_detection_data(str(write_coco(tmp_path)), "val")
    transforms = make_train_transforms(augmentation, 48) if augmentation else None
    plain, cached = (DetectionDataset(data, transforms, seed=5, cache_images=cache) for cache in (False, True))
    expected = {}
    for epoch in range(3):
        plain.set_epoch(epoch)
        expected |= {(epoch, index): plain[index] for index in range(len(plain))}
    reads = []

    def recording(image, image_id):
        reads.append(image_id)
        return decode_rgb(image, image_id)

    monkeypatch.setattr("deperceiver_hf.data.dataset.decode_rgb", recording)
    monkeypatch.setattr(SyntheticScenes, "paint", painted_once(SyntheticScenes.paint))
    for (epoch, index), item in expected.items():
        cached.set_epoch(epoch)
        found = cached[index]
        assert equal(found, item)
        assert found["image"].stride() == item["image"].stride()
        found["image"].zero_()  # an item belongs to whoever asked for it
    assert len(reads) == len(set(reads)) == len(data.dataset)


def painted_once(paint):
    seen = set()

    def checked(scenes, stream, index):
        assert index not in seen
        seen.add(index)
        return paint(scenes, stream, index)

    return checked


def test_a_pickled_dataset_is_the_same(data):
    dataset = make_and_set(data, 2)
    assert equal(pickle.loads(pickle.dumps(dataset))[1], dataset[1])


def odd_images() -> dict[str, tuple[PIL.Image.Image, dict]]:
    gray = PIL.Image.fromarray(np.arange(0, 240, dtype=np.uint8).reshape(12, 20))
    rgb = PIL.Image.merge("RGB", (gray, gray, gray))
    exif = rgb.getexif()
    exif[0x0112] = 6
    sixteen_bit = PIL.Image.fromarray(np.asarray(gray).astype(np.uint16) * 256)
    return {
        "gray.png": (gray, {}),
        "one_bit.png": (gray.convert("1"), {}),
        "sixteen_bit.png": (sixteen_bit, {}),
        "gray_alpha.png": (gray.convert("LA"), {}),
        "alpha.png": (rgb.convert("RGBA"), {}),
        "palette.png": (rgb.quantize(256), {}),
        "palette.gif": (rgb.quantize(256), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "turned.jpg": (rgb, {"exif": exif}),
        "pixel.png": (rgb.crop((0, 0, 1, 1)), {}),
        "line.png": (rgb.resize((1000, 1)), {}),
    }


@pytest.mark.parametrize("augment", [False, True])
def test_images_of_every_kind_become_rgb(tmp_path, processor, augment):
    images = odd_images()
    content = {
        "images": [{"id": position, "file_name": name} for position, name in enumerate(images)],
        "annotations": [annotation(position + 1, position, 1, [0, 0, 1, 1]) for position in range(len(images))],
        "categories": CATEGORIES,
    }
    write_coco(tmp_path, content)
    for name, (image, options) in images.items():
        image.save(tmp_path / "val2017" / name, **options)
    data = load_detection_data(str(tmp_path), "val", strict=True)
    dataset = DetectionDataset(data, make_train_transforms("original", 48) if augment else None)
    for index, (row, (image, options)) in enumerate(zip(data.dataset, images.values(), strict=True)):
        item = dataset[index]
        assert item["image"].dtype == torch.uint8
        assert item["image"].shape[0] == 3
        assert (row["width"], row["height"]) == (image.size[::-1] if options else image.size)
        if not augment:
            assert tuple(item["image"].shape[1:]) == (row["height"], row["width"])
            if image.mode in ("L", "I;16", "RGBA", "LA", "P") and image.size == (20, 12):
                reference = torch.arange(240).reshape(12, 20)
                assert (item["image"][1].int() - reference).abs().max() <= 8  # a palette is coarse
        batch = DetectionCollator(processor, do_resize=not augment)([item])
        assert batch["pixel_values"].isfinite().all()
        assert batch["labels"][0]["boxes"].isfinite().all()


@pytest.mark.parametrize("breakage", ["truncated", "missing", "replaced"])
def test_an_image_that_breaks_later_is_named(tmp_path, breakage):
    data = load_detection_data(str(write_coco(tmp_path)), "val")
    path = tmp_path / "val2017" / "000007.png"
    if breakage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif breakage == "missing":
        path.unlink()
    else:
        PIL.Image.new("RGB", (5, 5)).save(path)
    with pytest.raises((OSError, ValueError), match=r"image_id 7 .*000007\.png"):
        DetectionDataset(data)[0]


def test_labels_of_a_batch_lead_back_to_category_ids_boxes_and_images(tmp_path, processor):
    """Ids with holes, sizes that differ, crowds, an image without objects: the way into the model and back."""
    data = load_detection_data(str(write_coco(tmp_path)), "val")
    dataset = DetectionDataset(data)
    batch = DetectionCollator(processor, do_resize=True)([dataset[index] for index in range(len(dataset))])
    stored = {a["id"]: a for a in coco_content()["annotations"] if not a["iscrowd"]}
    found = []
    for label in batch["labels"]:
        height, width = label["orig_size"].tolist()
        for name, box in zip(label["class_labels"].tolist(), label["boxes"], strict=True):
            x, y, w, h = (box * torch.tensor([width, height, width, height])).tolist()
            found.append((int(label["image_id"]), data.category_ids[name], x - w / 2, y - h / 2, w, h))
    expected = [(a["image_id"], a["category_id"], *a["bbox"]) for a in stored.values()]
    np.testing.assert_allclose(sorted(found), sorted(expected), atol=1e-4)
    assert batch["pixel_mask"].shape == batch["pixel_values"].shape[:1] + batch["pixel_values"].shape[2:]
    assert [len(dataset[index]["annotations"]["annotations"]) for index in range(4)] == [2, 1, 1, 0]  # crowd kept


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_goes_on_in_the_middle_with_the_samples_that_were_left(data, grouped, num_workers):
    def batches(epoch, skip=0, num_workers=0):
        dataset = make_dataset(data)
        sampler = TrainingBatchSampler(dataset, 2, group_by_aspect_ratio=grouped)
        sampler.set_epoch(epoch, skip)
        return list(DataLoader(dataset, batch_sampler=sampler, collate_fn=list, num_workers=num_workers))

    whole = batches(1)
    rest = batches(1, skip=2, num_workers=num_workers)
    assert len(whole) == 3
    assert len(rest) == 1
    assert all(equal(mine, theirs) for mine, theirs in zip(rest[0], whole[2], strict=True))
