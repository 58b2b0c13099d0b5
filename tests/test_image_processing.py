# SPDX-License-Identifier: Apache-2.0
"""The image processor of both backends: what goes into the model and what comes out of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict

from deperceiver_hf.models.detection_processing_deperceiver import resized_size
from deperceiver_hf.models.image_processing_deperceiver import DePerceiverImageProcessor, DePerceiverImageProcessorPil

FIXTURES = Path(__file__).parent / "fixtures"
BACKENDS = [DePerceiverImageProcessor, DePerceiverImageProcessorPil]
SMALL = {"shortest_edge": 48, "longest_edge": 80}
ORIENTATION = 0x0112


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth coloured picture with some noise, more like a photograph than noise alone."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / (7 + 3 * c) + y / (11 - 2 * c) + c) for c in range(3)]
    pixels = np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def coco(*boxes, image_id: int = 7, **extra) -> dict:
    """The annotation of an image with these `(x, y, width, height)` boxes, labelled 0, 1, ..."""
    return {
        "image_id": image_id,
        "annotations": [
            {"bbox": list(box), "category_id": label, "area": box[2] * box[3], "iscrowd": 0, **extra}
            for label, box in enumerate(boxes)
        ],
    }


@pytest.fixture(params=BACKENDS, ids=["torchvision", "pil"])
def processor(request):
    return request.param(size=SMALL)


def test_defaults_are_those_of_the_paper():
    processor = DePerceiverImageProcessor()
    assert processor(picture(480, 640), return_tensors="pt")["pixel_values"].shape == (1, 3, 800, 1066)
    assert processor.size == {"shortest_edge": 800, "longest_edge": 1333}
    assert (processor.image_mean, processor.image_std) == (
        tuple(IMAGENET_DEFAULT_MEAN),
        tuple(IMAGENET_DEFAULT_STD),
    )


def test_batch_is_padded_with_zeros_after_normalisation(processor):
    batch = processor([picture(48, 60), picture(70, 48)], return_tensors="pt")
    values, mask = batch["pixel_values"], batch["pixel_mask"]
    assert values.shape == (2, 3, 70, 60)
    assert values.dtype == torch.float32
    assert mask.shape == (2, 70, 60)
    assert mask.dtype == torch.int64
    assert mask[0, :48, :60].all()
    assert mask[1, :70, :48].all()
    assert mask.sum((1, 2)).tolist() == [48 * 60, 70 * 48]
    assert (values * (1 - mask)[:, None] == 0).all()
    # these sizes need no resizing, so that the rest is arithmetic
    pixels = np.asarray(picture(48, 60), dtype=np.float32) / 255
    expected = (pixels - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    np.testing.assert_allclose(values[0, :, :48, :60].permute(1, 2, 0), expected, atol=1e-5)


def test_target_does_not_depend_on_the_other_images_of_the_batch(processor):
    image, annotation = picture(60, 90), coco((10, 5, 30, 20), (0, 0, 90, 60))
    alone = processor(image, annotation, return_tensors="pt")
    beside = processor([image, picture(200, 60)], [annotation, coco((1, 2, 3, 4))], return_tensors="pt")
    height, width = alone["labels"][0]["size"].tolist()
    assert beside["pixel_values"].shape[-2:] != (height, width)
    for name, value in alone["labels"][0].items():
        assert torch.equal(value, beside["labels"][0][name]), name
    assert torch.equal(alone["pixel_values"][0], beside["pixel_values"][0, :, :height, :width])


def test_boxes_are_relative_to_the_unpadded_image(processor):
    batch = processor(
        [picture(100, 200), picture(200, 100)], [coco((20, 10, 100, 40)), coco((0, 50, 50, 150))], return_tensors="pt"
    )
    first, second = batch["labels"]
    torch.testing.assert_close(first["boxes"], torch.tensor([[0.35, 0.30, 0.50, 0.40]]))
    torch.testing.assert_close(second["boxes"], torch.tensor([[0.25, 0.625, 0.5, 0.75]]))
    assert first["orig_size"].tolist() == [100, 200]
    assert first["size"].tolist() == [40, 80]
    torch.testing.assert_close(first["area"], torch.tensor([100.0 * 40 * (40 * 80) / (100 * 200)]))
    assert {name: value.dtype for name, value in first.items()} == {
        "class_labels": torch.int64,
        "boxes": torch.float32,
        "area": torch.float32,
        "iscrowd": torch.int64,
        "image_id": torch.int64,
        "orig_size": torch.int64,
        "size": torch.int64,
    }


def test_boxes_stay_corners_in_pixels_without_conversion(processor):
    batch = processor(picture(100, 200), coco((20, 10, 100, 40)), do_convert_annotations=False, return_tensors="pt")
    torch.testing.assert_close(batch["labels"][0]["boxes"], torch.tensor([[8.0, 4.0, 48.0, 20.0]]))


def test_predictions_equal_to_the_targets_give_back_the_annotated_boxes(processor):
    sizes = [(100, 200), (173, 59)]
    boxes = [(20.5, 10.25, 100.0, 40.0), (3.0, 100.0, 40.0, 60.0)]
    batch = processor([picture(*size) for size in sizes], [coco(box) for box in boxes], return_tensors="pt")
    outputs = SimpleNamespace(
        logits=torch.tensor([[[9.0, 0.0]], [[9.0, 0.0]]]),
        pred_boxes=torch.stack([label["boxes"] for label in batch["labels"]]),
    )
    target_sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
    for result, (x, y, w, h) in zip(
        processor.post_process_object_detection(outputs, target_sizes=target_sizes), boxes, strict=True
    ):
        torch.testing.assert_close(result["boxes"], torch.tensor([[x, y, x + w, y + h]]), atol=1e-4, rtol=0)


def test_crowds_and_degenerate_boxes_are_dropped_and_boxes_clamped(processor):
    annotation = coco((-10, -10, 60, 60), (50, 50, 0, 20), (100, 20, 30, 30), (90, 40, 100, 100), (40, 40, -5, 5))
    annotation["annotations"].append({"bbox": [1, 1, 50, 50], "category_id": 9, "area": 2500, "iscrowd": 1})
    label = processor(picture(100, 100), annotation, return_tensors="pt")["labels"][0]
    assert label["class_labels"].tolist() == [0, 3]
    torch.testing.assert_close(label["boxes"], torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.95, 0.7, 0.1, 0.6]]))
    assert label["iscrowd"].tolist() == [0, 0]
    assert label["area"].shape == (2,)


@pytest.mark.parametrize(
    "annotation",
    [coco(), coco((0, 0, 10, 10), iscrowd=1), coco((5, 5, 0, 3)), coco((500, 500, 3, 3))],
    ids=["empty", "crowd only", "degenerate only", "outside only"],
)
def test_image_without_objects_has_empty_targets(processor, annotation):
    label = processor(picture(50, 60), annotation, return_tensors="pt")["labels"][0]
    assert label["boxes"].shape == (0, 4)
    assert label["boxes"].dtype == torch.float32
    assert label["class_labels"].shape == (0,)
    assert label["class_labels"].dtype == torch.int64


def test_area_and_iscrowd_may_be_missing(processor):
    annotation = {"image_id": 1, "annotations": [{"bbox": [0, 0, 10, 20], "category_id": 2}]}
    label = processor(picture(48, 60), annotation, return_tensors="pt")["labels"][0]
    assert label["area"].tolist() == [200.0]
    assert label["iscrowd"].tolist() == [0]


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([coco(), coco()], r"2 annotations for 1 images"),
        ([{"annotations": []}], r"'image_id' and 'annotations', got \['annotations'\]"),
        ([{"image_id": 1}], r"'image_id' and 'annotations', got \['image_id'\]"),
        ([[1, 2, 3, 4]], r"got list"),
        ({"image_id": 1, "annotations": [{"bbox": [1, 2, 3, 4]}]}, r"'bbox' and 'category_id' in annotation 0 of.* 1"),
        ({"image_id": 5, "annotations": [{"category_id": 1}]}, r"annotation 0 of image 5, got \['category_id'\]"),
        ({"image_id": 5, "annotations": [{"bbox": [1, 2, 3], "category_id": 1}]}, r"four finite numbers.*\[1, 2, 3\]"),
        (coco((1, 2, float("nan"), 4)), r"annotation 0 of image 7 to be four finite numbers"),
        ({"image_id": "a.jpg", "annotations": []}, r"integer as image_id, got 'a.jpg'"),
        (
            {"image_id": 5, "annotations": [{"bbox": [1, 2, 3, 4], "category_id": "cat"}]},
            r"integer as category_id.*'cat'",
        ),
    ],
)
def test_malformed_annotations_are_refused_with_the_reason(processor, annotations, message):
    with pytest.raises(ValueError, match=message):
        processor(picture(40, 40), annotations, return_tensors="pt")


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "1", "P", "CMYK", "RGBA", "YCbCr", "HSV"])
def test_every_mode_of_a_picture_becomes_rgb(processor, mode):
    image = picture(50, 60).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    if mode == "P":
        image.info["transparency"] = 0
    expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_pictures_and_files_alike(processor, orientation, tmp_path):
    image = picture(40, 90)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as opened:
        given = processor(opened, coco((0, 0, 10, 10)), return_tensors="pt")
    read = processor(str(tmp_path / "photo.png"), return_tensors="pt")
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a),
    }[orientation](np.asarray(image))
    expected = processor(upright, return_tensors="pt")["pixel_values"]
    assert torch.equal(given["pixel_values"], expected)
    assert torch.equal(read["pixel_values"], expected)
    assert given["labels"][0]["orig_size"].tolist() == list(upright.shape[:2])


@pytest.mark.parametrize(
    ("height", "width"), [(48, 60), (1, 40), (40, 1), (1, 1), (4, 30), (30, 4), (3, 30), (2, 3), (50, 1)]
)
def test_arrays_and_tensors_of_any_layout_equal_the_picture(processor, height, width):
    image = picture(height, width)
    pixels = np.asarray(image)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    layouts = {"CHW": pixels.transpose(2, 0, 1), "BCHW": pixels.transpose(2, 0, 1)[None]}
    if height != 3:  # otherwise the array might as well have its channels first, and is taken so
        layouts |= {"HWC": pixels, "reversed BGR": np.ascontiguousarray(pixels[..., ::-1])[..., ::-1]}
    for name, array in layouts.items():
        assert torch.equal(processor(array, return_tensors="pt")["pixel_values"], expected), name
        tensor = torch.from_numpy(array.copy())
        assert torch.equal(processor(tensor, return_tensors="pt")["pixel_values"], expected), name
    explicit = processor(pixels, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert torch.equal(explicit, expected)


def test_grayscale_and_alpha_arrays_equal_the_picture(processor):
    gray = picture(50, 60).convert("L")
    expected = processor(gray, return_tensors="pt")["pixel_values"]
    array = np.asarray(gray)
    for layout in (array, array[None], array[..., None], torch.from_numpy(array.copy())):
        assert torch.equal(processor(layout, return_tensors="pt")["pixel_values"], expected)
    transparent = picture(50, 60).convert("RGBA")
    transparent.putalpha(gray)
    expected = processor(transparent, return_tensors="pt")["pixel_values"]
    array = np.asarray(transparent)
    for layout in (array, array.transpose(2, 0, 1)):
        assert torch.equal(processor(layout, return_tensors="pt")["pixel_values"], expected)


def test_images_of_different_kinds_share_a_batch(processor, tmp_path):
    image = picture(50, 60)
    image.save(tmp_path / "image.png")
    kinds = [image, np.asarray(image), torch.from_numpy(np.array(image)), str(tmp_path / "image.png")]
    values = processor(kinds, return_tensors="pt")["pixel_values"]
    assert len(values) == len(kinds)
    assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 5, 7), np.uint8), r"\(5, 5, 7\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (np.zeros(5, np.uint8), r"\(5,\)"),
        (object(), "array of object"),
        ([], "no images"),
    ],
)
def test_what_is_not_an_image_is_refused(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor(image, return_tensors="pt")


@pytest.mark.parametrize("do_resize", [True, False])
def test_torchvision_images_become_plain_tensors(processor, do_resize):
    image = tv_tensors.Image(picture(50, 60))
    values = processor(image, do_resize=do_resize, return_tensors="pt")["pixel_values"]
    expected = processor(picture(50, 60), do_resize=do_resize, return_tensors="pt")["pixel_values"]
    assert type(values) is torch.Tensor
    assert torch.equal(values, expected)


def test_a_tensor_given_is_not_changed(processor):
    image = torch.rand(3, 20, 30)
    before = image.clone()
    processor(image, do_resize=False, do_rescale=False, return_tensors="pt")
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("image_size", "size", "expected"),
    [
        ((480, 640), {"shortest_edge": 800, "longest_edge": 1333}, (800, 1066)),
        ((640, 480), {"shortest_edge": 800, "longest_edge": 1333}, (1066, 800)),
        ((500, 1000), {"shortest_edge": 800, "longest_edge": 1333}, (666, 1333)),
        ((300, 1335), {"shortest_edge": 800, "longest_edge": 1333}, (300, 1333)),
        ((1, 5000), {"shortest_edge": 800, "longest_edge": 1333}, (1, 1333)),
        ((5000, 1), {"shortest_edge": 800, "longest_edge": 1333}, (1333, 1)),
        ((100, 50), {"shortest_edge": 20}, (40, 20)),
        ((100, 50), {"height": 33, "width": 44}, (33, 44)),
        ((100, 50), {"max_height": 60, "max_width": 60}, (60, 30)),
        ((1, 5000), {"max_height": 60, "max_width": 60}, (1, 60)),
    ],
)
def test_size_after_resizing(image_size, size, expected):
    assert resized_size(image_size, SizeDict(**size)) == expected


def test_no_image_is_resized_to_nothing_or_beyond_the_longest_edge():
    rng = np.random.default_rng(0)
    size = SizeDict(shortest_edge=800, longest_edge=1333)
    for height, width in np.exp(rng.uniform(0, np.log(20000), (5000, 2))).astype(int).tolist():
        new_height, new_width = resized_size((height, width), size)
        assert min(new_height, new_width) >= 1
        assert min(new_height, new_width) <= 800
        assert max(new_height, new_width) <= 1333


def test_extreme_aspect_ratios_pass_through_the_processor(processor):
    batch = processor([picture(1, 3000), picture(3000, 1)], [coco((0, 0, 1500, 1))] * 2, return_tensors="pt")
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [80, 80]
    torch.testing.assert_close(batch["labels"][0]["boxes"], torch.tensor([[0.25, 0.5, 0.5, 1.0]]))


@pytest.mark.parametrize("size", [{"longest_edge": 50}, {"height": 0, "width": 30}])
def test_sizes_that_mean_nothing_are_refused(processor, size):
    with pytest.raises(ValueError, match="shortest_edge"):
        processor(picture(40, 50), size=size, return_tensors="pt")


def test_each_step_can_be_switched_off_for_a_call(processor):
    image = picture(33, 44)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    off = {"do_resize": False, "do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    assert torch.equal(processor(image, **off)["pixel_values"][0], pixels)
    torch.testing.assert_close(processor(image, **off | {"do_rescale": True})["pixel_values"][0], pixels / 255)
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    torch.testing.assert_close(
        processor(image, **off | {"do_normalize": True})["pixel_values"][0], (pixels - mean) / std
    )
    assert processor(image, **off | {"do_resize": True})["pixel_values"].shape == (1, 3, 48, 64)
    # and the processor keeps its own settings
    assert processor.do_resize
    assert processor.do_normalize


def test_padding_can_be_switched_off_or_fixed(processor):
    images = [picture(40, 50), picture(60, 50)]
    batch = processor(images, do_pad=False)
    assert [tuple(image.shape) for image in batch["pixel_values"]] == [(3, 48, 60), (3, 57, 48)]
    assert "pixel_mask" not in batch
    with pytest.raises(ValueError, match="do_pad=True"):
        processor(images, do_pad=False, return_tensors="pt")
    fixed = processor(images, pad_size={"height": 64, "width": 72}, return_tensors="pt")
    assert fixed["pixel_values"].shape == (2, 3, 64, 72)
    assert fixed["pixel_mask"].sum((1, 2)).tolist() == [48 * 60, 57 * 48]
    with pytest.raises(ValueError, match=r"Image 1 is 57 x 48 .* pad_size of 50 x 72"):
        processor(images, pad_size={"height": 50, "width": 72}, return_tensors="pt")
    with pytest.raises(ValueError, match="'height' and 'width'"):
        processor(images, pad_size={"shortest_edge": 50}, return_tensors="pt")


@pytest.mark.parametrize("options", [{"do_center_crop": True, "crop_size": 20}, {"data_format": "channels_last"}])
def test_options_without_effect_are_refused(processor, options):
    with pytest.raises(ValueError, match="not supported"):
        processor(picture(40, 50), **options)


def test_numpy_output(processor):
    batch = processor(picture(40, 50), coco((1, 2, 3, 4)), return_tensors="np")
    assert isinstance(batch["pixel_values"], np.ndarray)
    assert isinstance(batch["pixel_mask"], np.ndarray)
    assert isinstance(batch["labels"][0]["boxes"], np.ndarray)


@pytest.mark.parametrize("shapes", [[(120, 160), (160, 100)], [(30, 40), (1, 90)]])
def test_both_backends_agree(shapes):
    images = [picture(*shape, seed=i) for i, shape in enumerate(shapes)]
    annotations = [coco((3, 0, 20, 10), image_id=i) for i in range(len(shapes))]
    first, second = (cls(size=SMALL)(images, annotations, return_tensors="pt") for cls in BACKENDS)
    assert torch.equal(first["pixel_mask"], second["pixel_mask"])
    for ours, theirs in zip(first["labels"], second["labels"], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # one of 256 levels, in units of the smallest standard deviation
    torch.testing.assert_close(first["pixel_values"], second["pixel_values"], atol=1.01 / 255 / 0.224, rtol=0)


def test_settings_survive_saving(processor, tmp_path):
    changed = type(processor)(size={"max_height": 30, "max_width": 40}, do_normalize=False, image_mean=[0.1, 0.2, 0.3])
    changed.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert loaded.to_dict() == changed.to_dict()
    image = picture(50, 50)
    assert torch.equal(
        loaded(image, return_tensors="pt")["pixel_values"], changed(image, return_tensors="pt")["pixel_values"]
    )
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "DePerceiverImageProcessor"


@pytest.mark.parametrize("name", ["stride32", "stride16", "stride8", "multiscale", "stride32_aux"])
def test_post_processing_equals_the_original(name):
    golden = np.load(FIXTURES / f"{name}.npz")
    outputs = SimpleNamespace(logits=torch.tensor(golden["logits"]), pred_boxes=torch.tensor(golden["boxes"]))
    sizes = [(480, 640), (500, 333)]
    for target_sizes in (sizes, torch.tensor(sizes)):
        results = DePerceiverImageProcessor().post_process_object_detection(outputs, 0, target_sizes)
        for i, result in enumerate(results):
            np.testing.assert_allclose(result["scores"], golden[f"post{i}_scores"], atol=1e-6)
            np.testing.assert_array_equal(result["labels"], golden[f"post{i}_labels"])
            np.testing.assert_allclose(result["boxes"], golden[f"post{i}_boxes"], atol=1e-3)


def test_threshold_keeps_the_queries_above_it_in_order():
    logits = torch.tensor([[[0.0, 2.0, 0.0], [-200.0, -200.0, 200.0], [3.0, 0.0, 0.0], [0.0, 0.0, 3.0]]])
    outputs = SimpleNamespace(logits=logits, pred_boxes=torch.rand(1, 4, 4))
    processor = DePerceiverImageProcessor()
    assert processor.post_process_object_detection(outputs)[0]["labels"].tolist() == [1, 0]
    # also a query whose every score has underflowed to 0
    assert len(processor.post_process_object_detection(outputs, threshold=0)[0]["scores"]) == 4
    none = processor.post_process_object_detection(outputs, threshold=1.0)[0]
    assert none["boxes"].shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_scaled_in_float32(dtype):
    boxes = torch.tensor([[[0.71, 0.63, 0.11, 0.07]]], dtype=dtype)
    outputs = SimpleNamespace(logits=torch.zeros(1, 1, 3, dtype=dtype), pred_boxes=boxes)
    processor = DePerceiverImageProcessor()
    relative = processor.post_process_object_detection(outputs, 0)[0]["boxes"]
    result = processor.post_process_object_detection(outputs, 0, [(1001, 1333)])[0]
    assert result["scores"].dtype == result["boxes"].dtype == relative.dtype == torch.float32
    x, y, width, height = boxes.double().flatten().tolist()
    expected = torch.tensor([[x - width / 2, y - height / 2, x + width / 2, y + height / 2]])
    torch.testing.assert_close(relative, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(result["boxes"], expected * torch.tensor([1333, 1001, 1333, 1001]), atol=1e-3, rtol=0)


def test_target_sizes_may_be_a_list_of_tensors():
    """As `[label["orig_size"] for label in labels]` is."""
    outputs = SimpleNamespace(logits=torch.randn(2, 3, 4), pred_boxes=torch.rand(2, 3, 4))
    processor = DePerceiverImageProcessor()
    sizes = [(480, 640), (500, 333)]
    expected = processor.post_process_object_detection(outputs, 0.0, sizes)
    for target_sizes in ([torch.tensor(size) for size in sizes], torch.tensor(sizes)):
        results = processor.post_process_object_detection(outputs, 0.0, target_sizes)
        for result, reference in zip(results, expected, strict=True):
            assert torch.equal(result["boxes"], reference["boxes"])


@pytest.mark.parametrize(
    ("target_sizes", "message"),
    [([(10, 10)], "1 target sizes for 2 images"), (torch.ones(2, 3), r"\(2, 2\).*\(2, 3\)"), ([10, 20], r"\(2, 2\)")],
)
def test_target_sizes_that_do_not_fit_the_batch_are_refused(target_sizes, message):
    outputs = SimpleNamespace(logits=torch.zeros(2, 5, 4), pred_boxes=torch.rand(2, 5, 4))
    with pytest.raises(ValueError, match=message):
        DePerceiverImageProcessor().post_process_object_detection(outputs, target_sizes=target_sizes)
