"""What the kernel benchmarks share: synchronised interleaved timing, GEMM peak, reports."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Step = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one step.

    Attributes:
      best: Fastest repetition: least disturbed by whatever else the machine does.
      median: Median repetition.
    """

    best: float
    median: float


def compiled_step(function: Callable[..., Any], *arguments: Any) -> tuple[Step, int]:
    """Compiles ahead of time.

    Args:
      function: What to time.
      *arguments: Its arguments, on the device.

    Returns:
      A call that starts the computation, and the bytes of temporary memory.
    """
    compiled = jax.jit(function).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    return lambda: compiled(*arguments), memory.temp_size_in_bytes


def time_interleaved(
    steps: Mapping[str, Step], *, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Times steps in turns, so that a noisy neighbour disturbs all of them alike.

    Args:
      steps: Calls by name that return JAX arrays, or nothing once they are done.  Each is called
        once before the clock starts; on accelerators a repetition is ten calls in a row, so that
        starting one overlaps the one before.
      seconds: About how long to measure each; at least three repetitions.
      clock: `time.process_time` measures the CPU time of a single-threaded run, which a shared
        machine disturbs less.
    """
    durations: dict[str, list[float]] = {name: [] for name in steps}
    calls = 1 if jax.default_backend() == "cpu" else 10
    for step in steps.values():
        jax.block_until_ready(step())
    pending = set(steps)
    while pending:
        for name in [n for n in steps if n in pending]:
            began = clock()
            results = None
            for _ in range(calls):
                results = steps[name]()
            jax.block_until_ready(results)
            durations[name].append((clock() - began) / calls)
            if len(durations[name]) >= 3 and calls * sum(durations[name]) >= seconds:
                pending.remove(name)
    return {n: Timing(min(d), float(np.median(d))) for n, d in durations.items()}


def gemm_steps(dtype: Any, width: int) -> dict[str, tuple[Step, float]]:
    """Matrix products whose best rate is the peak: large squares, and the FFN's own shape.

    Returns:
      Calls that start them, and their FLOPs, by name.
    """
    sizes = [(2048, width, 2 * width), (1024,) * 3]
    if jax.default_backend() != "cpu":
        sizes += [(4096,) * 3, (8192,) * 3]
    result = {}
    for n, k, m in sizes:
        rng = np.random.default_rng(0)  # products of constants draw less power, and run faster
        a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((n, k), (k, m)))
        step, _ = compiled_step(jnp.dot, a, b)
        result[f"gemm {n}x{k}x{m}"] = (step, 2.0 * n * k * m)
    return result


def peak_flops(dtype: Any, width: int, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of the fastest of `gemm_steps`, each called often enough to hide the dispatch."""
    steps = gemm_steps(dtype, width)

    def repeated(step: Step) -> Step:
        return lambda: [step() for _ in range(10)]

    timings = time_interleaved({n: repeated(s) for n, (s, _) in steps.items()}, seconds=0.3,
                               clock=clock)  # fmt: skip
    return max(10 * flops / timings[n].best for n, (_, flops) in steps.items())


@dataclasses.dataclass(frozen=True)
class Rates:
    """What this machine does at best, as measured.

    Attributes:
      flops: FLOP/s of matrix products.
      exponentials: float32 exponentials per second.
      bandwidth: Bytes per second that are read or written, of arrays that fit no cache.
    """

    flops: float
    exponentials: float
    bandwidth: float

    def floor(self, flops: float, exponentials: float, num_bytes: float = 0.0) -> float:
        """Seconds that so much work takes at least.

        A CPU core computes products and exponentials with the same units, one after the other; an
        accelerator has units for each. Both read memory meanwhile.
        """
        parts = [flops / self.flops, exponentials / self.exponentials]
        arithmetic = sum(parts) if jax.default_backend() == "cpu" else max(parts)
        return max(arithmetic, num_bytes / self.bandwidth)


def measure_rates(
    dtype: Any, width: int, *, clock: Callable[[], float] = time.perf_counter
) -> Rates:
    """`Rates` of this process's device; products are of `dtype`, see `peak_flops`."""
    on_cpu = jax.default_backend() == "cpu"
    few = jnp.ones((1024, 1024) if on_cpu else (8192, 8192), jnp.float32)
    many = [jnp.ones((2**26 if on_cpu else 2**28,), jnp.float32)]
    exponential, _ = compiled_step(jnp.exp, few)
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no new pages

    def copy() -> Any:
        many[0] = increment(many[0])
        return many[0]

    timed = time_interleaved({"exp": exponential, "copy": copy}, seconds=0.3, clock=clock)
    return Rates(
        peak_flops(dtype, width, clock=clock),
        few.size / timed["exp"].best,
        2 * many[0].nbytes / timed["copy"].best,
    )


def environment() -> dict[str, Any]:
    """Hardware and versions, for every line of a report."""
    model = platform.processor()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        first: dict[str, str] = {}
        for key, value in fields:
            first.setdefault(key.strip(), value.strip())
        names = ("model name", "cpu family", "model")
        model = " ".join(f"{n} {first[n]}" for n in names if n in first)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": jax.devices()[0].device_kind, "cpu": model, "cores": cores,
            "jax": jax.__version__}  # fmt: skip


def write_json_lines(path: str | None, records: list[dict[str, Any]]) -> None:
    """One JSON object a line, each with `environment`; then says where they are."""
    if path:
        shared = environment()
        lines = [json.dumps(shared | record) + "\n" for record in records]
        pathlib.Path(path).write_text("".join(lines), encoding="utf-8")
        print(f"results are in {path}")


def fitted_exponent(lengths: list[int], seconds: list[float]) -> float:
    """Slope of log(seconds) over log(length)."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
