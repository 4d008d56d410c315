"""The training loop in one process: resuming, refusing, stopping, and compiling once."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from stca_jax import experiment, trainer
from stca_jax.config import apply_overrides
from stca_jax.errors import UserError
from stca_jax.evaluation.best import read_best
from stca_jax.evaluation.evaluator import evaluate_split, rows_that_fit, score_lengths
from stca_jax.evaluation.validation import Validation
from stca_jax.experiment import training_input
from stca_jax.experiments.configs import tiny
from stca_jax.experiments.reference_rows import reference_rows
from stca_jax.files import read_json_lines
from stca_jax.input.records import SPLITS
from stca_jax.trainer import train
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.training.metrics_writer import MetricsWriter
from stca_jax.workdir import restore_for_evaluation


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_dataset):
    """A run of 25 steps that was never interrupted, and its program."""
    config = short(tiny.get_config())
    workdir = tmp_path_factory.mktemp("finished")
    programs = []
    original = experiment.Program
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            experiment,
            "Program",
            lambda *a, **k: programs.append(original(*a, **k)) or programs[0],
        )
        result = train(config, tiny_dataset, workdir)
    return config, workdir, result, programs[0]


def test_a_run_ends_once_validation_no_longer_improves(tmp_path, tiny_dataset, monkeypatch):
    values = iter((0.5, 0.6, 0.6, 0.55, 0.7))
    monkeypatch.setattr("stca_jax.evaluation.validation.score", lambda *_: next(values))
    config = short(tiny.get_config(), **{"checkpoint.every_steps": "5", "evaluation.patience": "2"})
    assert train(config, tiny_dataset, tmp_path).step == 20
    assert read_best(tmp_path)["step"] == 10
    assert train(config, tiny_dataset, tmp_path).step == 20, "and it stays ended"
    patient = apply_overrides(config, {"evaluation.patience": "none"})
    assert train(patient, tiny_dataset, tmp_path).step == 25, "unless it is told to go on"
    assert read_best(tmp_path)["step"] == 25


def short(config, **overrides):
    values = {
        "training.max_steps": "25",
        "checkpoint.every_steps": "10",
        "checkpoint.keep_last": "9",
    }
    return apply_overrides(config, values | overrides)


def state_at(config, dataset, workdir, step):
    return jax.device_get(restore_for_evaluation(config, dataset, workdir, step)[1])


def losses(workdir: pathlib.Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_run_learns_saves_and_marks_its_best(finished):
    _, workdir, result, _ = finished
    assert (result.step, result.num_steps, result.signal) == (25, 25, None)
    assert Checkpointer(workdir).steps() == [10, 20, 25]
    assert read_best(workdir)["metric"] == "auc"
    curve = losses(workdir)
    assert curve[25] < curve[5]


def test_train_step_compiles_once_and_predict_once_per_length(finished):
    *_, program = finished
    assert program.train_step.__wrapped__._cache_size() == 1
    assert program.predict.__wrapped__._cache_size() == 1  # one validation length


def test_lengths_beyond_a_row_and_beyond_all_histories_score_alike(finished, tiny_dataset):
    """Histories of up to 512 events, trained in rows of 256."""
    config, workdir, *_ = finished
    program, state = restore_for_evaluation(config, tiny_dataset, workdir, 25)
    logits = {}
    for length in (32, 512, 16_384, 512):
        found = evaluate_split(
            program, state, tiny_dataset, config.input, split="test", length=length, max_requests=50
        )
        logits[length] = found.logit[np.lexsort((found.logit[:, 0], found.request_id))]
    np.testing.assert_allclose(logits[16_384], logits[512], atol=1e-5)
    assert np.abs(logits[32] - logits[512]).max() > 1e-3
    # A length that fits the training rows keeps their shape; each longer one has its own.
    assert program.predict.__wrapped__._cache_size() == 3


def test_longer_rows_are_fewer(tiny_config):
    """A batch holds no more tokens than in training, but a row on each device."""
    packing = dataclasses.replace(tiny_config.input, rows_per_batch=12, row_length=256)
    rows = {n: rows_that_fit(packing, n, num_shares=2) for n in (16, 256, 257, 600, 10_000)}
    assert rows == {16: 12, 256: 12, 257: 10, 600: 4, 10_000: 2}


def test_loop_fetches_metrics_once_a_window(tiny_config, tiny_dataset, tmp_path, monkeypatch):
    fetched = []
    original = jax.device_get
    monkeypatch.setattr(trainer.jax, "device_get", lambda x: fetched.append(x) or original(x))
    monkeypatch.setattr(trainer.Validation, "run", lambda *_: False)
    train(short(tiny_config), tiny_dataset, tmp_path)  # 25 steps in windows of 5
    assert len(fetched) == 5


def test_finished_run_started_again_changes_nothing(finished, tiny_dataset):
    config, workdir, _, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != "config.json"}
    result = train(config, tiny_dataset, workdir)
    assert result.step == result.num_steps == 25
    after = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != "config.json"}
    assert {p for p in before if p.is_file()} == {p for p in after if p.is_file()}


@pytest.mark.parametrize("lost", [(25,), (20, 25), (10, 20, 25)])
def test_resumed_run_is_bit_identical(finished, tiny_dataset, tmp_path, lost):
    config, workdir, _, _ = finished
    resumed = copy_without(workdir, tmp_path / "run", lost)
    train(config, tiny_dataset, resumed)
    expected, found = (state_at(config, tiny_dataset, w, 25) for w in (workdir, resumed))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(resumed) == losses(workdir)


def copy_without(workdir, target, steps):
    shutil.copytree(workdir, target)
    for step in steps:
        shutil.rmtree(target / "checkpoints" / str(step))
    return target


def test_unreadable_latest_checkpoint_falls_back_and_says_so(
    finished, tiny_dataset, tmp_path, caplog
):
    config, workdir, _, _ = finished
    damaged = copy_without(workdir, tmp_path / "run", ())
    for file in (damaged / "checkpoints" / "25" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"damaged")
    train(config, tiny_dataset, damaged)
    assert "checkpoint 25" in caplog.text
    assert "falling back" in caplog.text
    expected, found = (state_at(config, tiny_dataset, w, 25) for w in (workdir, damaged))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoints_that_all_fail_are_left_alone(finished, tiny_dataset, tmp_path):
    """The cause may be the file system's."""
    config, workdir, _, _ = finished
    damaged = copy_without(workdir, tmp_path / "run", ())
    for file in (damaged / "checkpoints").rglob("_METADATA"):
        file.unlink()
    with pytest.raises(UserError, match=r"can be read: checkpoint 25: .*checkpoint 10: "):
        train(config, tiny_dataset, damaged)
    assert Checkpointer(damaged).steps() == [10, 20, 25]


