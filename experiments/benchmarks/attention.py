"""The op alone: every implementation and order, forward and backward; block sizes tuned on request.

    python -m stca_jax.experiments.benchmarks.attention --json=attention.jsonl
    python -m stca_jax.experiments.benchmarks.attention --autotune --implementation=mosaic_tpu
    python -m stca_jax.experiments.benchmarks.attention --autotune --config=FILE [--data_dir=DIR]

`--autotune` times the op for a grid of block sizes on the device at hand and prints the default and
the best ones, to be passed as `block_sizes`.  Sizes whose blocks do not fit the device are reported
and skipped.  With `--config`, rows, lengths and ranges are those of a batch of its training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from stca_jax.data.preparation import prepare
from stca_jax.experiment import training_input
from stca_jax.experiments import launch
from stca_jax.experiments.benchmarks import timing
from stca_jax.input.dataset import RequestDataset
from stca_jax.ops.attention import AttentionOptions, cheaper_order, history_layer
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.pallas_tpu import MosaicKernels
from stca_jax.ops.pallas_triton import TritonKernels
from stca_jax.ops.tiles import BlockSizes, make_tiling, targets_per_token
from stca_jax.ranges import Ranges, SharedRanges

_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementation", ["reference", "xla"],
    "What to measure; triton_alone and mosaic_tpu_alone leave the history FFN to XLA.",
)  # fmt: skip
_ORDERS = flags.DEFINE_list("order", ["absorbed", "projected"], "Orders to measure.")
_ROWS = flags.DEFINE_integer("rows", 4, "R.")
_LENGTH = flags.DEFINE_integer("length", 4096, "L.")
_TARGETS = flags.DEFINE_list("targets", ["1", "16", "64", "256"], "M.")
_REQUESTS = flags.DEFINE_integer("requests", 1, "Requests of a row, with equal parts of L and M.")
_FORWARD = flags.DEFINE_bool("forward", False, "Measure the forward pass alone, as in serving.")
_WIDTH = flags.DEFINE_integer("width", 64, "d.")
_HEADS = flags.DEFINE_integer("heads", 4, "h.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
_CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "See train_step.")
_AUTOTUNE = flags.DEFINE_bool("autotune", False, "Search block sizes.")
_JSON = flags.DEFINE_string("json", None, "File for JSON lines.")
_BATCH = 5  # of a training; any
_SHOWN = 5  # block sizes


class _Rows(NamedTuple):
    """Rows to attend over."""

    length: int
    ranges: Ranges

    @property
    def shape(self) -> tuple[int, int]:
        """R, M."""
        rows, num_targets = self.ranges.start.shape
        return rows, num_targets


def _full_rows(num_targets: int) -> _Rows:
    """Rows whose targets read all of the row, or of their request's part of it."""
    requests = jnp.arange(num_targets) * _REQUESTS.value // num_targets
    tokens = _LENGTH.value // _REQUESTS.value
    start = jnp.broadcast_to(requests * tokens, (_ROWS.value, num_targets))
    kind = SharedRanges if _REQUESTS.value == 1 else Ranges
    return _Rows(_LENGTH.value, kind(start, start + tokens))


def _training_rows() -> _Rows:
    """Rows of a batch of the config's training."""
    config = launch.load_config()
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    with contextlib.closing(training_input(config, dataset)) as batches:
        batch = next(itertools.islice(batches, _BATCH, None)).batch
    return _Rows(batch.history_time.shape[1], batch.ranges)


def _rows() -> list[_Rows]:
    if launch.has_config():
        return [_training_rows()]
    return [_full_rows(int(num_targets)) for num_targets in _TARGETS.value]


def _candidates(implementation: str, over: _Rows) -> list[BlockSizes]:
    """Kernels encode all tokens at once; "xla" needs large blocks on an accelerator."""
    if implementation != "xla":
        sizes = itertools.product((512,), (16, 32, 64, 128, 256, 512), (4, 8, 16, 32))
    elif jax.default_backend() == "cpu":
        sizes = itertools.product((512, 1024), (64, 128, 256, 512, 1024), (16, 32, 64, 128, 256))
    else:
        sizes = itertools.product((4096, 16_384, 65_536), (1024, 4096, 16_384), (16, 64))
    if implementation != "xla":
        return [BlockSizes(*s) for s in sizes]
    rows, num_targets = over.shape
    tilings = {make_tiling(rows, over.length, num_targets, BlockSizes(*s)): BlockSizes(*s)
               for s in sizes if s[1] <= s[0]}  # fmt: skip
    return list(tilings.values())


