"""Tables, charts and page of made-up runs."""

import dataclasses

import pytest

from stca_jax.comparison.costs import Costs
from stca_jax.comparison.entries import make_entries
from stca_jax.comparison.results import charts, summary_rows, write_page
from stca_jax.experiments.configs import tiny

COSTS = Costs(
    parameters=100, table_parameters=10, tokens_per_step=50.0, targets_per_step=20.0,
    flops_per_step=2e9, seconds_per_step=0.5, step_bytes=3 * 2**20,
    latency={"1": 0.001, "100": 0.004, "1000": 0.03},
)  # fmt: skip


def rows_of(entry, seed, auc_by_length):
    shared = {"point": entry, "seed": seed, "gauc_user": 0.6, "log_loss": 0.5, "calibration": 1.0,
              "steps": 10, "train_tokens": 500, "train_seconds": 7.0}  # fmt: skip
    rows = [{**shared, "split": "validation", "length": 64, "auc": 0.7 + seed / 10}]
    return rows + [
        {**shared, "split": "test", "length": n, "auc": auc} for n, auc in auc_by_length.items()
    ]


@pytest.fixture
def entries():
    return make_entries(tiny.get_config(), ["stca", "din"], ["full", "plain"])


@pytest.fixture
def rows():
    return [
        *rows_of("stca-full", 0, {16: 0.6, 64: 0.70}),
        *rows_of("stca-full", 1, {16: 0.6, 64: 0.74}),
        *rows_of("din-plain", 0, {16: 0.5, 64: 0.65}),
    ]


SEARCHED = [
    {"entry": "stca-full", "settings": "learning_rate 0.1", "chosen": False},
    {"entry": "stca-full", "settings": "learning_rate 0.2", "chosen": True},
]


def test_summary_is_of_the_longest_history_over_seeds(entries, rows):
    costs = {entry.name: COSTS for entry in entries}
    stca, din = summary_rows(entries, rows, costs, SEARCHED, "auc")
    assert (stca["module"], stca["variant"], stca["seeds"]) == ("stca", "full", 2)
    assert (din["module"], din["variant"], din["seeds"]) == ("din", "plain", 1)
    assert stca["auc"] == pytest.approx(0.72)
    assert stca["auc_sd"] == pytest.approx(0.02 * 2**0.5)
    assert din["auc_sd"] is None
    assert stca["validation_auc"] == pytest.approx(0.75)
    assert stca["settings"] == "learning_rate 0.2"
    assert stca["train_seconds"] == 7.0
    untimed = [{**row, "train_seconds": None} for row in rows]
    assert summary_rows(entries, untimed, costs, SEARCHED, "auc")[0]["train_seconds"] == 10 * 0.5
    expected = {"targets": 200, "tokens": 500, "gigaflop": 20.0, "tokens_per_second": 100,
                "step_mb": 3.0, "ms_1_targets": 1.0, "ms_1000_targets": 30.0}  # fmt: skip
    assert expected.items() <= din.items()


def test_charts_are_of_one_variant_each(entries, rows, tmp_path):
    costs = {entry.name: COSTS for entry in entries}
    costs["din-plain"] = dataclasses.replace(COSTS, latency={**COSTS.latency, "100": 0.5})
    summary = summary_rows(entries, rows, costs, SEARCHED, "auc")
    references = [
        {"model": model, "length": n, "auc": 0.6, "log_loss": 0.6}
        for model in ("logistic", "boosted")
        for n in (16, 64)
    ]
    made = {chart.name: chart for chart in charts(entries, rows, summary, references)}
    assert [line.label for line in made["auc_full"].lines] == ["stca", "logistic", "boosted"]
    assert [line.label for line in made["auc_plain"].lines] == ["din", "logistic", "boosted"]
    assert made["auc_full"].lines[0].y == pytest.approx([0.6, 0.72])
    (point,) = made["latency_plain"].lines
    assert (point.label, point.x, point.y) == ("din", [500.0], [0.65])
    tables = {"Summary": summary, "Search": SEARCHED}
    write_page(tmp_path, "a <dataset>", list(made.values()), tables)
    page = (tmp_path / "comparison.html").read_text()
    assert "a &lt;dataset&gt;" in page
    assert "learning_rate 0.2" in page
    assert (tmp_path / "latency_plain.png").exists()
