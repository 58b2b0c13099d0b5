# SPDX-License-Identifier: Apache-2.0
"""When a run evaluates, saves its state and ends, as functions of where it is.

A run is a sequence of evaluation intervals. One ends with an epoch, with the run, or where `eval_steps` makes an
evaluation due; then the run evaluates and saves what is due. All is counted in optimizer steps and epochs, so that a
resumed run does what it would have done.
"""

import math

from .arguments import DEFAULT_DECAY_FRACTION, DEFAULT_PLAIN_FRACTION, TrainingOptions
from .checkpoints import TrainingProgress


class RunSchedule:
    """The schedule of one run.

    Args:
        options: Of the run.
        batches_per_epoch: Batches that one process makes in an epoch.

    Attributes:
        steps_per_epoch: Optimizer steps; the last one of an epoch may accumulate fewer batches.
        total_steps: After so many steps the run ends.
        time_used: The part of `max_minutes` that is over, in [0, 1]; 0 if there is no such limit.
        early_decay: First and last step of a decay of the rate that lost patience has brought forward.
    """

    def __init__(self, options: TrainingOptions, batches_per_epoch: int):
        self.options = options
        self.batches_per_epoch = batches_per_epoch
        self.steps_per_epoch = -(-batches_per_epoch // options.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * options.epochs
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)
        self._planned_steps = self.total_steps
        self.time_used = 0.0
        self.early_decay: tuple[int, int] | None = None

    def resume(self, progress: TrainingProgress) -> None:
        """Take over what a training state knows of the run's end."""
        if self.options.max_minutes is not None:
            self.time_used = min(1.0, progress.seconds / (60 * self.options.max_minutes))
        self._apply_patience(progress)

    def position(self, step: int) -> float:
        """The part of the run that is over before a step, by steps or by the clock, whichever is further."""
        return max(step / self.total_steps, self.time_used)

    def is_plain(self, step: int) -> bool:
        """Whether the images of a step, counted from 0, are not mixed with others any more."""
        fraction = self.options.plain_fraction
        return self.position(step) >= 1 - (DEFAULT_PLAIN_FRACTION if fraction is None else fraction)

    # Early stopping

    def note_evaluation(self, progress: TrainingProgress, ap: float) -> None:
        """Count evaluations that bring no better AP; once they are too many, the rate decays or the run ends."""
        if ap > progress.reference_ap + self.options.early_stopping_threshold:
            progress.reference_ap, progress.stale_evaluations = ap, 0
        elif not self._decays(progress):
            progress.stale_evaluations += 1
        lost = self.patience_is_lost(progress)
        if lost and self.options.lr_scheduler == "wsd" and not self._decays(progress):
            progress.decay_from = progress.step
        self._apply_patience(progress)

    def patience_is_lost(self, progress: TrainingProgress) -> bool:
        patience = self.options.early_stopping_patience
        return patience is not None and progress.stale_evaluations >= patience

    def ended_early(self, progress: TrainingProgress) -> bool:
        """Whether a run that is over would have gone on, had its patience not been lost."""
        return self.patience_is_lost(progress) and progress.step < self._planned_steps and self.time_used < 1

    def _apply_patience(self, progress: TrainingProgress) -> None:
        """Let the run end where its state says: after a decay that lasts the same part of it, or at once."""
        if progress.decay_from is not None:
            end = max(progress.decay_from + 1, round(progress.decay_from / (1 - self._decay_fraction)))
            self.early_decay = progress.decay_from, end
            self.total_steps = min(self.total_steps, end)
        elif self.patience_is_lost(progress):
            self.total_steps = min(self.total_steps, progress.step)

    def _decays(self, progress: TrainingProgress) -> bool:
        """Whether the rate of `wsd` has begun to fall: from here on it falls to its end."""
        if self.options.lr_scheduler != "wsd":
            return False
        return progress.decay_from is not None or self.position(progress.step) >= 1 - self._decay_fraction

    @property
    def _decay_fraction(self) -> float:
        return self.options.decay_fraction or DEFAULT_DECAY_FRACTION

    # What is due

    def batches_of_next_step(self, progress: TrainingProgress) -> int:
        return min(self.options.gradient_accumulation_steps, self.batches_per_epoch - progress.batches)

    def epochs_done(self, progress: TrainingProgress) -> float:
        return progress.epoch + progress.batches / self.batches_per_epoch

    def epoch_is_over(self, progress: TrainingProgress) -> bool:
        return progress.batches == self.batches_per_epoch

    def last_step_is_done(self, progress: TrainingProgress) -> bool:
        return progress.step >= self.total_steps

    def interval_is_over(self, progress: TrainingProgress) -> bool:
        """Whether evaluation and saving, as far as they are due, come before the next step."""
        not_evaluated = progress.closed_step < progress.step
        return (
            self.epoch_is_over(progress)
            or self.last_step_is_done(progress)
            or (not_evaluated and _divides(self.options.eval_steps, progress.step))
        )

    def run_is_over(self, progress: TrainingProgress) -> bool:
        return self.last_step_is_done(progress) and progress.closed_step == progress.step

    def evaluation_is_due(self, progress: TrainingProgress) -> bool:
        """At the end of an interval; an epoch that is over has been counted as done."""
        if self.options.eval_steps is not None:
            due = _divides(self.options.eval_steps, progress.step)
        else:
            due = progress.batches == 0 and _divides(self.options.eval_every, progress.epoch)
        return due or self.last_step_is_done(progress)

    def evaluations_in(self, steps: float) -> int:
        """How many come in the next steps, about."""
        every = self.options.eval_steps or self.steps_per_epoch * self.options.eval_every
        return math.ceil(steps / every) if every else 0

    def state_is_due(self, progress: TrainingProgress) -> bool:
        """After a step; an epoch that is over has been counted as done."""
        return (
            self.last_step_is_done(progress)
            or (progress.batches == 0 and _divides(self.options.save_every, progress.epoch))
            or _divides(self.options.checkpointing_steps, progress.step)
        )


def _divides(every: int | None, count: int) -> bool:
    """Whether something that happens once in so many steps or epochs happens now; never if not given or 0."""
    return every is not None and every > 0 and count % every == 0
