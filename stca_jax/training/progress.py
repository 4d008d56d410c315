"""What a run shows while it trains: a bar on a terminal, else a line in the log now and then."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from tqdm import tqdm

_log = logging.getLogger(__name__)


class Progress:
    """Shows steps, loss and speed; what it shows is measured elsewhere."""

    def __init__(
        self, step: int, num_steps: int, *, is_shown: bool = True, log_every_seconds: float = 60.0
    ):
        """Begins after `step` steps of `num_steps`.

        Args:
          step: Steps done before.
          num_steps: Of the whole run.
          is_shown: False shows nothing, as on all but one of several processes.
          log_every_seconds: Least time between two lines in a log.
        """
        self._num_steps = num_steps
        self._is_shown = is_shown
        self._log_every_seconds = log_every_seconds
        self._unlogged_seconds = math.inf
        self._bar = tqdm(
            desc="Training",
            initial=step,
            total=num_steps,
            unit="step",
            dynamic_ncols=True,
            disable=None if is_shown else True,  # None: unless it is no terminal
        )
        if not self._bar.disable:
            for handler in logging.getLogger().handlers:
                handler.addFilter(self._clear)

    def step(self) -> None:
        """Shows that a step was started; tqdm draws at most ten times a second."""
        self._bar.update()

    def report(
        self, step: int, loss: float | None, speed: Mapping[str, float], seconds: float
    ) -> None:
        """Shows what is known of the steps since the last report.

        Args:
          step: The latest of them.
          loss: Its window's mean, if it has one.
          speed: "steps", "tokens" and "targets" per second; empty while a run compiles.
          seconds: What those steps took.
        """
        shown = [] if loss is None else [f"loss {loss:.4g}"]
        shown += [f"{tqdm.format_sizeof(rate)} {name}/s" for name, rate in speed.items()]
        if not self._bar.disable:
            self._bar.set_postfix_str("  ".join(shown), refresh=False)
            return
        self._unlogged_seconds += seconds
        is_last = step == self._num_steps
        if self._is_shown and (is_last or self._unlogged_seconds >= self._log_every_seconds):
            self._unlogged_seconds = 0.0
            if speed.get("steps", 0) > 0:
                seconds_left = (self._num_steps - step) / speed["steps"]
                shown.append(f"ETA {tqdm.format_interval(seconds_left)}")
            _log.info("%s", "  ".join([f"step {step:,}/{self._num_steps:,}", *shown]))

    def close(self) -> None:
        """Leaves the bar as it is."""
        for handler in logging.getLogger().handlers:
            handler.removeFilter(self._clear)
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _clear(self, record: logging.LogRecord) -> bool:
        """Gives a message of the log a line of its own; the next step draws the bar again."""
        del record
        self._bar.clear()
        return True
