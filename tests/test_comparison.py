# SPDX-License-Identifier: Apache-2.0
"""Comparisons of tiny models: equal terms, right numbers, and nothing done twice or mixed."""

import dataclasses
import json
import math
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from accelerate.state import PartialState

from deperceiver_hf.benchmarks.cost import count_cost
from deperceiver_hf.comparison import ModelSpec, parse_arguments, run_comparison, runs
from deperceiver_hf.comparison.plot import mean_curve
from deperceiver_hf.comparison.report import ComparisonReport, make_report
from deperceiver_hf.comparison.results import _final_loss, read_run
from deperceiver_hf.training import DetectionTrainer, build_model
from training_runs import TINY_DEPERCEIVER, TINY_DETR, read_log

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare.py"
OF_ONE_MODEL = {"architecture", "num_latents", "enc_blocks", "enc_layers_per_block", "enc_layers", "dim_feedforward"}
DEPERCEIVER = "mine=deperceiver,num_latents=8,enc_blocks=1,enc_layers_per_block=1"
INFINITE = f"infinite={DEPERCEIVER.partition('=')[2]},bbox_loss_coef=1e39"
DETR = "detr,enc_layers=1,dec_layers=3,dim_feedforward=16"
SHARED = (
    "--backbone test_resnet --no_pretrained_backbone --hidden_dim 16 --nheads 2 --num_queries 12 --shortest_edge 64 "
    "--max_train_samples 12 --max_eval_samples 3 --num_workers 0 --eval_steps 1 --log_every 1"
)
SEARCH = "--lrs 1e-3 1e-2 --search_steps 1"


def command(output_dir: Path, models: str, rest: str = "--steps 2", shared: str = SHARED) -> list[str]:
    return f"--output_dir {output_dir} --models {models} {rest} {shared}".split()


def compare(*arguments: str):
    return run_comparison(parse_arguments(command(*arguments)))


def run_script(monkeypatch, *arguments: str) -> int:
    """Exit code of `scripts/compare.py`."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command(*arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def read_json(path: Path):
    return json.loads(path.read_text())


def forbid_training(monkeypatch) -> None:
    def train(*args):
        raise AssertionError("something is trained")

    monkeypatch.setattr(runs, "_train", train)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Output directory of a comparison of two models by two seeds, with a search."""
    directory = tmp_path_factory.mktemp("finished")
    compare(directory, f"{DEPERCEIVER} {DETR}", f"--steps 2 --seeds 0 1 {SEARCH}")
    return directory


def test_report_has_the_numbers_of_the_runs(finished):
    report = read_json(finished / "report.json")
    rows = report["tables"]["steps-2"]
    assert list(rows) == ["mine", "detr"]
    for name, row in rows.items():
        directories = [finished / "runs" / "steps-2" / name / f"seed-{seed}" for seed in (0, 1)]
        summaries = [read_json(directory / "summary.json") for directory in directories]
        assert row["steps"] == 2
        assert row["seconds"] == pytest.approx(mean(summary["seconds"] for summary in summaries))
        assert row["images_per_second"] == pytest.approx(8 / sum(summary["seconds"] for summary in summaries))
        assert row["ap"] == pytest.approx(mean(summary["metrics"]["ap"] for summary in summaries))
        assert row["ap_by_seed"] == {str(seed): summaries[seed]["metrics"]["ap"] for seed in (0, 1)}
        for seed, directory in enumerate(directories):
            options = summaries[seed]["options"]
            assert (options["seed"], options["lr"], options["lr_backbone"]) == (seed, row["lr"], row["lr"])
            run = read_run(directory)
            assert [(point.step, point.ap) for point in run.curve] == [
                (line["step"], line["ap"]) for line in read_log(directory, "eval")
            ]
            assert 0 < run.curve[0].seconds < run.curve[1].seconds == pytest.approx(run.seconds, abs=1e-3)
            left = {path.name for path in directory.iterdir()} - {".lock"}
            assert left == {"last", "metrics.jsonl", "options.yaml", "run.json", "summary.json"}
    assert rows["mine"]["parameters"] != rows["detr"]["parameters"]
    assert min(row["flops"] for row in rows.values()) > 1e6
    assert report["failures"] == []


def test_the_rate_of_the_best_trial_is_taken(finished):
    rows = read_json(finished / "report.json")["tables"]["steps-2"]
    for name, row in rows.items():
        trials = [read_run(finished / "runs" / "search" / name / f"lr-{lr}") for lr in ("0.001", "0.01")]
        assert [(trial.lr, trial.seed, trial.step) for trial in trials] == [(1e-3, 0, 1), (1e-2, 0, 1)]
        assert row["lr"] == max(trials, key=lambda trial: (trial.metrics["ap"], -trial.final_loss)).lr


