"""A file of requests: the evaluation's probabilities, or a sentence that names the row."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stca_jax.export.replay import replay


def predict(model, requests, output):
    return subprocess.run(
        [sys.executable, "-m", "experiments.predict", f"--model={model}", "--encoded",
         f"--requests={requests}", f"--output={output}"],
        capture_output=True, text=True, timeout=550,
    )  # fmt: skip


def rows_of(dataset, request_ids):
    """Requests with their whole history in the row."""
    known = {}
    for step in replay(dataset, request_ids):
        request, events = step.request, known.setdefault(step.request.user, [])
        events.append(step.new)
        history = {f"history_{name}": np.concatenate([e.columns[name] for e in events]).tolist()
                   for name in step.new.columns}  # fmt: skip
        yield (
            step.request_id,
            {
                "user": request.user,
                "time": request.time,
                "history_time": np.concatenate([e.time for e in events]).tolist(),
                **history,
                **{name: np.asarray(values).tolist() for name, values in request.targets.items()},
                **{name: np.asarray(value).item() for name, value in request.request.items()},
            },
        )


@pytest.mark.slow
def test_probabilities_are_the_evaluations(export, everything_run, expected, tmp_path):
    asked = list(rows_of(everything_run.dataset, expected))[-30:]
    requests, output = tmp_path / "requests.parquet", tmp_path / "scores.parquet"
    pq.write_table(pa.Table.from_pylist([row for _, row in asked]), requests)
    done = predict(export, requests, output)
    assert done.returncode == 0, done.stderr
    assert f"30 requests are scored in {output}" in done.stdout
    scored = pq.read_table(output).to_pylist()
    tasks = everything_run.dataset.schema.tasks
    for (request_id, row), found in zip(asked, scored, strict=True):
        assert (found["user"], found["time"]) == (row["user"], row["time"])
        right = 1 / (1 + np.exp(-expected[request_id].astype(np.float64)))
        np.testing.assert_allclose(np.stack([found[t] for t in tasks], -1), right, atol=3e-6)

    name = next(iter(everything_run.dataset.schema.target))
    bad = [row for _, row in asked]
    bad[3] = bad[3] | {name: [10**9] * len(bad[3][name])}
    pq.write_table(pa.Table.from_pylist(bad), requests)
    before = output.read_bytes()
    done = predict(export, requests, output)
    assert done.returncode == 1
    assert f"error: row 3 of --requests={requests}: target {name!r} has 1000000000" in done.stderr
    assert output.read_bytes() == before, "an output is replaced whole or not at all"
