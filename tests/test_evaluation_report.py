# SPDX-License-Identifier: Apache-2.0
"""The file of an evaluation is read as it was written, and what is no such file is refused."""

import json

import pytest

from deperceiver_hf.errors import UserError
from deperceiver_hf.evaluation.report import EvaluationReport

CONTENT = {
    "metrics": {"ap": 0.25, "ap_small": -1.0, "ar100": 0.5},
    "per_class": {"person": 0.25, "dog": None},
    "model": "outputs/mine/best",
    "dataset": "path/to/coco",
    "split": "val",
    "num_images": 12,
    "predictions": "eval_predictions.json",
    "settings": {"batch_size": 8, "device": "cpu"},
    "versions": {"torch": "2.14.1"},
    "seconds": 1.25,
    "date": "2031-02-03",
}
NEEDED = ("metrics", "dataset", "split", "num_images")


def test_keys_of_the_file_are_these_in_this_order(tmp_path):
    EvaluationReport(**CONTENT).write(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert text == json.dumps(CONTENT, indent=2) + "\n"
    assert EvaluationReport.read(tmp_path / "report.json") == EvaluationReport(**CONTENT)


def test_older_and_newer_files_are_read():
    older = {key: CONTENT[key] for key in NEEDED}
    assert EvaluationReport.from_dict(older).to_dict() == older
    assert EvaluationReport.from_dict(CONTENT | {"weather": "rain"}) == EvaluationReport(**CONTENT)


@pytest.mark.parametrize("key", NEEDED)
def test_files_without_a_needed_key_are_refused(key):
    with pytest.raises(UserError, match=rf"eval\.json is not a report .* no {key}"):
        EvaluationReport.from_dict({k: v for k, v in CONTENT.items() if k != key}, source="eval.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": "many"}, "num_images cannot be 'many'"),
        ({"num_images": True}, "num_images cannot be True"),
        ({"metrics": [0.5] * 1000}, "metrics cannot be"),
        ({"dataset": 7}, "dataset cannot be 7"),
        ({"date": 2031}, "date cannot be 2031"),
        ({"metrics": {"ap": 34.1}}, "ap = 34.1; a fraction of 1"),
        ({"metrics": {"ap": None}}, "ap = None; a fraction of 1"),
        ({"metrics": {"ap": True}}, "ap = True; a fraction of 1"),
        ({"metrics": {"ap": float("nan")}}, "ap = nan; a fraction of 1"),
    ],
)
def test_impossible_values_are_named(changes, message):
    with pytest.raises(UserError, match=message) as error:
        EvaluationReport.from_dict(CONTENT | changes)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("text", ["{torn", "[1]", "null", "{}"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UserError, match=r"other\.json is not a report of `deperceiver evaluate`"):
        EvaluationReport.read(tmp_path / "other.json")