def test_report_says_what_was_done_in_words_and_pictures(finished):
    text = (finished / "report.md").read_text()
    rows = read_json(finished / "report.json")["tables"]["steps-2"]
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith(("| mine", "| detr"))]
    table = {line[0].removeprefix("| "): line for line in lines[:2]}
    assert {name: line[7] for name, line in table.items()} == {n: f"{100 * r['ap']:.1f}" for n, r in rows.items()}
    for fact in (
        "Equal steps: 2",
        "Search",
        "--seeds 0 1",
        "synthetic, 12 images",
        "seeds (0, 1)",
        "torch",
    ):
        assert fact in text
    assert (finished / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_report_warns_of_rates_at_the_end_of_those_tried(finished):
    report = make_report(parse_arguments(command(finished, f"{DEPERCEIVER} {DETR}", f"--steps 2 {SEARCH}")))
    assert "lowest or highest that was tried for mine, detr: try more." in report.markdown()
    trial = next(run for run in report.runs if run.budget == "search" and run.model == "mine")
    better, worse = (trial.metrics | {"ap": ap} for ap in (1.0, -1.0))
    tried = {1e-3: worse, 3e-3: better, 1e-2: worse}
    trials = [dataclasses.replace(trial, lr=lr, metrics=metrics) for lr, metrics in tried.items()]
    assert "try more" not in ComparisonReport(["mine"], trials).markdown()


def test_report_names_the_commands_and_machines_of_its_runs(finished):
    options = parse_arguments(command(finished, f"{DEPERCEIVER} {DETR}", f"--steps 2 --seeds 1 {SEARCH}"))
    report = make_report(options)
    (done_by,) = report.commands  # by an earlier command: this one has nothing left to do
    assert "--seeds 0 1" in done_by
    assert f"    {done_by}\n" in report.markdown()
    assert "did not have the same machine" not in report.markdown()

    def timed(run, command, threads):
        facts = run.facts | {"command": command, "machine": run.facts["machine"] | {"threads": threads}}
        return dataclasses.replace(run, budget="minutes-1", facts=facts)

    run = report.runs_of("steps-2")[0]
    two = ComparisonReport(report.models, [timed(run, "first", 1), timed(run, "second", 2)])
    assert two.commands == ["first", "second"]
    assert [machine["threads"] for machine in two.machines("minutes-1")] == [1, 2]
    assert "did not have the same machine" in two.markdown()


def test_finished_runs_are_not_done_again(finished, monkeypatch):
    before = read_json(finished / "report.json")
    forbid_training(monkeypatch)
    assert run_script(monkeypatch, finished, f"{DEPERCEIVER} {DETR}", f"--steps 2 --seeds 0 1 {SEARCH}") == 0
    after = read_json(finished / "report.json")
    assert (after["tables"], after["runs"]) == (before["tables"], before["runs"])
    # A call for other seeds or fewer models takes the rates that have been found, and reports on all.
    compare(finished, DETR, f"--steps 2 --seeds 1 {SEARCH}")
    assert set(read_json(finished / "report.json")["tables"]["steps-2"]) == {"detr", "mine"}


@pytest.mark.parametrize(
    ("models", "rest", "message"),
    [
        (DETR.replace("16", "32"), SEARCH, "dim_feedforward was 16 and is 32"),
        (DETR, f"{SEARCH} --weight_decay 0.5", r"weight_decay was 0.0001 and is 0.5"),
        (DETR, "--lrs 1e-3 1e-1 --search_steps 1", r"lrs was \[0.001, 0.01\] and is \[0.001, 0.1\]"),
        (DETR, "--lrs 1e-3", r"lrs was"),
        (f"{DETR},lr=0.5", SEARCH, "lr was .* and is 0.5"),
    ],
)
def test_changed_settings_are_refused(finished, monkeypatch, models, rest, message):
    forbid_training(monkeypatch)
    with pytest.raises(ValueError, match=message):
        compare(finished, models, f"--steps 2 --seeds 1 {rest}")


def test_failed_runs_are_reported_and_tried_again(tmp_path, monkeypatch, capsys):
    broken = f"{INFINITE} impossible={DEPERCEIVER.partition('=')[2]},hidden_dim=18"
    assert run_script(monkeypatch, tmp_path, f"{broken} {DETR}", "--steps 1 --lrs 1e-3") == 1
    report = read_json(tmp_path / "report.json")
    assert list(report["tables"]["steps-1"]) == ["detr"]
    assert {failure["run"]: failure["error"] for failure in report["failures"]}.keys() == {
        "infinite, steps-1, seed 0",
        "impossible, steps-1, seed 0",
    }
    text = capsys.readouterr().out
    assert "loss is not finite at step 1" in text
    assert "d_model" in text
    # What failed may be changed.
    mended = f"impossible={DEPERCEIVER.partition('=')[2]},hidden_dim=16"
    assert compare(tmp_path, mended, "--steps 1 --lrs 1e-3").rows("steps-1").keys() == {"detr", "impossible"}


def test_a_model_for_which_no_rate_works_has_failed(tmp_path, monkeypatch):
    failures = compare(tmp_path, INFINITE, f"--steps 1 {SEARCH}").failures
    assert [(run.budget, run.lr) for run in failures] == [("search", 1e-3), ("search", 1e-2)]
    forbid_training(monkeypatch)  # that a rate is too high has been found
    assert len(compare(tmp_path, INFINITE, f"--steps 1 {SEARCH}").failures) == 2


def test_interrupted_the_same_command_goes_on(tmp_path, monkeypatch):
    arguments = (tmp_path, DETR, "--steps 4 --lrs 1e-3")
    with monkeypatch.context() as patch:
        original = DetectionTrainer.optimizer_step

        def step_and_interrupt(run, batches, count):
            if run.progress.step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return original(run, batches, count)

        patch.setattr(DetectionTrainer, "optimizer_step", step_and_interrupt)
        assert run_script(patch, *arguments) == 130
    directory = tmp_path / "runs" / "steps-4" / "detr" / "seed-0"
    assert [path.name for path in directory.glob("state-*")] == ["state-00000002-0000"]
    assert not (tmp_path / "report.md").exists()
    with pytest.raises(ValueError, match="dec_layers was 3 and is 2"):
        compare(tmp_path, DETR.replace("dec_layers=3", "dec_layers=2"), "--steps 4 --lrs 1e-3")
    assert run_script(monkeypatch, *arguments) == 0
    assert [line["step"] for line in read_log(directory, "train")] == [1, 2, 3, 4]


def test_equal_time_ends_every_run_with_a_decayed_rate(tmp_path):
    report = compare(tmp_path, f"{DEPERCEIVER} {DETR}", "--minutes 0.01 --lrs 1e-3", f"{SHARED} --eval_steps 1000")
    for run in report.runs_of("minutes-0.01"):
        assert 0.6 <= run.seconds < 0.6 + 10
        rates = [line["lr"] for line in read_log(tmp_path / "runs" / "minutes-0.01" / run.model / "seed-0", "train")]
        assert rates[0] == 1e-3
        assert len(rates) < 4 or rates[-1] < rates[0]


def test_models_share_what_is_given_once_and_the_rest_is_decided():
    shared = SHARED.replace("--no_pretrained_backbone", "--augmentation flip")
    options = parse_arguments(
        command(
            Path("out"),
            "detr,hidden_dim=32 scratch=deperceiver,no_pretrained_backbone=true,lr=0.5 frozen=detr,lr_backbone=0",
            "--minutes 3 --steps 7 --lrs 1e-3 1e-2 --search_minutes 1",
            shared,
        )
    )
    assert options.budgets == {"minutes-3": (3, None), "steps-7": (None, 7)}
    made = [options.training_options(model, Path("out"), 1e-2, 5, minutes=3) for model in options.models]
    assert [(run.lr, run.lr_backbone) for run in made] == [(1e-2, 1e-3), (0.5, 0.5), (1e-2, 0)]
    assert [run.hidden_dim for run in made] == [32, 16, 16]
    assert {(run.augmentation, run.lr_scheduler, run.max_minutes, run.seed) for run in made} == {("flip", "wsd", 3, 5)}
    assert [options.fixed_lr(model) for model in options.models] == [None, 0.5, None]


def test_fields_of_the_configuration_come_after_shared_ones():
    shared = f"{SHARED} --config dropout=0.2"
    options = parse_arguments(command(Path("out"), "detr,config.init_std=0.5,config.dropout=0.1", "--steps 1", shared))
    made = options.training_options(options.models[0], Path("out"), 1e-3, 0, steps=1)
    assert made.config == ["dropout=0.2", "init_std=0.5", "dropout=0.1"]


def test_models_with_a_backbone_of_their_own_stand_beside_others(tmp_path):
    """Also what is counted of them, and what is read back for the report."""
    models = "deimv2,dec_layers=2 lwdetr=lw_detr,backbone=test_vit rfdetr=rf_detr,backbone=test_vit"
    of_one_size = f"{SHARED} --longest_edge 64 --augmentation flip --dataset synthetic:image_size=64"
    report = compare(tmp_path, models, "--steps 1", of_one_size)
    rows = report.to_dict()["tables"]["steps-1"]
    assert list(rows) == ["deimv2", "lwdetr", "rfdetr"]
    assert report.to_dict()["failures"] == []
    assert all(row["flops"] > 1e6 and row["parameters"] > 1e5 and 0 <= row["ap"] <= 1 for row in rows.values())


def test_a_saved_model_of_any_architecture_can_be_compared():
    options = parse_arguments(command(Path("out"), "detr,model=there", "--steps 1", "--dataset synthetic"))
    made = options.training_options(options.models[0], Path("out"), 1e-3, 0, steps=1)
    assert (made.architecture, made.model) == ("detr", "there")


@pytest.mark.parametrize(
    ("models", "rest", "message"),
    [
        ("no_such_net", "--steps 1", "no_such_net"),
        ("detr,layers=3", "--steps 1", "no model option layers"),
        ("detr,batch_size=3", "--steps 1", "give --batch_size once"),
        ("detr,dec_layers=many", "--steps 1", "dec_layers"),
        ("a/b=detr", "--steps 1", "'a/b' cannot be a name"),
        ("detr detr,enc_layers=2", "--steps 1", "--models has detr twice; write NAME=ARCHITECTURE"),
        ("detr", "--steps 1 --seeds 3 3", "--seeds has 3 twice"),
        ("mine=detr deperceiver", "--steps 1 --num_latents 5", "model mine: --num_latents"),
        ("detr", "", "--minutes, --steps or both"),
        ("detr", "--steps 0", "--max_steps must be at least 1"),
        ("detr", "--minutes -1", "--max_minutes must be more than 0"),
        ("detr", "--steps 1 --lrs 1e-3 1e-4", "--search_minutes or --search_steps"),
        ("detr", "--steps 1 --search_steps 3", "several --lrs"),
        ("detr", "--steps 1 --lr 3", "give --lrs"),
        ("detr", "--steps 1 --epochs 3", "give --steps or --minutes"),
        ("detr", "--steps 1 --batch_sizes 3", "unknown: --batch_sizes 3"),
        ("detr", "--steps 1 --augmentation most", "augmentation"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused_in_one_line(capsys, models, rest, message):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(command(Path("out"), models, rest))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_commas_within_a_value_belong_to_it():
    spec = ModelSpec.parse("detr,pretrained_backbone=a,b.safetensors,num_queries=3")
    assert spec.options == {"architecture": "detr", "pretrained_backbone": "a,b.safetensors", "num_queries": 3}


def test_a_run_belongs_to_one_process(tmp_path):
    PartialState()  # for the logger
    entered = threading.Event()

    def enter():
        with runs._locked(tmp_path / "run"):
            entered.set()

    other = threading.Thread(target=enter)
    with runs._locked(tmp_path / "run"):
        other.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    other.join()


def test_flops_are_those_of_the_benchmark():
    options = parse_arguments(command(Path("out"), DEPERCEIVER))
    run = options.training_options(options.models[0], Path("out"), 1e-3, 0, steps=1)
    names = ["disc", "square"]

    parameters, flops = runs.count_model(run, names, (64, 64))
    model = build_model(run, names)
    cost = count_cost(lambda: type(model)._from_config(model.config, attn_implementation="eager"), 64, 64)
    assert (parameters, flops) == (cost.parameters, cost.flops)


def test_final_loss_is_the_mean_of_the_last_steps():
    lines = [{"step": step, "loss": loss} for step, loss in ((5, 9.0), (8, 7.0), (9, 4.0), (11, 1.0))]
    assert _final_loss(lines) == pytest.approx((4 + 2 * 1) / 3)
    assert _final_loss([*lines, {"step": 12, "loss": None}]) == math.inf
    assert _final_loss([]) == math.inf


def test_mean_curve():
    steps = [(np.array([1.0, 2.0]), np.array([0.0, 4.0])), (np.array([3.0, 4.0]), np.array([2.0, 6.0]))]
    assert [list(axis) for axis in mean_curve(steps)] == [[2, 3], [1, 5]]
    times = [(np.array([0.0, 4.0]), np.array([0.0, 4.0])), (np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))]
    seconds, values = mean_curve(times)
    assert (seconds[0], seconds[-1]) == (1, 3)
    assert np.allclose(values, (seconds + 2) / 2)


def test_the_tiny_models_are_those_of_other_tests():
    """What is written in `SHARED` and in the specs above adds up to the sizes that other tests train."""
    options = parse_arguments(command(Path("out"), f"{DEPERCEIVER} {DETR}"))
    for model, tiny in zip(options.models, (TINY_DEPERCEIVER, TINY_DETR), strict=True):
        made = dataclasses.asdict(options.training_options(model, Path("out"), 1e-3, 0, steps=1))
        assert {name: made[name] for name in tiny} == tiny
