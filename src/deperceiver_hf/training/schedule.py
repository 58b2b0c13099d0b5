# SPDX-License-Identifier: Apache-2.0
"""When a run evaluates, saves its state and ends, as functions of where it is.

A run is a sequence of evaluation intervals. One ends with an epoch, with the run, or where `eval_steps` makes an
evaluation due; then the run evaluates and saves what is due. All is counted in optimizer steps and epochs, so that a
resumed run does what it would have done.
"""

from .arguments import TrainingOptions
from .checkpoints import TrainingProgress


class RunSchedule:
    """The schedule of one run.

    Args:
        options: Of the run.
        batches_per_epoch: Batches that one process makes in an epoch.

    Attributes:
        steps_per_epoch: Optimizer steps; the last one of an epoch may accumulate fewer batches.
        total_steps: After so many steps the run ends.
    """

    def __init__(self, options: TrainingOptions, batches_per_epoch: int):
        self.options = options
        self.batches_per_epoch = batches_per_epoch
        self.steps_per_epoch = -(-batches_per_epoch // options.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * options.epochs
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)

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
