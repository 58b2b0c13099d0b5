# SPDX-License-Identifier: Apache-2.0
"""Devices by name, and the precision that each of them is fast in."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deperceiver_hf import machine
from deperceiver_hf.machine import (
    AttentionShape,
    choose_precision,
    choose_threads,
    computes_in_bfloat16,
    describe_machine,
    fastest_attention,
    find_device,
    make_accelerator,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """As without `accelerate launch`."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def hardware(monkeypatch):
    """Make the machine one that computes in bfloat16, or one that does not."""

    def pretend(in_bfloat16: bool) -> None:
        monkeypatch.setattr(machine, "computes_in_bfloat16", lambda device: in_bfloat16)
        monkeypatch.setattr(machine, "device_name", lambda device: f"the {device.type}")

    return pretend


@pytest.mark.parametrize(
    ("device", "in_bfloat16", "expected"),
    [
        (CPU, True, "bf16"),
        (CPU, False, "no"),
        (CUDA, True, "bf16"),
        (CUDA, False, "fp16"),
        (torch.device("mps"), False, "no"),
    ],
)
def test_auto_takes_what_the_hardware_computes_in(hardware, device, in_bfloat16, expected):
    hardware(in_bfloat16)
    precision = choose_precision("auto", device)
    assert (precision.name, precision.warning) == (expected, None)
    assert f"the {device.type}" in precision.reason


@pytest.mark.parametrize(("launched", "expected"), [("bf16", "bf16"), ("fp16", "fp16"), ("no", "fp16")])
def test_auto_follows_the_launcher(hardware, monkeypatch, launched, expected):
    hardware(False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert choose_precision("auto", CUDA).name == expected
    assert choose_precision("no", CUDA).name == "no"


@pytest.mark.parametrize("in_bfloat16", [True, False])
def test_what_is_asked_for_is_taken(hardware, in_bfloat16):
    hardware(in_bfloat16)
    precision = choose_precision("bf16", CPU)
    assert (precision.name, precision.dtype) == ("bf16", torch.bfloat16)
    assert (precision.warning is None) == in_bfloat16
    if not in_bfloat16:
        assert "emulated" in precision.warning
        assert "times as long" in precision.warning


@pytest.mark.parametrize(("name", "message"), [("fp16", "needs a GPU"), ("int3", "auto, no, fp16, bf16")])
def test_impossible_precisions_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        choose_precision(name, CPU)


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", pytest.param("DNNL_MAX_CPU_ISA", marks=pytest.mark.heavy)])
def test_instructions_that_are_switched_off_do_not_count(variable):
    """As on a processor that has none."""
    command = "import torch, deperceiver_hf.machine as m; print(m.choose_precision('auto', torch.device('cpu')).name)"
    environment = {name: value for name, value in os.environ.items() if "MAX_CPU_ISA" not in name}
    printed = subprocess.run(
        [sys.executable, "-c", command],
        env={**environment, variable: "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        check=True,
    )
    if os.uname().machine in ("x86_64", "amd64"):
        assert printed.stdout.strip() == "no"


def test_bfloat16_of_the_processor_is_what_its_flags_say():
    """Of the flags that Linux shows, where it shows them."""
    shown = Path("/proc/cpuinfo")
    if not shown.exists():
        pytest.skip(f"no {shown} here")
    flags = set(shown.read_text(encoding="utf-8").split())
    if computes_in_bfloat16(CPU):
        assert flags & {"avx512_bf16", "amx_bf16", "bf16"}


@pytest.mark.parametrize(
    ("name", "message"), [("cuda:99", "CUDA devices"), ("gpu", "must be auto, cpu"), ("meta:x", "auto")]
)
def test_devices_that_are_not_there_are_refused(name, message):
    for find in (find_device, make_accelerator):
        with pytest.raises(ValueError, match=message):
            find(name)


def test_devices_by_name():
    assert find_device("cpu") == CPU
    assert find_device("auto").type == make_accelerator().device.type
    assert make_accelerator("cpu").device == CPU


def test_description_names_device_threads_and_versions():
    description = describe_machine(CPU)
    assert description["threads"] == torch.get_num_threads()
    assert description["torch"] == torch.__version__.split("+")[0] or description["torch"] == torch.__version__
    assert description["device"].startswith("cpu (")


def test_the_faster_one_is_taken_and_the_first_of_equals(monkeypatch):
    def wait(seconds: float):
        return lambda: time.sleep(seconds)

    assert machine._fastest({"a": wait(0.02), "b": wait(0.001)}, 3) == "b"
    assert machine._fastest({"a": wait(0.001), "b": wait(0.02)}, 3) == "a"
    monkeypatch.setattr(machine, "CLEARLY_FASTER", 0.0)
    assert machine._fastest({"a": wait(0.02), "b": wait(0.001)}, 3) == "a"


def test_attention_is_measured_once_for_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []

    def measure(shape, dtype):
        measured.append(shape)
        return "eager"

    monkeypatch.setattr(machine, "_measure_attention", measure)
    shape = AttentionShape(batch=8, heads=4, queries=300, keys=4000, key_channels=48, value_channels=24)
    for _ in range(2):
        assert fastest_attention(shape, torch.float32, CPU) == "eager"
    assert len(measured) == 1
    assert measured[0].batch == 1  # a part of a large batch
    assert fastest_attention(shape, torch.bfloat16, CPU) == "eager"
    assert len(measured) == 2
    assert fastest_attention(shape, torch.float32, CUDA) == "sdpa"
    (tmp_path / "deperceiver_hf" / "measured.json").write_text("torn {")
    assert fastest_attention(shape, torch.float32, CPU) == "eager"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "deperceiver_hf" / "measured.json"))  # no directory
    assert fastest_attention(shape, torch.float32, CPU) == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_can_be_measured(dtype):
    assert machine._measure_attention(AttentionShape(1, 2, 4, 8, 16, 8), dtype) in ("eager", "sdpa")


