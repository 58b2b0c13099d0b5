# SPDX-License-Identifier: Apache-2.0
"""Loss of DePerceiver v2: set prediction with sigmoid classification, for the selection of the latents and for every
block, and the restoration of denoising queries.

Shapes: S stages (selection and blocks, or blocks alone), B images, Q queries, C classes, T = most objects in an image,
P denoising queries.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from .configuration_deperceiver_v2 import DePerceiverV2Config
from .denoising_deperceiver_v2 import DenoisingQueries, object_targets
from .matching_deperceiver import (
    DetectionTargets,
    MatchedPairs,
    box_ious,
    center_to_corners,
    hungarian_match,
    mean_boxes_per_process,
    pad_targets,
)
from .tokens_deperceiver_v2 import gather_rows


class Predictions(NamedTuple):
    """What is compared with the objects.

    Attributes:
        logits (`torch.Tensor` of shape `(S, B, Q, C)`): Class logits.
        boxes (`torch.Tensor` of shape `(S, B, Q, 4)`): (center x, center y, width, height) in [0, 1].
    """

    logits: torch.Tensor
    boxes: torch.Tensor

    def float(self) -> "Predictions":
        return Predictions(self.logits.float(), self.boxes.float())


def sigmoid_class_cost(logits: torch.Tensor, config: DePerceiverV2Config) -> torch.Tensor:
    """Cost of each class: what the focal loss (Lin et al. 2017, https://arxiv.org/abs/1708.02002) would be if it were
    the right one, less what it would be if it were not (Zhu et al. 2021, https://arxiv.org/abs/2010.04159)."""
    probability = logits.sigmoid()
    softplus = nn.functional.softplus
    positive = config.focal_alpha * (1 - probability) ** config.focal_gamma * softplus(-logits)
    negative = (1 - config.focal_alpha) * probability**config.focal_gamma * softplus(logits)
    return positive - negative


def classification_loss(
    logits: torch.Tensor, one_hot: torch.Tensor, iou: torch.Tensor, config: DePerceiverV2Config
) -> torch.Tensor:
    """Loss of every logit, of the kind `config.classification_loss`.

    - `focal`: Lin et al. 2017, https://arxiv.org/abs/1708.02002
    - `varifocal`: Zhang et al. 2021, https://arxiv.org/abs/2008.13367, as in RT-DETR
    - `mal`: Huang et al. 2025, "DEIM", https://arxiv.org/abs/2412.04234, section 3.3

    Args:
        logits (`torch.Tensor` of shape `(..., C)`): Class logits.
        one_hot (`torch.Tensor` of shape `(..., C)`): 1 at the class of the matched object, 0 elsewhere.
        iou (`torch.Tensor` of shape `(...)`): IoU of the box with that of the matched object.
        config (`DePerceiverV2Config`): Kind and exponents.
    """
    probability = logits.detach().sigmoid()
    quality = one_hot * iou.detach()[..., None]
    if config.classification_loss == "focal":
        target = one_hot
        probability = logits.sigmoid()
        off_target = (one_hot - probability).abs()
        weight = (one_hot * config.focal_alpha + (1 - one_hot) * (1 - config.focal_alpha)) * (
            off_target**config.focal_gamma
        )
    elif config.classification_loss == "varifocal":
        target = quality
        weight = quality + (1 - one_hot) * 0.75 * probability**config.focal_gamma
    else:
        target = quality**config.mal_gamma
        weight = one_hot + (1 - one_hot) * probability**config.mal_gamma
    return weight * nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")


def detection_loss(
    selection: Predictions | None,
    blocks: Predictions,
    is_query: torch.Tensor | None,
    denoised: Predictions | None,
    denoising: DenoisingQueries | None,
    targets: DetectionTargets,
    config: DePerceiverV2Config,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of all stages, computed in float32 whatever the precision around it.

    Args:
        selection (`Predictions` of one stage, *optional*): Of the selected tokens, before the first block.
        blocks (`Predictions`): Of every block.
        is_query (`torch.Tensor` of shape `(B, Q)`, *optional*): `False` at padding queries.
        denoised (`Predictions`, *optional*): Of the denoising queries in every block.
        denoising (`DenoisingQueries`, *optional*): These queries.
        targets (`DetectionTargets`): Objects of the batch.
        config (`DePerceiverV2Config`): Weights.

    Returns:
        The weighted sum, and the unweighted terms: `loss_class`, `loss_bbox`, `loss_giou` of the last block, the same
        with the suffix `_{block}` for the earlier ones, `_selection` for the selection and `_denoising` for the sum
        over the blocks' denoising; and `class_error`, the percentage of matched queries whose best class is wrong.

    Raises:
        FloatingPointError: Predictions or target boxes are not finite.
        ValueError: A class label is not one of the model's.
    """
    with torch.autocast(device_type=blocks.logits.device.type, enabled=False):
        # Before anything that can raise on one process only: the others would wait for it here.
        num_boxes = num_noised = mean_boxes_per_process(sum(targets.sizes), blocks.logits.device)
        if denoising is not None:
            drawn = sum(min(size, denoising.num_objects) for size in targets.sizes)
            num_noised = mean_boxes_per_process(drawn, blocks.logits.device)
        blocks = blocks.float()
        terms, pairs = _set_terms(blocks, is_query, targets, num_boxes, config)
        names = [f"_{block}" for block in range(len(blocks.logits) - 1)] + [""]
        loss_dict = {"class_error": _class_error(blocks, targets, pairs)}
        for name, values in terms.items():
            loss_dict |= {name + suffix: value for suffix, value in zip(names, values.detach(), strict=True)}
        total = weighted_sum(terms, config)
        if selection is not None:
            terms, _ = _set_terms(selection.float(), is_query, targets, num_boxes, config)
            loss_dict |= {f"{name}_selection": values.detach().sum() for name, values in terms.items()}
            total = total + weighted_sum(terms, config)
        if denoised is not None and denoising is not None:
            terms = _denoising_terms(denoised.float(), denoising, targets, num_noised, config)
            loss_dict |= {f"{name}_denoising": values.detach().sum() for name, values in terms.items()}
            total = total + weighted_sum(terms, config)
    return total, loss_dict


def prepare_targets(labels: list[dict[str, torch.Tensor]], num_images: int, device: torch.device) -> DetectionTargets:
    """Stack the targets of all images.

    Raises:
        ValueError: `labels` are not those of so many images, or incomplete.
    """
    if len(labels) != num_images:
        raise ValueError(f"got `labels` of {len(labels)} images for predictions of {num_images}.")
    return pad_targets(labels, device)


def weighted_sum(terms: Mapping[str, torch.Tensor], config: DePerceiverV2Config) -> torch.Tensor:
    """Sum of `loss_class`, `loss_bbox` and `loss_giou`, each `(S,)`, by the weights of the config."""
    return (
        config.class_loss_coefficient * terms["loss_class"].sum()
        + config.bbox_loss_coefficient * terms["loss_bbox"].sum()
        + config.giou_loss_coefficient * terms["loss_giou"].sum()
    )


def _set_terms(
    stages: Predictions,
    is_query: torch.Tensor | None,
    targets: DetectionTargets,
    num_boxes: torch.Tensor,
    config: DePerceiverV2Config,
) -> tuple[dict[str, torch.Tensor], MatchedPairs]:
    """Terms of the loss of matched queries, each `(S,)`, and the matching."""
    pairs = hungarian_match(
        *stages,
        targets,
        config,
        num_classes=config.num_labels,
        class_cost_function=sigmoid_class_cost,
        is_query=is_query,
    )
    if is_query is not None:
        pairs = _drop_padding(pairs, is_query)
    return _matched_terms(stages, targets, pairs, num_boxes, config), pairs


def _drop_padding(pairs: MatchedPairs, is_query: torch.Tensor) -> MatchedPairs:
    """The pairs without those of padding queries: an image of fewer tokens than objects leaves objects unmatched."""
    real = is_query[pairs.image, pairs.query]
    return MatchedPairs(*(indices[real] for indices in pairs))


def _matched_terms(
    stages: Predictions,
    targets: DetectionTargets,
    pairs: MatchedPairs,
    num_boxes: torch.Tensor,
    config: DePerceiverV2Config,
) -> dict[str, torch.Tensor]:
    predicted, objects = (pairs.layer, pairs.image, pairs.query), (pairs.image, pairs.target)
    boxes, target_boxes = stages.boxes[predicted], targets.boxes[objects]  # (pairs, 4)
    l1 = (boxes - target_boxes).abs().sum(-1)
    iou, giou = box_ious(center_to_corners(boxes), center_to_corners(target_boxes))
    logits = stages.logits
    one_hot = torch.zeros_like(logits)
    one_hot[(*predicted, targets.class_labels[objects])] = 1
    ious = logits.new_zeros(logits.shape[:-1]).index_put(predicted, iou.detach())
    zeros = l1.new_zeros(len(logits))
    return {
        "loss_class": classification_loss(logits, one_hot, ious, config).sum((1, 2, 3)) / num_boxes,
        "loss_bbox": zeros.index_add(0, pairs.layer, l1) / num_boxes,
        "loss_giou": zeros.index_add(0, pairs.layer, 1 - giou) / num_boxes,
    }


def _denoising_terms(
    denoised: Predictions,
    denoising: DenoisingQueries,
    targets: DetectionTargets,
    num_noised: torch.Tensor,
    config: DePerceiverV2Config,
) -> dict[str, torch.Tensor]:
    """Positive queries know their object, negative ones have none; the mean over the objects that were noised, and
    over the groups."""
    class_labels, boxes, _ = object_targets(targets)
    class_labels, boxes = class_labels.gather(1, denoising.objects), gather_rows(boxes, denoising.objects)
    positive = torch.arange(denoising.is_query.shape[1], device=boxes.device) // denoising.num_objects % 2 == 0  # (P,)
    is_query = denoising.is_query.float()  # (B, P)
    matched = is_query * positive

    num_noised = num_noised * denoising.num_groups
    iou, giou = box_ious(center_to_corners(denoised.boxes), center_to_corners(boxes))  # (S, B, P)
    one_hot = nn.functional.one_hot(class_labels, config.num_labels) * matched[..., None]  # (B, P, C)
    losses = classification_loss(denoised.logits, one_hot.expand_as(denoised.logits), iou, config)
    return {
        "loss_class": (losses * is_query[..., None]).sum((1, 2, 3)) / num_noised,
        "loss_bbox": ((denoised.boxes - boxes).abs().sum(-1) * matched).sum((1, 2)) / num_noised,
        "loss_giou": ((1 - giou) * matched).sum((1, 2)) / num_noised,
    }


@torch.no_grad()
def _class_error(stages: Predictions, targets: DetectionTargets, pairs: MatchedPairs) -> torch.Tensor:
    last = pairs.layer == len(stages.logits) - 1
    best = stages.logits[-1].argmax(-1)[pairs.image[last], pairs.query[last]]
    correct = (best == targets.class_labels[pairs.image[last], pairs.target[last]]).float()
    return 100 - 100 * correct.sum() / max(len(correct), 1)
