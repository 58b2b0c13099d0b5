# SPDX-License-Identifier: Apache-2.0
"""How fast a run is, and how long it will take."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.logging import get_logger

from .arguments import TrainingOptions
from .checkpoints import TrainingProgress
from .schedule import RunSchedule

logger = get_logger(__name__)

STEPS_OF_ESTIMATE = 20  # of a process, before it says how long the run will take
STEPS_REMEMBERED = 50


class Pace:
    """Counts the seconds of training, which are part of the progress, and estimates those to come.

    Args:
        options: Of the run.
        progress: Of the run.
        schedule: Of the run.
    """

    def __init__(self, options: TrainingOptions, progress: TrainingProgress, schedule: RunSchedule):
        self.options, self.progress, self.schedule = options, progress, schedule
        self._clock = time.perf_counter()
        self._steps: deque[float] = deque(maxlen=STEPS_REMEMBERED)  # seconds
        self._evaluations: list[float] = []  # seconds
        self._has_said = False

    def start(self) -> None:
        """Training goes on from now."""
        self._clock = time.perf_counter()

    def part_of_time(self) -> float:
        """The part of the time allowed that is over, in [0, 1]; 0 if it is not limited."""
        if self.options.max_minutes is None:
            return 0.0
        seconds = self.progress.seconds + time.perf_counter() - self._clock
        return min(1.0, seconds / (60 * self.options.max_minutes))

    def end_step(self) -> float:
        """Bring the time spent training up to date; returns the seconds of the step."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self.progress.seconds += seconds
        self._steps.append(seconds)
        if len(self._steps) == STEPS_OF_ESTIMATE and not self._has_said:
            self._has_said = True
            self._say()
        return seconds

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation, whose seconds are no training."""
        start = time.perf_counter()
        yield
        self._evaluations.append(time.perf_counter() - start)

    def seconds_left(self) -> float:
        """After a step: until the end of the run, evaluations included once there was one; as if no patience were
        lost."""
        each = self._seconds_of_a_step()
        steps = float(self.schedule.total_steps - self.progress.step)
        if self.options.max_minutes is not None:
            steps = min(steps, max(0.0, 60 * self.options.max_minutes - self.progress.seconds) / max(each, 1e-9))
        evaluation = statistics.mean(self._evaluations) if self._evaluations else 0.0
        return steps * each + evaluation * self.schedule.evaluations_in(steps)

    def _seconds_of_a_step(self) -> float:
        return statistics.mean(list(self._steps)[len(self._steps) // 2 :])  # the first steps are slower than the rest

    def _say(self) -> None:
        """Say once how long the run will take."""
        left = self.schedule.total_steps - self.progress.step
        if self.options.max_minutes is None and left > 0:
            seconds = self._seconds_of_a_step()
            logger.info(
                f"A step takes {seconds:.2f} s, the {left} to go about {minutes_in_words(seconds * left / 60)}. "
                "Ctrl-C saves the state; --resume auto goes on from it."
            )


def as_duration(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def minutes_in_words(minutes: float) -> str:
    """`a minute`, `12 minutes`, `1.5 hours`: as exact as an estimate is."""
    if minutes < 1.5:
        return "a minute"
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
