"""What a module costs: measured speed, memory and latency, counted FLOPs and parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from stca_jax.batch import RequestBatch, empty_batch
from stca_jax.errors import UserError
from stca_jax.experiment import ExperimentConfig, experiment_program, training_input
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import InputElement
from stca_jax.models.sequence import SequenceCost
from stca_jax.training.flops import model_flops
from stca_jax.training.sharding import MeshConfig, device_batch, make_mesh
from stca_jax.training.state import split_ranker
from stca_jax.training.train_step import Program

TARGETS = (1, 100, 1_000)  # of the requests whose latency is measured
_STEPS = 5  # timed


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one entry, on the machine at hand.

    Attributes:
      parameters: Without tables.
      table_parameters: Rows times widths.
      tokens_per_step: History tokens of a batch.
      targets_per_step: Targets of a batch.
      flops_per_step: Of matrix products, forward and backward.
      seconds_per_step: Median of a few steps, input aside.
      step_bytes: Memory of a step: state, batch and what is computed between; None if unknown.
      latency: Seconds for the forward pass of one request of m targets with the longest evaluated
        history, nothing cached, by m.
    """

    parameters: int
    table_parameters: int
    tokens_per_step: float
    targets_per_step: float
    flops_per_step: float
    seconds_per_step: float
    step_bytes: int | None
    latency: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """History tokens read in training."""
        return self.tokens_per_step / self.seconds_per_step


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every entry may spend on a training; one of the three.

    Attributes:
      steps: Steps of the first entry, of whose targets every entry then reads as many.
      minutes: Time of steps, as measured before.
      flops: Of matrix products.
    """

    steps: int | None = None
    minutes: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError unless one of them is given and positive."""
        given = [v for v in dataclasses.astuple(self) if v is not None]
        if len(given) != 1 or not given[0] > 0:
            raise UserError(
                f"the budget is {', '.join(map(str, given)) or 'empty'}; give one positive number: "
                "--steps, --minutes or --flops"
            )

    def steps_of(self, costs: Costs, first: Costs) -> int:
        """Steps of an entry.

        Args:
          costs: Of the entry.
          first: Of the first entry.
        """
        if self.steps is not None:
            steps = self.steps * first.targets_per_step / costs.targets_per_step
        elif self.minutes is not None:
            steps = 60 * self.minutes / costs.seconds_per_step
        else:
            assert self.flops is not None
            steps = self.flops / costs.flops_per_step
        return max(1, round(steps))


def measure(config: ExperimentConfig, dataset: RequestDataset) -> Costs:
    """Runs a few train steps, and the forward pass of a long request, on one process's devices."""
    program = experiment_program(config, dataset.schema, num_steps=1_000)
    with contextlib.closing(training_input(config, dataset)) as batches:
        elements = list(itertools.islice(batches, _STEPS + 1))
    flops = model_flops(config.model, dataset.schema, *config.input.row_shape)
    seconds, step_bytes = _time_steps(program, elements)
    _, dense, tables = split_ranker(nnx.eval_shape(program.new_ranker))
    return Costs(
        parameters=_size(dense),
        table_parameters=_size(tables),
        tokens_per_step=statistics.fmean(e.fill.tokens for e in elements),
        targets_per_step=statistics.fmean(e.fill.targets for e in elements),
        flops_per_step=statistics.fmean(step_flops(flops, e) for e in elements),
        seconds_per_step=seconds,
        step_bytes=step_bytes,
        latency={str(m): _latency(config, dataset, m) for m in TARGETS},
    )


def _size(parameters: Any) -> int:
    return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(parameters))


def step_flops(flops: SequenceCost, element: InputElement) -> float:
    """FLOPs of the matrix products of a train step of that batch, by `model_flops`."""
    batch = element.batch
    lengths = np.where(batch.target_mask, batch.history_end - batch.history_start, 0.0)
    token_pairs = (lengths * (lengths + 1) / (2 * batch.num_request_targets)).sum()
    return flops.train_step(element.fill.tokens, element.fill.targets, lengths.sum(), token_pairs)


def _time_steps(program: Program, elements: list[InputElement]) -> tuple[float, int | None]:
    """Median seconds of a step, the first aside, and its memory."""
    batches = [device_batch(e.batch, program.batch_shardings) for e in elements]
    state = program.initialize()
    with jax.set_mesh(program.mesh):
        step = jax.jit(program.step, donate_argnums=0).lower(state, batches[0]).compile()
        seconds = []
        for batch in batches:
            started = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics.loss)
            seconds.append(time.perf_counter() - started)
    memory = step.memory_analysis()
    if memory is None:
        return statistics.median(seconds[1:]), None
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return statistics.median(seconds[1:]), int(total)


def _latency(config: ExperimentConfig, dataset: RequestDataset, num_targets: int) -> float:
    """Median seconds to score one request."""
    batch = long_request(dataset, max(config.evaluation.lengths), num_targets)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    program = Program(
        config.model, dataset.schema, config.optimizer, config.training, mesh, batch, 1, config.seed
    )
    state = program.initialize()
    on_device = device_batch(batch, program.prediction_shardings)
    return _median_seconds(lambda: program.predict(state, on_device))


def long_request(dataset: RequestDataset, length: int, num_targets: int) -> RequestBatch:
    """A row of one request with a history of that length; ids differ, as they do in a log."""
    batch = empty_batch(dataset.schema, 1, length, num_targets, shared_history=False)
    rng = np.random.default_rng(0)
    for features in (batch.history, batch.target, batch.request):
        for name, values in features.items():
            if dataset.schema.is_categorical(name):
                values[:] = rng.integers(0, dataset.schema.vocabularies[name], values.shape)
    batch.history_time[:] = np.arange(length)
    batch.request_time[:] = length
    batch.history_end[:] = length
    batch.target_mask[:] = True
    batch.num_request_targets[:] = num_targets
    return batch


def _median_seconds(run: Callable[[], Any], repetitions: int = 3) -> float:
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
