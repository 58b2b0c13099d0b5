# SPDX-License-Identifier: Apache-2.0
"""The training loop: what a step does, what a run leaves behind, and when it stops."""

import dataclasses
import json
import math
import os
import runpy
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from torch.optim.lr_scheduler import StepLR
from torchvision import tv_tensors
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from deperceiver_hf.backbone_weights import IMAGENET_PREPROCESSING
from deperceiver_hf.training import DetectionTrainer, NonFiniteLossError, pace
from deperceiver_hf.training.optimization import create_scheduler, learning_rates
from deperceiver_hf.training.setup import TrainingData, create_accelerator
from training_runs import (
    TINY_DEPERCEIVER,
    TINY_DETR,
    assert_equal_weights,
    read_log,
    stop_at,
    tiny_options,
    train_until_killed,
    weights_of,
)

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_ends_with_130(tmp_path, monkeypatch, capsys, number):
    straight = DetectionTrainer(tiny_options(tmp_path / "straight"))
    straight.train()

    with monkeypatch.context() as patch:
        stop_at(patch, 4, lambda: os.kill(os.getpid(), number))
        options = tiny_options(tmp_path / "run")
        assert run_script(patch, options) == 130
    assert "--resume auto" in capsys.readouterr().out
    assert not (tmp_path / "run" / "summary.json").exists()
    assert signal.getsignal(number) is not None
    resumed = DetectionTrainer(tiny_options(tmp_path / "run", resume="auto"))
    assert resumed.progress.step == 5  # the step that was under way was finished
    resumed.train()
    assert_equal_weights(weights_of(straight), weights_of(resumed))


def run_script(monkeypatch, options, *arguments: str) -> int:
    """Exit code of `scripts/train.py` with what differs from the defaults in `options` as flags."""
    flags = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not isinstance(value, list) and value not in (field.default, None):
            flags += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def test_cached_images_change_nothing_and_may_be_cached_from_then_on(tmp_path, monkeypatch):
    plain = DetectionTrainer(tiny_options(tmp_path / "plain", augmentation="crop"))
    plain.train()
    cached = DetectionTrainer(tiny_options(tmp_path / "cached", augmentation="crop", cache_images=True))
    cached.train()
    assert_equal_weights(weights_of(plain), weights_of(cached))
    train_until_killed(tmp_path / "run", monkeypatch, 8, augmentation="crop")
    resumed = DetectionTrainer(tiny_options(tmp_path / "run", augmentation="crop", cache_images=True, resume="auto"))
    resumed.train()
    assert_equal_weights(weights_of(plain), weights_of(resumed))


def test_boundaries_of_size_reach_the_evaluation(tmp_path):
    """An object is between 7 and 110 pixels large; only with moved boundaries is there none that is small."""
    for sizes, small in (([32, 96], True), ([5, 6], False)):
        run = DetectionTrainer(tiny_options(tmp_path / str(small), size_boundaries=sizes, epochs=1, eval_every=1))
        assert (run.train().metrics["ap_small"] >= 0) == small


def test_more_epochs_go_on_and_other_options_are_refused(tmp_path):
    DetectionTrainer(tiny_options(tmp_path / "run", epochs=1)).train()
    with pytest.raises(ValueError, match=r"lr was 0.001 and is 0.5"):
        DetectionTrainer(tiny_options(tmp_path / "run", epochs=2, resume="auto", lr=0.5))
    resumed = DetectionTrainer(tiny_options(tmp_path / "run", epochs=2, resume=str(tmp_path / "run")))
    resumed.train()
    straight = DetectionTrainer(tiny_options(tmp_path / "straight"))
    straight.train()
    assert_equal_weights(weights_of(straight), weights_of(resumed))


