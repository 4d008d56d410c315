"""The comparison as a user runs it."""

import csv
import json

import pytest
from processes import run


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.exhaustive
def test_comparison_runs_once_and_writes_tables_and_page(tmp_path, data_dir):
    workdir = tmp_path / "comparison"
    arguments = (
        "experiments.compare",
        "--config=experiments/configs/tiny.py",
        f"--workdir={workdir}",
        f"--data_dir={data_dir}",
        "--modules=target_attention,sasrec",
        "--variants=plain",
        "--steps=4",
        "--seeds=1",
        "--rate_factors=1,2",
        "--search_share=0.5",
        "--config.evaluation.lengths=16,64",
    )
    status, output = run(*arguments, timeout=900)
    assert status == 0, output
    results = read(workdir / "results.csv")
    found = {(row["point"], row["split"], row["length"]) for row in results}
    for entry in ("target_attention-plain", "sasrec-plain"):
        assert {(entry, "test", "16"), (entry, "test", "64")} < found
    assert ("logistic", "test", "64") in found
    summary = {row["module"]: row for row in read(workdir / "summary.csv")}
    assert int(summary["target_attention"]["steps"]) == 4
    targets = [float(row["targets"]) for row in summary.values()]
    assert max(targets) < 1.5 * min(targets)  # the same budget, up to whole steps
    for row in summary.values():
        assert float(row["ms_1000_targets"]) > 0
        assert float(row["tokens_per_second"]) > 0
    search = read(workdir / "search.csv")
    assert len(search) == 4
    assert sum(row["chosen"] == "True" for row in search) == 2
    for entry, row in (("target_attention-plain", search[0]), ("sasrec-plain", search[2])):
        assert row["entry"] == entry
        of_entry = [r for r in search if r["entry"] == entry]
        (chosen,) = [r for r in of_entry if r["chosen"] == "True"]
        assert float(chosen["auc"]) == max(float(r["auc"]) for r in of_entry)
    page = (workdir / "comparison.html").read_text()
    assert "sasrec" in page
    assert "http" not in page.replace("http://www.w3.org", "")

    def times():
        runs = [*workdir.glob("*/seed-*/**/*"), *workdir.glob("*/costs.json")]
        return {p: p.stat().st_mtime_ns for p in runs if p.is_file() and p.name != "config.json"}

    finished = times()
    status, output = run(*arguments, timeout=900)
    assert status == 0, output
    assert times() == finished

    # As if the chosen settings had done well in the search and no longer in the whole training.
    entry = workdir / "sasrec-plain"
    (chosen,) = [r for r in search if r["entry"] == entry.name and r["chosen"] == "True"]
    (seed,) = entry.glob("seed-*")
    spoil(seed / "metrics.jsonl")
    status, output = run(*arguments, timeout=900)
    assert status == 0, output
    assert f"sasrec-plain diverges with {chosen['settings']}" in output
    of_entry = [r for r in read(workdir / "search.csv") if r["entry"] == entry.name]
    assert [r["diverged"] == "True" for r in of_entry] == [r == chosen for r in search[2:]]
    assert [r["chosen"] == "True" for r in of_entry] == [r != chosen for r in search[2:]]
    assert len(list(entry.glob("diverged/*/seed-0"))) == 1
    assert seed.exists()  # trained anew
    finished = times()
    (entry / "seed-1").mkdir()  # as a launch with more seeds leaves it that was killed
    status, output = run(*arguments, timeout=900)
    assert status == 0, output
    assert times() == finished


def spoil(metrics):
    """Turns validation AUC into that of a model that knows less than nothing."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [line for line in lines if "validation/auc" in line]
    assert found
    for line in found:
        line["validation/auc"] = 0.01
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