def test_threads_are_chosen_unless_the_environment_says(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        assert choose_threads(CPU) == 4
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(machine, "_fastest", lambda candidates, repeats: list(candidates)[-1])
        assert choose_threads(CPU) == 1
        assert choose_threads(CUDA) == 4
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


GIB = 2**30
UNLIMITED = {"memory.max": "max", "memory.current": f"{GIB}", "memory.stat": "inactive_file 0"}


def group(limit: int, usage: int, cached: int, version: int = 2) -> dict[str, str]:
    if version == 2:
        return {
            "memory.max": f"{limit}\n",
            "memory.high": "max\n",
            "memory.current": f"{usage}\n",
            "memory.stat": f"anon 5\ninactive_file {cached}\n",
        }
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    stat = {"memory.stat": f"inactive_file 1\ntotal_inactive_file {cached}\n"}
    return {name: f"{value}\n" for name, value in zip(names, (limit, usage), strict=True)} | stat


CONTROL_GROUPS = {
    "none": ("", {}, []),
    "own group": ("0::/job\n", {"job": group(4 * GIB, 3 * GIB, GIB)}, [2 * GIB]),
    "a group above is narrower": (
        "0::/user/job\n",
        {"user/job": group(8 * GIB, GIB, 0), "user": group(4 * GIB, 2 * GIB, 0), "": UNLIMITED},
        [2 * GIB, 7 * GIB],
    ),
    "a container that sees its group as the top one": ("0::/../other\n", {"": group(3 * GIB, GIB, 0)}, [2 * GIB]),
    "version 1": (
        "5:cpu:/x\n4:memory:/docker/5b3\n0::/\n",
        {"memory": group(2 * GIB, GIB, 0, version=1), "memory/docker": {}},
        [GIB],
    ),
    "no limit": ("0::/job\n", {"job": UNLIMITED}, []),
}


@pytest.mark.parametrize("name", CONTROL_GROUPS)
def test_memory_is_that_of_the_container(tmp_path, monkeypatch, name):
    listed, groups, expected = CONTROL_GROUPS[name]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(listed)
    for path, files in groups.items():
        directory = tmp_path / "sys" / "fs" / "cgroup" / path
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (directory / file).write_text(text)
    left = machine._left_by_control_groups(tmp_path)
    assert sorted(left) == expected
    monkeypatch.setattr(machine, "_left_by_control_groups", lambda: left)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    own = machine.psutil.virtual_memory()
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: own)
    assert machine.available_memory() == min([own.available, *expected]) // 2