def _step(over: _Rows, implementation: Any, order: Any, sizes: BlockSizes | None) -> Any:
    """The fused layer's gradients in everything, and temporary bytes."""
    rng = np.random.default_rng(0)
    d, h, (rows, num_targets) = _WIDTH.value, _HEADS.value, over.shape

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(d), _DTYPE.value)

    encoder = HistoryEncoder(
        normal(d, 2 * d), normal(d, 2 * d), normal(2 * d, d), jnp.ones(d), jnp.zeros(d)
    )
    heads = (d, h, d // h)
    arguments = (normal(rows, num_targets, h, d // h), normal(rows, over.length, d), encoder,
                 normal(*heads), normal(*heads))  # fmt: skip

    if implementation == "triton_alone":
        implementation = dataclasses.replace(TritonKernels.here(), encodes=False)
    elif implementation == "mosaic_tpu_alone":
        implementation = MosaicKernels(encodes=False)

    def loss(*inputs: Any) -> jax.Array:
        out = history_layer(*inputs, options=AttentionOptions(order, implementation, sizes))
        return out.output.astype(jnp.float32).sum() + out.log_sum_exp.sum()

    step = loss if _FORWARD.value else jax.grad(loss, argnums=tuple(range(5)))
    return timing.compiled_step(step, *arguments, over.ranges)


def _compare() -> list[dict[str, Any]]:
    clock = time.process_time if _CLOCK.value == "cpu" else time.perf_counter
    records = []
    for over in _rows():
        rows, num_targets = over.shape
        calls, memory = {}, {}
        for implementation, order in itertools.product(_IMPLEMENTATIONS.value, _ORDERS.value):
            key = f"{implementation} {order}"
            calls[key], memory[key] = _step(over, implementation, order, None)
        is_shared = isinstance(over.ranges, SharedRanges)
        readers = targets_per_token(over.length, num_targets, is_shared=is_shared)
        chosen = cheaper_order(readers, _HEADS.value, _WIDTH.value)
        for key, measured in timing.time_interleaved(calls, seconds=1, clock=clock).items():
            ms = 1e3 * measured.best / rows
            records.append({"step": key, "L": over.length, "m": num_targets,
                            "ms_per_request": ms, "temp_mb": memory[key] / 1e6,
                            "chosen_order": chosen})  # fmt: skip
            print(f"m={num_targets:<5d} {key:22s} {ms:9.4g} ms/request  "
                  f"{memory[key] / 1e6:8.1f} MB   cost model: {chosen}", flush=True)  # fmt: skip
    return records


def _autotune() -> list[dict[str, Any]]:
    clock = time.process_time if _CLOCK.value == "cpu" else time.perf_counter
    records = []
    searched = itertools.product(_IMPLEMENTATIONS.value, _ORDERS.value, _rows())
    for implementation, order, over in searched:
        rows, num_targets = over.shape
        calls: dict[str, Any] = {}
        for sizes in (None, *_candidates(implementation, over)):
            name = repr(sizes) if sizes else "default"
            try:
                calls[name], _ = _step(over, implementation, order, sizes)
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                print(f"{sizes}: {str(error).splitlines()[0]}", flush=True)
        timings = timing.time_interleaved(calls, seconds=0.3, clock=clock)
        ms = {name: 1e3 * t.best / rows for name, t in timings.items()}
        print(f"{implementation} {order} L={over.length} m={num_targets}")
        best_first = sorted(ms, key=lambda name: ms[name])
        for name in dict.fromkeys(["default", *best_first[:_SHOWN]]):
            print(f"  {ms[name]:9.4g} ms  {name}", flush=True)
        records += [{"step": implementation, "order": order, "L": over.length, "m": num_targets,
                     "block_sizes": name, "ms_per_request": value}
                    for name, value in ms.items()]  # fmt: skip
    return records


def main() -> None:
    """Measures, prints, and writes."""
    print(timing.environment())
    timing.write_json_lines(_JSON.value, _autotune() if _AUTOTUNE.value else _compare())


if __name__ == "__main__":
    launch.run(main, takes_config=True)
