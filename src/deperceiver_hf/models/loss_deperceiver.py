# SPDX-License-Identifier: Apache-2.0
"""Set prediction loss (Carion et al. 2020, "End-to-End Object Detection with Transformers", section 3.1).

Predictions that are matched with an object learn its class and box, all others "no object".

Shapes: L decoder layers, B images, Q queries, C classes, P matched pairs.
"""

import torch
from transformers import PreTrainedConfig

from .matching_deperceiver import (
    DetectionTargets,
    MatchedPairs,
    center_to_corners,
    generalized_box_iou,
    hungarian_match,
    mean_boxes_per_process,
    pad_targets,
)


def set_prediction_loss(
    logits: torch.Tensor, pred_boxes: torch.Tensor, labels: list[dict[str, torch.Tensor]], config: PreTrainedConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of all decoder layers, computed in float32 whatever the precision around it.

    Args:
        logits (`torch.Tensor` of shape `(L, B, Q, C + 1)`): Class logits, the last class is "no object".
        pred_boxes (`torch.Tensor` of shape `(L, B, Q, 4)`): (center x, center y, width, height) in [0, 1].
        labels (`list[dict[str, torch.Tensor]]`): Per image `class_labels` `(n,)` and `boxes` `(n, 4)`.
        config (`PreTrainedConfig`): Gives the `*_cost` and `*_loss_coefficient` weights and `eos_coefficient`.

    Returns:
        The weighted sum, and the unweighted terms: `loss_ce`, `loss_bbox`, `loss_giou`, `class_error` (percent of
        matched predictions whose best class is wrong), `cardinality_error` (absolute error in the number of objects
        per image) of the last layer, and the same but `class_error` with the suffix `_{layer}` for the earlier ones.

    Raises:
        FloatingPointError: Predictions or target boxes are not finite.
        ValueError: `labels` do not fit the predictions.
    """
    if len(labels) != logits.shape[1]:
        raise ValueError(f"got `labels` of {len(labels)} images for predictions of {logits.shape[1]}.")
    with torch.autocast(device_type=logits.device.type, enabled=False):
        logits, pred_boxes = logits.float(), pred_boxes.float()
        targets = pad_targets(labels, logits.device)
        # Before anything that can raise on one process only: the others would wait for it here.
        num_boxes = mean_boxes_per_process(sum(targets.sizes), logits.device)
        pairs = hungarian_match(logits, pred_boxes, targets, config)
        return _loss_of_pairs(logits, pred_boxes, targets, pairs, num_boxes, config)


def _loss_of_pairs(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    targets: DetectionTargets,
    pairs: MatchedPairs,
    num_boxes: torch.Tensor,
    config: PreTrainedConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    num_layers = logits.shape[0]
    no_object = logits.shape[-1] - 1
    predictions = (pairs.layer, pairs.image, pairs.query)
    objects = (pairs.image, pairs.target)

    matched_classes = targets.class_labels[objects]
    target_classes = logits.new_full(logits.shape[:-1], no_object, dtype=torch.long).index_put(
        predictions, matched_classes
    )
    nll = -logits.log_softmax(-1).gather(-1, target_classes[..., None])[..., 0]  # (L, B, Q)
    weight = torch.where(target_classes == no_object, config.eos_coefficient, 1.0)
    loss_ce = (weight * nll).sum((1, 2)) / weight.sum((1, 2))

    boxes, target_boxes = pred_boxes[predictions], targets.boxes[objects]  # (P, 4)
    l1 = (boxes - target_boxes).abs().sum(-1)
    giou = generalized_box_iou(center_to_corners(boxes), center_to_corners(target_boxes))
    zeros = l1.new_zeros(num_layers)
    loss_bbox = zeros.index_add(0, pairs.layer, l1) / num_boxes
    loss_giou = zeros.index_add(0, pairs.layer, 1 - giou) / num_boxes

    coefficients = (config.class_loss_coefficient, config.bbox_loss_coefficient, config.giou_loss_coefficient)
    terms = (loss_ce, loss_bbox, loss_giou)
    loss = sum(coefficient * term.sum() for coefficient, term in zip(coefficients, terms, strict=True))

    with torch.no_grad():
        best = logits.argmax(-1)
        sizes = torch.tensor(targets.sizes, dtype=torch.float32).to(logits.device, non_blocking=True)
        cardinality_error = ((best != no_object).sum(-1).float() - sizes).abs().mean(-1)
        correct = zeros.index_add(0, pairs.layer, (best[predictions] == matched_classes).float())[-1]
        class_error = 100 - 100 * correct * num_layers / max(len(matched_classes), 1)
    loss_dict = {"class_error": class_error}
    named = zip(("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"), (*terms, cardinality_error), strict=True)
    for name, values in named:
        for layer, value in enumerate(values.detach()):
            loss_dict[name if layer == num_layers - 1 else f"{name}_{layer}"] = value
    return loss, loss_dict