def test_output_directory_is_not_mixed_with_another_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--resume auto"):
        DetectionTrainer(tiny_options(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="no complete training state"):
        DetectionTrainer(tiny_options(tmp_path / "run", resume=str(tmp_path / "run")))
    with pytest.raises(NotADirectoryError):
        DetectionTrainer(tiny_options(tmp_path / "run" / "notes.txt"))

    DetectionTrainer(tiny_options(tmp_path / "run", epochs=1, overwrite_output_dir=True)).train()
    (first,) = (tmp_path / "run").glob("state-*")
    with pytest.raises(FileNotFoundError):  # what cannot start deletes nothing
        DetectionTrainer(tiny_options(tmp_path / "run", overwrite_output_dir=True, train_split="no such"))
    assert first.exists()
    DetectionTrainer(tiny_options(tmp_path / "run", max_steps=2, overwrite_output_dir=True)).train()
    assert not first.exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_time_ends_a_run_like_its_last_step(tmp_path, scripted_ap):
    scripted_ap(0.1)
    run = DetectionTrainer(tiny_options(tmp_path, max_minutes=1e-6, eval_every=1))
    result = run.train()
    assert (result.step, result.interrupted) == (1, False)
    assert [line["epoch"] for line in read_log(tmp_path, "eval")] == [1 / 6]
    AutoModelForObjectDetection.from_pretrained(tmp_path / "last")
    assert DetectionTrainer(tiny_options(tmp_path / "long", max_minutes=60)).train().step == 12


def test_states_are_saved_as_rarely_as_asked(tmp_path, monkeypatch):
    saved = []
    original = DetectionTrainer._save_state
    monkeypatch.setattr(DetectionTrainer, "_save_state", lambda run: (saved.append(run.progress.epoch), original(run)))
    DetectionTrainer(tiny_options(tmp_path, epochs=5, save_every=2, max_train_samples=4)).train()
    assert saved == [2, 4, 5]


def test_best_models_are_kept_ready_to_use(tmp_path, scripted_ap):
    scripted_ap(0.1, 0.5, 0.2, 0.3, 0.5)
    run = DetectionTrainer(tiny_options(tmp_path, epochs=5, eval_every=1, save_top_k=2, max_train_samples=4))
    result = run.train()
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-002-step-4", "epoch-005-step-10"]
    assert (result.best_ap, Path(result.best_model).name) == (0.5, "epoch-005-step-10")
    assert (tmp_path / "best").resolve() == Path(result.best_model).resolve()
    assert json.loads((tmp_path / "best" / "metrics.json").read_text()) == {"epoch": 5, "step": 10, "ap": 0.5}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(model["ap"], model["epoch"]) for model in summary["best_models"]] == [(0.5, 5), (0.5, 2)]

    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "best")
    assert_equal_weights(model.state_dict(), run.model.state_dict())
    assert model.config.id2label == run.data.train.id2label
    processor = AutoImageProcessor.from_pretrained(tmp_path / "best")
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (64, 107)


def test_models_carry_a_card_of_where_they_come_from(tmp_path, scripted_ap):
    scripted_ap(0.25, 0.5, 0.5)

    def train(name, model=TINY_DEPERCEIVER):
        AcceleratorState._reset_state(reset_partial_state=True)
        DetectionTrainer(tiny_options(tmp_path / name, model, epochs=1, eval_every=1, max_train_samples=4)).train()
        return ModelCard.load(tmp_path / name / "best" / "README.md")

    new = train("new")
    assert (new.data.license, new.data.pipeline_tag, new.data.base_model) == ("apache-2.0", "object-detection", None)
    assert new.data.model_name == "new"
    assert [(result.metric_type, result.metric_value) for result in new.data.eval_results] == [("ap", 25.0)]
    assert "All weights started from random numbers." in new.text
    assert "trained for 2 steps of 2 images" in new.text
    assert "max_train_samples: 4" in new.text
    assert str(tmp_path) not in new.content

    card = tmp_path / "new" / "last" / "README.md"
    card.write_text("---\nlicense: cc-by-nc-4.0\n---\n", encoding="utf-8")
    tuned = train("tuned", {"model": str(tmp_path / "new" / "last")})
    assert tuned.data.license == "cc-by-nc-4.0"
    assert "All weights started from `last`." in tuned.text
    assert "is cc-by-nc-4.0." in tuned.text
    assert str(tmp_path) not in tuned.content

    copy = tmp_path / "without-card"
    shutil.copytree(tmp_path / "new" / "last", copy)
    (copy / "README.md").unlink()
    unknown = train("unknown", {"model": str(copy)})
    assert unknown.data.license is None
    assert "states no licence" in unknown.text


