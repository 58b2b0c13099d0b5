# SPDX-License-Identifier: Apache-2.0
"""Matching of predictions with objects, for the losses of both architectures and of the models trained beside them.

Predictions and objects are matched one to one at the least total cost by the Hungarian method (Carion et al. 2020,
"End-to-End Object Detection with Transformers", section 3.1), for all decoder layers and images with one copy of the
costs to the host. A batch is compared part by part, so that a crowded image makes its neighbours as long, not all.

Shapes: L decoder layers, B images, Q queries, C classes, T = most objects in an image, P matched pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import PreTrainedConfig

PADDING_COST = 1e6  # of giving any object to a padding query
PAIRS_AT_ONCE = 2**21  # of predictions and objects, that are compared with each other: 8 MiB per array
BOX_TOLERANCE = 0.01  # by which rounding may take a target box beyond [0, 1]


class DetectionTargets(NamedTuple):
    """The objects of a batch, padded to the same number.

    Attributes:
        class_labels (`torch.Tensor` of shape `(B, T)`): Classes, 0 in the padding.
        boxes (`torch.Tensor` of shape `(B, T, 4)`): (center x, center y, width, height) in [0, 1], float32.
        sizes (`list[int]`): Number of objects in each image.
    """

    class_labels: torch.Tensor
    boxes: torch.Tensor
    sizes: list[int]


class MatchedPairs(NamedTuple):
    """Indices of matched predictions and objects, each `(P,)`: a prediction is `[layer, image, query]`, its object
    `[image, target]`."""

    layer: torch.Tensor
    image: torch.Tensor
    query: torch.Tensor
    target: torch.Tensor


def pad_targets(labels: list[dict[str, torch.Tensor]], device: torch.device) -> DetectionTargets:
    """Stack the targets of all images.

    Raises:
        ValueError: An image's `class_labels` and `boxes` are missing or do not fit each other.
    """
    for index, target in enumerate(labels):
        if "class_labels" not in target or "boxes" not in target:
            raise ValueError(f"`labels[{index}]` needs 'class_labels' and 'boxes', but has {sorted(target)}.")
        class_shape, box_shape = tuple(target["class_labels"].shape), tuple(target["boxes"].shape)
        if len(class_shape) != 1 or box_shape != (*class_shape, 4):
            raise ValueError(
                f"`labels[{index}]`: 'class_labels' must be (num_objects,) and 'boxes' (num_objects, 4), but they are "
                f"{class_shape} and {box_shape}."
            )
    sizes = [len(target["class_labels"]) for target in labels]
    pad = nn.utils.rnn.pad_sequence
    class_labels = pad([target["class_labels"].to(device).long() for target in labels], batch_first=True)
    boxes = pad([target["boxes"].to(device).float() for target in labels], batch_first=True)
    return DetectionTargets(class_labels, boxes, sizes)


def center_to_corners(boxes: torch.Tensor) -> torch.Tensor:
    """Convert boxes `(..., 4)` from (center x, center y, width, height) to (left, top, right, bottom)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((center - 0.5 * size, center + 0.5 * size), dim=-1)


