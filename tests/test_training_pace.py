# SPDX-License-Identifier: Apache-2.0
"""How long a run is said to take."""

from pathlib import Path

import pytest
from accelerate import PartialState

from deperceiver_hf.training import pace
from deperceiver_hf.training.checkpoints import TrainingProgress
from deperceiver_hf.training.pace import Pace, as_duration, minutes_in_words
from deperceiver_hf.training.schedule import RunSchedule
from training_runs import tiny_options


class Clock:
    """Stands in for the module `time`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2 * 30),  # 60 steps, of which 30 are done
        ({"eval_every": 2}, 2 * 30 + 3 * 7),  # after epochs 6 to 10, every second
        ({"eval_steps": 4, "eval_every": 1}, 2 * 30 + 8 * 7),
        ({"max_minutes": 1.5, "eval_every": 1}, 20 + 2 * 7),  # 70 s of 90 are over: 10 steps
    ],
)
def test_time_left_is_that_of_steps_and_evaluations(monkeypatch, options, expected):
    PartialState(cpu=True)  # of the logger
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    chosen = tiny_options(Path("unused"), epochs=10, **options)
    progress = TrainingProgress()
    schedule = RunSchedule(chosen, batches_per_epoch=6)
    left = Pace(chosen, progress, schedule)
    for step in range(30):
        clock.now += 12 if step == 0 else 2  # the first one is slow
        left.end_step()
        progress.step += 1
        if step % 6 == 5 and options:
            with left.evaluating():
                clock.now += 7
            left.start()
    assert progress.seconds == 70
    assert left.seconds_left() == pytest.approx(expected, rel=0.15)


def test_durations():
    assert [as_duration(seconds) for seconds in (0.4, 59.6, 123, 3723)] == ["0:00", "1:00", "2:03", "1:02:03"]


def test_estimates_are_said_in_words():
    assert [minutes_in_words(minutes) for minutes in (0.2, 1.6, 89, 90)] == [
        "a minute",
        "2 minutes",
        "89 minutes",
        "1.5 hours",
    ]
