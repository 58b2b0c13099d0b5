# SPDX-License-Identifier: Apache-2.0
"""docs/ecosystem.md and docs/scaling_out.md are true: their Python is run, their commands are up to the start."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForObjectDetection, HfArgumentParser, TrainingArguments

from coco_samples import write_coco
from conftest import tiny_model, tiny_v2_model
from deperceiver_hf import DePerceiverV2Config, DePerceiverV2ForObjectDetection, DePerceiverV2ImageProcessor
from deperceiver_hf import prediction as predict
from deperceiver_hf.cli import COMMANDS, _parse
from deperceiver_hf.evaluation import job as evaluate
from deperceiver_hf.training import command as train

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
COCO_NAMES = {0: "person", 1: "fire hydrant", 2: "stop sign", 3: "toothbrush"}


def blocks(language: str, heading: str) -> list[str]:
    section = re.split(r"^#+ ", TEXT, flags=re.MULTILINE)
    (chosen,) = [text for text in section if text.startswith(heading + "\n")]
    return re.findall(rf"```{language}\n(.*?)```", chosen, flags=re.DOTALL)


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """A directory with what the snippets take for granted, and in which they run."""
    monkeypatch.chdir(tmp_path)
    labels = {"num_labels": 4, "id2label": COCO_NAMES, "label2id": {name: i for i, name in COCO_NAMES.items()}}
    tiny_v2_model(**labels).save_pretrained("outputs/v2/best")
    DePerceiverV2ImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained("outputs/v2/best")
    write_coco(Path("path/to/data"))
    return tmp_path


def test_trainer_snippet(places, capsys):
    (code,) = blocks("python", "Trainer")
    names: dict = {}
    exec(code.replace('report_to="none"', 'report_to="none", use_cpu=True'), names)
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1
    assert names["trainer"].args.label_names == ["image_ids"]


def test_peft_snippet_adapts_saves_restores_and_merges(places):
    (code,) = blocks("python", "peft")
    names: dict = {}
    exec(code, names)
    before = AutoModelForObjectDetection.from_pretrained("outputs/v2/best").state_dict()
    adapted = names["adapted"].eval()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    heads = [name for name in trained if "lora_" not in name]
    assert heads
    assert all("class_labels_classifier" in name or "denoising_classes" in name for name in heads)
    layers = {name: parameter for name, parameter in trained.items() if "lora_B" in name}  # zero before the step
    assert len(layers) == 2 * 10  # blocks x linear maps
    assert [name for name, parameter in layers.items() if not parameter.any()] == []
    # All else is to the bit what it was, statistics of batch norms among it.
    after = {name.removeprefix("base_model.model."): tensor for name, tensor in adapted.state_dict().items()}
    after = {name.replace(".base_layer", ""): tensor for name, tensor in after.items()}
    untouched = before.keys() & after.keys()
    assert any("running_mean" in name for name in untouched)
    assert [name for name in untouched if not torch.equal(before[name], after[name])] == []
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        as_trained, merged = adapted(pixel_values=images), names["merged"](pixel_values=images)
        plain = AutoModelForObjectDetection.from_pretrained("outputs/merged")(pixel_values=images)
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(merged[name], as_trained[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(plain[name], merged[name])
    assert as_trained.logits.shape[-1] == 3


def test_layers_and_head_of_the_first_architecture_are_adapted_as_said():
    said = re.search(r"In the first architecture the layers are `(.*?)` and the head is `(.*?)`", TEXT)
    pattern, head = said.groups()
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=pattern, modules_to_save=[head]))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("encoder.layers.0" in name for name in trained)
    assert any("decoder.layers.0" in name for name in trained)
    assert {name.split(".")[2] for name in trained} == {"model", head}


COMMAND_LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_are_read(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(line)
    match program:
        case "accelerate":
            assert words[0] == "launch"
            arguments = launch.launch_command_parser().parse_args(words[1:])
            assert Path(arguments.config_file).is_file()
            script, options = Path(arguments.training_script), arguments.training_script_args
        case "sbatch":
            script, options = Path("scripts/train.py"), words[1:]
            assert Path(words[0]).is_file()
        case "python":
            script, options = Path(words[0]), words[1:]
    assert script.is_file()
    if script.stem in COMMANDS:
        modules = {"train": train, "evaluate": evaluate, "predict": predict}
        _parse(script.stem, modules[script.stem], options)
    else:
        given = runpy.run_path(str(script))["ExampleArguments"]
        HfArgumentParser((given, TrainingArguments)).parse_args_into_dataclasses(options)


def test_table_of_the_plan_is_what_the_script_prints(capsys):
    runpy.run_path(str(ROOT / "examples" / "scaling_plan.py"), run_name="__main__")
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + 7
    assert table in (ROOT / "docs" / "scaling_out.md").read_text(encoding="utf-8")


def test_plan_counts_the_parameters_that_the_model_has():
    plan = runpy.run_path(str(ROOT / "examples" / "scaling_plan.py"))["Model"]()
    config = DePerceiverV2Config.from_preset("base", num_labels=80)
    with torch.device("meta"):
        model = DePerceiverV2ForObjectDetection(config)
    assert plan.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.005)
    assert plan.trained == pytest.approx(sum(p.numel() for p in model.parameters() if p.requires_grad), rel=0.005)
    assert (plan.queries, plan.denoising) == (config.num_queries, config.num_denoising_queries)
