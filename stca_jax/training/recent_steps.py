"""What the host remembers of recent steps, and what it reports of them."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from stca_jax.errors import UserError
from stca_jax.input.pipeline import InputElement
from stca_jax.models.sequence import SequenceCost
from stca_jax.training.flops import chip_of
from stca_jax.training.metrics_writer import MetricsWriter
from stca_jax.training.monitoring import PhaseClock, device_memory
from stca_jax.training.progress import Progress
from stca_jax.training.train_step import StepMetrics, TrainingConfig

_MOST_SKIPPED = 50  # steps in a row; a run that skips more learns nothing


class _Step(NamedTuple):
    """What the host remembers of a step until its metrics are fetched."""

    step: int
    metrics: StepMetrics
    element: InputElement


def _has_ended(step: _Step) -> bool:
    return step.metrics.loss.is_ready()  # type: ignore[attr-defined]  # in C++, unknown to mypy


class RecentSteps:
    """Steps whose metrics are still on the device.

    A window of steps is fetched when the next one is full, so that fetching waits for no step.

    Attributes:
      clock: Of the loop; its laps since the last report are averaged over the steps reported.
    """

    def __init__(
        self,
        config: TrainingConfig,
        flops: SequenceCost,
        num_shares: int,
        writer: MetricsWriter,
        progress: Progress,
    ):
        """Starts the clock.

        Args:
          config: What to report, and what to do about steps that diverge.
          flops: Of the model that is trained.
          num_shares: Shares of a global batch, of which this process reads one.
          writer: Gets the lines of metrics.
          progress: Shows the steps, and of the lines the loss and the speed.
        """
        self.clock = PhaseClock()
        self._writer = writer
        self._progress = progress
        self._num_shares = num_shares
        self._training = config
        self._flops = flops
        self._steps: collections.deque[_Step] = collections.deque()
        self._timed_step = 0  # the last one whose time has been reported
        self._is_compiled = False  # by the first report, whose time the compilation is part of
        self._num_skipped = 0  # in a row

    def add(self, step: int, metrics: StepMetrics, element: InputElement) -> None:
        """Remembers a step that was started, and of its batch what is reported."""
        batch = element.batch.replace(
            history={}, target={}, request={}, history_time=element.batch.history_time[:, :0]
        )
        self._steps.append(_Step(step, metrics, element._replace(batch=batch)))
        self._progress.step()

    def report(self, *, everything: bool) -> None:
        """Writes the mean of each full window, once it is one window old, or of all that is left.

        Raises:
          UserError: a step diverged, or where they are skipped `_MOST_SKIPPED` in a row; names the
            step and its requests.
        """
        size = self._training.log_every_steps
        windows: list[list[_Step]] = []
        while self._steps and (everything or len(self._steps) >= 2 * size):
            windows.append([self._steps.popleft() for _ in range(min(size, len(self._steps)))])
        summaries = [self._summarise(window) for window in windows]
        if not windows:
            return
        # Windows reported together are timed together: the first of them ended unseen.
        self.clock.lap("step")
        laps = self.clock.take()
        timed = self._ended_since(windows)
        speed = self._speed(timed, laps) if self._is_compiled else {}
        self._is_compiled = True
        timing = self._timing(len(timed), laps) | device_memory(jax.local_devices())
        named = {f"speed/{name}_per_second": value for name, value in speed.items()}
        if speed:
            named |= self._utilization(timed, laps)
        for window, summary in zip(windows, summaries, strict=True):
            self._writer.write(window[-1].step, summary | named | timing)
        loss = summaries[-1].get("train/loss")
        self._progress.report(windows[-1][-1].step, loss, speed, sum(laps.values()))

    def _ended_since(self, windows: list[list[_Step]]) -> list[_Step]:
        """Steps that ended since the last report: not those of its windows, if the device is quick.

        Else the last windows of a run would seem faster, and the first after a checkpoint slower.
        """
        reported = [step for window in windows for step in window]
        others = itertools.takewhile(_has_ended, self._steps)
        timed = [s for s in (*reported, *others) if s.step > self._timed_step]
        self._timed_step = max([self._timed_step, *(s.step for s in timed)])
        return timed

    def _summarise(self, window: list[_Step]) -> dict[str, float]:
        """Means over the steps of a window that were not skipped."""
        fetched = jax.device_get([s.metrics for s in window])
        diverged = [bool(m.diverged) for m in fetched]
        is_skipping = self._training.on_divergence == "skip"
        for step, metrics in zip(window, fetched, strict=True):
            self._num_skipped = self._num_skipped + 1 if metrics.diverged else 0
            if metrics.diverged and (not is_skipping or self._num_skipped == _MOST_SKIPPED):
                raise UserError(
                    _describe_divergence(step, metrics, self._training, self._num_skipped)
                )
        kept = [m for m in fetched if not m.diverged]
        scalars = [m.scalars() for m in kept]
        columns = {n: [s[n] for s in scalars] for n in (scalars[0] if scalars else ())}
        fills = [s.element.fill.metrics() for s in window]
        columns |= {n: [f[n] for f in fills] for n in fills[0]}
        summary = {f"train/{name}": float(np.mean(values)) for name, values in columns.items()}
        if is_skipping:
            summary["train/skipped_steps"] = sum(diverged)
        return summary

    @staticmethod
    def _timing(num_steps: int, laps: Mapping[str, float]) -> dict[str, float]:
        """Where the time since the last report went, per step."""
        return {
            f"train/{phase}_seconds": laps.get(phase, 0.0) / max(1, num_steps)
            for phase in ("input", "step", "checkpoint", "validation")
        }

    @staticmethod
    def _speed(timed: list[_Step], laps: Mapping[str, float]) -> dict[str, float]:
        """What was done a second of all the time since the last report."""
        fills = [step.element.fill for step in timed]
        counts = {
            "steps": len(timed),
            "tokens": sum(fill.tokens for fill in fills),
            "targets": sum(fill.targets for fill in fills),
        }
        return {name: count / sum(laps.values()) for name, count in counts.items()}

    def _utilization(self, timed: list[_Step], laps: Mapping[str, float]) -> dict[str, float]:
        """What the devices made of the time of input and step."""
        rate = sum(self._flops_of(step) for step in timed) / (laps["input"] + laps["step"])
        found = {"speed/model_flops_per_second": rate}
        devices = jax.devices()
        if chip := chip_of(devices[0].device_kind):
            found["speed/model_flops_utilization"] = rate / (chip.flops * len(devices))
        return found

    def _flops_of(self, step: _Step) -> float:
        """Of the global batch; every share of it is taken to have as long ranges as ours."""
        batch, fill = step.element.batch, step.element.fill
        lengths = np.where(batch.target_mask, batch.history_end - batch.history_start, 0.0)
        pairs = lengths.sum() * self._num_shares
        of_requests = lengths * (lengths + 1) / (2 * batch.num_request_targets)
        token_pairs = of_requests.sum() * self._num_shares
        return self._flops.train_step(fill.tokens, fill.targets, pairs, token_pairs)


def _describe_divergence(
    step: _Step, metrics: StepMetrics, training: TrainingConfig, num_skipped: int
) -> str:
    batch = step.element.batch
    ids = np.unique(batch.request_id[batch.target_mask]).tolist()
    shown = ", ".join(map(str, ids[:20])) + (", …" if len(ids) > 20 else "")
    exceeds = training.max_gradient_norm and training.max_gradient_norm < metrics.gradient_norm
    what = (
        f"exceeds max_gradient_norm {training.max_gradient_norm:g}" if exceeds else "is not finite"
    )
    if num_skipped > 1:
        what += f", nor was any of the {num_skipped - 1} steps before it usable"
    return (
        f"step {step.step} {what} (loss {metrics.loss:.4g}, gradient norm "
        f"{metrics.gradient_norm:.4g}, of tables {metrics.table_gradient_norm:.4g}, parameter norm "
        f"{metrics.parameter_norm:.4g}); training "
        f"stopped, and the last checkpoint is from before it. The batch held {len(ids)} requests "
        f"with ids {shown}. Look for odd feature "
        "values there, lower optimizer.learning_rate, or lower optimizer.clip_norm"
    )
