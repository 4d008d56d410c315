import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stca_jax.training.metrics_writer import MetricsWriter, WandbConfig


def _lines(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _points(workdir, tag):
    accumulator = EventAccumulator(str(workdir), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_writes_json_lines_and_events(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(0, {"eval/auc": np.float32(0.5)})
        writer.write(np.int64(10), {"train/loss": 0.25, "train/tokens": np.array(7)})
        writer.write(10, {"eval/auc": np.float64(0.75)})
        writer.flush()
    lines = _lines(tmp_path / "new" / "run")
    assert all(abs(line.pop("time") - time.time()) < 60 for line in lines)
    assert lines == [
        {"step": 0, "eval/auc": 0.5},
        {"step": 10, "train/loss": 0.25, "train/tokens": 7},
        {"step": 10, "eval/auc": 0.75},
    ]
    assert _points(tmp_path / "new" / "run", "eval/auc") == [(0, 0.5), (10, 0.75)]
    assert _points(tmp_path / "new" / "run", "train/tokens") == [(10, 7.0)]


def test_lines_are_there_without_flush_or_close(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"a": 1.0})
    assert [line["step"] for line in _lines(tmp_path)] == [1]
    assert _points(tmp_path, "a") == [(1, 1.0)]
    writer.close()
    writer.close()


def test_nan_and_infinity_are_null_in_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"nan": float("nan"), "inf": np.float32("-inf")})
    (line,) = _lines(tmp_path)
    assert line["nan"] is None
    assert line["inf"] is None
    assert math.isnan(_points(tmp_path, "nan")[0][1])
    assert _points(tmp_path, "inf") == [(1, -math.inf)]


class DeviceArray:
    """Stands for a jax.Array, which would have to be fetched."""

    def __float__(self):
        raise AssertionError("fetched from the device")


@pytest.mark.parametrize("value", [DeviceArray(), np.zeros(1), "0.5", None, True, 1j])
def test_refuses_what_is_no_number(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(TypeError, match=r"metric 'train/loss': .*jax.device_get"):
            writer.write(1, {"good": 1.0, "train/loss": value})
        with pytest.raises(ValueError, match=r"metric 'step': .*choose another"):
            writer.write(1, {"step": 1.0})
    assert _lines(tmp_path) == []


@pytest.mark.parametrize(("start_step", "kept"), [(0, []), (3, [1, 2, 3]), (9, [1, 2, 3, 4, 5])])
def test_resume_drops_later_steps(tmp_path, start_step, kept):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"a": 1.0})
    with MetricsWriter(tmp_path, start_step=start_step) as writer:
        assert [line["step"] for line in _lines(tmp_path)] == kept
        writer.write(start_step + 1, {"a": 2.0})
    expected = [(step, 1.0) for step in kept] + [(start_step + 1, 2.0)]
    assert [(line["step"], line["a"]) for line in _lines(tmp_path)] == expected
    assert _points(tmp_path, "a") == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_again_and_again_within_a_second(tmp_path):
    for life in range(5):
        with MetricsWriter(tmp_path, start_step=life) as writer:
            for step in range(life + 1, life + 4):
                writer.write(step, {"a": float(life)})
    expected = [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 4.0), (6, 4.0), (7, 4.0)]
    assert [(line["step"], line["a"]) for line in _lines(tmp_path)] == expected
    assert _points(tmp_path, "a") == expected


def test_resume_drops_damaged_lines(tmp_path):
    good = b'{"step": 1, "a": 1.0}\n'
    damaged = [b"\0\0\0\n", b"\xff\n", b"[1]\n", b'{"a": 1}\n', b'{"step": 2, "a": 1.0}']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([good, *damaged]))
    MetricsWriter(tmp_path, start_step=5).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good


def test_killed_writer_loses_and_repeats_nothing(tmp_path):
    # A tensorflow that cannot be imported stands in for the real one, which must not be.
    modules, workdir = tmp_path / "modules", tmp_path / "run"
    modules.mkdir()
    (modules / "tensorflow.py").write_text("raise AssertionError('tensorflow was imported')")
    code = """
        import itertools, sys
        from stca_jax.training.metrics_writer import MetricsWriter
        writer = MetricsWriter(sys.argv[1])
        for step in itertools.count(1):
            writer.write(step, {"a": float(step), "b": 1.0})
            print(step, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(workdir)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(modules), *sys.path])},
    )
    for _ in range(200):
        assert process.stdout.readline(), "the writer died by itself"
    process.send_signal(signal.SIGKILL)
    reported = 200 + len(process.stdout.read().splitlines())
    process.wait()

    # What the process reported is there. A write cut in the middle leaves a piece of a record.
    assert [line["step"] for line in _lines(workdir)][:reported] == list(range(1, reported + 1))
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 100, "ti')
    (events,) = workdir.glob("events.*")
    with events.open("ab") as file:
        file.write(events.read_bytes()[-20:])

    with MetricsWriter(workdir, start_step=150) as writer:
        for step in range(151, 161):
            writer.write(step, {"a": -1.0})
    expected = [(step, float(step) if step <= 150 else -1.0) for step in range(1, 161)]
    assert [(line["step"], line["a"]) for line in _lines(workdir)] == expected
    assert _points(workdir, "a") == expected
    assert _points(workdir, "b")[-1][0] == 150


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", is_main_process=False, wandb=WandbConfig("p")) as writer:
        writer.write(1, {"a": 1.0})
        writer.flush()
        with pytest.raises(TypeError):
            writer.write(1, {"a": "b"})
    assert not (tmp_path / "run").exists()


def test_wandb(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**kwargs):
        calls.append(kwargs)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start_step in (0, 5, 0):
        config = WandbConfig("project", mode="offline")
        with MetricsWriter(tmp_path, start_step=start_step, wandb=config, config={"x": 1}) as w:
            w.write(start_step + 1, {"a": 0.5})
    assert calls[1:3] == [(1, {"a": 0.5}), "finish"]
    assert calls[0]["project"] == "project"
    assert calls[0]["config"] == {"x": 1}
    # The resumed run is the same run; one that starts from nothing is another.
    assert calls[0]["id"] == calls[3]["id"] != calls[6]["id"]


def test_wandb_missing(tmp_path, monkeypatch):
    MetricsWriter(tmp_path).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[wandb\]"'):
        MetricsWriter(tmp_path, wandb=WandbConfig("project"))
    assert len(_lines(tmp_path)) == 1  # Nothing was dropped for a run that did not start.
