# SPDX-License-Identifier: Apache-2.0
"""The training runs of a comparison, one after another, each in a directory of its own.

    output_dir/
        comparison.json                    what all runs have in common
        runs/search/NAME/lr-0.0003/        a trial of a learning rate
        runs/BUDGET/NAME/seed-0/           a run; BUDGET is minutes-M or steps-N
            run.json                       its settings, and on what it ran
            failure.json                   why it failed, if it did
            ...                            what training writes, without training states once it is finished
        report.md, report.json, comparison.png

Several processes may work in one output directory; a run is done by one of them, for which others wait.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import gc
import json
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..benchmarks.report import require_matplotlib
from ..errors import UserError, explain
from ..machine import describe_machine
from ..output_files import require_writable_directory, write_json
from ..saved_models import load_detector
from ..training import DetectionTrainer, NonFiniteLossError, TrainingOptions, build_model
from ..training.run_directory import RunDirectory
from .arguments import DECIDED_HERE, ComparisonOptions, ModelSpec
from .plot import draw_curves
from .report import ComparisonReport, make_report
from .results import FAILURE_FILE, RUN_FILE, read_run

logger = get_logger(__name__)

COMPARISON_FILE = "comparison.json"
HARMLESS = {name for name, facts in TrainingOptions.facts().items() if facts.harmless}


def run_comparison(options: ComparisonOptions) -> ComparisonReport:
    """Do the runs that are not finished yet, and write the report on all that are in the output directory.

    A run that fails is reported and does not keep the others from being done; repeating the comparison tries it again.

    Raises:
        ValueError: The output directory has runs with other settings, a saved model to start from is damaged, or there
            are several processes.
        OSError: The output directory cannot be written to.
        ImportError: matplotlib is missing.
        KeyboardInterrupt: SIGINT or SIGTERM; the state of the run under way is saved.
    """
    require_matplotlib()
    if PartialState().num_processes > 1:
        raise UserError("a comparison trains with a single process; start it plainly with `python`.")
    require_writable_directory(options.output_dir)
    for source in sorted({model.options["model"] for model in options.models if "model" in model.options}):
        load_detector(source)  # a damaged one is found before hours of training the others
    search_seed = _claim(options)
    for model in options.models:
        _check_existing_runs(options, model)

    rates = {model.name: options.fixed_lr(model) or _search(options, model, search_seed) for model in options.models}
    for budget, (minutes, steps) in options.budgets.items():
        for seed in options.seeds:
            for model in options.models:
                if (lr := rates[model.name]) is not None:
                    directory = _run_directory(options, budget, model, f"seed-{seed}")
                    run_options = options.training_options(model, directory, lr, seed, minutes, steps)
                    _do_run(model, run_options, options.command)

    report = make_report(options)
    draw_curves(report, options.output_dir / "comparison.png")
    report.write(options.output_dir)
    return report


def _claim(options: ComparisonOptions) -> int:
    """Record what the runs in the output directory have in common, and return the seed of the search."""
    shared = {
        name: options.shared.get(name, default)
        for name, default in TrainingOptions.defaults().items()
        if name not in HARMLESS and name not in DECIDED_HERE
    }
    common = {
        "options": shared,
        **{name: getattr(options, name) for name in ("lrs", "search_minutes", "search_steps")},
    }
    common = json.loads(json.dumps(common))
    path = options.output_dir / COMPARISON_FILE
    begun = (file.parent for file in options.output_dir.glob(f"runs/*/*/*/{RUN_FILE}"))
    if path.exists() and not all(_has_failed(directory) for directory in begun):
        old = json.loads(path.read_text(encoding="utf-8"))
        seed = old.pop("search_seed")
        # Earlier versions wrote the defaults of options that a comparison decides, too.
        old_options = {name: value for name, value in old.pop("options").items() if name not in DECIDED_HERE}
        new_options = common.pop("options")
        _require_same(options.output_dir, {**old, **old_options}, {**common, **new_options})
        return seed
    write_json(path, {**common, "search_seed": options.seeds[0]})
    return options.seeds[0]


def _check_existing_runs(options: ComparisonOptions, model: ModelSpec) -> None:
    """Refuse changed settings before anything is trained; a rate that is yet to be found is checked later."""
    lr = options.fixed_lr(model)
    unknown = set() if lr else {"lr", "lr_backbone"}
    for budget, (minutes, steps) in options.budgets.items():
        for seed in options.seeds:
            directory = _run_directory(options, budget, model, f"seed-{seed}")
            run_options = options.training_options(model, directory, lr or options.lrs[0], seed, minutes, steps)
            _require_same_run(directory, run_options, unknown)


def _search(options: ComparisonOptions, model: ModelSpec, seed: int) -> float | None:
    """The best of the learning rates; `None` if training failed with each."""
    best = None
    for lr in options.lrs:
        directory = _run_directory(options, "search", model, f"lr-{lr:g}")
        run_options = options.training_options(
            model, directory, lr, seed, options.search_minutes, options.search_steps
        )
        _do_run(model, run_options, options.command, failure_is_a_result=True)
        run = read_run(directory)
        if run.failure is None and (best is None or run.rank < best.rank):
            best = run
    return None if best is None else best.lr


def _do_run(model: ModelSpec, options: TrainingOptions, command: str, failure_is_a_result: bool = False) -> None:
    """Begin or go on with a run, if it is not finished.

    Args:
        command: The command line, for the report.
        failure_is_a_result: Do not repeat a run whose loss was not finite.
    """
    directory = Path(options.directory)
    training, failure = RunDirectory(directory), directory / FAILURE_FILE
    with _locked(directory):
        if training.is_finished:
            _require_same_run(directory, options)
            training.remove_states()
            return
        if _has_failed(directory):
            old = json.loads(failure.read_text(encoding="utf-8"))
            if failure_is_a_result and old["diverged"] and old["settings"] == _settings(options):
                return
            failure.unlink()
            (directory / RUN_FILE).unlink()
        _require_same_run(directory, options)
        resumed = "auto" if training.states() else None
        options = dataclasses.replace(options, resume=resumed, overwrite_output_dir=resumed is None)
        logger.info(f"{directory}: {'resumed' if resumed else 'started'}")
        try:
            interrupted = _train(model, options, command)
        except Exception as error:  # out of memory, CUDA, data: the other models may do better
            logger.error(f"{directory} failed: {explain(error).message}")
            logger.debug("where it failed", exc_info=error)
            _describe(directory, model, options, command)
            diverged = isinstance(error, NonFiniteLossError)
            reason = explain(error).message
            write_json(failure, {"error": reason, "diverged": diverged, "settings": _settings(options)})
            training.remove_states()
            return
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if interrupted:
            raise KeyboardInterrupt
        training.remove_states()


def _train(model: ModelSpec, options: TrainingOptions, command: str) -> bool:
    """Train; returns whether that was interrupted."""
    trainer = DetectionTrainer(options)
    try:
        data = trainer.data
        size = data.image_processor.size
        edge = size.shortest_edge or size.height or size.max_height
        width = size.width or edge
        if pad_size := getattr(data.image_processor, "pad_size", None):  # what the model sees
            edge, width = pad_size["height"], pad_size["width"]
        parameters, flops = count_model(options, data.train.label_names, (edge, width))
        _describe(
            Path(options.directory),
            model,
            options,
            command,
            parameters=parameters,
            flops=flops,
            image_size=edge,
            image_width=width,
            training_images=len(data.dataset),
            evaluation_images=len(data.require_evaluation().dataset),
            batches_per_epoch=len(data.sampler),
            device=str(trainer.accelerator.device),
        )
        return trainer.train().interrupted
    finally:
        trainer.accelerator.free_memory()


def count_model(options: TrainingOptions, label_names: list[str], image_size: tuple[int, int]) -> tuple[int, int]:
    """Parameters of a model, and the FLOPs of its matrix products and convolutions for an image of this height and
    width."""
    with torch.random.fork_rng():
        model = build_model(options, label_names, load_pretrained_backbone=False).eval().requires_grad_(False)
    # Fused attention kernels are not counted on every device; plain matrix products are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixel_values=torch.zeros(1, 3, *image_size))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def _describe(directory: Path, model: ModelSpec, options: TrainingOptions, command: str, **facts: Any) -> None:
    """Write what a run is and where it runs."""
    description = {
        "model": model.name,
        "architecture": options.architecture,
        "settings": _settings(options),
        **facts,
        "machine": describe_machine(),
        "command": command,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(directory / RUN_FILE, description)


def _settings(options: TrainingOptions) -> dict[str, Any]:
    fields = {name: value for name, value in dataclasses.asdict(options).items() if name not in HARMLESS}
    return json.loads(json.dumps(fields))


def _require_same_run(directory: Path, options: TrainingOptions, ignored: Set[str] = frozenset()) -> None:
    """Refuse to go on with a run, or to take its result, if it has other settings; a failed one may be changed."""
    path = directory / RUN_FILE
    if path.exists() and not _has_failed(directory):
        old, new = json.loads(path.read_text(encoding="utf-8"))["settings"], _settings(options)
        _require_same(directory, *({k: v for k, v in fields.items() if k not in ignored} for fields in (old, new)))


def _require_same(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    names = sorted(old.keys() | new.keys())
    if changed := [f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in names if old.get(k) != new.get(k)]:
        raise UserError(
            f"{directory} has been run with other settings: {'; '.join(changed)}. Give them again, delete it, or take "
            f"another --output_dir."
        )


def _run_directory(options: ComparisonOptions, budget: str, model: ModelSpec, run: str) -> Path:
    return options.output_dir / "runs" / budget / model.name / run


def _has_failed(directory: Path) -> bool:
    return (directory / FAILURE_FILE).exists()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes out of a run; a process that dies lets go of it."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info(f"{directory}: waiting for the process that is at it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
