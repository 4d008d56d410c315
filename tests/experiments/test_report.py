"""The report as a user runs it."""

import json

from processes import run

from stca_jax import config as config_lib
from stca_jax.experiments.configs import tiny


def write_run(workdir):
    (workdir / "evaluation").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config_lib.to_dict(tiny.get_config())))
    row = {"split": "test", "min_history": 0, "max_requests": None, "step": 1, "length": 16}
    line = json.dumps({**row, "model": "stca", "auc": 0.6})
    (workdir / "evaluation" / "test-1.jsonl").write_text(line + "\n")
    return workdir


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    workdirs = [write_run(tmp_path / name / "run") for name in ("short", "long")]
    page = tmp_path / "page.html"
    arguments = [f"--workdir={workdir}" for workdir in workdirs]
    status, output = run("experiments.report", *arguments, f"--output={page}")
    assert status == 0, output
    assert f"written to {page}, and 2 charts" in output
    assert "<h1>short/run, long/run</h1>" in page.read_text()


def test_directory_without_a_run_is_refused(tmp_path):
    status, output = run(
        "experiments.report", f"--workdir={tmp_path}", f"--output={tmp_path}/page.html"
    )
    assert status == 1
    assert "holds no run" in output
    assert "Traceback" not in output