def test_saved_processor_normalises_as_the_backbone_expects_and_fine_tuning_keeps_that(tmp_path, caplog):
    half, usual = ([0.5, 0.5, 0.5],) * 2, (IMAGENET_PREPROCESSING["image_mean"], IMAGENET_PREPROCESSING["image_std"])

    def train(name, model=TINY_DEPERCEIVER, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        caplog.clear()
        with caplog.at_level("INFO"):
            DetectionTrainer(tiny_options(tmp_path / name, model, max_steps=1, **options)).train()
        processor = AutoImageProcessor.from_pretrained(tmp_path / name / "last")
        return list(processor.image_mean), list(processor.image_std)

    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)  # timm's own weights of it expect 0.5
    pretrained = {**TINY_DEPERCEIVER, "no_pretrained_backbone": False, "pretrained_backbone": str(weights)}
    assert train("pretrained", pretrained) == half
    assert caplog.text.count("Images are normalised as the backbone's weights expect, by mean") == 1
    assert train("tuned", {"model": str(tmp_path / "pretrained" / "last")}) == half
    assert train("random") == usual
    assert "normalised" not in caplog.text
    assert train("random, tuned", {"model": str(tmp_path / "random" / "last")}) == usual


def test_state_of_other_preprocessing_is_not_resumed(tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    pretrained = {**TINY_DEPERCEIVER, "no_pretrained_backbone": False, "pretrained_backbone": str(weights)}
    DetectionTrainer(tiny_options(tmp_path / "run", pretrained, max_steps=1)).train()
    (state,) = (tmp_path / "run").glob("state-*/training_state.json")
    content = json.loads(state.read_text())
    assert content["fingerprint"].pop("image_mean") == [0.5, 0.5, 0.5]
    state.write_text(json.dumps(content))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="image_mean was None and is"):
        DetectionTrainer(tiny_options(tmp_path / "run", pretrained, max_steps=2, resume="auto"))


