# SPDX-License-Identifier: Apache-2.0
"""Images and COCO annotations in, padded batches and targets out: what both architectures' image processors share."""

import math
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv_functional
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .pixels_deperceiver import as_tensor, open_rgb_picture, to_rgb, to_uint8, upright


class DetectionProcessingKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    """The options of `transformers.processing_utils.ImagesKwargs`, and one of detection processors.

    Attributes:
        do_convert_annotations (`bool`, *optional*, defaults to `True`):
            `True`: target boxes are `(center_x, center_y, width, height)` in [0, 1] of the un-padded image.
            `False`: they are `(x_min, y_min, x_max, y_max)` in pixels of the resized, un-padded image.
    """

    do_convert_annotations: bool | None


if TYPE_CHECKING:
    from transformers.image_processing_backends import TorchvisionBackend as Backend
else:
    Backend = object  # the classes that are made of the mix-in bring the real one


class DetectionProcessingMixin(Backend):
    """Everything of the image processor but the resampling of pixels, which comes from the transformers backend."""

    valid_kwargs = DetectionProcessingKwargs
    model_input_names: ClassVar[list[str]] = ["pixel_values", "pixel_mask"]

    do_convert_rgb = True
    do_resize = True
    size: ClassVar[dict[str, int]] = {"shortest_edge": 800, "longest_edge": 1333}
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = True
    pad_size = None
    do_convert_annotations = True

    def preprocess(
        self,
        images: ImageInput,
        annotations: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs: Unpack[DetectionProcessingKwargs],
    ) -> BatchFeature:
        """Prepare images, and their annotations if given, for the model.

        Args:
            images: one image or a list of them: PIL images of any mode, numpy arrays or tensors (`(H, W)`,
                `(H, W, C)` or `(C, H, W)` of gray, gray with alpha, RGB or RGBA), 4-D batches of such, paths, URLs or
                base64. An EXIF orientation of a PIL image or a file is applied first, so that "the image" below is
                what a viewer shows. Transparency is dropped. Integers of 8, 16 and 32 bits and floats in [0, 1] or
                [0, 255] are taken by their range, so that all of them give the same tensor: `to_uint8` has the rules.
                With `do_rescale=False`, or a `rescale_factor` other than 1/255, the range of arrays and tensors is
                the caller's: they are taken as they are.
            annotations: one dictionary per image, `{"image_id": int, "annotations": [{"bbox": [x, y, width, height],
                "category_id": int, "area": float, "iscrowd": int}, ...]}`. `bbox` is in pixels of the image given,
                `category_id` is the label 0 to `num_labels - 1`; `area` (default: the box's) and `iscrowd`
                (default: 0) may be missing. Boxes are clamped to the image; crowds and boxes without an area are
                dropped.
            kwargs: any default of the processor for this call, e.g. `do_resize=False`, `size=...`,
                `return_tensors="pt"`. `size` is `{"shortest_edge", "longest_edge"}`, `{"shortest_edge"}`,
                `{"max_height", "max_width"}` (all three keep the aspect ratio) or `{"height", "width"}`.

        Returns:
            `pixel_values` `(B, 3, H, W)` float32, zero on the padding at the bottom and on the right; `pixel_mask`
            `(B, H, W)` int64, 1 on real pixels; and with annotations `labels`, for each image a dictionary of
            `class_labels` `(n,)` int64, `boxes` `(n, 4)` float32 `(center_x, center_y, width, height)` in [0, 1] OF
            THE UN-PADDED IMAGE, `area` `(n,)` in pixels of the resized image, `iscrowd` `(n,)` (all 0), `image_id`
            `(1,)`, `orig_size` and `size` `(2,)`, the `(height, width)` before and after resizing.
            With `do_pad=False` there is no `pixel_mask`, and without `return_tensors` images may differ in size.

        Raises:
            ValueError: no image, not an image, or one that cannot be read; values of no known range; a malformed
                annotation, as many annotations as images are missing, a `size` that is not one of the above, an image
                larger than `pad_size`, or images of different sizes to be returned as one tensor with `do_pad=False`.
        """
        return super().preprocess(images, annotations, **kwargs)

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """One image as a tensor `(C, H, W)`; `C` is 3 with `do_convert_rgb`, values are 0 to 255 if they are to be
        rescaled by 1/255."""
        if isinstance(image, Image.Image):
            image = to_rgb(image) if do_convert_rgb else upright(image)
            input_data_format = ChannelDimension.LAST
        if not isinstance(image, torch.Tensor):
            image = as_tensor(image)
        if image.ndim not in (2, 3) or image.numel() == 0:
            raise ValueError(
                f"Got an image of shape {tuple(image.shape)}; expected (H, W), (H, W, C) or (C, H, W), all at least 1."
            )
        if image.dtype == torch.bool or (do_rescale and math.isclose(rescale_factor or 0, 1 / 255, rel_tol=1e-4)):
            image = to_uint8(image)
        if image.ndim == 2:
            image = image[None]
        elif ChannelDimension(input_data_format or _infer_channel_dimension(image.shape)) == ChannelDimension.LAST:
            image = image.permute(2, 0, 1)
        if do_convert_rgb:
            # grayscale is repeated, an alpha channel dropped: what `PIL.Image.convert("RGB")` does
            image = image[:1].expand(3, -1, -1) if image.shape[0] <= 2 else image[:3]
        return image.to(device)

    @classmethod
    def backend_classes(cls) -> dict[str, Any]:
        """The classes of both backends, by the names that `AutoImageProcessor.register` knows them by."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The processor's settings; the saved `auto_map` names the classes of both backends, whichever is saved."""
        output = super().to_dict()
        if "AutoImageProcessor" in output.get("auto_map", {}):
            classes = [self.backend_classes()[backend] for backend in ("pil", "torchvision")]
            references = [f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for cls in classes]
            output["auto_map"] = output["auto_map"] | {"AutoImageProcessor": references}
        return output

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        """A flat list of single images; files are read here, in the same way for both backends."""
        if isinstance(images, list | tuple):
            return [image for entry in images for image in self._prepare_images_structure(entry)]
        if isinstance(images, str | Path):
            return [open_rgb_picture(images)]
        return list(images) if getattr(images, "ndim", None) == 4 else [images]

    def _validate_preprocess_kwargs(
        self,
        do_center_crop: bool | None = None,
        data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if do_center_crop:
            raise ValueError("do_center_crop is not supported: boxes would no longer fit. Crop before, or resize.")
        if data_format is not None and ChannelDimension(data_format) != ChannelDimension.FIRST:
            raise ValueError(f"data_format {data_format!r} is not supported: the model takes channels first.")

    def _preprocess_image_like_inputs(
        self, images: ImageInput, annotations: dict[str, Any] | list[dict[str, Any]] | None = None, **kwargs
    ) -> BatchFeature:
        prepared = self._prepare_image_like_inputs(images, **kwargs)
        if not prepared:
            raise ValueError("Got no images; give at least one.")
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, dict) else list(annotations)
            if len(annotations) != len(prepared):
                raise ValueError(
                    f"Got {len(annotations)} annotations for {len(prepared)} images; expected one dictionary "
                    "{'image_id', 'annotations'} per image, with an empty list for an image without objects."
                )
        return self._preprocess(prepared, annotations, **kwargs)

    def _preprocess(
        self,
        images: list[torch.Tensor] | list[np.ndarray],
        annotations: list[dict[str, Any]] | None,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        do_pad: bool,
        pad_size: SizeDict | None,
        do_convert_annotations: bool,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        if do_resize:
            new_sizes = [resized_size(original_size, size) for original_size in original_sizes]
            images = [
                self.resize(image, SizeDict(height=height, width=width), resample=resample)
                for image, (height, width) in zip(images, new_sizes, strict=True)
            ]
        images = [torch.as_tensor(image) for image in images]

        if do_pad:
            pixel_values, pixel_mask = zero_batch([tuple(image.shape) for image in images], pad_size, images[0].device)
            data = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
            regions = [pixel_values[i, :, : image.shape[1], : image.shape[2]] for i, image in enumerate(images)]
        else:
            shapes = {tuple(image.shape) for image in images}
            if return_tensors is not None and len(shapes) > 1:
                raise ValueError(
                    f"Images of different shapes {sorted(shapes)} cannot be one tensor without padding; use "
                    "do_pad=True, or leave out return_tensors to get a list."
                )
            regions = [torch.empty(image.shape, dtype=torch.float32, device=image.device) for image in images]
            data = {"pixel_values": regions}

        # Pixels are scaled where the batch holds them: the padding stays 0, and no copy of the batch is made.
        for region, image in zip(regions, images, strict=True):
            region.copy_(image)
            if do_rescale:
                region.mul_(rescale_factor)
            if do_normalize:
                tv_functional.normalize(region, image_mean, image_std, inplace=True)

        batch = BatchFeature(data, tensor_type=return_tensors)
        if annotations is not None:
            batch["labels"] = [
                BatchFeature(
                    coco_to_target(
                        annotation, original_size, tuple(image.shape[-2:]), do_convert_annotations, device=image.device
                    ),
                    tensor_type=return_tensors,
                )
                for annotation, original_size, image in zip(annotations, original_sizes, images, strict=True)
            ]
        return batch


class PilProcessingMixin(DetectionProcessingMixin):
    """What the Pillow backend needs of a processor."""

    def process_image(self, image, **kwargs) -> np.ndarray:  # type: ignore[override]
        """One image as an array `(C, H, W)`, which is what this backend resizes."""
        return super().process_image(image, **kwargs).cpu().numpy()


def require_finite(logits: torch.Tensor, pred_boxes: torch.Tensor) -> None:
    """Refuse predictions from which no detections can be made; a logit of minus infinity is a class ruled out.

    Raises:
        FloatingPointError: some are not finite.
    """
    finite = torch.stack([(logits < math.inf).all(), pred_boxes.isfinite().all()]).tolist()  # NaN is not less either
    wrong = [name for name, good in zip(("logits", "pred_boxes"), finite, strict=True) if not good]
    if wrong:
        raise FloatingPointError(
            f"The model predicts numbers that are not finite ({', '.join(wrong)}): its weights are damaged, its "
            "training has diverged or its precision is too low. Use another checkpoint, or float32."
        )


def boxes_in_pixels(
    pred_boxes: torch.Tensor, target_sizes: torch.Tensor | list[tuple[int, int]] | None, clip: bool = True
) -> torch.Tensor:
    """Boxes `(B, Q, 4)` as corners (x_min, y_min, x_max, y_max), float32, from (center_x, center_y, width, height) in
    [0, 1]; in pixels if `target_sizes` gives the (height, width) of each image; with `clip` moved into the image where
    they reach beyond it.

    Raises:
        ValueError: `target_sizes` does not hold one (height, width) per image.
    """
    centers, extents = pred_boxes.float().split(2, dim=-1)  # (B, Q, 2)
    boxes = torch.cat([centers - extents / 2, centers + extents / 2], dim=-1)  # (B, Q, 4)
    if target_sizes is None:
        return boxes.clamp(0, 1) if clip else boxes
    if len(target_sizes) != len(boxes):
        raise ValueError(
            f"Got {len(target_sizes)} target sizes for {len(boxes)} images; expected one (height, width) per image of "
            "the batch."
        )
    if not isinstance(target_sizes, torch.Tensor):  # tensors in a list too, such as those of `orig_size`
        target_sizes = [size.tolist() if isinstance(size, torch.Tensor) else size for size in target_sizes]
    sizes = torch.as_tensor(target_sizes, dtype=torch.float32, device=boxes.device)
    if sizes.shape != (len(boxes), 2):
        raise ValueError(
            f"Expected target sizes of shape ({len(boxes)}, 2), a (height, width) per image, got {tuple(sizes.shape)}."
        )
    limits = sizes.flip(-1).repeat(1, 2)[:, None]  # (B, 1, 4), (w, h, w, h) per image
    boxes = boxes * limits
    return boxes.clamp(min=0).minimum(limits) if clip else boxes


def resized_size(image_size: tuple[int, int], size: SizeDict) -> tuple[int, int]:
    """`(height, width)` that an image of `image_size` `(height, width)` is resized to; at least 1 x 1.

    Raises:
        ValueError: `size` has none of the supported sets of keys.
    """
    if size.height and size.width:
        return size.height, size.width
    if size.max_height and size.max_width:
        height, width = get_image_size_for_max_height_width(image_size, size.max_height, size.max_width)
        return max(height, 1), max(width, 1)
    if size.shortest_edge:
        height, width = get_size_with_aspect_ratio(image_size, size.shortest_edge, size.longest_edge)
        # An extreme aspect ratio rounds the shorter side to 0, and an image whose shorter side needs no resizing is
        # left as it is even where its longer side is a pixel or two too long.
        longest = size.longest_edge or max(height, width)
        return min(max(height, 1), longest), min(max(width, 1), longest)
    raise ValueError(
        f"Cannot resize to size={dict(size)}; expected the keys 'shortest_edge' and (optionally) 'longest_edge', "
        "'max_height' and 'max_width', or 'height' and 'width', all at least 1."
    )


def zero_batch(
    shapes: list[tuple[int, int, int]], pad_size: SizeDict | None = None, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """An empty batch for images of these shapes `(C, H_i, W_i)`, each in its upper left corner.

    Returns:
        Zeros `(B, C, H, W)`, of the largest height and width or of `pad_size`; and the mask `(B, H, W)` int64, 1 on
        real pixels.

    Raises:
        ValueError: an image is larger than `pad_size`, or that has no height or width.
    """
    if pad_size and not (pad_size.height and pad_size.width):
        raise ValueError(f"Cannot pad to pad_size={dict(pad_size)}; expected the keys 'height' and 'width'.")
    height = pad_size.height if pad_size else max(shape[1] for shape in shapes)
    width = pad_size.width if pad_size else max(shape[2] for shape in shapes)
    pixel_mask = torch.zeros(len(shapes), height, width, dtype=torch.int64, device=device)
    for i, (_, image_height, image_width) in enumerate(shapes):
        if image_height > height or image_width > width:
            raise ValueError(
                f"Image {i} is {image_height} x {image_width} (height x width) and does not fit the pad_size of "
                f"{height} x {width}; give a larger `pad_size` or a smaller `size`."
            )
        pixel_mask[i, :image_height, :image_width] = 1
    pixel_values = torch.zeros(len(shapes), shapes[0][0], height, width, dtype=torch.float32, device=device)
    return pixel_values, pixel_mask


def coco_to_target(
    annotation: dict[str, Any],
    original_size: tuple[int, int],
    resized_size: tuple[int, int],
    relative_boxes: bool = True,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Turn the COCO annotation of one image into the model's target.

    Args:
        annotation: `{"image_id", "annotations": [{"bbox", "category_id", "area", "iscrowd"}, ...]}`, boxes
            `(x, y, width, height)` in pixels of the original image.
        original_size: `(height, width)` of the image that the boxes refer to.
        resized_size: `(height, width)` of the image that the model gets, without padding.
        relative_boxes: boxes `(center_x, center_y, width, height)` in [0, 1] of the un-padded image; otherwise
            `(x_min, y_min, x_max, y_max)` in pixels of the resized image.
        device: where the tensors are made.

    Returns:
        The dictionary described in `DetectionProcessingMixin.preprocess` (`n` may be 0).

    Raises:
        ValueError: a key is missing, a box is not four finite numbers, an id is not an integer.
    """
    if not isinstance(annotation, dict) or not {"image_id", "annotations"} <= annotation.keys():
        found = f"{sorted(annotation)}" if isinstance(annotation, dict) else type(annotation).__name__
        raise ValueError(f"Expected an annotation with the keys 'image_id' and 'annotations', got {found}.")
    image_id = _integer(annotation["image_id"], "image_id")

    boxes, class_labels, areas = [], [], []
    for index, instance in enumerate(annotation["annotations"]):
        where = f"annotation {index} of image {image_id}"
        if not isinstance(instance, dict) or not {"bbox", "category_id"} <= instance.keys():
            found = f"{sorted(instance)}" if isinstance(instance, dict) else type(instance).__name__
            raise ValueError(f"Expected the keys 'bbox' and 'category_id' in {where}, got {found}.")
        if instance.get("iscrowd"):
            continue
        box = np.asarray(instance["bbox"], dtype=np.float64)
        if box.shape != (4,) or not np.isfinite(box).all():
            raise ValueError(
                f"Expected the bbox of {where} to be four finite numbers [x, y, width, height] in pixels, got "
                f"{instance['bbox']}."
            )
        boxes.append(box)
        class_labels.append(_integer(instance["category_id"], f"category_id of {where}"))
        areas.append(float(instance.get("area", box[2] * box[3])))

    # float64 until the boxes are relative: a target then depends on nothing but the image and the box
    limits = np.array(original_size[::-1] * 2, dtype=np.float64)  # (w, h, w, h)
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)  # x, y, width, height
    corners[:, 2:] += corners[:, :2]
    corners = corners.clip(0, limits) / limits  # x_min, y_min, x_max, y_max in [0, 1]
    extents = corners[:, 2:] - corners[:, :2]
    keep = (extents > 0).all(axis=1)
    if relative_boxes:
        target_boxes = np.concatenate([corners[:, :2] + extents / 2, extents], axis=1)
    else:
        target_boxes = corners * np.array(resized_size[::-1] * 2)

    scale = (resized_size[0] * resized_size[1]) / (original_size[0] * original_size[1])
    labels = np.array(class_labels, dtype=np.int64)[keep]
    target = {
        "class_labels": labels,
        "boxes": target_boxes[keep].astype(np.float32),
        "area": (np.array(areas, dtype=np.float64)[keep] * scale).astype(np.float32),
        "iscrowd": np.zeros_like(labels),
        "image_id": np.array([image_id], dtype=np.int64),
        "orig_size": np.array(original_size, dtype=np.int64),
        "size": np.array(resized_size, dtype=np.int64),
    }
    return {name: torch.from_numpy(value).to(device) for name, value in target.items()}


def _integer(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"Expected an integer as {name}, got {value!r}.") from error


def _infer_channel_dimension(shape: torch.Size) -> ChannelDimension:
    """Where the channels of a 3-D image are, also where a side of the image is as short as a pixel has channels."""
    for channels in (3, 4, 1, 2):
        if shape[0] == channels:
            return ChannelDimension.FIRST
        if shape[2] == channels:
            return ChannelDimension.LAST
    raise ValueError(
        f"Got an image of shape {tuple(shape)}; expected 1 to 4 channels in the first or the last dimension."
    )
