"""What a run says about itself, and what it does about steps that diverge."""

import json
import time

import jax
import numpy as np
import pytest

from stca_jax import experiment, trainer
from stca_jax.config import apply_overrides
from stca_jax.errors import UserError
from stca_jax.input.pipeline import make_input
from stca_jax.trainer import train
from stca_jax.training import flops, recent_steps
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.training.loss import LabelLoss
from stca_jax.training.monitoring import PhaseClock, ProfileConfig, device_memory

WINDOW = 5


@pytest.fixture
def config(tiny_config):
    values = {"training.max_steps": 20, "checkpoint.every_steps": 20}
    return apply_overrides(tiny_config, values | {"training.log_every_steps": WINDOW})


@pytest.fixture(autouse=True)
def no_validation(monkeypatch):
    monkeypatch.setattr(trainer.Validation, "run", lambda *_: False)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def spoil_steps(monkeypatch, steps):
    """Makes the labels of those steps infinite, on their way to the device."""
    original, calls = trainer.device_batch, []

    def device_batch(batch, shardings):
        calls.append(None)
        if len(calls) in steps:
            batch = batch.replace(label=np.full_like(batch.label, np.inf))
        return original(batch, shardings)

    monkeypatch.setattr(trainer, "device_batch", device_batch)


@pytest.mark.slow
def test_skipped_steps_are_counted_and_left_out_of_the_means(
    config, tiny_dataset, tmp_path, monkeypatch
):
    spoil_steps(monkeypatch, {7, 9})
    config = apply_overrides(config, {"training.on_divergence": "skip"})
    assert train(config, tiny_dataset, tmp_path).step == 20
    assert [line["train/skipped_steps"] for line in lines(tmp_path)] == [0, 2, 0, 0]
    assert all(np.isfinite(line["train/loss"]) for line in lines(tmp_path))
    assert Checkpointer(tmp_path).steps() == [20]


@pytest.mark.slow
def test_skipped_steps_in_a_row_stop_the_run(config, tiny_dataset, tmp_path, monkeypatch):
    """However many steps a line of the metrics has: here one, and every step of some lines."""
    monkeypatch.setattr(recent_steps, "_MOST_SKIPPED", 5)
    spoil_steps(monkeypatch, {*range(3, 7), *range(9, 14)})
    values = {"training.on_divergence": "skip", "training.log_every_steps": 1}
    message = "step 13 is not finite, nor was any of the 4 steps before it"
    with pytest.raises(UserError, match=message):
        train(apply_overrides(config, values), tiny_dataset, tmp_path)


@pytest.mark.exhaustive
def test_stop_names_the_spike(config, tiny_dataset, tmp_path):
    config = apply_overrides(config, {"training.max_gradient_norm": 1e-6})
    with pytest.raises(UserError, match=r"step 1 exceeds max_gradient_norm 1e-06 \(loss"):
        train(config, tiny_dataset, tmp_path)


def test_options_reach_the_train_step(config, tiny_dataset):
    """Every value of the config that decides what a step computes."""
    values = {
        "accumulate_steps": 4, "on_divergence": "skip", "max_gradient_norm": 2.0, "ema_decay": 0.9,
        "loss_weighting": "request",
    }  # fmt: skip
    values = {f"training.{name}": v for name, v in values.items()}
    config = apply_overrides(config, values | {"seed": 7})
    program = experiment.experiment_program(config, tiny_dataset.schema, num_steps=1)
    assert program.training == config.training
    assert program.seed == config.seed == 7
    assert program.losses == (LabelLoss("request"),)


@pytest.mark.parametrize(
    ("name", "value"),
    [("accumulate_steps", 0), ("max_gradient_norm", 0.0), ("ema_decay", 1.0), ("ema_decay", -0.1)],
)
def test_values_that_cannot_work_are_refused(config, name, value):
    with pytest.raises(UserError, match=f"{name} is {value}"):
        apply_overrides(config, {f"training.{name}": value})


def test_time_is_divided_among_phases(config, tiny_dataset, tmp_path, monkeypatch):
    save, pause = Checkpointer.save, 0.3
    monkeypatch.setattr(Checkpointer, "save", lambda *a: time.sleep(pause) or save(*a))
    config = apply_overrides(config, {"checkpoint.every_steps": 10})
    train(config, tiny_dataset, tmp_path)
    found = {line["step"]: line for line in lines(tmp_path)}
    assert found[10]["train/checkpoint_seconds"] == 0
    # The save at step 10 is told with the ten steps after it.
    assert found[15]["train/checkpoint_seconds"] >= pause / 10
    phases = ("input", "step", "checkpoint", "validation")
    spent = sum(found[15][f"train/{phase}_seconds"] for phase in phases)
    assert spent == pytest.approx(1 / found[15]["speed/steps_per_second"], rel=0.2)