def test_a_second_unreadable_checkpoint_of_a_step_is_kept_too(finished, tiny_dataset, tmp_path):
    config, workdir, _, _ = finished
    damaged = copy_without(workdir, tmp_path / "run", ())
    (damaged / "unreadable-25" / "state").mkdir(parents=True)
    (damaged / "checkpoints" / "25" / "state" / "_METADATA").unlink()
    train(config, tiny_dataset, damaged)
    assert (damaged / "unreadable-25-2" / "input").exists()


def test_checkpoint_is_scored_though_the_run_ended_before_it_was(finished, tiny_dataset, tmp_path):
    config, workdir, _, _ = finished
    unscored = copy_without(workdir, tmp_path / "run", ())
    metrics = unscored / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(x for x in lines if not ('"step": 25' in x and "validation/" in x)))
    (unscored / "best.json").unlink()
    train(config, tiny_dataset, unscored)
    scores = [
        [{n: v for n, v in line.items() if n != "time"} for line in read_json_lines(w)
         if line["step"] == 25 and "validation/auc" in line]
        for w in (workdir / "metrics.jsonl", metrics)
    ]  # fmt: skip
    assert scores[0] == scores[1] != []
    assert read_best(unscored)["step"] == 25


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mesh.model", 64, "mesh"),
        ("evaluation.min_history", 9_999, "split 'validation' has min_history=9999 or more"),
        ("input.min_history", 9_999, "split 'train' has min_history=9999 or more"),
    ],
)
def test_what_cannot_run_leaves_the_workdir_free(
    tiny_config, tiny_dataset, tmp_path, name, value, message
):
    with pytest.raises(UserError, match=message):
        train(short(tiny_config, **{name: value}), tiny_dataset, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_run_is_scored_on_other_devices_than_it_was_trained_on(finished, tiny_dataset):
    config, workdir, _, _ = finished
    expected = state_at(config, tiny_dataset, workdir, 25)
    elsewhere = apply_overrides(config, {"mesh.model": 64})  # devices that are not here
    found = state_at(elsewhere, tiny_dataset, workdir, 25)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_data_than_the_run_was_trained_on_are_not_scored(finished, tiny_dataset, monkeypatch):
    config, workdir, _, _ = finished
    changed = dict.fromkeys(tiny_dataset.fingerprint, "another digest")
    monkeypatch.setattr(type(tiny_dataset), "fingerprint", changed)
    with pytest.raises(UserError, match="is not the one this run began with"):
        restore_for_evaluation(config, tiny_dataset, workdir, 25)


def test_half_written_checkpoint_is_never_taken_for_whole(finished, tiny_dataset, tmp_path):
    config, workdir, _, _ = finished
    interrupted = copy_without(workdir, tmp_path / "run", (25,))
    whole = interrupted / "checkpoints" / "20"
    half = interrupted / "checkpoints" / "25.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "_METADATA").write_bytes((whole / "state" / "_METADATA").read_bytes()[:50])
    assert Checkpointer(interrupted).steps() == [10, 20]
    train(config, tiny_dataset, interrupted)
    assert not half.exists()
    assert Checkpointer(interrupted).steps() == [10, 20, 25]


def test_workdir_of_another_config_is_refused_with_the_differences(finished, tiny_dataset):
    config, workdir, _, _ = finished
    other = apply_overrides(config, {"model.sequence.num_layers": 3, "seed": 1})
    with pytest.raises(UserError, match=r"num_layers: 2 -> 3[\s\S]*seed: 0 -> 1"):
        train(other, tiny_dataset, workdir)


def test_checkpoint_of_another_model_lists_the_arrays(finished, tiny_dataset):
    config, workdir, _, _ = finished
    other = apply_overrides(config, {"model.sequence.width": 32})
    with pytest.raises(UserError, match=r"ffn/up: checkpoint has float32\[3, 18, 36\], this model"):
        restore_for_evaluation(other, tiny_dataset, workdir, 25)


def test_divergence_names_step_and_requests_and_keeps_the_last_checkpoint(
    tiny_config, tiny_dataset, tmp_path
):
    config = short(
        tiny_config,
        **{
            "optimizer.learning_rate": 1e30,
            "optimizer.warmup_steps": 0,
            "checkpoint.every_steps": 1,
        },
    )
    with pytest.raises(
        UserError, match=r"step 1 is not finite .*parameter norm inf.* ids \d+, \d+"
    ):
        train(config, tiny_dataset, tmp_path)
    assert Checkpointer(tmp_path).steps() == []  # step 1 was not worth keeping


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)]
)
def test_signal_saves_a_checkpoint_and_the_run_goes_on(
    finished, tiny_dataset, tmp_path, monkeypatch, number
):
    config, workdir, _, _ = finished
    original = trainer.device_batch
    calls = []

    def device_batch(*args):
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(trainer, "device_batch", device_batch)
    result = train(config, tiny_dataset, tmp_path)
    assert (result.step, result.signal) == (7, number)
    assert Checkpointer(tmp_path).steps() == [7]
    assert train(config, tiny_dataset, tmp_path).step == 25
    expected, found = (state_at(config, tiny_dataset, w, 25) for w in (workdir, tmp_path))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_signal_in_the_last_step_interrupts_nothing(
    tiny_config, tiny_dataset, tmp_path, monkeypatch
):
    original, calls, validated = trainer.device_batch, [], []

    def device_batch(*args):
        calls.append(None)
        if len(calls) == 25:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(trainer, "device_batch", device_batch)
    monkeypatch.setattr(trainer.Validation, "run", lambda *a: bool(validated.append(a[3])))
    result = train(short(tiny_config), tiny_dataset, tmp_path)
    assert (result.step, result.num_steps, result.signal) == (25, 25, None)
    assert validated == [10, 20, 25]


