# SPDX-License-Identifier: Apache-2.0
"""The notebook in `examples/`: it is stored as it was written, and every cell runs."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from coco_samples import coco_content, write_coco

NOTEBOOK = Path(__file__).parents[1] / "examples" / "fine_tune_on_your_own_data.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    for cell in code:
        ast.parse(cell.source)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", ())]
    assert parameters is code[0]


@pytest.mark.heavy
def test_notebook_runs_on_small_data(notebook, tmp_path, monkeypatch):
    content = coco_content()
    for split in ("train", "val"):
        places = {"annotation_file": f"annotations/instances_{split}2017.json", "image_dir": f"{split}2017"}
        write_coco(tmp_path / "data", content, **places)
    options = {"shortest_edge": 48, "longest_edge": 64, "epochs": 2, "eval_every": 1, "batch_size": 2, "log_every": 1}
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    own = {"DATASET": str(tmp_path / "data"), "OUTPUT": "out", "OPTIONS": options}
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in own.items())
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "4 classes: person, fire hydrant, stop sign, toothbrush" in printed
    assert "Trained 4 steps (2 epochs)" in printed
    assert "AP per class" in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert (tmp_path / "out" / "last" / "model.safetensors").is_file()
