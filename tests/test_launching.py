# SPDX-License-Identifier: Apache-2.0
"""What starts several processes: the configurations of `accelerate launch` and the SLURM job in `examples/accelerate`.

Those for GPUs are read by accelerate and brought to the point where it would start processes; those for CPUs do.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch

from deperceiver_hf.machine import find_device, is_sharding_asked_for, make_accelerator
from deperceiver_hf.training.setup import create_accelerator
from deperceiver_hf.training.sharding import ModelShards
from training_runs import tiny_options

ROOT = Path(__file__).parents[1]
HANGS = 600  # seconds after which processes are taken to wait for each other, also on busy cores
CONFIGS = ROOT / "examples" / "accelerate"
TINY_RUN = [
    *("--dataset", "synthetic:image_size=64", "--architecture", "deperceiver", "--backbone", "test_resnet"),
    *("--no_pretrained_backbone", "--num_latents", "8", "--enc_blocks", "1", "--enc_layers_per_block", "1"),
    *(
        "--hidden_dim",
        "16",
        "--nheads",
        "2",
        "--num_queries",
        "5",
        "--shortest_edge",
        "64",
        "--max_train_samples",
        "8",
    ),
    *("--max_eval_samples", "2", "--num_workers", "0", "--batch_size", "1", "--mixed_precision", "no"),
]
LAUNCHED = {  # machines, processes of a machine, what else the processes are told
    "one_gpu": (1, 1, {"ACCELERATE_USE_CPU": "False"}),
    "several_gpus": (1, 8, {}),
    "several_nodes": (2, 8, {}),
    "fsdp2": (1, 8, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
    "one_cpu_process": (1, 1, {"ACCELERATE_USE_CPU": "True"}),
    "several_cpu_processes": (1, 2, {}),
}


@pytest.fixture
def dry_run(monkeypatch):
    """What `accelerate launch` would start: machines, processes of a machine, command, environment."""
    started = []

    def run(arguments):
        command = [arguments.training_script, *arguments.training_script_args]
        started.append(
            (int(arguments.nnodes.split(":")[-1]), int(arguments.nproc_per_node), command, dict(os.environ))
        )

    def popen(command, env):
        started.append((1, 1, command[1:], env))
        return SimpleNamespace(wait=lambda: None, returncode=0)

    monkeypatch.setattr("torch.distributed.run.run", run)
    monkeypatch.setattr(launch.subprocess, "Popen", popen)

    def launch_dry(*arguments: str):
        launch.launch_command(launch.launch_command_parser().parse_args([*arguments, "scripts/train.py", "--lr", "1"]))
        return started.pop()

    return launch_dry


def test_every_configuration_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == LAUNCHED.keys()


@pytest.mark.parametrize("name", LAUNCHED)
def test_configuration_starts_what_it_says(dry_run, monkeypatch, name):
    machines, processes, *_ = expected = LAUNCHED[name]
    nodes, started, command, environment = dry_run("--config_file", str(CONFIGS / f"{name}.yaml"))
    assert (nodes, started) == (machines, processes)
    assert command == ["scripts/train.py", "--lr", "1"]
    assert expected[2].items() <= environment.items()
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # the command's own option decides
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert is_sharding_asked_for() == (name == "fsdp2")
    if processes > 1:
        assert dry_run("--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "4")[1] == 4 / machines


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP", "NO_WRAP"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: false"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--gradient_checkpointing"),
    ],
)
def test_sharding_of_another_kind_is_refused(monkeypatch, variable, value, remedy):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=remedy):
        make_accelerator("cpu")


@pytest.mark.parametrize(
    ("processes", "precision", "message"), [(1, "no", "there is one; launch more"), (2, "fp16", "bf16 or no")]
)
def test_shards_that_are_not_there_are_refused(processes, precision, message):
    with pytest.raises(ValueError, match=message):
        ModelShards(torch.nn.Linear(1, 1), SimpleNamespace(num_processes=processes, mixed_precision=precision))


def test_muon_is_not_for_shards(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="give --optimizer adamw"):
        create_accelerator(tiny_options(tmp_path, optimizer="muon"))


def test_launcher_that_starts_one_of_several_processes_is_told_on(dry_run, monkeypatch, caplog):
    alone = "asked for several processes and has started one"
    for arguments, remarks in ((("--cpu", "--num_processes", "2"), 1), (("--cpu", "--num_processes", "1"), 0)):
        *_, environment = dry_run(*arguments)
        with monkeypatch.context() as patch, caplog.at_level("INFO", logger="deperceiver_hf"):
            for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE"):
                patch.delenv(name, raising=False)
            for name in environment.keys() & {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"}:
                patch.setenv(name, environment[name])
            assert find_device().type == "cpu"
            make_accelerator()
        assert "1 process on cpu." in caplog.text
        assert caplog.text.count(alone) == remarks
        caplog.clear()


def environment(**changes: str) -> dict[str, str]:
    """For processes that are launched: without a GPU, with one thread each, and with this Python's programs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **changes}