def box_ious(boxes1: torch.Tensor, boxes2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU, in [0, 1], and generalised IoU (Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630), in [-1, 1].

    Args:
        boxes1, boxes2 (`torch.Tensor` of shapes that broadcast to `(..., 4)`): (left, top, right, bottom).
            With shapes `(..., Q, 1, 4)` and `(..., 1, T, 4)` all pairs are compared.

    Returns:
        Two `torch.Tensor` of shape `(...)`.
    """
    tiny = torch.finfo(boxes1.dtype).tiny  # two empty boxes at the same place: 0, not 0 / 0
    left1, top1, right1, bottom1 = boxes1.unbind(-1)
    left2, top2, right2, bottom2 = boxes2.unbind(-1)
    area1 = (right1 - left1) * (bottom1 - top1)
    area2 = (right2 - left2) * (bottom2 - top2)
    overlap_width = torch.minimum(right1, right2) - torch.maximum(left1, left2)
    overlap_height = torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)
    intersection = overlap_width.clamp(min=0) * overlap_height.clamp(min=0)
    union = area1 + area2 - intersection
    hull_width = torch.maximum(right1, right2) - torch.minimum(left1, left2)
    hull_height = torch.maximum(bottom1, bottom2) - torch.minimum(top1, top2)
    hull = hull_width * hull_height
    iou = intersection / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


def generalized_box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """The second of `box_ious`."""
    return box_ious(boxes1, boxes2)[1]


def softmax_class_cost(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Cost of each class, minus its probability, for logits `(..., C + 1)`."""
    return -logits.softmax(-1)


def matching_cost(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    targets: DetectionTargets,
    config: PreTrainedConfig,
    class_cost_function: Callable[[torch.Tensor, PreTrainedConfig], torch.Tensor] = softmax_class_cost,
) -> torch.Tensor:
    """Cost `(L, B, Q, T)` of giving an object to a prediction: that of its class, L1 and `-GIoU` of the boxes,
    weighted by `class_cost`, `bbox_cost` and `giou_cost`. An image's predictions are compared with its own objects
    only."""
    num_layers, _, num_queries, _ = logits.shape
    classes = targets.class_labels[None, :, None].expand(num_layers, -1, num_queries, -1)
    class_cost = class_cost_function(logits, config).gather(-1, classes)
    bbox_cost = torch.cdist(pred_boxes, targets.boxes.expand(num_layers, -1, -1, -1), p=1)
    giou_cost = -generalized_box_iou(
        center_to_corners(pred_boxes)[..., None, :], center_to_corners(targets.boxes)[:, None]
    )
    return config.class_cost * class_cost + config.bbox_cost * bbox_cost + config.giou_cost * giou_cost


@torch.no_grad()
def hungarian_match(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    targets: DetectionTargets,
    config: PreTrainedConfig,
    *,
    num_classes: int | None = None,
    class_cost_function: Callable[[torch.Tensor, PreTrainedConfig], torch.Tensor] = softmax_class_cost,
    is_query: torch.Tensor | None = None,
) -> MatchedPairs:
    """Match predictions and objects one to one at the least total cost, in every layer and image by itself.

    Where there are more objects than queries, the objects that are cheapest to leave out stay unmatched.

    Args:
        logits (`torch.Tensor` of shape `(L, B, Q, C + 1)`): Class logits, float32.
        pred_boxes (`torch.Tensor` of shape `(L, B, Q, 4)`): (center x, center y, width, height) in [0, 1], float32.
        targets (`DetectionTargets`): Objects of the batch.
        config (`PreTrainedConfig`): Gives `class_cost`, `bbox_cost`, `giou_cost`.
        num_classes (`int`, *optional*): How many of the logits are classes; by default all but the last.
        class_cost_function: Cost of each class for given logits; by default minus the softmax.
        is_query (`torch.Tensor` of shape `(B, Q)`, *optional*): `False` at padding queries, which get an object
            only where there are more objects than other queries.

    Raises:
        FloatingPointError: Predictions or target boxes are not finite; says which.
        ValueError: A class label is not one of the model's, or a target box is not in [0, 1].
    """
    num_layers, _, num_queries, num_outputs = logits.shape
    num_classes = num_outputs - 1 if num_classes is None else num_classes
    class_labels = targets.class_labels
    labels_in_range = class_labels.clamp(0, num_classes - 1)
    problems = {
        "logits": ~logits.isfinite().all(),
        "pred_boxes": ~pred_boxes.isfinite().all(),
        "target boxes": ~targets.boxes.isfinite().all(),
        "class_labels": (labels_in_range != class_labels).any(),
        "boxes": _is_implausible(targets.boxes).any(),
    }
    parts = _parts(targets.sizes, num_layers * num_queries)
    costs = []
    for part in parts:
        most, sizes = max(targets.sizes[part]), targets.sizes[part]
        own = DetectionTargets(labels_in_range[part, :most], targets.boxes[part, :most], sizes)
        cost = matching_cost(logits[:, part], pred_boxes[:, part], own, config, class_cost_function)
        if is_query is not None:  # all objects alike, so that padding has no part in who gets which of the others
            cost = cost.masked_fill(~is_query[part, :, None], PADDING_COST)
        costs.append(cost)
    # One copy brings the costs and the verdicts on the inputs to the host.
    flags = torch.stack(list(problems.values())).to(logits.dtype)
    on_host = torch.cat((flags, *(cost.flatten() for cost in costs))).cpu()
    found = [name for name, flag in zip(problems, on_host[: len(problems)].tolist(), strict=True) if flag]
    if "class_labels" in found:
        wrong = class_labels[labels_in_range != class_labels][0]
        raise ValueError(
            f"`class_labels` must be in [0, {num_classes}) for a model with {num_classes} classes, but one is "
            f"{wrong}. Use contiguous labels, and a model whose `num_labels` is that of the dataset."
        )
    if "boxes" in found:
        image, index = _is_implausible(targets.boxes).nonzero()[0].tolist()
        box = ", ".join(f"{value:g}" for value in targets.boxes[image, index].tolist())
        raise ValueError(
            "`boxes` must be (center_x, center_y, width, height) in [0, 1] of the un-padded image, but box "
            f"{index} of image {image} of the batch is ({box}). Divide pixels by the image's width and height, or let "
            "the image processor make the labels from COCO annotations."
        )
    if found:
        raise FloatingPointError(f"matching needs finite numbers, but these are not: {', '.join(found)}.")
    values = on_host[len(problems) :].split([cost.numel() for cost in costs])
    of_images = [
        image_cost[..., :size].numpy()  # (L, Q, objects of the image)
        for part, cost, numbers in zip(parts, costs, values, strict=True)
        for image_cost, size in zip(numbers.view(cost.shape).unbind(1), targets.sizes[part], strict=True)
    ]
    pairs = []
    for layer in range(num_layers):
        for image, image_cost in enumerate(of_images):
            queries, objects = linear_sum_assignment(image_cost[layer])
            pairs.append(np.stack((np.full_like(queries, layer), np.full_like(queries, image), queries, objects)))
    indices = torch.from_numpy(np.concatenate(pairs, axis=1))
    return MatchedPairs(*indices.to(logits.device, non_blocking=True))


def _parts(sizes: list[int], pairs_per_object: int) -> list[slice]:
    """Neighbouring images of a batch that are compared together: padded to the same number of objects, they are
    `PAIRS_AT_ONCE`, or a single image."""
    parts, start, most = [], 0, 0
    for image, size in enumerate(sizes):
        most = max(most, size)
        if image > start and (image - start + 1) * most * pairs_per_object > PAIRS_AT_ONCE:
            parts.append(slice(start, image))
            start, most = image, size
    return [*parts, slice(start, len(sizes))]


def _is_implausible(boxes: torch.Tensor) -> torch.Tensor:
    """Which of the target boxes `(B, T, 4)` are not in [0, 1], `(B, T)`; NaN is for another check."""
    return ((boxes < -BOX_TOLERANCE) | (boxes > 1 + BOX_TOLERANCE)).any(-1)


def mean_boxes_per_process(num_boxes: int, device: torch.device) -> torch.Tensor:
    """Objects in all processes' batches divided by the number of processes, at least 1.

    Distributed training averages gradients over processes, so with this divisor they equal those of one process that
    holds the joint batch.
    """
    total = torch.tensor(float(num_boxes), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total.clamp(min=1)
