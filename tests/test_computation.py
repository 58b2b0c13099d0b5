# SPDX-License-Identifier: Apache-2.0
"""How a run computes is chosen once, and taken over when it is resumed."""

import pytest
import torch
from accelerate import PartialState

from deperceiver_hf.machine import AttentionShape
from deperceiver_hf.training import DetectionTrainer, computation
from deperceiver_hf.training.computation import ThreadWatch, attention_shape
from training_runs import TINY_ARCHITECTURES, TINY_DETR, tiny_options


@pytest.fixture
def found(monkeypatch):
    """What measuring finds: a dictionary to change."""
    found = {"attention": "eager", "threads": 1}
    monkeypatch.setattr(computation, "fastest_attention", lambda shape, dtype, device: found["attention"])
    monkeypatch.setattr(computation, "choose_threads", lambda device: found["threads"])
    before = torch.get_num_threads()
    yield found
    torch.set_num_threads(before)


def test_what_was_chosen_is_kept_on_resume(tmp_path, found):
    options = {"attn_implementation": "auto", "max_steps": 1, "epochs": 1}
    first = DetectionTrainer(tiny_options(tmp_path, TINY_DETR, **options))
    assert (first.model.config._attn_implementation, torch.get_num_threads()) == ("eager", 1)
    first.train()
    found.update(attention="sdpa", threads=2)
    resumed = DetectionTrainer(tiny_options(tmp_path, TINY_DETR, **options, resume="auto"))
    assert (resumed.model.config._attn_implementation, torch.get_num_threads()) == ("eager", 1)
    anew = DetectionTrainer(tiny_options(tmp_path, TINY_DETR, **options, overwrite_output_dir=True))
    assert (anew.model.config._attn_implementation, torch.get_num_threads()) == ("sdpa", 2)


def test_what_is_asked_for_is_not_measured(tmp_path, found):
    run = DetectionTrainer(tiny_options(tmp_path, TINY_DETR, attn_implementation="sdpa"))
    assert run.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model", TINY_ARCHITECTURES.values(), ids=TINY_ARCHITECTURES)
def test_every_architecture_has_an_attention_to_measure(tmp_path, found, model):
    run = DetectionTrainer(tiny_options(tmp_path, model, attn_implementation="auto", batch_size=3))
    assert run.computation.attention == "eager"
    shape = attention_shape(run.options, run.accelerator.unwrap_model(run.model).config)
    assert isinstance(shape, AttentionShape)
    assert shape.batch == 3
    assert min(shape) >= 1


@pytest.fixture
def threads():
    """Room for four threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    PartialState()  # the log asks which process this is
    yield
    torch.set_num_threads(before)


def test_threads_follow_what_else_runs_on_the_cores(monkeypatch, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    best = [1]
    monkeypatch.setattr(computation, "choose_threads", lambda device: best[0])
    watch = ThreadWatch(torch.device("cpu"), threads=4, most=4)
    for _ in range(computation.STEPS_TO_COMPARE + 200):
        watch.after_step(0.1)
    for seconds in (1.0, 1.0, 0.1, 1.0, 1.0):  # a state saved, a page swapped
        watch.after_step(seconds)
    assert (watch.threads, torch.get_num_threads()) == (4, 4)
    watch.after_step(1.0)
    assert (watch.threads, torch.get_num_threads()) == (1, 1)
    best[0] = 4
    for _ in range(computation.STEPS_UNTIL_ANOTHER_TRY - 1):
        watch.after_step(0.2)
    assert watch.threads == 1
    watch.after_step(0.2)
    assert (watch.threads, torch.get_num_threads()) == (4, 4)


@pytest.mark.parametrize(("device", "variable"), [("cuda", None), ("cpu", "4")])
def test_threads_stay_where_they_are_said_or_do_not_matter(monkeypatch, threads, device, variable):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(computation, "choose_threads", lambda device: 1)
    watch = ThreadWatch(torch.device(device), threads=4, most=4)
    for seconds in [0.1] * 50 + [1.0] * 50:
        watch.after_step(seconds)
    assert (watch.threads, torch.get_num_threads()) == (4, 4)