def test_a_thread_that_cannot_handle_signals_trains_too(tiny_config, tiny_dataset, tmp_path):
    config = short(tiny_config, **{"training.max_steps": 1})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        result = pool.submit(train, config, tiny_dataset, tmp_path).result()
    assert (result.step, Checkpointer(tmp_path).steps()) == (1, [1])


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_closes_input_checkpointer_and_lock(
    tiny_config, tiny_dataset, tmp_path, monkeypatch, kind
):
    original, steps, inputs = trainer.device_batch, [], []

    def device_batch(*args):
        steps.append(None)
        if len(steps) == 11:  # the checkpoint of step 10 is being written
            raise kind("of a test")
        return original(*args)

    def recording(*args, **kwargs):
        inputs.append(training_input(*args, **kwargs))
        return inputs[-1]

    monkeypatch.setattr(trainer, "device_batch", device_batch)
    monkeypatch.setattr(trainer, "training_input", recording)
    closed = []
    close = Checkpointer.close
    monkeypatch.setattr(Checkpointer, "close", lambda self: closed.append(self) or close(self))
    monkeypatch.setattr(trainer.Validation, "run", lambda *_: False)
    config = short(tiny_config, **{"input.num_threads": 2})
    with pytest.raises(kind, match="of a test"):
        train(config, tiny_dataset, tmp_path)
    with pytest.raises(ValueError, match="the input is closed"):
        next(inputs[0])
    assert not (tmp_path / "training.lock").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if kind is RuntimeError:  # after Ctrl-C nothing is waited for
        assert len(closed) == 1
        assert Checkpointer(tmp_path).steps() == [10]


