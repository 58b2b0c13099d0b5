# SPDX-License-Identifier: Apache-2.0
"""Training states: what is saved and what is not, resuming, and what a run that was killed leaves behind."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deperceiver_hf import DePerceiverForObjectDetection
from deperceiver_hf.errors import UserError
from deperceiver_hf.training import DetectionTrainer, NonFiniteLossError, trainer
from training_runs import (
    assert_equal_weights,
    kill,
    read_log,
    stop_at,
    tiny_options,
    train_until_killed,
    weights_of,
)

RESUMED_RUNS = {
    "killed": {"checkpointing_steps": 2},
    "killed with workers and accumulation": {
        "checkpointing_steps": 1,
        "num_workers": 2,
        "gradient_accumulation_steps": 2,
        "max_train_samples": 14,
        "warmup_steps": 3,
        "lr_scheduler": "cosine",
    },
    "killed in the second epoch": {"checkpointing_steps": 3, "lr_drop": 1, "group_by_aspect_ratio": True},
    "killed in bfloat16": {"checkpointing_steps": 2, "use_bfloat": True, "log_every": 5},
    "killed in the second epoch, evaluated within": {"checkpointing_steps": 3, "eval_steps": 7},
}


@pytest.mark.parametrize("name", RESUMED_RUNS)
def test_killed_and_resumed_equals_never_killed(tmp_path, monkeypatch, scripted_ap, name):
    options = {"eval_every": 1, "dropout": 0.1, **RESUMED_RUNS[name]}
    scripted_ap(0.2, 0.1)
    straight = DetectionTrainer(tiny_options(tmp_path / "straight", **options))
    expected = straight.train()

    scripted_ap(*((0.2, 0.2, 0.1) if "within" in name else (0.2, 0.1)))  # the first evaluation is done again
    train_until_killed(tmp_path / "resumed", monkeypatch, 8 if "second" in name else 3, **options)
    torch.manual_seed(99)  # nothing is left of the random state
    resumed = DetectionTrainer(tiny_options(tmp_path / "resumed", **options, resume="auto"))
    result = resumed.train()

    assert resumed.best_models.top_k > 0
    assert_equal_weights(weights_of(straight), weights_of(resumed))
    moments = [run.optimizer.state_dict()["state"] for run in (straight, resumed)]
    for left, right in zip(*(moment.values() for moment in moments), strict=True):
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert resumed.progress.best == straight.progress.best
    assert (result.step, result.epoch, result.best_ap) == (expected.step, expected.epoch, 0.2)
    for kind in ("train", "eval"):
        assert read_log(tmp_path / "resumed", kind) == read_log(tmp_path / "straight", kind)


def test_resuming_starts_in_the_middle_of_the_epoch(tmp_path, monkeypatch):
    train_until_killed(tmp_path, monkeypatch, 3, checkpointing_steps=2)
    run = DetectionTrainer(tiny_options(tmp_path, checkpointing_steps=2, resume="auto"))
    assert (run.progress.step, run.progress.epoch, run.progress.batches) == (2, 0, 2)
    run.data.sampler.set_epoch(0, skip=2)
    rest = list(run.data.sampler)
    run.data.sampler.set_epoch(0)
    assert rest == list(run.data.sampler)[2:]


def test_stopped_at_an_evaluation_it_is_made_when_resumed(tmp_path, monkeypatch, scripted_ap):
    scripted_ap(0.1, 0.2, 0.3)
    options = {"eval_every": 1, "eval_steps": 4, "save_top_k": 1}
    with monkeypatch.context() as patch:
        stop_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert DetectionTrainer(tiny_options(tmp_path, **options)).train().interrupted
    DetectionTrainer(tiny_options(tmp_path, **options, resume="auto")).train()
    assert [line["step"] for line in read_log(tmp_path, "eval")] == [4, 8, 12]
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-002-step-12"]


def test_kill_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    straight = DetectionTrainer(tiny_options(tmp_path / "straight"))
    straight.train()

    run = DetectionTrainer(tiny_options(tmp_path / "run", checkpointing_steps=2))
    save = run.accelerator.save_state

    def save_half(directory):
        if run.progress.step == 4:
            (Path(directory) / "model.safetensors").write_bytes(b"half")
            kill()
        save(directory)

    monkeypatch.setattr(run.accelerator, "save_state", save_half)
    with pytest.raises(RuntimeError, match="killed"):
        run.train()
    resumed = DetectionTrainer(tiny_options(tmp_path / "run", checkpointing_steps=2, resume="auto"))
    assert resumed.progress.step == 2
    assert not list((tmp_path / "run").glob("*.incomplete"))
    resumed.train()
    assert_equal_weights(weights_of(straight), weights_of(resumed))


@pytest.mark.parametrize("options", [{"eval_every": 1}, {"eval_every": 1, "eval_steps": 4}], ids=["epochs", "steps"])
def test_a_signal_in_an_evaluation_saves_the_state_before_it(tmp_path, monkeypatch, options):
    straight = DetectionTrainer(tiny_options(tmp_path / "straight", **options))
    straight.train()

    evaluate = trainer.evaluate_detector

    def interrupted(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate_detector", interrupted)
        result = DetectionTrainer(tiny_options(tmp_path / "run", **options)).train()
    assert result.interrupted
    assert result.exit_code == 130
    assert read_log(tmp_path / "run", "eval") == []
    resumed = DetectionTrainer(tiny_options(tmp_path / "run", **options, resume="auto"))
    assert resumed.progress.closed_step < resumed.progress.step
    resumed.train()
    assert_equal_weights(weights_of(straight), weights_of(resumed))
    assert read_log(tmp_path / "run", "eval") == read_log(tmp_path / "straight", "eval")


@pytest.mark.parametrize("broken", ["a weight", "the variance of a batch norm", "a moment of the optimizer"])
def test_what_is_not_finite_is_neither_saved_nor_evaluated(tmp_path, broken):
    run = DetectionTrainer(tiny_options(tmp_path, eval_every=1, checkpointing_steps=6))
    step = run.optimizer_step

    def break_after_the_epoch(batches, count):
        stop = step(batches, count)
        if run.progress.step == 11:  # the evaluation comes next
            if broken == "a weight":
                tensor = run.parameters[0].data
            elif broken == "a moment of the optimizer":
                tensor = next(iter(run.optimizer.state.values()))["exp_avg_sq"]
            else:
                tensor = next(buffer for name, buffer in run.model.named_buffers() if name.endswith("running_var"))
            tensor.view(-1)[0] = torch.inf
        return stop

    run.optimizer_step = break_after_the_epoch
    with pytest.raises(NonFiniteLossError, match="not finite at step 12"):
        run.train()
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00000006-0001"]
    assert len(list(tmp_path.glob("epoch-*"))) == 1


def damaged_in_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "one byte": damaged_in_a_byte,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_is_damaged_in_any_part_is_refused(tmp_path, damage):
    DetectionTrainer(tiny_options(tmp_path / "run", max_steps=1)).train()
    (state,) = (tmp_path / "run").glob("state-*")
    files = sorted(path.name for path in state.iterdir())
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "training_state.json"} <= {*files}
    for name in files:
        copied = shutil.copytree(state, tmp_path / "copies" / name / state.name)
        DAMAGES[damage](copied / name)
        with pytest.raises((UserError, FileNotFoundError), match=r"damaged|no complete training state"):
            DetectionTrainer(tiny_options(tmp_path / f"out-{name}", resume=str(copied)))


class Payload:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_no_part_of_a_state_runs_code(tmp_path):
    """Not even where whoever changed a file has made its checksum fit."""
    DetectionTrainer(tiny_options(tmp_path / "run", max_steps=1)).train()
    (state,) = (tmp_path / "run").glob("state-*")
    content = json.loads((state / "training_state.json").read_text(encoding="utf-8"))
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin"):
        copied, marker = shutil.copytree(state, tmp_path / name / state.name), tmp_path / "EXECUTED"
        torch.save(Payload(marker), copied / name)
        digest = hashlib.sha256((copied / name).read_bytes()).hexdigest()
        changed = content | {"sha256": content["sha256"] | {name: digest}}
        (copied / "training_state.json").write_text(json.dumps(changed), encoding="utf-8")
        with contextlib.suppress(UserError):
            DetectionTrainer(tiny_options(tmp_path / f"out-{name}", resume=str(copied)))
        assert not marker.exists()


def test_a_state_of_an_earlier_version_with_code_is_refused_by_name(tmp_path):
    DetectionTrainer(tiny_options(tmp_path / "run", max_steps=1)).train()
    (state,) = (tmp_path / "run").glob("state-*")
    content = json.loads((state / "training_state.json").read_text(encoding="utf-8"))
    del content["schedule"], content["sha256"]
    (state / "training_state.json").write_text(json.dumps(content), encoding="utf-8")
    (state / "custom_checkpoint_0.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="earlier version"):
        DetectionTrainer(tiny_options(tmp_path / "run", resume="auto"))


def test_best_is_a_copy_where_links_are_not_possible(tmp_path, monkeypatch, scripted_ap):
    def refuse(*arguments, **keywords):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    scripted_ap(0.1, 0.2)
    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    DetectionTrainer(tiny_options(tmp_path, eval_every=1)).train()
    assert not (tmp_path / "best").is_symlink()
    assert json.loads((tmp_path / "best" / "metrics.json").read_text(encoding="utf-8"))["ap"] == 0.2
    DePerceiverForObjectDetection.from_pretrained(tmp_path / "best")
    assert not list(tmp_path.glob("*.incomplete")) + list(tmp_path.glob("*.deleted"))


def test_without_objects_to_evaluate_there_is_no_best_model(tmp_path, scripted_ap, caplog):
    scripted_ap(-1.0, -1.0)
    with caplog.at_level(logging.INFO, logger="deperceiver_hf"):
        result = DetectionTrainer(tiny_options(tmp_path, eval_every=1)).train()
    assert result.best_ap is None
    assert not list(tmp_path.glob("epoch-*"))
    assert "-100" not in caplog.text + result.summary()
    assert "AP -" in caplog.text


def test_a_run_killed_before_its_first_state_leaves_no_lines(tmp_path, monkeypatch):
    train_until_killed(tmp_path, monkeypatch, 3)
    assert len(read_log(tmp_path, "train")) > 0
    assert not list(tmp_path.glob("state-*"))
    DetectionTrainer(tiny_options(tmp_path, resume="auto")).train()
    assert [line["step"] for line in read_log(tmp_path, "train")] == list(range(1, 13))


def test_going_back_to_an_earlier_state_deletes_the_later_one_once_there_is_a_new_one(tmp_path):
    DetectionTrainer(tiny_options(tmp_path / "run", max_steps=2)).train()
    (early,) = (tmp_path / "run").glob("state-*")
    kept = shutil.copytree(early, tmp_path / early.name)
    DetectionTrainer(tiny_options(tmp_path / "run", max_steps=4, resume="auto")).train()
    shutil.copytree(kept, tmp_path / "run" / early.name)
    run = DetectionTrainer(tiny_options(tmp_path / "run", max_steps=3, resume=str(tmp_path / "run" / early.name)))
    assert len(list((tmp_path / "run").glob("state-*"))) == 2
    run.train()
    assert [path.name for path in (tmp_path / "run").glob("state-*")] == ["state-00000003-0000"]


def test_a_finished_run_without_states_is_not_deleted_by_resume(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, max_steps=1))
    run.train()
    run.run_directory.remove_states()
    with pytest.raises(FileExistsError, match="finished run"):
        DetectionTrainer(tiny_options(tmp_path, max_steps=1, resume="auto"))
    assert (tmp_path / "last" / "model.safetensors").is_file()


def test_an_output_directory_that_cannot_be_used_is_found_before_data_are_loaded(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="file"):
        DetectionTrainer(tiny_options(tmp_path / "file" / "run", dataset=str(tmp_path / "no-data")))


@pytest.mark.heavy
def test_killed_at_any_file_operation_a_run_ends_as_if_it_had_not_been(tmp_path, request):
    """At some of them here; `--kill-everywhere` takes all."""
    points = [] if request.config.getoption("--kill-everywhere") else ["--points", "8"]
    tests = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, tests / "kill_everywhere.py", tmp_path / "work", *points]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["operations"] > 100


def test_gradient_that_is_not_finite_is_never_saved(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, checkpointing_steps=1))
    weight = run.parameters[-1]
    weight.register_hook(lambda gradient: gradient * torch.nan if run.progress.step == 1 else gradient)
    with pytest.raises(NonFiniteLossError, match="not finite at step 2: the norm of the gradient"):
        run.train()
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00000001-0000"]
