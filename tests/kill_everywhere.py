"""Kills a tiny training run at file operations, resumes it, and compares what is left with the uninterrupted run.

    python tests/kill_everywhere.py WORK [--points N] [--seed S]

The run is killed (SIGKILL) just before its n-th operation on a file or directory below its output directory, for every
n, or for N of them that the seed chooses. Prints a line for each that is not as it should be, and the counts at the
end, as JSON; the exit code is 1 if any is wrong.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

from deperceiver_hf.training import DetectionTrainer
from training_runs import tiny_options

OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate")
CLOCK = ("seconds", "images_per_second")


def run(output_dir: Path, resume: str | None = None) -> None:
    """Evaluates twice and keeps the best model only, so that models are made, replaced and deleted; it has an average
    of the weights, draws pictures, and ends before its time because the AP does not improve."""
    options = tiny_options(
        output_dir,
        epochs=9,
        eval_every=1,
        save_top_k=1,
        max_train_samples=8,
        checkpointing_steps=3,
        ema_decay=0.5,
        early_stopping_patience=2,
        early_stopping_threshold=1.0,
        pictures=2,
    )
    options.resume = resume
    DetectionTrainer(options).train()


def die_at(operation: int, below: Path, counted: Path) -> None:
    """Kill this process before so many operations below a directory; their count goes to a file."""
    done = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal done
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in OPERATIONS) or str(below) not in " ".join(map(str, arguments[:2])):
            return
        done += 1
        if done == operation:
            os.kill(os.getpid(), signal.SIGKILL)
        if operation < 0:
            counted.write_text(str(done))

    sys.addaudithook(hook)


def in_child(function, *arguments) -> int:
    """Exit status of a forked process that calls a function."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            function(*arguments)
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_run(operation: int, output_dir: Path) -> None:
    die_at(operation, output_dir, output_dir.parent / "counted")
    run(output_dir)


def contents(output_dir: Path) -> dict[str, object]:
    """What a run left: every file by name, without what depends on the clock and the directory's place."""
    found: dict[str, object] = {}
    for path in sorted(output_dir.rglob("*")):
        name = path.relative_to(output_dir).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = "directory"
        elif path.suffix in (".bin", ".pkl"):
            is_optimizer = path.name == "optimizer.bin"
            found[name] = str(torch.load(path, weights_only=True)) if is_optimizer else path.stat().st_size
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = [{key: line[key] for key in line if key not in CLOCK} for line in lines]
        elif path.name == "training_state.json":
            state = json.loads(path.read_text(encoding="utf-8"))
            found[name] = {key: state["progress"][key] for key in state["progress"] if key != "seconds"}
        elif path.name not in ("summary.json", "options.yaml"):
            found[name] = path.read_bytes()
        else:
            found[name] = "file"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--points", type=int, help="How many of the operations; all by default.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    work = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    straight, interrupted = work / "straight" / "run", work / "interrupted" / "run"  # the name is in cards
    if in_child(killed_run, -1, straight) != 0:
        raise SystemExit("the uninterrupted run failed")
    expected, operations = contents(straight), int((straight.parent / "counted").read_text())
    points = list(range(1, operations + 1))
    if arguments.points is not None:
        points = sorted(random.Random(arguments.seed).sample(points, min(arguments.points, operations)))

    wrong = 0
    for point in points:
        if in_child(killed_run, point, interrupted) != -signal.SIGKILL:
            wrong += 1
            print(f"{point}: was not killed", flush=True)
        elif status := in_child(run, interrupted, "auto"):
            wrong += 1
            print(f"{point}: resuming ended with {status}", flush=True)
        else:
            found = contents(interrupted)
            if differing := sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)):
                wrong += 1
                print(f"{point}: differs in {', '.join(differing[:8])}", flush=True)
        shutil.rmtree(interrupted, ignore_errors=True)
    print(json.dumps({"operations": operations, "killed": len(points), "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
