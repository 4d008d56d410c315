"""Train steps on the same batch with item tables of growing size: time should not grow with them.

    python -m stca_jax.experiments.benchmarks.tables --json=tables.jsonl

Prints the time of a step for each size, over that of the smallest, and the temporary memory of the
step next to the table itself.  The batch touches the same number of rows, spread over the table.
Several CPU devices: XLA_FLAGS=--xla_force_host_platform_device_count=8.

Measured with --width=16 --seconds=4 on 2 cores of an AMD EPYC (AVX2) server, 2026-11-25, beside
other jobs: 28.0 ms at 100,000 rows, 28.4 ms at 10,000,000 (1.01 times), 11 MB of temporary memory.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from absl import flags

from stca_jax.batch import RequestBatch, empty_batch
from stca_jax.experiments import launch
from stca_jax.experiments.benchmarks import timing
from stca_jax.models.embedding import EmbeddingConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.schema import Schema
from stca_jax.training.optimizer import OptimizerConfig
from stca_jax.training.sharding import MeshConfig, device_batch, make_mesh
from stca_jax.training.train_step import Program, TrainingConfig

_ROWS = flags.DEFINE_list("rows", ["100000", "1000000", "10000000"], "Sizes of the vocabulary.")
_WIDTH = flags.DEFINE_integer("width", 32, "Width of the table and of the model.")
_BATCH = flags.DEFINE_integer("batch", 8, "Rows of the batch, one request each.")
_LENGTH = flags.DEFINE_integer("length", 1_024, "History tokens of a row.")
_TARGETS = flags.DEFINE_integer("targets", 16, "Targets of a request.")
_TABLES = flags.DEFINE_enum("tables", "adagrad", ["adagrad", "adam"], "Row-wise optimizer.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Measuring time per size.")
_JSON = flags.DEFINE_string("json", None, "File for JSON lines.")


def _batch(schema: Schema, num_items: int) -> RequestBatch:
    """Full rows; the smallest vocabulary's ids, spread over all of a larger one."""
    smallest = min(map(int, _ROWS.value))
    rng = np.random.default_rng(0)
    batch = empty_batch(schema, _BATCH.value, _LENGTH.value, _TARGETS.value, shared_history=False)
    for ids in (batch.history["item"], batch.target["item"]):
        ids[:] = rng.integers(0, smallest, ids.shape) * (num_items // smallest)
    batch.history_time[:] = np.arange(_LENGTH.value)
    batch.history_end[:] = _LENGTH.value
    batch.request_time[:] = _LENGTH.value + 1
    batch.label[:] = rng.integers(0, 2, batch.label.shape)
    batch.target_mask[:] = True
    batch.num_request_targets[:] = _TARGETS.value
    return batch


def _program(num_items: int) -> tuple[Program, RequestBatch]:
    schema = Schema(
        history=("item",),
        target=("item",),
        request=(),
        vocabularies={"item": num_items},
        tasks=("click",),
    )
    model = RankerConfig(
        sequence=StcaConfig(width=_WIDTH.value, num_layers=2, num_heads=4),
        embedding=EmbeddingConfig(item_width=_WIDTH.value),
    )
    batch = _batch(schema, num_items)
    program = Program(
        model,
        schema,
        OptimizerConfig(tables="adam" if _TABLES.value == "adam" else "adagrad"),
        TrainingConfig(),
        make_mesh(MeshConfig()),
        batch,
        num_steps=1_000_000,
        seed=0,
    )
    return program, device_batch(batch, program.batch_shardings)


class _Trainer:
    """Takes a step at each call, on the same batch."""

    def __init__(self, num_items: int):
        self.program, self.batch = _program(num_items)
        self.state = self.program.initialize()

    def __call__(self) -> None:
        self.state, metrics = self.program.train_step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))

    def memory(self) -> tuple[int, int]:
        """Temporary bytes of a step, and bytes of the table, on one device."""
        step: Any = self.program.train_step
        mesh = self.program.batch_shardings.history_time.mesh
        with jax.set_mesh(mesh):
            compiled = step.__wrapped__.lower(self.state, self.batch).compile()
        table = self.state.tables["item"].addressable_shards[0].data
        return compiled.memory_analysis().temp_size_in_bytes, table.nbytes


def main() -> None:
    """Measures all sizes in turns."""
    trainers = {rows: _Trainer(int(rows)) for rows in _ROWS.value}
    memory = {rows: trainer.memory() for rows, trainer in trainers.items()}
    timings = timing.time_interleaved(
        trainers,
        seconds=_SECONDS.value,
    )
    smallest = timings[min(timings, key=int)]
    records = [
        {
            "rows": int(rows),
            "best_ms": 1e3 * measured.best,
            "median_ms": 1e3 * measured.median,
            "best_over_smallest": measured.best / smallest.best,
            "median_over_smallest": measured.median / smallest.median,
            "temp_mb": memory[rows][0] / 1e6,
            "table_mb": memory[rows][1] / 1e6,
            "devices": jax.device_count(),
            "optimizer": _TABLES.value,
        }
        for rows, measured in timings.items()
    ]
    for r in records:
        print(
            f"{r['rows']:>12,} rows  {r['best_ms']:8.1f} ms best  {r['median_ms']:8.1f} ms median  "
            f"ratio {r['best_over_smallest']:.2f} best, {r['median_over_smallest']:.2f} median  "
            f"temp {r['temp_mb']:,.0f} MB, table {r['table_mb']:,.0f} MB"
        )
    print(timing.environment())
    timing.write_json_lines(_JSON.value, records)


if __name__ == "__main__":
    launch.run(main)
