# SPDX-License-Identifier: Apache-2.0
"""How a run ends before its time: patience that is lost, and numbers that are not finite."""

import json

import pytest
import torch

from deperceiver_hf.errors import UserError
from deperceiver_hf.training import DetectionTrainer, NonFiniteLossError, finiteness
from training_runs import assert_equal_weights, read_log, tiny_options, train_until_killed, weights_of

PATIENT = {"eval_every": 1, "max_train_samples": 4, "epochs": 9, "early_stopping_patience": 2, "save_top_k": 1}


@pytest.mark.parametrize(
    ("threshold", "evaluations", "best"),
    [
        (0.0, [0.1, 0.05, 0.2, 0.1, 0.2], 0.2),
        (0.15, [0.1, 0.2, 0.24], 0.24),  # the best one is kept all the same
        (0.15, [0.1, 0.2, 0.26, 0.3, 0.3], 0.3),  # what is slow counts in sum
    ],
)
def test_a_run_ends_when_its_ap_has_ceased_to_improve(tmp_path, scripted_ap, threshold, evaluations, best):
    scripted_ap(*evaluations)
    run = DetectionTrainer(tiny_options(tmp_path, **PATIENT, early_stopping_threshold=threshold))
    result = run.train()
    assert (result.step, result.epoch) == (2 * len(evaluations), len(evaluations))
    assert result.stopped_early
    assert "ceased to improve" in result.summary()
    assert result.best_ap == best
    assert json.loads((tmp_path / "best" / "metrics.json").read_text())["ap"] == best
    assert json.loads((tmp_path / "summary.json").read_text())["stopped_early"] is True


def test_more_patience_lets_a_run_that_has_ended_early_go_on(tmp_path, scripted_ap):
    scripted_ap(0.2, 0.1, 0.1)
    result = DetectionTrainer(tiny_options(tmp_path, **PATIENT)).train()
    assert result.stopped_early
    ended = DetectionTrainer(tiny_options(tmp_path, **PATIENT, resume="auto"))
    assert ended.train().step == result.step
    scripted_ap(0.9, 0.8, 0.7)
    more = {**PATIENT, "early_stopping_patience": 3, "epochs": 6}
    assert DetectionTrainer(tiny_options(tmp_path, **more, resume="auto")).train().step == result.step + 6


def test_without_patience_a_run_goes_to_its_end(tmp_path, scripted_ap):
    scripted_ap(*[0.1] * 4)
    options = {**PATIENT, "early_stopping_patience": None, "epochs": 4}
    result = DetectionTrainer(tiny_options(tmp_path, **options)).train()
    assert (result.epoch, result.stopped_early) == (4, False)
    scripted_ap(0.1, 0.1, 0.1)
    lost_at_its_end = {**PATIENT, "epochs": 3}
    result = DetectionTrainer(tiny_options(tmp_path / "short", **lost_at_its_end)).train()
    assert (result.epoch, result.stopped_early) == (3, False)


@pytest.mark.parametrize("kill_at", [None, 7])
def test_lost_patience_begins_the_decay_of_wsd_before_its_time(tmp_path, monkeypatch, scripted_ap, kill_at):
    """At step 6 of 18: a decay of 0.4 of the run then ends with step 10."""
    options = {**PATIENT, "lr_scheduler": "wsd", "lr": 1.0, "checkpointing_steps": 1}
    aps = [0.3, 0.2, 0.1, 0.1, 0.1]
    scripted_ap(*aps)
    if kill_at:
        train_until_killed(tmp_path, monkeypatch, kill_at, **options)
        options["resume"] = "auto"
        scripted_ap(*aps[kill_at // 2 :])
    result = DetectionTrainer(tiny_options(tmp_path, **options)).train()
    rates = [line["lr"] for line in read_log(tmp_path, "train")]
    assert rates == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25])
    assert (result.step, result.stopped_early) == (10, True)


def test_no_patience_is_lost_in_the_decay_of_wsd(tmp_path, scripted_ap):
    scripted_ap(*[0.3] * 4)
    options = {**PATIENT, "lr_scheduler": "wsd", "decay_fraction": 0.9, "epochs": 4}
    result = DetectionTrainer(tiny_options(tmp_path, **options)).train()
    assert (result.epoch, result.stopped_early) == (4, False)