def test_training_resizes_as_the_processor(tmp_path):
    sample = {
        "image": tv_tensors.Image(torch.randint(256, (3, 90, 120), dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(90, 120)),
        "labels": torch.zeros(0, dtype=torch.long),
        "area": torch.zeros(0),
        "iscrowd": torch.zeros(0, dtype=torch.bool),
    }
    resized = {}
    for backbone in ("test_resnet", "test_efficientnet"):
        model = {**TINY_DEPERCEIVER, "backbone": backbone, "no_pretrained_backbone": False}
        options = tiny_options(tmp_path, model, pretrained_backbone="weights.pth", augmentation="none")
        data = TrainingData.load(options, create_accelerator(options))
        prepared = data.image_processor(sample["image"], do_rescale=False, do_normalize=False, return_tensors="pt")
        resized[backbone] = data.dataset.transforms(sample)["image"].float()
        torch.testing.assert_close(resized[backbone], prepared["pixel_values"][0], atol=1, rtol=0)
    bilinear, bicubic = resized.values()
    assert (bilinear - bicubic).abs().max() > 5


@pytest.mark.parametrize(
    ("options", "evaluated"),
    [
        ({"eval_every": 2, "epochs": 5}, [2, 4, 5]),
        ({"eval_every": 1, "max_steps": 3}, [1, 1.5]),
        ({"eval_every": 0}, []),
        ({"eval_every": 1, "eval_steps": 3, "epochs": 5}, [1.5, 3, 4.5, 5]),
    ],
)
def test_when_a_run_evaluates(tmp_path, scripted_ap, options, evaluated):
    scripted_ap(*[0.1] * 5)
    run = DetectionTrainer(tiny_options(tmp_path, max_train_samples=4, **options))
    run.train()
    assert [line["epoch"] for line in read_log(tmp_path, "eval")] == evaluated
    if evaluated:
        assert run.progress.best[0].step == 2 * evaluated[-1]
    AutoModelForObjectDetection.from_pretrained(tmp_path / "last")


def test_evaluation_is_that_of_the_saved_model_and_leaves_training_alone(tmp_path):
    runs = []
    for name, every in {"never": {}, "epochs": {"eval_every": 1}, "steps": {"eval_every": 1, "eval_steps": 3}}.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        runs.append(DetectionTrainer(tiny_options(tmp_path / name, dropout=0.1, max_train_samples=4, **every)))
        runs[-1].train()
        assert_equal_weights(weights_of(runs[0]), weights_of(runs[-1]))
    assert [line["step"] for line in read_log(tmp_path / "steps", "eval")] == [3, 4]
    lines = read_log(tmp_path / "epochs", "eval")
    assert [line["step"] for line in lines] == [2, 4]
    assert {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"} <= lines[0].keys()


SCHEDULES = {
    "step": ({"lr_drop": 2}, lambda step: 0.1 ** (step // 6)),
    "step with warm-up": ({"lr_drop": 2, "warmup_steps": 4}, lambda step: min(1, step / 4) * 0.1 ** (step // 6)),
    "default drop": ({"epochs": 100}, lambda step: 0.1 ** (step // (33 * 3))),
    "constant": ({"lr_scheduler": "constant", "warmup_steps": 2}, lambda step: min(1, step / 2)),
    "linear": ({"lr_scheduler": "linear"}, lambda step: 1 - step / 15),
    "cosine": (
        {"lr_scheduler": "cosine", "warmup_steps": 5},
        lambda step: step / 5 if step < 5 else 0.5 + 0.5 * math.cos(math.pi * (step - 5) / 10),
    ),
    "wsd": ({"lr_scheduler": "wsd", "warmup_steps": 2}, lambda step: min(1, step / 2, (15 - step) / 6)),
    "wsd with a long decay": ({"lr_scheduler": "wsd", "decay_fraction": 0.8}, lambda step: min(1, (15 - step) / 12)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_of_every_step(tmp_path, name):
    fields, factor = SCHEDULES[name]
    options = tiny_options(tmp_path, lr=0.2, lr_backbone=0.01, **{"epochs": 5, **fields})
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [
        {"name": group, "params": [parameter], "lr": rate}
        for group, parameter, rate in zip(("model", "backbone"), parameters, (0.2, 0.01), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.2)
    total = 3 * options.epochs
    scheduler = create_scheduler(optimizer, options, steps_per_epoch=3, total_steps=total)
    for step in range(total):
        rates = learning_rates(optimizer)
        assert rates == pytest.approx({"lr": 0.2 * factor(step), "lr_backbone": 0.01 * factor(step)})
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("linear", lambda used: 1 - used),
        ("cosine", lambda used: 0.5 + 0.5 * math.cos(math.pi * used)),
        ("wsd", lambda used: min(1, (1 - used) / 0.4)),
    ],
)
def test_schedule_ends_with_the_time_if_that_comes_before_the_steps(name, factor):
    optimizer = torch.optim.SGD([{"name": "model", "params": [torch.zeros(1)]}], lr=1.0)
    options = tiny_options(Path("unused"), lr_scheduler=name)
    used = 0.0
    scheduler = create_scheduler(optimizer, options, 10, 1000, lambda: used)
    for step in range(1, 11):
        used = step / 10
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == pytest.approx([factor(used)])
    used = 0.001  # the steps are further on
    for _ in range(590):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([factor(0.6)])


class Clock:
    """Stands in for the module `time`: ten seconds pass in every optimizer step."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        original = DetectionTrainer._loss

        def loss_of_ten_seconds(run, batch):
            self.now += 10
            return original(run, batch)

        monkeypatch.setattr(DetectionTrainer, "_loss", loss_of_ten_seconds)
        monkeypatch.setattr(pace, "time", self)

    def perf_counter(self) -> float:
        return self.now


def test_limited_by_time_a_run_decays_to_its_end_also_when_resumed(tmp_path, monkeypatch):
    Clock(monkeypatch)
    options = {"epochs": 1000, "max_minutes": 100 / 60, "lr_scheduler": "wsd", "lr": 1.0}
    expected = [min(1, (1 - step / 10) / 0.4) for step in range(10)]
    DetectionTrainer(tiny_options(tmp_path / "straight", **options)).train()
    train_until_killed(tmp_path / "resumed", monkeypatch, 8, checkpointing_steps=7, **options)
    DetectionTrainer(tiny_options(tmp_path / "resumed", resume="auto", **options)).train()
    for name in ("straight", "resumed"):
        assert [line["lr"] for line in read_log(tmp_path / name, "train")] == pytest.approx(expected)


def test_step_schedule_is_that_of_torch():
    optimizers = [torch.optim.SGD([{"name": "model", "params": [torch.zeros(1)]}], lr=1.0) for _ in range(2)]
    ours = create_scheduler(optimizers[0], tiny_options(Path("unused"), lr_drop=4), steps_per_epoch=1, total_steps=12)
    theirs = StepLR(optimizers[1], step_size=4)
    for _ in range(12):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr())
        for scheduler in (*optimizers, ours, theirs):
            scheduler.step()


def test_accumulated_gradient_is_the_mean_over_batches(tmp_path):
    options = {"clip_max_norm": 0, "gradient_accumulation_steps": 3, "batch_size": 1, "max_train_samples": 4}
    run = DetectionTrainer(tiny_options(tmp_path, **options, no_aux_loss=True, epochs=1))
    assert run.schedule.total_steps == 2  # three batches, and the one that is left
    batches = [run.data.collate([run.data.dataset[index]]) for index in range(3)]
    run.model.train()
    expected = [torch.zeros_like(parameter) for parameter in run.parameters]
    for batch in batches:
        run.model.zero_grad()
        run.model(**batch).loss.backward()
        for mean, parameter in zip(expected, run.parameters, strict=True):
            mean += parameter.grad / 3
    run.optimizer_step(iter(batches), 3)
    for mean, parameter in zip(expected, run.parameters, strict=True):
        torch.testing.assert_close(parameter.grad, mean)
    assert run.scheduler.last_epoch == 1


@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_gradient_is_clipped_by_norm(tmp_path, max_norm):
    run = DetectionTrainer(tiny_options(tmp_path, clip_max_norm=max_norm))
    run.model.train()
    run.optimizer_step(iter([run.data.collate([run.data.dataset[0]])]), 1)
    norm = torch.linalg.vector_norm(torch.stack([parameter.grad.norm() for parameter in run.parameters]))
    assert run.guard.grad_norm > 1
    torch.testing.assert_close(norm, torch.tensor(max_norm) if max_norm else run.guard.grad_norm, rtol=1e-4, atol=0)


def test_backbone_has_its_own_learning_rate_and_none_freezes_it(tmp_path):
    for name, rate in (("trained", 3e-4), ("frozen", 0.0)):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = DetectionTrainer(tiny_options(tmp_path / name, lr_backbone=rate, max_steps=2))
        before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
        rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
        run.train()
        changed = {
            name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])
        }
        in_backbone = {name for name in changed if "backbone" in name}
        if rate:
            assert rates == {"model": 1e-3, "backbone": 3e-4}
            assert in_backbone
        else:
            assert rates == {"model": 1e-3}
            assert not in_backbone
        assert changed - in_backbone


BROKEN_RUNS = {
    "infinite loss": ({"bbox_loss_coef": 1e39}, r"loss inf, .*loss_bbox \d\.\d+"),
    "broken predictions": ({}, r"not: logits"),
}


@pytest.mark.parametrize("name", BROKEN_RUNS)
def test_loss_that_is_not_finite_stops_with_step_and_terms(tmp_path, name):
    options, reported = BROKEN_RUNS[name]
    run = DetectionTrainer(tiny_options(tmp_path, **options, checkpointing_steps=1))
    if not options:
        stop = DetectionTrainer.optimizer_step

        def break_third_step(batches, count):
            if run.progress.step == 2:
                with torch.no_grad():
                    run.parameters[-1].fill_(torch.nan)
                    next(p for n, p in run.model.named_parameters() if "class" in n).fill_(torch.nan)
            return stop(run, batches, count)

        run.optimizer_step = break_third_step
    with pytest.raises(NonFiniteLossError, match=reported) as error:
        run.train()
    assert f"at step {1 if options else 3} (epoch 1)" in str(error.value)
    states = [path.name for path in tmp_path.glob("state-*")]
    assert states == ([] if options else ["state-00000002-0000"])


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, use_bfloat=True, max_steps=1))
    seen = set()
    for module in run.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    run.train()
    assert torch.bfloat16 in seen
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert run.accelerator.mixed_precision == "bf16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is possible")
def test_float16_is_refused_without_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="--use_bfloat"):
        DetectionTrainer(tiny_options(tmp_path, amp=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_float16_overflow_of_the_scaler_is_no_error(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, amp=True))
    run.accelerator.scaler._init_scale = 2.0**40
    run.train()
    assert run.accelerator.scaler.get_scale() < 2.0**40


def test_trackers_get_the_numbers_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = DetectionTrainer(tiny_options(tmp_path, report_to=["tensorboard"], project="shapes", max_steps=3))
    run.train()
    events = EventAccumulator(str(tmp_path / "shapes")).Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert logged == pytest.approx({line["step"]: line["loss"] for line in read_log(tmp_path, "train")})


def test_log_lines_are_means_over_their_interval(tmp_path):
    fine, coarse = (tmp_path / name for name in ("fine", "coarse"))
    DetectionTrainer(tiny_options(fine, epochs=1, log_every=1)).train()
    DetectionTrainer(tiny_options(coarse, epochs=1, log_every=4)).train()
    single = [line["loss"] for line in read_log(fine, "train")]
    means = [sum(single[start:end]) / (end - start) for start, end in pairwise((0, 4, 6))]
    assert [line["loss"] for line in read_log(coarse, "train")] == pytest.approx(means)
    assert {"loss_ce", "loss_bbox", "loss_giou", "class_error", "grad_norm", "lr", "lr_backbone"} <= (
        read_log(coarse, "train")[0].keys()
    )


def test_training_learns(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, TINY_DETR, epochs=15, augmentation="none", clip_max_norm=1.0))
    run.train()
    losses = [line["loss"] for line in read_log(tmp_path, "train")]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "/no/such/directory"], "/no/such/directory"),
        (["--batch_size", "50"], "batch"),
        (["--backbone", "no_such_net"], "no_such_net"),
        (["--hidden_dim", "18"], "d_model"),
        (["--bbox_loss_coef", "-1"], "--bbox_loss_coef"),
        (["--model", "/no/such/model"], "--hidden_dim"),
    ],
)
def test_errors_of_the_user_are_one_line(tmp_path, monkeypatch, capfd, arguments, message):
    assert run_script(monkeypatch, tiny_options(tmp_path), *arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())
