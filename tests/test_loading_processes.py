# SPDX-License-Identifier: Apache-2.0
"""The processes that load images: however they are started, whatever is sent to them, every command ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deperceiver_hf.data.sampling import _Worker, iterating, make_loader

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")

HANGS = 600  # seconds after which a process is taken to hang, also on busy cores
START = """import multiprocessing
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    from deperceiver_hf.cli import main
    raise SystemExit(main())
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        write_many(root, split, 40)
    return root


def write_many(root: Path, split: str, count: int) -> None:
    images, annotations = [], []
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for number in range(1, count + 1):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
        box = {"bbox": [8, 8, 20, 30], "area": 600, "iscrowd": 0, "category_id": number % 2 + 1}
        annotations.append({"id": number, "image_id": number, **box})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def start(arguments: list, log: Path, method: str | None = None, **environment: str) -> subprocess.Popen:
    """A command in a process group of its own, which writes what it says to a file."""
    program = ["-m", "deperceiver_hf"]
    if method is not None:
        program = [str(log.with_suffix(".py"))]
        Path(program[0]).write_text(START.format(method=method), encoding="utf-8")
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )


def end_of(process: subprocess.Popen, log: Path, seconds: float = HANGS) -> tuple[int, str]:
    """Exit code and output; whatever is left of the group is ended."""
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still alive after {seconds} s: {log.read_text(encoding='utf-8')[-2000:]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return code, log.read_text(encoding="utf-8")


def wait_for(log: Path, text: str, process: subprocess.Popen, seconds: float = HANGS) -> None:
    deadline = time.monotonic() + seconds
    while text not in log.read_text(encoding="utf-8"):
        assert process.poll() is None, log.read_text(encoding="utf-8")[-2000:]
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-2000:]
        time.sleep(0.02)


def members(group: int) -> list[int]:
    """Living processes of a group."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, encoding="utf-8", check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, pgid, state in rows if int(pgid) == group and not state.startswith("Z")]


def training(data: Path, model: Path, output: Path, *options: object) -> list:
    command = ["train", "--model", model, "--dataset", data, "--output_dir", output, "--batch_size", 4, "--lr", "1e-4"]
    return [*command, "--num_workers", 2, "--augmentation", "none", "--log_every", 1, "--pictures", 0, *options]


def evaluation(data: Path, model: Path, output: Path, *options: object) -> list:
    return ["evaluate", "--model", model, "--dataset", data, "--output", output, "--num_workers", 2, *options]


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.heavy)])
def test_processes_may_be_started_in_any_way(data, cat_and_dog, tmp_path, method):
    log = tmp_path / "log"
    # Of one process, which takes seconds to import what it needs, for the training and one for the evaluation.
    options = ("--max_steps", 2, "--epochs", 1, "--num_workers", 1)
    process = start(training(data, cat_and_dog, tmp_path / "run", *options), log, method)
    code, said = end_of(process, log)
    assert code == 0, said
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"kind": "eval"' in lines


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        (signal.SIGTERM, True),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.heavy),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.heavy),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.heavy),
    ],
)
def test_a_signal_in_training_saves_the_state(data, cat_and_dog, tmp_path, number, whole_group):
    log = tmp_path / "log"
    process = start(training(data, cat_and_dog, tmp_path / "run", "--epochs", 500, "--eval_every", 0), log)
    wait_for(log, "loss=", process)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    code, said = end_of(process, log)
    assert code == 130, said
    assert "Traceback" not in said
    assert "--resume auto" in said.splitlines()[-1]
    assert list((tmp_path / "run").glob("state-*/training_state.json"))
    assert members(process.pid) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.heavy)])
def test_a_signal_to_the_group_in_the_evaluation_of_a_run_saves_the_state(data, cat_and_dog, tmp_path, number):
    log = tmp_path / "log"
    options = ("--epochs", 1, "--max_steps", 1, "--eval_every", 1)
    slow = tmp_path / "slow"
    slow.mkdir()
    # Every image of an evaluation takes a while.
    (slow / "sitecustomize.py").write_text(
        "import time, sys\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'deperceiver_hf.training.command':\n"
        "            from deperceiver_hf.evaluation import evaluator\n"
        "            get = evaluator._ProcessedImages.__getitem__\n"
        "            evaluator._ProcessedImages.__getitem__ = lambda s, i: (time.sleep(0.3), get(s, i))[1]\n"
        "sys.meta_path.insert(0, Slow())\n",
        encoding="utf-8",
    )
    path = os.pathsep.join([str(slow), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = start(training(data, cat_and_dog, tmp_path / "run", *options), log, PYTHONPATH=path)
    wait_for(log, "Evaluating", process)
    os.killpg(process.pid, number)
    code, said = end_of(process, log)
    assert code == 130, said
    assert "Traceback" not in said
    state = json.loads(next((tmp_path / "run").glob("state-*/training_state.json")).read_text(encoding="utf-8"))
    assert state["progress"]["closed_step"] == 0  # the evaluation is still to come
    assert members(process.pid) == []


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_ends_an_evaluation(data, cat_and_dog, tmp_path, number):
    log = tmp_path / "log"
    process = start(evaluation(data, cat_and_dog, tmp_path / "e.json"), log)
    wait_for(log, "Evaluating", process)
    os.killpg(process.pid, number)
    code, said = end_of(process, log)
    assert code in (130, 0), said  # done, if it was quick
    assert "Traceback" not in said
    assert members(process.pid) == []


@pytest.mark.parametrize("command", ["train", pytest.param("evaluate", marks=pytest.mark.heavy)])
def test_a_killed_process_that_loads_ends_the_command_in_a_line(data, cat_and_dog, tmp_path, command):
    log = tmp_path / "log"
    if command == "train":
        process = start(training(data, cat_and_dog, tmp_path / "run", "--epochs", 500, "--eval_every", 0), log)
        wait_for(log, "loss=", process)
    else:
        process = start(evaluation(data, cat_and_dog, tmp_path / "e.json"), log)
        wait_for(log, "Evaluating", process)
    workers = [pid for pid in members(process.pid) if pid != process.pid]
    for pid in workers[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    code, said = end_of(process, log)
    assert "Traceback" not in said
    if command == "train":
        assert code == 1, said
        assert "--num_workers" in said.splitlines()[-1]
    assert members(process.pid) == []


@pytest.mark.heavy
def test_processes_that_load_end_with_a_killed_command(data, cat_and_dog, tmp_path):
    log = tmp_path / "log"
    process = start(training(data, cat_and_dog, tmp_path / "run", "--epochs", 500, "--eval_every", 0), log)
    wait_for(log, "loss=", process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + HANGS  # torch looks for its parent every 5 seconds
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert members(process.pid) == []


class _HitBeforeItIgnores(_Worker):
    """A process that gets a SIGTERM in its first moments."""

    def __call__(self, worker_id: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        super().__call__(worker_id)


def test_a_signal_to_a_process_that_has_just_started_is_ignored():
    loader = make_loader([1, 2, 3, 4], [[0, 1], [2, 3]], list, num_workers=1)
    loader.worker_init_fn = _HitBeforeItIgnores()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with iterating(loader) as batches:
        assert list(batches) == [[1, 2], [3, 4]]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
