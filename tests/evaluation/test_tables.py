"""Tables: what is written is what was given, and a failed write changes nothing."""

import csv
import json
import os
import stat

import numpy as np
import pytest

from stca_jax.errors import UserError
from stca_jax.evaluation import tables
from stca_jax.files import read_json_lines

ROWS = [
    {"model": "stca", "length": 512, "auc": 0.80712345},
    {"model": "counting", "length": 4000, "auc": np.float32(0.75), "log_loss": float("nan")},
    {"model": "a|b\nc", "done": True, "auc": None},
]


def test_format_table():
    assert tables.format_table(ROWS, digits=3).splitlines() == [
        "| model    | length |   auc | log_loss | done |",
        "| -------- | -----: | ----: | -------: | ---: |",
        "| stca     |    512 | 0.807 |          |      |",
        "| counting |   4000 | 0.750 |      nan |      |",
        "| a\\|b c   |        |       |          | True |",
    ]


def test_added_rows_replace_their_own_only(tmp_path):
    path, keys = tmp_path / "t.jsonl", ("length", "min_history", "task")
    first = [{"length": n, "min_history": 0, "auc": 0.5} for n in (16, 64)]
    assert tables.add_rows(path, first, keys) == first
    second = [{"length": n, "min_history": h, "auc": 0.6} for n, h in ((64, 0), (64, 9))]
    assert tables.add_rows(path, second, keys) == [first[0], *second]
    assert read_json_lines(path) == [first[0], *second]


def test_no_rows(tmp_path):
    assert tables.format_table([]) == ""
    for name in ("t.csv", "t.jsonl", "t.md"):
        tables.write_table(tmp_path / name, [])
        assert (tmp_path / name).read_text().strip() == ""


def test_markdown_file_holds_the_table(tmp_path):
    tables.write_table(tmp_path / "t.md", ROWS)
    assert (tmp_path / "t.md").read_text() == tables.format_table(ROWS) + "\n"


def test_csv_keeps_full_precision_and_text(tmp_path):
    tables.write_table(tmp_path / "t.csv", ROWS)
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["model", "length", "auc", "log_loss", "done"]
    assert float(rows[0]["auc"]) == ROWS[0]["auc"]
    assert rows[0]["log_loss"] == ""
    assert rows[2]["model"] == "a|b\nc"


def test_json_lines_are_strict_json(tmp_path):
    rows = [*ROWS, {"count": np.int64(3), "loss": np.inf}]
    tables.write_table(str(tmp_path / "t.jsonl"), rows)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    read = [json.loads(line, parse_constant=refuse) for line in lines]
    assert read[0] == ROWS[0]
    assert read[1] == {"model": "counting", "length": 4000, "auc": 0.75, "log_loss": None}
    assert read[3] == {"count": 3, "loss": None}


def test_reads_back_what_was_written(tmp_path):
    path = tmp_path / "t.jsonl"
    assert read_json_lines(path) == []
    tables.write_table(path, ROWS)
    assert read_json_lines(path) == [
        {"model": "stca", "length": 512, "auc": 0.80712345},
        {"model": "counting", "length": 4000, "auc": 0.75, "log_loss": None},
        {"model": "a|b\nc", "done": True, "auc": None},
    ]
    with path.open("a") as file:
        file.write('{"model": "st')  # still being written
    assert len(read_json_lines(path)) == 3
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(UserError, match=r"line 2 of .* is '\[2\]"):
        read_json_lines(path)


def test_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"'\.xlsx', expected one of \.csv, \.jsonl, \.md"):
        tables.write_table(tmp_path / "t.xlsx", ROWS)


def test_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    tables.write_table(path, ROWS[:1])
    before = path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        tables.write_table(path, ROWS)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_overwrites_with_ordinary_permissions(tmp_path):
    path, ordinary = tmp_path / "t.csv", tmp_path / "ordinary"
    ordinary.touch()
    tables.write_table(path, ROWS)
    tables.write_table(path, ROWS[:1])
    assert path.read_text() == "model,length,auc\nstca,512,0.80712345\n"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
