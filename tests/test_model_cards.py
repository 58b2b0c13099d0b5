# SPDX-License-Identifier: Apache-2.0
"""The committed cards are what the template makes; figures that nobody measured are in none of them."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from deperceiver_hf.benchmarks.variants import deperceiver_v2_variant, deperceiver_variant
from deperceiver_hf.model_cards import CARDS, MEASURED_FILE, make_model_card, read_evaluation, write_model_cards
from deperceiver_hf.model_cards.deperceiver import PAPER_RESULTS
from deperceiver_hf.training import ARCHITECTURES, parse_arguments
from deperceiver_hf.training.recipes import with_recipe

ROOT = Path(__file__).parents[1]
DIRECTORY = ROOT / "model_cards"
EVALUATION = {
    "metrics": {
        **{"ap": 0.12345, "ap50": 0.25, "ap75": 0.1, "ap_small": -1, "ap_medium": 0.05, "ap_large": 0.2, "ar100": 0.3}
    },
    "per_class": {"person": 0.1},
    "model": "/home/someone/run/best",
    "dataset": "/home/someone/coco",
    "split": "val",
    "num_images": 5000,
    "date": "2031-02-03",
}


def few_cards(monkeypatch, *keys: str) -> None:
    """Write these cards only, to save time."""
    monkeypatch.setattr("deperceiver_hf.model_cards.writing.CARDS", {key: CARDS[key] for key in keys})


def write_evaluation(path: Path, **changes) -> Path:
    path.write_text(json.dumps({**EVALUATION, **changes}))
    return path


def test_committed_cards_are_up_to_date(tmp_path):
    """They are made again from what was measured for them."""
    if (DIRECTORY / MEASURED_FILE).exists():
        shutil.copy(DIRECTORY / MEASURED_FILE, tmp_path)
    write_model_cards(tmp_path)
    names = sorted(file.name for file in tmp_path.glob("*.md"))
    assert names == sorted(file.name for file in DIRECTORY.glob("*.md"))
    assert len(names) == len(CARDS)
    for name in names:
        assert (DIRECTORY / name).read_text() == (tmp_path / name).read_text(), "run `deperceiver cards`"


def test_cards_have_metadata_and_no_unmeasured_figure():
    measured = json.loads((DIRECTORY / MEASURED_FILE).read_text()) if (DIRECTORY / MEASURED_FILE).exists() else {}
    for key, card in CARDS.items():
        text = (DIRECTORY / f"{card.name}.md").read_text()
        data = ModelCard(text).data
        assert (data.license, data.library_name, data.pipeline_tag) == (
            "apache-2.0",
            "transformers",
            "object-detection",
        )
        if key not in measured:
            assert data.eval_results is None
            assert "Measured" not in text
            # The rows of the paper are the only accuracies, and those are of the first architecture.
            results = text.split("## Results")[1].split("## Limits")[0]
            rows = [row for row in results.splitlines() if re.match(r"\| .*\d\.\d", row)]
            expected = [] if key.startswith("v2") else list(PAPER_RESULTS)
            assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == expected
        assert not re.search(r"TBD|TODO|None|\{[{%]|\n\n\n", text)
        assert all(len(line) < 200 for line in text.splitlines())


@pytest.mark.parametrize("key", CARDS)
def test_training_command_makes_the_configuration_of_the_card(key):
    text = (DIRECTORY / f"{CARDS[key].name}.md").read_text()
    command = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ").split()
    arguments = with_recipe(command[command.index("scripts/train.py") + 1 :])
    if "--recipe" in arguments:  # which is expanded now
        at = arguments.index("--recipe")
        del arguments[at : at + 2]
    options = parse_arguments(arguments)
    make_config = ARCHITECTURES[options.architecture].make_config
    trained, expected = make_config(options, [f"class {index}" for index in range(91)]), CARDS[key].config()
    for config in (trained, expected):
        config.id2label = config.label2id = {}
    assert type(trained) is type(expected)
    assert trained.to_dict() == expected.to_dict()
    assert (options.epochs, options.lr, options.lr_backbone) == (50, 1e-4, 1e-5)
    if options.architecture == "deperceiver":
        assert options.lr_drop == 33


@pytest.mark.parametrize("key", ["stride16", "v2-nano"])
def test_measured_figures_appear_once_measured(tmp_path, monkeypatch, key):
    report = write_evaluation(tmp_path / "report.json")
    few_cards(monkeypatch, key, "stride32")
    write_model_cards(tmp_path, {key: report})
    text = (tmp_path / f"{CARDS[key].name}.md").read_text()
    assert "Measured on coco (val, 5000 images, 2031-02-03)" in text
    assert "| AP | AP50 | AP75 | AP medium | AP large |" in text  # nothing small was there to be found
    assert "| 12.3 | 25.0 | 10.0 | 5.0 | 20.0 |" in text
    assert "/home" not in text
    assert "No weights trained by it" not in text
    assert "Nothing has been measured" not in text
    results = {result.metric_name: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results == {"AP": 12.35, "AP50": 25.0, "AP75": 10.0, "AP medium": 5.0, "AP large": 20.0}
    assert "Measured" not in (tmp_path / "deperceiver-r50-32.md").read_text()


def test_cards_remember_and_replace_what_was_measured(tmp_path, monkeypatch):
    few_cards(monkeypatch, "stride32")
    report = write_evaluation(tmp_path / "report.json")
    card = tmp_path / "deperceiver-r50-32.md"
    write_model_cards(tmp_path, {"stride32": report})
    first = card.read_text()
    report.unlink()
    write_model_cards(tmp_path)
    assert card.read_text() == first
    write_model_cards(tmp_path, {"stride32": write_evaluation(report, metrics={"ap": 0.5})})
    assert card.read_text().count("Measured on") == 1
    write_model_cards(tmp_path, {"stride32": write_evaluation(report, dataset="org/other")})
    assert card.read_text().count("Measured on") == 2
    data = ModelCard(card.read_text()).data
    assert {result.dataset_name for result in data.eval_results} == {"coco", "org/other"}
    assert data.datasets == ["coco"]  # what it was trained on


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_detections": [1, 10, 100]}, False),
        ({"max_detections": [1, 10, 1000]}, True),
        ({"max_detections": [1000]}, True),
        ({}, False),
        (None, False),
    ],
)
def test_more_detections_than_coco_counts_are_said(tmp_path, settings, said):
    described = read_evaluation(write_evaluation(tmp_path / "report.json", settings=settings)).described()
    assert ("1000 detections of a class in an image count" in described) == said
    assert "100 detections" not in described


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {}}, "nothing was measured"),
        ({"metrics": {"ap": -1}}, "nothing was measured"),
        ({"metrics": {"ap": 34.1}}, "fraction of 1"),
        ({"metrics": {"ap": "0.3"}}, "fraction of 1"),
        ({"metrics": None}, "not a report"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_evaluation(write_evaluation(tmp_path / "report.json", **changes))


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        read_evaluation(tmp_path / "nothing.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a report"):
        read_evaluation(tmp_path / "list.json")
    with pytest.raises(ValueError, match="no configuration stride7"):
        write_model_cards(tmp_path, {"stride7": tmp_path / "list.json"})
    assert not list(tmp_path.glob("*.md"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"decoder_type": "layered", "decoder_layers": 2}, ["--dec_layers 2", "2 layers of self-attention"]),
        ({"position_embedding_type": "learned"}, ["--position_embedding learned", "800 x 800 pixels"]),
        ({"feature_strides": [4, 8]}, ["do not describe this configuration", "strides 4 and 8"]),
        ({"num_blocks": 1, "num_latents": 7}, ["--enc_blocks 1", "--num_latents 7", "1 pass through"]),
    ],
)
def test_other_configurations_have_cards_too(overrides, expected):
    text = str(make_model_card(deperceiver_variant("16", **overrides), "other"))
    for part in expected:
        assert part in text.replace(" \\\n   ", "")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, ["--preset nano", "DETR on the same tokens", "| object latents | 60, picked"]),
        ({"num_queries": 7}, ["set what differs", "| object latents | 7, picked"]),
        ({"query_selection": False}, ["They are learned", "| object latents | 60, learned"]),
        ({"share_key_values": True}, ["keys and values computed once for all blocks"]),
        ({"feature_strides": 16, "num_denoising_queries": 0}, ["feature map of stride 16", "| denoising | none |"]),
    ],
)
def test_other_configurations_of_v2_have_cards_too(overrides, expected):
    text = str(make_model_card(deperceiver_v2_variant("nano", **overrides), "other"))
    for part in expected:
        assert part in text


def test_v2_card_does_not_change_the_configuration():
    config = deperceiver_v2_variant("nano", attn_implementation="sdpa")
    make_model_card(config, "other")
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--metrics", "stride16"], 2),
        (["--metrics", "stride16=nothing.json"], 2),
        (["--metrics", "x=nothing.json"], 2),
    ],
)
def test_script_refuses_without_traceback(monkeypatch, capsys, tmp_path, arguments, code):
    monkeypatch.setattr(sys, "argv", ["make_model_cards.py", *arguments, "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "make_model_cards.py"), run_name="__main__")
    assert ended.value.code == code
    assert "deperceiver cards: error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
