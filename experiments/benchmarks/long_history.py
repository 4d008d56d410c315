"""Time and memory of a sequence module on one request, by the length of its history.

python -m stca_jax.experiments.benchmarks.long_history [--module=SequenceO1Config]
    [--lengths=10000,30000,100000] [--targets=16] [--seconds=20]

Scoring, and gradients of all weights and tokens (layers computed again in the backward pass), at
d = 64, in CPU time of one thread where there is no accelerator; memory is what XLA reserves beside
the arguments. The exponent is the slope of log time between the first and the last length.
"""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jaxtyping import Array

from stca_jax import config as config_lib
from stca_jax.evaluation.tables import format_table
from stca_jax.experiments import launch
from stca_jax.experiments.benchmarks.timing import compiled_step, time_interleaved
from stca_jax.models.ranker import RankerConfig
from stca_jax.models.sequence import SequenceInput
from stca_jax.ranges import Ranges

_MODULE = flags.DEFINE_string("module", "SequenceO1Config", "As in --config.model.sequence.")
_LENGTHS = flags.DEFINE_list("lengths", ["10000", "30000", "100000"], "Events, ascending.")
_TARGETS = flags.DEFINE_integer("targets", 16, "Targets of the request.", 1)
_SECONDS = flags.DEFINE_float("seconds", 20, "To measure each.")
_WIDTH = 64


def main() -> None:
    """Prints the table."""
    config = config_lib.apply_overrides(RankerConfig(), {"sequence": _MODULE.value}).sequence
    module = config.make(remat=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(module)

    def score(params: Any, inputs: SequenceInput) -> Array:
        return nnx.merge(graph, params)(inputs).summary

    def loss(params: Any, tokens: Array, inputs: SequenceInput) -> Array:
        return jnp.square(score(params, inputs._replace(tokens=tokens))).sum()

    gradients = jax.grad(loss, argnums=(0, 1))
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    rows: list[dict[str, Any]] = []
    for length in map(int, _LENGTHS.value):
        inputs = _request(length)
        row: dict[str, Any] = {"events": length}
        for name, (step, memory) in {
            "score": compiled_step(score, params, inputs),
            "train": compiled_step(gradients, params, inputs.tokens, inputs),
        }.items():
            timing = time_interleaved({name: step}, seconds=_SECONDS.value, clock=clock)[name]
            row |= {f"{name} s": timing.best, f"{name} MB": round(memory / 2**20)}
        rows.append(row)
        print(format_table([row], digits=3), flush=True)
    print(format_table(rows, digits=3))
    first, last = rows[0], rows[-1]
    if first is last:
        return
    for name in ("score s", "train s"):
        exponent = math.log(last[name] / first[name]) / math.log(last["events"] / first["events"])
        print(f"{name} grows as length^{exponent:.2f}")


def _request(length: int) -> SequenceInput:
    rng = np.random.default_rng(0)
    m = _TARGETS.value
    return SequenceInput(
        jnp.asarray(rng.normal(size=(1, length, _WIDTH)), jnp.float32),
        jnp.asarray(rng.normal(size=(1, m, _WIDTH)), jnp.float32),
        jnp.arange(length)[None],
        jnp.full((1, m), length),
        Ranges(jnp.zeros((1, m), jnp.int32), jnp.full((1, m), length, jnp.int32)),
    )


if __name__ == "__main__":
    launch.run(main)
