# SPDX-License-Identifier: Apache-2.0
"""`--batch_size auto`: what fits is found, written down and kept, and trains as if it had been given."""

import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from deperceiver_hf.errors import UserError
from deperceiver_hf.training import DetectionTrainer, batch_size, parse_arguments
from deperceiver_hf.training.recipes import recipe_arguments
from training_runs import assert_equal_weights, tiny_options, train_until_killed, weights_of

MEGABYTE = 2**20


class WatchedProcess:
    """Has the memory that a step takes, whatever else goes on here, and counts how often it is looked at."""

    looks = taken = 0

    def memory_info(self):
        WatchedProcess.looks += 1
        return SimpleNamespace(rss=100 * MEGABYTE + WatchedProcess.taken)


class FakeTrial:
    """Its steps take 40 MB, and 20 MB for each image, until somebody has looked."""

    shapes = ((10, 10),)

    def make_model(self):
        return None, None, None

    def make_batch(self, batch_size):
        return {"pixel_values": torch.zeros(batch_size)}

    def step(self, model, optimizer, batch_size):
        WatchedProcess.taken = (40 + 20 * batch_size) * MEGABYTE
        looks, deadline = WatchedProcess.looks, time.monotonic() + 60
        while WatchedProcess.looks < looks + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        WatchedProcess.taken = 0


@pytest.mark.parametrize(("room", "expected"), [(1000, 8), (150, 4), (90, 1), (50, 0)])
def test_on_a_cpu_the_memory_of_larger_batches_is_estimated(monkeypatch, room, expected):
    monkeypatch.setattr(batch_size, "available_memory", lambda: room * MEGABYTE / batch_size.SHARE_OF_MEMORY)
    monkeypatch.setattr(batch_size, "_bytes_of_cached_images", lambda trial: 0)
    monkeypatch.setattr(psutil, "Process", WatchedProcess)
    found, why = batch_size._estimated(FakeTrial(), [1, 2, 4, 8])
    assert found == expected, why


@pytest.mark.parametrize("most", [8, 4, 1, 0])
def test_elsewhere_batches_are_tried_from_the_largest_down(most):
    class Limited(FakeTrial):
        def step(self, model, optimizer, size):
            tried.append(size)
            if size > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    tried: list[int] = []
    assert batch_size._tried(Limited(), [1, 2, 4, 8])[0] == most
    assert tried == [size for size in (8, 4, 2, 1) if size >= max(most, 1) for _ in range(2 if size == most else 1)]


def test_another_error_of_a_trial_is_not_taken_for_a_lack_of_memory():
    class Broken(FakeTrial):
        def step(self, model, optimizer, size):
            raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="do not match"):
        batch_size._tried(Broken(), [1, 2])


def test_a_run_keeps_what_it_chose_and_is_that_of_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_size, "_estimated", lambda trial, sizes: (max(s for s in sizes if s < 4), "tested"))
    automatic = {"batch_size": "auto", "images_per_step": 6, "checkpointing_steps": 1, "dropout": 0.1}
    given = {"batch_size": 3, "gradient_accumulation_steps": 2}
    straight = DetectionTrainer(tiny_options(tmp_path / "given", dropout=0.1, **given))
    straight.train()
    train_until_killed(tmp_path / "auto", monkeypatch, 2, **automatic)
    written = yaml.safe_load((tmp_path / "auto" / "options.yaml").read_text(encoding="utf-8"))
    assert {name: written[name] for name in given} == given
    assert "images_per_step" not in written

    monkeypatch.setattr(batch_size, "_estimated", lambda trial, sizes: (1, "less memory now"))
    resumed = DetectionTrainer(tiny_options(tmp_path / "auto", **automatic, resume="auto"))
    resumed.train()
    assert (resumed.options.batch_size, resumed.options.gradient_accumulation_steps) == (3, 2)
    assert_equal_weights(weights_of(straight), weights_of(resumed))
    with pytest.raises(UserError, match="a step has 6 images"):
        DetectionTrainer(tiny_options(tmp_path / "auto", **{**automatic, "images_per_step": 12}, resume="auto"))


def test_a_real_step_is_measured(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, batch_size="auto", ema_decay=0.9, mosaic=0.5))
    assert (run.options.batch_size, run.options.gradient_accumulation_steps) == (8, 2)  # 12 images are no batch of 16


def test_nothing_that_fits_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_size, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"not even a batch of one image fits .* GiB may be taken"):
        DetectionTrainer(tiny_options(tmp_path, batch_size="auto"))


def test_a_recipe_says_how_many_images_make_a_step(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("batch_size: 4\ngradient_accumulation_steps: 3\n", encoding="utf-8")
    assert recipe_arguments(str(recipe), {"batch_size": "auto"}) == ["--images_per_step=12"]
    assert recipe_arguments(str(recipe), {"batch_size": "auto", "images_per_step": 8}) == []
    assert recipe_arguments(str(recipe), {"batch_size": 2}) == ["--batch_size=4", "--gradient_accumulation_steps=3"]
    recipe.write_text("batch_size: auto\nimages_per_step: 8\n", encoding="utf-8")
    assert recipe_arguments(str(recipe), {"batch_size": 2}) == ["--batch_size=auto"]
    assert recipe_arguments(str(recipe), {"lr": 1.0}) == ["--batch_size=auto", "--images_per_step=8"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size many", "'many' is neither a whole number nor auto"),
        ("--batch_size 0", "at least 1"),
        ("--batch_size auto --gradient_accumulation_steps 2", "give --images_per_step"),
        ("--images_per_step 8", "belongs to --batch_size auto"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_arguments(flags.split())
    assert message in capsys.readouterr().err
