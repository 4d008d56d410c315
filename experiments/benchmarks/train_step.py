"""The ladder: forward and backward of the sequence module, one line per cumulative improvement.

    taskset -c 0 python -m stca_jax.experiments.benchmarks.train_step --json=train_step.jsonl

Steps: one history per impression · one per request, einsum · order by the cost model · tiled ·
fused · the device's kernels · ragged lengths packed into rows; with PyTorch installed
(`pip install -e ".[bench]"`), its TransformerEncoder with the targets appended and STCA with SDPA
beside it.  GFLOP/s count the
model's FLOPs, never recomputation; the peak is the best matrix product of the same run.  The floor
is what the model's products, exponentials and bytes take at the best rates of the same run.
Runs unchanged on GPU and TPU; `--dtype=bfloat16` there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array

from stca_jax.experiments import launch
from stca_jax.experiments.benchmarks import sequence_modules, timing
from stca_jax.ops.attention import (
    AttentionOptions,
    cheaper_order,
    history_layer,
    target_to_history_attention,
)
from stca_jax.ops.encoder import encode_history
from stca_jax.ops.implementation import Order
from stca_jax.ranges import Ranges

_LENGTHS = flags.DEFINE_list("lengths", ["256", "1024", "4096", "10240"], "History lengths L.")
_LONG = flags.DEFINE_list("long_lengths", ["32768", "102400"], "Lengths for the fused step only.")
_TARGETS = flags.DEFINE_list("targets", ["1", "16", "64", "256"], "Targets per request m.")
_REQUESTS = flags.DEFINE_integer("requests", 8, "Requests per step at the longest length.")
_LAYERS = flags.DEFINE_integer("layers", 2, "N.")
_WIDTH = flags.DEFINE_integer("width", 64, "d.")
_HEADS = flags.DEFINE_integer("heads", 4, "h.")
_RATIO = flags.DEFINE_integer("ffn_ratio", 2, "r.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
_SECONDS = flags.DEFINE_float("seconds", 1.0, "Measuring time per step.")
_CLOCK = flags.DEFINE_enum(
    "clock", "wall", ["wall", "cpu"], "cpu: process time, for one core of a shared machine."
)
_TORCH = flags.DEFINE_bool("torch", True, "Compare with PyTorch if it is installed.")
_JSON = flags.DEFINE_string("json", None, "File for JSON lines.")
_PLOT = flags.DEFINE_string("plot", None, "File for a plot of ms/request over length.")


_KERNELS = {"gpu": "triton", "tpu": "mosaic_tpu"}


def _clock() -> Callable[[], float]:
    return time.process_time if _CLOCK.value == "cpu" else time.perf_counter


def _other(order: Order) -> Order:
    return "projected" if order == "absorbed" else "absorbed"


def _attention_path(order: Order, implementation: Any) -> sequence_modules.HistoryPath:
    def path(query, tokens, encoder, w_key, w_value, ranges):
        return target_to_history_attention(
            query, encode_history(encoder, tokens), w_key, w_value, ranges,
            options=AttentionOptions(order, implementation),
        ).output  # fmt: skip

    return path


def _fused_path(order: Order, implementation: Any = None) -> sequence_modules.HistoryPath:
    def path(*arguments):
        return history_layer(*arguments, options=AttentionOptions(order, implementation)).output

    return path


def _random(*shape: int) -> Array:
    values = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(values, _DTYPE.value)


def _layers() -> list[sequence_modules.Layer]:
    return sequence_modules.init_layers(
        _LAYERS.value, _WIDTH.value, _HEADS.value, _RATIO.value, jnp.dtype(_DTYPE.value)
    )


def _steps(length: int, num_targets: int, requests: int, only_fused: bool) -> dict[str, Any]:
    """Name to (arguments of `request_step`, requests per step)."""
    tokens = _random(requests, length, _WIDTH.value)
    targets = _random(requests, num_targets, _WIDTH.value)
    start = jnp.zeros((requests, num_targets), jnp.int32)
    order = cheaper_order(num_targets, _HEADS.value, _WIDTH.value)
    ranges = Ranges(start, start + length)
    shared = (tokens, targets, ranges)
    fused = {"fused": ((*shared, _fused_path(order, "xla")), requests)}
    if jax.default_backend() in _KERNELS:
        name = _KERNELS[jax.default_backend()]
        fused[f"kernels, {name}"] = ((*shared, _fused_path(order, name)), requests)
    if only_fused:
        return fused
    impressions = (
        jnp.repeat(tokens[:1], num_targets, 0),
        targets[0][:, None],
        Ranges(*(x[0][:, None] for x in ranges)),
        _attention_path("absorbed", "reference"),
    )
    steps = {
        "request-level, einsum": _attention_path(_other(order), "reference"),
        "order by cost model": _attention_path(order, "reference"),
        "tiled": _attention_path(order, "xla"),
    }
    middle = {name: ((*shared, path), requests) for name, path in steps.items()}
    return {"per impression": (impressions, 1)} | middle | fused


def _work(length: int, num_targets: int, rates: timing.Rates) -> tuple[float, float]:
    """FLOPs of a request, and the seconds that it takes at least."""
    shape = (length, num_targets, _LAYERS.value, _WIDTH.value, _HEADS.value, _RATIO.value)
    flops = sequence_modules.model_flops(*shape)
    exponentials = sequence_modules.model_exponentials(*shape)
    itemsize = jnp.dtype(_DTYPE.value).itemsize
    num_bytes = sequence_modules.model_bytes(length, _LAYERS.value, _WIDTH.value, itemsize)
    return flops, rates.floor(flops, exponentials, num_bytes)


def _measure(
    length: int, num_targets: int, only_fused: bool, rates: timing.Rates
) -> list[dict[str, Any]]:
    requests = max(1, min(_REQUESTS.value * max(1, 10_240 // length), 64))
    if length * requests > 10_240 * _REQUESTS.value:
        requests = max(1, 10_240 * _REQUESTS.value // length)
    layers = _layers()
    calls: dict[str, timing.Step] = {}
    memory: dict[str, int] = {}
    per_step: dict[str, int] = {}
    for name, (arguments, count) in _steps(length, num_targets, requests, only_fused).items():
        function, inputs = sequence_modules.request_step(layers, *arguments)
        calls[name], memory[name] = timing.compiled_step(function, *inputs)
        per_step[name] = count
    if _TORCH.value and not only_fused and num_targets == 16:
        count = 1 if jax.default_backend() == "cpu" else requests  # a CPU needs no batch
        for name, call in sequence_modules.torch_steps(
            count, length, num_targets, _LAYERS.value, _WIDTH.value, _HEADS.value, _RATIO.value,
            dtype=_DTYPE.value, num_threads=timing.environment()["cores"],
        ).items():  # fmt: skip
            calls[name], per_step[name] = call, count
    timings = timing.time_interleaved(calls, seconds=_SECONDS.value, clock=_clock())
    peak = max(rates.flops, timing.peak_flops(_DTYPE.value, _WIDTH.value, clock=_clock()))
    flops, floor = _work(length, num_targets, dataclasses.replace(rates, flops=peak))
    slowest = timings["per impression"].best if not only_fused else None
    records = []
    for name, measured in timings.items():
        seconds = measured.best / per_step[name]
        ours = not name.startswith("PyTorch Transformer")
        records.append({
            "step": name, "L": length, "m": num_targets, "requests": per_step[name],
            "ms_per_request": 1e3 * seconds,
            "median_ms_per_request": 1e3 * measured.median / per_step[name],
            "gflops": flops / seconds / 1e9 if ours else None,
            "fraction_of_peak": flops / seconds / peak if ours else None,
            "fraction_of_floor": floor / seconds if ours else None,
            "peak_gflops": peak / 1e9,
            "temp_mb": memory[name] / 1e6 if name in memory else None,
            "speed_up": slowest / seconds if slowest else None,
        })  # fmt: skip
    return records


def _measure_packed() -> list[dict[str, Any]]:
    """Heavy-tailed lengths packed into rows, against one padded row per request."""
    longest, m = max(int(x) for x in _LENGTHS.value), 16
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    filled, packed_rows = 0, 2
    starts: list[list[int]] = [[]]
    while True:
        n = int(np.clip(rng.lognormal(np.log(longest / 6), 1.0), 16, longest))
        if filled + n > longest:
            if len(starts) == packed_rows:
                break
            starts.append([])
            filled = 0
        starts[-1].append(filled)
        lengths.append(n)
        filled += n
    slots = max(map(len, starts))
    remaining = iter(lengths)
    start = np.zeros((packed_rows, slots), np.int32)
    end = np.zeros((packed_rows, slots), np.int32)
    for row, values in enumerate(starts):
        for slot, value in enumerate(values):
            start[row, slot], end[row, slot] = value, value + next(remaining)
    packed_start, packed_end = (jnp.repeat(jnp.asarray(x), m, 1) for x in (start, end))
    padded_end = jnp.repeat(jnp.asarray(lengths)[:, None], m, 1)
    full_end = jnp.full_like(padded_end, longest)
    zeros = jnp.zeros_like(padded_end)
    width, count = _WIDTH.value, len(lengths)
    fused = _fused_path(cheaper_order(m, _HEADS.value, width))
    layers = _layers()
    rows, targets = _random(count, longest, width), _random(count, m, width)
    cases = {
        "padded, all rows full": (rows, targets, Ranges(zeros, full_end), fused),
        "padded, ranges skipped": (rows, targets, Ranges(zeros, padded_end), fused),
        "packed": (
            rows[:packed_rows], _random(packed_rows, slots * m, width),
            Ranges(packed_start, packed_end), fused,
        ),
    }  # fmt: skip
    calls = {}
    for name, arguments in cases.items():
        function, inputs = sequence_modules.request_step(layers, *arguments)
        calls[name], _ = timing.compiled_step(function, *inputs)
    timings = timing.time_interleaved(calls, seconds=_SECONDS.value, clock=_clock())
    padded = timings["padded, all rows full"].best
    share = sum(lengths) / (count * longest)
    return [
        {"step": name, "L": longest, "m": m, "requests": count,
         "ms_per_request": 1e3 * measured.best / count,
         "cost_over_padded": measured.best / padded, "real_over_padded_tokens": share,
         "cost_over_token_share": measured.best / padded / share}
        for name, measured in timings.items()
    ]  # fmt: skip


def _show(record: dict[str, Any]) -> None:
    fields = [f"{record['step']:46s} L={record['L']:<7d} m={record['m']:<5d}"]
    fields.append(f"{record['ms_per_request']:9.4g} ms/request")
    for name, text in (("gflops", "{:6.1f} GFLOP/s"), ("fraction_of_peak", "{:5.1%} of peak"),
                       ("fraction_of_floor", "{:5.1%} of floor"),
                       ("temp_mb", "{:7.1f} MB"), ("speed_up", "{:6.1f}x"),
                       ("cost_over_padded", "{:6.3f} of the padded cost"),
                       ("real_over_padded_tokens", "{:6.3f} of its tokens")):  # fmt: skip
        if record.get(name) is not None:
            fields.append(text.format(record[name]))
    print("  ".join(fields), flush=True)


def _plot(records: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    chosen = [r for r in records if r.get("m") == 16 and "fraction_of_peak" in r]
    for name in dict.fromkeys(r["step"] for r in chosen):
        points = [(r["L"], r["ms_per_request"]) for r in chosen if r["step"] == name]
        axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="history length", ylabel="ms per request, forward + backward")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Measures, prints, and writes."""
    print(timing.environment())
    rates = timing.measure_rates(_DTYPE.value, _WIDTH.value, clock=_clock())
    print(f"products {rates.flops / 1e9:.4g} GFLOP/s ({_DTYPE.value}), exponentials "
          f"{rates.exponentials / 1e9:.3g} G/s, memory {rates.bandwidth / 1e9:.4g} GB/s",
          flush=True)  # fmt: skip
    records: list[dict[str, Any]] = [{"step": "rates"} | dataclasses.asdict(rates)]
    points = [(int(x), int(m), False) for m in _TARGETS.value for x in _LENGTHS.value]
    points += [(int(x), 16, True) for x in _LONG.value]
    for length, num_targets, only_fused in points:
        for record in _measure(length, num_targets, only_fused, rates):
            records.append(record)
            _show(record)
        jax.clear_caches()
    for record in _measure_packed():
        records.append(record)
        _show(record)
    fused = [r for r in records if r["step"] == "fused" and r["m"] == 16 and r["L"] >= 1000]
    if len(fused) > 1:
        exponent = timing.fitted_exponent(
            [r["L"] for r in fused], [r["ms_per_request"] for r in fused]
        )
        print(f"exponent of the fused step in L, from {fused[0]['L']}: {exponent:.3f}")
        records.append({"step": "exponent in L", "value": exponent})
    if _PLOT.value:
        _plot(records, _PLOT.value)
        print(f"the plot is in {_PLOT.value}")
    timing.write_json_lines(_JSON.value, records)


if __name__ == "__main__":
    launch.run(main)
