# SPDX-License-Identifier: Apache-2.0
"""The loss of D-FINE and DEIMv2, whose boxes are distributions of their edges, with each layer's outputs together.

In transformers the layers' scores and boxes begin with the first prediction of the decoder, which has no distribution,
and are paired with the layers' distributions one off; the last layer has no loss of its distributions, none of its
predictions for denoising queries has any, and D-FINE's boxes are matched layer by layer. Here it is as in the authors'
code (Peterande/D-FINE, `dfine_criterion.py`; ShihuaHuang95/DEIM, `deim_criterion.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_deimv2 import Deimv2Loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Detector
else:
    Detector = object  # the classes that are made of the mix-in bring the real one


class DFineCriterion(Deimv2Loss):
    """The terms of D-FINE: boxes and distributions learn from the union of what all layers match, scores from what
    their own layer does."""

    def __init__(self, config: PreTrainedConfig):
        DFineLoss.__init__(self, config)
        self.use_dense_one_to_one = True


class DistributionLoss(Detector):
    """Mix-in that pairs the outputs of transformers' D-FINE or DEIMv2.

    Attributes:
        criterion_class: Computes the terms of the loss from the paired outputs.
    """

    criterion_class: Callable[[PreTrainedConfig], nn.Module]

    @property
    def loss_function(self) -> Any:
        return partial(_distribution_loss, self.criterion_class)


def _distribution_loss(
    criterion_class: Callable[[PreTrainedConfig], nn.Module],
    logits: torch.Tensor,
    labels: list[dict[str, torch.Tensor]],
    device: torch.device,
    pred_boxes: torch.Tensor,
    config: PreTrainedConfig,
    outputs_class: torch.Tensor,
    outputs_coord: torch.Tensor,
    enc_topk_logits: torch.Tensor,
    enc_topk_bboxes: torch.Tensor,
    denoising_meta_values: dict[str, Any] | None,
    predicted_corners: torch.Tensor,
    initial_reference_points: torch.Tensor,
    **kwargs,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """As transformers calls it.

    Args:
        logits, pred_boxes: Of the last layer; they are in the next two.
        outputs_class: `(B, L + 1, Q, C)`, the first prediction before those of the L layers; `(B, 1, Q, C)` of the
            last layer in evaluation mode.
        outputs_coord: Boxes `(B, L + 1, Q, 4)`.
        enc_topk_logits, enc_topk_bboxes: Of the encoder's proposals.
        denoising_meta_values: How many of the Q queries, which come first, restore noised objects.
        predicted_corners: Logits of the distributions `(B, L, Q, 4 * (bins + 1))`.
        initial_reference_points: Boxes `(B, L, Q, 4)` that the distributions refer to.
    """
    parts: list[Any] = [outputs_class, outputs_coord.clamp(0, 1), predicted_corners, initial_reference_points]
    outputs: dict[str, Any] = {}
    if denoising_meta_values is not None:
        split = [part.split(denoising_meta_values["dn_num_split"], dim=2) for part in parts]
        restored = _predictions(*(noised for noised, _ in split))
        outputs = {"dn_auxiliary_outputs": restored, "denoising_meta_values": denoising_meta_values}
        parts = [plain for _, plain in split]
    *earlier, last = _predictions(*parts)
    proposals = {"logits": enc_topk_logits, "pred_boxes": enc_topk_bboxes.clamp(0, 1)}
    outputs = {**last, "auxiliary_outputs": [*earlier, proposals], **outputs}
    terms = criterion_class(config).to(device)(outputs, labels)
    return sum(terms.values()), terms, outputs["auxiliary_outputs"]


def _predictions(
    logits: torch.Tensor, boxes: torch.Tensor, corners: torch.Tensor, references: torch.Tensor
) -> list[dict[str, torch.Tensor]]:
    """The predictions, as the criterion takes them: the first, if there is one, then those of the layers, which are
    taught by the last."""
    first = logits.shape[1] - corners.shape[1]
    alone = [{"logits": logits[:, i], "pred_boxes": boxes[:, i]} for i in range(first)]
    return alone + [
        {
            "logits": logits[:, first + i],
            "pred_boxes": boxes[:, first + i],
            "pred_corners": corners[:, i],
            "ref_points": references[:, i],
            "teacher_corners": corners[:, -1],
            "teacher_logits": logits[:, -1],
        }
        for i in range(corners.shape[1])
    ]
