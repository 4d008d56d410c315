"""The notebooks: both files of a pair agree and show pictures; every cell runs in a real kernel."""

import base64
import os
import pathlib

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from processes import REPOSITORY

FOLDER = REPOSITORY / "experiments" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_pair_agrees_and_shows_what_a_whole_run_made(name):
    """After an edit run CONTRIBUTING's command: jupytext drops what the changed cells had made."""
    text = jupytext.read(FOLDER / f"{name}.py")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)

    def cells(nb):
        return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in nb.cells]

    assert cells(notebook) == cells(text)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert pictures
    assert all(base64.b64decode(p).startswith(b"\x89PNG\r\n\x1a\n") for p in pictures)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000
    first = notebook.cells[0].source
    assert "https://colab.research.google.com/github/" in first
    assert f"/experiments/notebooks/{name}.ipynb)" in first


def execute(name: str, folder: pathlib.Path, **parameters) -> str:
    """Runs a notebook somewhere else than in the checkout; returns what its cells printed."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (position,) = [
        i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])
    ]
    known = notebook.cells[position].source
    assert all(f"{parameter} = " in known for parameter in parameters)
    values = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(values))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    outputs = [output for c in notebook.cells for output in c.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.exhaustive
def test_ten_minutes_with_stca(tmp_path):
    output = execute(
        "ten_minutes_with_stca",
        tmp_path,
        DATA_DIR=str(tmp_path / "prepared"),
        WORKDIR=str(tmp_path / "run"),
        MAX_STEPS=8,
        LENGTHS=(1_000,),  # what training validates at: compiled once
        TEST_REQUESTS=50,
        ATTENTION_BATCHES=1,
    )
    assert "in company" in output
    assert "trained 8 steps" in output
    assert "of the earlier purchases of a product" in output


@pytest.mark.exhaustive
def test_your_own_log(tmp_path):
    output = execute(
        "your_own_log",
        tmp_path,
        LOG=str(tmp_path / "log.parquet"),
        DATA_DIR=str(tmp_path / "prepared"),
        WORKDIR=str(tmp_path / "run"),
        NUM_HOUSEHOLDS=60,
        MAX_STEPS=6,
    )
    assert "| stca     |   1000 |" in output
    assert "rejected rows" in output


@pytest.mark.exhaustive
def test_pods(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    )
    output = execute(
        "pods", tmp_path, DATA_DIR=str(data_dir), WORKDIR=str(tmp_path / "run"), NUM_LAYERS=1
    )
    assert "8 devices" in output
    assert "fits" in output
    assert "stopped by SIGTERM" in output
    assert "finished 40 steps" in output


@pytest.mark.exhaustive
def test_serve_a_ranker(tmp_path, data_dir):
    output = execute(
        "serve_a_ranker",
        tmp_path,
        DATA_DIR=str(data_dir),
        FOLDER=str(tmp_path / "serve"),
        MAX_STEPS=60,
    )
    assert "ready at port" in output
    assert "{'appended': 1} {'appended': 0}" in output
    assert "rank 12 of 12, then" in output
    assert "{'deleted': True}" in output
    assert "ended with 0" in output