def end_each_step(monkeypatch):
    """As on a device that is quicker than the host."""
    add = trainer.RecentSteps.add
    monkeypatch.setattr(
        trainer.RecentSteps, "add", lambda *a: add(*a[:2], jax.block_until_ready(a[2]), *a[3:])
    )


def test_steps_are_timed_when_they_end(config, tiny_dataset, tmp_path, monkeypatch):
    """Of steps that had ended by the last report, no time is left in the next."""
    end_each_step(monkeypatch)
    timed, ended_since = [], trainer.RecentSteps._ended_since

    def spy(self, windows):
        found = ended_since(self, windows)
        timed.append((windows[-1][-1].step, len(found)))
        return found

    monkeypatch.setattr(trainer.RecentSteps, "_ended_since", spy)
    config = apply_overrides(config, {"training.max_steps": 22, "checkpoint.every_steps": 11})
    train(config, tiny_dataset, tmp_path)
    assert timed == [(5, 10), (11, 1), (16, 10), (22, 1)]


def test_flops_are_those_of_the_batches(config, tiny_dataset, tmp_path, monkeypatch):
    end_each_step(monkeypatch)
    kind = jax.devices()[0].device_kind
    chip = flops.Chip((kind,), flops=1e9, memory=1, bandwidth=1, interconnect=1)
    monkeypatch.setitem(flops.CHIPS, "test", chip)
    # Its history tokens interact, so that all amounts count.
    values = {"model.sequence": "TransformerConfig", "model.sequence.width": 16}
    config = apply_overrides(config, values | {"input.rows": "request"})
    train(config, tiny_dataset, tmp_path)
    batches = make_input(tiny_dataset, config.input)
    elements = [next(batches) for _ in range(20)]
    batches.close()
    model = flops.model_flops(config.model, tiny_dataset.schema, *config.input.row_shape)
    expected = 0
    for element in elements[15:]:  # those that ended after the report at step 15
        batch = element.batch
        lengths = (batch.history_end - batch.history_start)[batch.target_mask]
        of_request = dict(zip(batch.request_id[batch.target_mask], lengths, strict=True))
        token_pairs = sum(n * (n + 1) // 2 for n in map(int, of_request.values()))
        amounts = (element.fill.tokens, batch.target_mask.sum(), lengths.sum(), token_pairs)
        expected += model.train_step(*amounts)
    line = lines(tmp_path)[-1]
    seconds = 5 * (line["train/input_seconds"] + line["train/step_seconds"])
    assert line["speed/model_flops_per_second"] * seconds == pytest.approx(expected)
    rate = line["speed/model_flops_per_second"]
    assert line["speed/model_flops_utilization"] == pytest.approx(rate / 1e9 / len(jax.devices()))


@pytest.mark.slow
def test_traces_the_steps_that_are_asked_for(config, tiny_dataset, tmp_path):
    config = apply_overrides(config, {"profile.steps": "3:5"})
    train(config, tiny_dataset, tmp_path)
    (path,) = (tmp_path / "plugins" / "profile").rglob("*.xplane.pb")
    traced = {
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert traced == {3, 4}


@pytest.mark.parametrize("steps", ["3", "0:2", "5:5", "a:b", ":3"])
def test_steps_to_trace_that_make_no_sense_are_refused(steps):
    with pytest.raises(ValueError, match="expected first:stop"):
        ProfileConfig(steps)


def test_clock_gives_each_lap_to_its_phase():
    clock = PhaseClock()
    clock.lap("a")
    time.sleep(0.05)
    clock.lap("b")
    taken = clock.take()
    assert taken["b"] >= 0.05 > taken["a"]
    assert clock.take() == {}


def test_memory_is_that_of_the_fullest_device():
    class Device:
        def __init__(self, **stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

    devices = [Device(bytes_in_use=3, num_allocs=1), Device(bytes_in_use=5, num_allocs=1)]
    assert device_memory(devices) == {"memory/bytes_in_use": 5}
    assert device_memory([Device(), devices[0]]) == {}