def test_validation_shows_how_far_chance_moves_it(finished, tiny_dataset, tmp_path, caplog):
    config, workdir, _, _ = finished
    unscored = copy_without(workdir, tmp_path / "run", ())
    metrics = unscored / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(x for x in lines if not ('"step": 25' in x and "validation/" in x)))
    caplog.set_level("INFO")
    train(config, tiny_dataset, unscored)
    (line,) = [x for x in read_json_lines(metrics) if x["step"] == 25 and "validation/auc" in x]
    assert (
        f"step 25: validation auc {line['validation/auc']:.4f} (standard error of the AUC "
        f"{line['validation/auc_se']:.4f}, {line['validation/num_targets']:,} targets of "
        f"{line['validation/num_requests']:,} requests)"
    ) in caplog.text


def test_requests_of_short_histories_are_left_out_everywhere(finished, tiny_dataset, tmp_path):
    """Of the evaluation, the training's own validation, and the references."""
    config, workdir, _, _ = finished
    index, least = tiny_dataset.index, 150
    evaluation = dataclasses.replace(
        config.evaluation, min_history=least, lengths=(16,), validation_targets=None
    )
    config = dataclasses.replace(config, evaluation=evaluation)
    expected = {
        name: int(((index.split == k) & (index.history_end >= least)).sum())
        for k, name in enumerate(SPLITS)
    }
    assert 0 < expected["test"] < (index.split == 2).sum()
    program, state = restore_for_evaluation(config, tiny_dataset, workdir, 25)
    (row,) = score_lengths(
        program, state, tiny_dataset, config.input, evaluation, split="test", step=25
    )
    assert row["num_requests"] == expected["test"]
    assert {r["num_requests"] for r in reference_rows(config, tiny_dataset, "test")} == {
        expected["test"]
    }
    (tmp_path / "checkpoints" / "25").mkdir(parents=True)
    with MetricsWriter(tmp_path) as writer:
        validation = Validation(tiny_dataset, config.input, evaluation, tmp_path, every_steps=5)
        validation.run(program, state, 25, writer)
    (line,) = read_json_lines(tmp_path / "metrics.jsonl")
    assert line["validation/num_requests"] == expected["validation"]


@pytest.mark.parametrize("knows", [True, False])
def test_validation_warns_of_a_model_that_knows_nothing(
    finished, tiny_dataset, tmp_path, caplog, knows
):
    config, workdir, _, _ = finished
    program, state = restore_for_evaluation(config, tiny_dataset, workdir, 25)
    head = jax.tree.map(lambda x: x if knows else 0 * x, state.dense["head"])
    state = dataclasses.replace(state, dense={**state.dense, "head": head})
    (tmp_path / "checkpoints" / "25").mkdir(parents=True)
    with MetricsWriter(tmp_path) as writer:
        validation = Validation(
            tiny_dataset, config.input, config.evaluation, tmp_path, every_steps=5
        )
        validation.run(program, state, 25, writer)
    (line,) = read_json_lines(tmp_path / "metrics.jsonl")
    assert (line["validation/normalized_entropy"] < 0.9995) == knows
    assert ("validation is hardly better than the mean label" in caplog.text) != knows


def test_evaluation_is_limited_by_targets(finished, tiny_dataset):
    config, workdir, _, _ = finished
    limited = dataclasses.replace(config.evaluation, max_targets=100, lengths=(16,))
    program, state = restore_for_evaluation(config, tiny_dataset, workdir, 25)
    (row,) = score_lengths(
        program, state, tiny_dataset, config.input, limited, split="test", step=25
    )
    assert 50 < row["num_targets"] <= 100
    assert row["max_targets"] == 100


@pytest.mark.slow
def test_a_workdir_of_any_other_name_works_to_the_end(tiny_config, tiny_dataset, tmp_path):
    config = short(tiny_config, **{"training.max_steps": 2, "checkpoint.every_steps": 1})
    workdir = tmp_path / "it's {x} 100% #1 $HOME ü日本 =,;:~"
    train(config, tiny_dataset, workdir)
    shutil.rmtree(workdir / "checkpoints" / "2")
    assert train(config, tiny_dataset, workdir).step == 2
    state_at(config, tiny_dataset, workdir, 2)


def test_best_checkpoint_survives_retention(tiny_config, tiny_dataset, tmp_path):
    config = short(tiny_config, **{"checkpoint.keep_last": 1, "checkpoint.every_steps": 5,
                                   "evaluation.larger_is_better": False})  # fmt: skip
    train(config, tiny_dataset, tmp_path)  # the first has the smallest AUC
    assert Checkpointer(tmp_path).steps() == [5, 25]