def start(name: str, *arguments: str | Path) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{name}.yaml"]
    return subprocess.Popen(
        [*launcher, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.heavy
def test_two_nodes_train_together(tmp_path):
    """Two launchers, as on two machines, of a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run = ["scripts/train.py", *TINY_RUN, "--epochs", "1", "--eval_every", "0", "--output_dir", tmp_path / "out"]
    launchers = [
        start("several_nodes", "--num_processes", "2", "--machine_rank", rank, "--main_process_port", port, *run)
        for rank in ("0", "1")
    ]
    outputs = [launcher.communicate(timeout=HANGS)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert "2 processes on cpu." in outputs[0]
    assert "processes on" not in outputs[1]  # the main process speaks for all
    assert "Trained 4 steps (1 epochs)" in outputs[0]


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "processes"), [("one_cpu_process", 1), ("several_cpu_processes", 2)])
def test_processes_on_a_cpu_train(tmp_path, name, processes):
    count = ["--num_processes", str(processes)]
    run = ["scripts/train.py", *TINY_RUN, "--epochs", "1", "--eval_every", "0", "--output_dir", tmp_path / "out"]
    launcher = start(name, *count, *run)
    output, _ = launcher.communicate(timeout=HANGS)
    assert launcher.returncode == 0, output
    assert f"{processes} process{'es' if processes > 1 else ''} on cpu." in output
    assert f"Trained {8 // processes} steps" in output
    assert len(list((tmp_path / "out").glob("state-*/random_states_*.pkl"))) == processes


@pytest.mark.heavy
def test_slurm_job_saves_its_state_when_its_time_is_up_and_goes_on(tmp_path):
    """With stand-ins for SLURM's two programs, on one node of two processes."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {
        "srun": '#!/bin/sh\nexec env SLURM_NODEID=0 "$@"\n',
        "scontrol": '#!/bin/sh\nif [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    requeued, output = tmp_path / "requeued", tmp_path / "out"
    slurm = environment(SLURM_JOB_ID="77", SLURM_JOB_NODELIST="n0", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2")
    slurm |= {"PATH": f"{programs}{os.pathsep}{slurm['PATH']}", "REQUEUED": str(requeued)}
    run = [*TINY_RUN, "--epochs", "30", "--save_every", "30", "--eval_every", "0", "--log_every", "1"]

    def submit() -> subprocess.Popen:
        command = ["bash", CONFIGS / "slurm.sbatch", *run, "--output_dir", output]
        return subprocess.Popen(
            command, cwd=ROOT, env=slurm, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
        )

    job = submit()
    deadline = time.monotonic() + HANGS
    while not (output / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=HANGS)
    assert job.returncode != 0
    assert requeued.read_text() == "requeue 77\n", said
    (state,) = output.glob("state-*")
    steps = json.loads((state / "training_state.json").read_text())["progress"]["step"]
    assert 0 < steps < 120
    job = submit()
    said, _ = job.communicate(timeout=HANGS)
    assert job.returncode == 0, said
    assert f"after {steps} steps" in said
    assert "Trained 120 steps" in said
    assert requeued.read_text() == "requeue 77\n"  # and not again
