"""Where a run's time and memory go: a clock of phases, device memory, profiler traces.

Besides the means of `StepMetrics` and of the fill, a line of metrics has

    train/{input,step,checkpoint,validation}_seconds  per step; "input" is waiting for a batch, and
                                                      "step" includes compilation in the first line
    train/skipped_steps               how many, if training.on_divergence is "skip"
    speed/{steps,tokens,targets}_per_second           of all that time; not in the first line
    speed/model_flops_per_second      of input and step; what is counted says `flops`
    speed/model_flops_utilization     over the devices' bfloat16 peak, where that is known
    memory/{,peak_}bytes_in_use       of the fullest device, where the backend says
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Which steps to trace with `jax.profiler`; TensorBoard's profile plugin shows them.

    Attributes:
      steps: "10:13" traces steps 10, 11 and 12; None traces none.  The first step of a run is 1,
        and compiles.
    """

    steps: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for anything but "first:stop"."""
        first, _, stop = (self.steps or "1:2").partition(":")
        if not (first.isdigit() and stop.isdigit() and 1 <= int(first) < int(stop)):
            raise ValueError(
                f"steps is {self.steps!r}; expected first:stop with 1 <= first < stop, as in 10:13"
            )

    @property
    def traced(self) -> range:
        """The steps to trace."""
        first, _, stop = (self.steps or "1:1").partition(":")
        return range(int(first), int(stop))


class Profiler:
    """Traces the configured steps into WORKDIR/plugins/profile, on every process its own devices.

    Around the traced steps, and only there, the host waits for the devices.
    """

    def __init__(self, config: ProfileConfig, workdir: str | os.PathLike[str]):
        self._steps = config.traced
        self._workdir = os.fspath(workdir)
        self._tracing = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tracing:  # the run ended within the traced steps
            self._stop()

    @contextlib.contextmanager
    def step(self, step: int, state: object) -> Iterator[None]:
        """Surrounds the dispatch of a step.

        Args:
          step: Its number, from 1.
          state: What the step reads: traces begin once it is there.
        """
        if self._tracing and step not in self._steps:
            jax.block_until_ready(state)
            self._stop()
        if not self._tracing and step in self._steps:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._workdir)
            self._tracing = True
        if not self._tracing:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()


class PhaseClock:
    """Divides the time of a loop among its phases: each lap is what passed since the lap before."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Ends a lap, which was of the given phase."""
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


def device_memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """Bytes of HBM in use now, and at most so far, on the fullest device.

    Empty where the backend does not say, as on CPU.
    """
    stats = [device.memory_stats() or {} for device in devices]
    return {
        f"memory/{name}": max(s[name] for s in stats)
        for name in ("bytes_in_use", "peak_bytes_in_use")
        if all(name in s for s in stats)
    }
