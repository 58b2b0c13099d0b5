# SPDX-License-Identifier: Apache-2.0
"""Stopping a run whose numbers are not finite any more, before they reach anything that is kept."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from .checkpoints import TrainingProgress
from .setup import TrainingData
from .sharding import own_part

MOST_OVERFLOWS = 40  # in a row: a loss scaled down by 2**40 is not the scaler's fault
MOST_NAMED = 8  # images in a message
ADVICE = "A lower --lr, more --warmup_steps or --mixed_precision bf16 or no may help."


class NonFiniteLossError(FloatingPointError):
    """Loss, gradient, model or predictions are not finite; the message names step, terms and images."""


class FinitenessGuard:
    """Knows which images the numbers of a process come from, and raises the error that all processes end with.

    With float16 the scaler of the loss finds its scale by overflows of the gradient, and skips those steps: only very
    many of them in a row are an error.

    Args:
        accelerator: Of the run.
        data: That the images come from.
        progress: Of the run; steps that the scaler skips are counted there.

    Attributes:
        grad_norm: Norm of the gradient of the last step, before clipping.
    """

    def __init__(self, accelerator: Accelerator, data: TrainingData, progress: TrainingProgress):
        self.accelerator, self.data, self.progress = accelerator, data, progress
        self.grad_norm: torch.Tensor | None = None
        self._counted = True  # whether the norm has been looked at for overflows
        self._images: list[int] = []  # ids of the step under way
        self._images_before: list[int] = []  # of the last step

    def begin_step(self) -> None:
        self._images_before, self._images = self._images, []

    def note_images(self, batch: Mapping[str, Any], mixed_with: Mapping[int, Iterable[int]]) -> None:
        """Take note of the images of a batch, and of those that were mixed into them."""
        for label in batch["labels"]:
            image_id = int(label["image_id"])
            self._images += [image_id, *mixed_with.get(image_id, ())]

    def note_gradient(self, norm: torch.Tensor) -> None:
        self.grad_norm, self._counted = norm, False

    def flags(self, loss: torch.Tensor) -> list[torch.Tensor]:
        """Whether this process has to stop, and whether the scaler skipped its last step; without waiting for the
        device."""
        broken = ~loss.detach().isfinite()
        overflown = torch.zeros_like(broken)
        if self.grad_norm is not None:
            infinite = ~self.grad_norm.isfinite()
            if self.accelerator.scaler is None:
                broken = broken | infinite
            elif not self._counted:
                overflown = infinite
        return [broken, overflown]

    def count_overflow(self, overflown: bool, state: Path | None) -> None:
        """Count the steps in a row that were skipped; every process must call this.

        Raises:
            NonFiniteLossError: They are too many.
        """
        if self._counted or self.accelerator.scaler is None:
            return
        self._counted = True
        self.progress.overflows = self.progress.overflows + 1 if overflown else 0
        if self.progress.overflows >= MOST_OVERFLOWS:
            raise NonFiniteLossError(
                f"the gradient was beyond the range of float16 in {self.progress.overflows} steps in a row, to step "
                f"{self.progress.step}; none of them has changed the weights. {_kept(state)} {ADVICE}"
            )

    def report_step(
        self, loss: torch.Tensor, terms: Mapping[str, torch.Tensor], problem: str, state: Path | None
    ) -> NoReturn:
        """Raise an error that tells what each process saw; every process must call this."""
        progress = self.progress
        values = {"loss": loss.item(), **{name: value.item() for name, value in terms.items()}}
        images = self._images
        if self.grad_norm is not None:
            values["norm of the gradient before"] = self.grad_norm.item()
            if not self.grad_norm.isfinite():  # whatever came then has come of it
                images = self._images_before
        report = problem.rstrip(".") or ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        report = f"process {self.accelerator.process_index}: {report} ({self._described(images)})"
        reports = gather_object([report])
        raise NonFiniteLossError(
            f"the loss is not finite at step {progress.step + 1} (epoch {progress.epoch + 1}). {'; '.join(reports)}. "
            f"{_kept(state)} Look at these images and their boxes. {ADVICE}"
        )

    def require_finite(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Path | None) -> None:
        """Refuse to evaluate or save a model, or the state of its optimizer, that is not finite; on all processes."""
        tensors: dict[str, Any] = {}
        if self.grad_norm is not None and self.accelerator.scaler is None:  # a GradScaler skips such steps itself
            tensors["the norm of the gradient"] = self.grad_norm
        elif self.grad_norm is not None:
            self.count_overflow(not self.grad_norm.isfinite(), state)
        tensors |= {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for number, moments in enumerate(optimizer.state.values()):
            tensors |= {f"{name} of the optimizer ({number})": value for name, value in moments.items()}
        tensors = {
            name: own_part(t.detach()) for name, t in tensors.items() if torch.is_tensor(t) and t.is_floating_point()
        }
        finite = torch.stack([tensor.isfinite().all().to(self.accelerator.device) for tensor in tensors.values()])
        if self.accelerator.reduce((~finite).float(), reduction="sum").any():
            broken = [name for name, fine in zip(tensors, finite.tolist(), strict=True) if not fine]
            broken = broken or ["what another process has"]
            raise NonFiniteLossError(
                f"the training is not finite at step {self.progress.step}: {', '.join(broken[:3])}"
                f"{f' and {len(broken) - 3} others' if len(broken) > 3 else ''}, after a step on "
                f"{self._described(self._images)}. Nothing was saved of it. {_kept(state)} {ADVICE}"
            )

    def _described(self, image_ids: list[int]) -> str:
        """Images by their own ids and their files."""
        data = self.data.train
        wanted = list(dict.fromkeys(image_ids))
        places = {image_id: place for place, image_id in enumerate(data.dataset.with_format(None)["image_id"])}
        named = []
        for image_id in wanted[:MOST_NAMED]:
            path = self.data.dataset.image_path(places[image_id])
            named.append(f"{data.own_image_id(image_id)}{f' ({path})' if path else ''}")
        more = len(wanted) - len(named)
        return f"images {', '.join(named) or 'unknown'}{f' and {more} more' if more else ''}"


def _kept(state: Path | None) -> str:
    """What a user has after the end."""
    if state is None:
        return "No state had been saved."
    return f"What was saved before is kept, the newest state is {state}; the run would come to the same from there."
