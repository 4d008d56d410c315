r"""A train step of a config: all of it, and without the parts of the match channel.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 \
        python -m stca_jax.experiments.benchmarks.model_step --config=FILE --clock=cpu

Steps of one batch of the config's training, in turns, with the update of tables and dense
parameters. Prints milliseconds, the FLOPs of matrix products that the step needs, and what share of
the fastest product of this machine, measured in the run, they are done at.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from stca_jax import config as config_lib
from stca_jax.allocator import keep_freed_memory
from stca_jax.comparison.costs import step_flops
from stca_jax.data.preparation import prepare
from stca_jax.evaluation.tables import format_table
from stca_jax.experiment import ExperimentConfig, experiment_program, training_input
from stca_jax.experiments import launch
from stca_jax.experiments.benchmarks import timing
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import InputElement
from stca_jax.training.flops import model_flops
from stca_jax.training.sharding import device_batch

_CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "See train_step.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Seconds to measure each.")
_BATCH = 5  # of a training; any
_WITHOUT: Mapping[str, Mapping[str, Any]] = {
    "as configured": {},
    "without soft counts": {"model.match_soft_counts": False},
    "without the match channel": {"model.match_channel": False},
}


def main() -> None:
    """Measures and prints."""
    keep_freed_memory()  # as the trainer does
    clock = time.process_time if _CLOCK.value == "cpu" else time.perf_counter
    config = launch.load_config()
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    with contextlib.closing(training_input(config, dataset)) as batches:
        element = next(itertools.islice(batches, _BATCH, None))
    configs: dict[str, ExperimentConfig] = {}
    for name, overrides in _WITHOUT.items():
        changed = config_lib.apply_overrides(config, overrides)
        if changed not in configs.values():
            configs[name] = changed
    steps = {name: _step(c, dataset, element) for name, c in configs.items()}
    timings = timing.time_interleaved(steps, seconds=_SECONDS.value, clock=clock)
    width = config.model.sequence.width
    peak = timing.peak_flops(config.model.dtype, width, clock=clock)
    rows = []
    for name, changed in configs.items():
        of_model = model_flops(changed.model, dataset.schema, *config.input.row_shape)
        flops, seconds = step_flops(of_model, element), timings[name].best
        rows.append({"step": name, "ms": 1e3 * seconds, "median_ms": 1e3 * timings[name].median,
                     "gflop": flops / 1e9, "share_of_peak": flops / seconds / peak})  # fmt: skip
    print(timing.environment())
    print(f"products {peak / 1e9:.4g} GFLOP/s ({config.model.dtype})")
    print(format_table(rows))


def _step(config: ExperimentConfig, dataset: RequestDataset, element: InputElement) -> timing.Step:
    """A call that starts a step, from the state that the last one left."""
    program = experiment_program(config, dataset.schema, num_steps=1_000)
    batch = device_batch(element.batch, program.batch_shardings)
    state = program.initialize()

    def step() -> jax.Array:
        nonlocal state
        state, metrics = program.train_step(state, batch)
        return metrics.loss

    return step


if __name__ == "__main__":
    launch.run(main, takes_config=True)