def test_killed_before_it_ends_early_a_run_ends_the_same(tmp_path, monkeypatch, scripted_ap):
    aps = [0.3, 0.2, 0.1, 0.1, 0.1]
    options = {**PATIENT, "ema_decay": 0.5, "dropout": 0.1, "lr_scheduler": "wsd", "checkpointing_steps": 3}
    scripted_ap(*aps)
    straight = DetectionTrainer(tiny_options(tmp_path / "straight", **options))
    straight.train()
    scripted_ap(*aps)
    train_until_killed(tmp_path / "resumed", monkeypatch, 5, **options)
    resumed = DetectionTrainer(tiny_options(tmp_path / "resumed", **options, resume="auto"))
    assert resumed.progress.stale_evaluations == 1
    resumed.train()
    assert resumed.progress.step == straight.progress.step < 18
    assert_equal_weights(weights_of(straight), weights_of(resumed))
    averages = [run.average.model.state_dict() for run in (straight, resumed)]
    assert_equal_weights(*averages)
    for kind in ("train", "eval"):
        assert read_log(tmp_path / "resumed", kind) == read_log(tmp_path / "straight", kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping_patience": 0}, "at least 1"),
        ({"early_stopping_patience": 2}, "--eval_every 0"),
        ({"early_stopping_threshold": 0.1}, "--early_stopping_threshold: belongs to"),
        (
            {"early_stopping_patience": 2, "eval_every": 1, "lr_scheduler": "wsd", "decay_fraction": 1.0},
            "leaves none",
        ),
    ],
)
def test_patience_that_makes_no_sense_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        tiny_options(tmp_path, **options)


def test_patience_needs_objects_to_find(tmp_path):
    dataset = "synthetic:image_size=64,min_objects=0,max_objects=0"
    with pytest.raises(UserError, match="no object"):
        DetectionTrainer(tiny_options(tmp_path, dataset=dataset, **PATIENT))


def test_a_gradient_that_is_not_finite_names_the_images_that_it_came_from(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, checkpointing_steps=2))
    batches = {}

    def noting(batch, mixed_with):
        batches.setdefault(run.progress.step, []).extend(int(label["image_id"]) for label in batch["labels"])
        note(batch, mixed_with)

    note, run.guard.note_images = run.guard.note_images, noting
    weight = run.parameters[-1]
    weight.register_hook(lambda gradient: gradient * torch.nan if run.progress.step == 2 else gradient)
    with pytest.raises(NonFiniteLossError, match="at step 4") as error:
        run.train()
    assert f"(images {', '.join(map(str, batches[2]))})" in str(error.value)
    assert batches[2] != batches[3]
    assert "state-00000002-0000" in str(error.value)


def test_a_loss_that_is_not_finite_names_the_files_of_its_batch(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, bbox_loss_coef=1e39))
    run.data.dataset.image_path = lambda place: f"folder/{place}.jpg"
    with pytest.raises(NonFiniteLossError, match=r"images \d+ \(folder/\d+\.jpg\), \d+ \(folder/\d+\.jpg\)") as error:
        run.train()
    assert "No state had been saved" in str(error.value)


class _Scaler:
    """Stands in for a GradScaler: there is one, that is all that the guard asks."""


def test_overflows_of_float16_are_an_error_only_when_they_do_not_end(tmp_path, monkeypatch):
    run = DetectionTrainer(tiny_options(tmp_path))
    guard, loss = run.guard, torch.tensor(1.0)
    monkeypatch.setattr(run.accelerator, "scaler", _Scaler())

    def step(norm: float) -> None:
        broken, overflown = guard.flags(loss)
        assert not broken
        guard.count_overflow(bool(overflown), None)
        guard.note_gradient(torch.tensor(norm))

    for norm in [torch.inf] * (finiteness.MOST_OVERFLOWS - 1) + [1.0] + [torch.nan] * 3:
        step(norm)
    assert run.progress.overflows == 2  # the last step is counted with the next one
    guard.require_finite(run.model, run.optimizer, None)  # or when the state is saved
    assert run.progress.overflows == 3
    step(1.0)
    assert run.progress.overflows == 3
    for _ in range(finiteness.MOST_OVERFLOWS):
        step(torch.inf)
    with pytest.raises(NonFiniteLossError, match="in 40 steps in a row"):
        step(torch.inf)
