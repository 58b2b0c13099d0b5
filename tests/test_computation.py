# SPDX-License-Identifier: Apache-2.0
"""How a run computes is chosen once, and taken over when it is resumed."""

import copy

import pytest
import torch
from accelerate import PartialState

from deperceiver_hf.machine import AttentionShape
from deperceiver_hf.training import DetectionTrainer, computation
from deperceiver_hf.training.computation import Float32Depthwise, ThreadWatch, attention_shape
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


def test_depthwise_convolutions_train_in_float32_under_autocast():
    def gradients(model, dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(images)
        assert output.dtype == dtype
        model.zero_grad()
        output.float().square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    torch.manual_seed(0)
    images = torch.rand(2, 16, 12, 12)
    plain = torch.nn.Conv2d(16, 16, 5, padding=2, groups=16)
    hooked = copy.deepcopy(plain)
    Float32Depthwise.of(torch.nn.Sequential(hooked, torch.nn.Conv2d(16, 16, 1)))
    copied = copy.deepcopy(hooked)
    exact = gradients(plain, torch.float32)
    rounded = gradients(plain, torch.bfloat16)
    for model in (hooked, copied):
        for ours, best, worse in zip(gradients(model, torch.bfloat16), exact, rounded, strict=True):
            assert (ours - best).abs().max() < 0.5 * (worse - best).abs().max()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(hooked(images), plain(images), rtol=0, atol=0)

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError):
            hooked(torch.rand(1, 7, 12, 12))
        assert torch.is_autocast_enabled("cpu")  # the convolution has failed in between
        assert hooked(images).dtype == torch.bfloat16
