"""Writes a run's scalars to JSON lines, TensorBoard and Weights & Biases, and shows its progress.

Every point stands once in each output, even when a run is killed and goes on from an older
checkpoint: a writer that starts at step s first drops what its predecessor wrote after s. So one
directory has one writer at a time.
"""

import dataclasses
import datetime
import json
import logging
import math
import operator
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from stca_jax.files import replacing

_log = logging.getLogger(__name__)
_RESERVED = ("step", "time")


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Where Weights & Biases puts the run; it needs `pip install -e '.[wandb]'`.

    Attributes:
      project: project the run belongs to.
      entity: user or team; None is the account's default.
      name: name to show; None lets Weights & Biases choose one.
      mode: "offline" writes below the run's directory, for a later `wandb sync`.
    """

    project: str
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


class MetricsWriter:
    """Writes scalars and shows progress; on all but the main process it does neither.

    In `workdir`:

    - `metrics.jsonl`: one line {"step": 10, "time": 1.7e9, "train/loss": 0.5} per `write`. NaN and
      infinities, which JSON does not have, become null; TensorBoard shows which it was.
    - `events.out.tfevents.*`: TensorBoard's event files, one per writer.
    - `wandb_run_id.txt`, with `wandb` only: how a resumed run finds itself again. Weights & Biases
      cannot drop points: of a step written twice it keeps the first.

    Each `write` has reached the operating system when it returns, so a killed process loses none.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        start_step: int = 0,
        total_steps: int | None = None,
        wandb: WandbConfig | None = None,
        config: Mapping[str, Any] | None = None,
        is_main_process: bool = True,
        log_every_seconds: float = 60.0,
    ):
        """Opens the outputs and drops what a previous writer wrote after `start_step`.

        Args:
          workdir: directory for the files; it is made if need be.
          start_step: the step of the checkpoint this run goes on from, whose own metrics stay; at 0
            nothing of a previous run stays.
          total_steps: the run's last step, for the remaining time.
          wandb: also log to Weights & Biases.
          config: the run's settings by name, shown by Weights & Biases.
          is_main_process: whether this process writes; of several hosts' processes only one may.
          log_every_seconds: least time between two progress lines in a log (not on a terminal).

        Raises:
          ImportError: `wandb` is given but Weights & Biases is not installed.
        """
        self._progress = _Progress(start_step, total_steps, is_main_process, log_every_seconds)
        self._outputs: list[_Output] = []
        if not is_main_process:
            return
        directory = Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        first_step = start_step + 1 if start_step else 0
        if wandb is not None:  # First, since it can fail, and nothing is dropped yet.
            self._outputs.append(_WandbRun(directory, wandb, config or {}, first_step))
        self._outputs.append(_JsonLines(directory / "metrics.jsonl", first_step))
        self._outputs.append(_EventFile(directory, first_step))

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes scalars of one step; a step may be written in parts, under different names.

        Args:
          step: number of training steps done.
          scalars: Python or NumPy scalars by name. Device arrays are refused: fetching them here
            would stall the device unseen.

        Raises:
          TypeError: a value is no such scalar.
          ValueError: a name is "step" or "time".
        """
        step = operator.index(step)
        values = {name: _scalar(name, value) for name, value in scalars.items()}
        now = time.time()
        for output in self._outputs:
            output.write(step, now, values)

    def progress(
        self,
        step: int,
        *,
        loss: float | None = None,
        steps: int | None = None,
        tokens: int | None = None,
        targets: int | None = None,
    ) -> dict[str, float]:
        """Shows the progress: on a terminal as one line that changes, else now and then in the log.

        Args:
          step: number of training steps done.
          loss: the latest loss.
          steps: training steps done since the last call, if `step` is an earlier one.
          tokens: history tokens processed since the last call.
          targets: targets processed since the last call.

        Returns:
          The speed since the last call, to `write` if wanted: "speed/steps_per_second" and, where
          given, "speed/tokens_per_second" and "speed/targets_per_second". Empty on the first call,
          which starts the clock: what comes before is compilation.
        """
        return self._progress.update(step, loss, steps, tokens, targets)

    def show_step(self, step: int) -> None:
        """Between two calls of `progress`: the step, on a terminal, at most once a second.

        Args:
          step: number of training steps started.
        """
        self._progress.show_step(step)

    def flush(self) -> None:
        """Makes what was written survive a crash of the machine, not only of the process."""
        for output in self._outputs:
            output.flush()

    def close(self) -> None:
        """Closes the outputs; a second call does nothing."""
        self._progress.close()
        while self._outputs:
            self._outputs.pop().close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Output(Protocol):
    def write(self, step: int, now: float, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    def __init__(self, path: Path, first_step: int):
        if path.exists():
            _drop_lines(path, first_step)
        self._file = path.open("ab")

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        line = json.dumps({"step": step, "time": round(now, 3), **finite}, allow_nan=False)
        # One buffered write and a flush: the line reaches the file in one system call.
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _drop_lines(path: Path, first_step: int) -> None:
    """Removes the lines from `first_step` on, and a line that a killed writer left unfinished."""
    unreadable = 0
    with path.open("rb") as old, replacing(path) as new:
        for line in old:
            try:
                keep = json.loads(line)["step"] < first_step and line.endswith(b"\n")
            except (ValueError, KeyError, TypeError):
                keep, unreadable = False, unreadable + 1
            if keep:
                new.write(line)
    if unreadable:
        _log.warning("%s: dropped %d unfinished or damaged line(s)", path, unreadable)


class _EventFile:
    """A TensorBoard event file; the library's own writer would import TensorFlow if it is there."""

    def __init__(self, directory: Path, first_step: int):
        # TensorBoard reads a directory's files in the order of their names, so a restart within
        # the same second must not sort before its predecessor.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("ab")
        self._records = RecordWriter(self._file)
        self._append(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        # Makes TensorBoard drop what earlier files hold from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        points = [summary_pb2.Summary.Value(tag=n, simple_value=v) for n, v in values.items()]
        summary = summary_pb2.Summary(value=points)
        self._append(event_pb2.Event(wall_time=now, step=step, summary=summary))

    def _append(self, event: event_pb2.Event) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _WandbRun:
    def __init__(
        self, directory: Path, wandb: WandbConfig, config: Mapping[str, Any], first_step: int
    ):
        try:
            from wandb import init
        except ImportError as e:
            raise ImportError(
                f"the run is to be logged to Weights & Biases ({wandb}), which is not installed: "
                "pip install -e '.[wandb]', or set wandb to none"
            ) from e
        id_file = directory / "wandb_run_id.txt"
        is_resumed = first_step > 0 and id_file.exists()
        run_id = id_file.read_text() if is_resumed else uuid.uuid4().hex
        self._run = init(
            project=wandb.project,
            entity=wandb.entity,
            name=wandb.name,
            mode=wandb.mode,
            dir=str(directory),
            config=dict(config),
            allow_val_change=True,  # A resumed run may have a longer total_steps.
            id=run_id,
            resume="allow",
        )
        id_file.write_text(run_id)

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        del now  # Weights & Biases keeps its own time.
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Does nothing: Weights & Biases sends on its own."""

    def close(self) -> None:
        self._run.finish()


class _Progress:
    """Measures the speed between calls and shows it."""

    def __init__(self, start_step: int, total_steps: int | None, show: bool, log_every: float):
        self._total_steps = total_steps
        self._show = show
        self._log_every = log_every
        self._is_terminal = sys.stderr.isatty()
        self._step = start_step
        self._time: float | None = None
        self._log_time = -math.inf
        self._shown_time = -math.inf
        self._latest: tuple[float | None, dict[str, float]] = (None, {})

    def update(
        self,
        step: int,
        loss: float | None,
        steps: int | None,
        tokens: int | None,
        targets: int | None,
    ) -> dict[str, float]:
        now = time.monotonic()
        steps = step - self._step if steps is None else steps
        counts = {"steps": steps, "tokens": tokens, "targets": targets}
        speed: dict[str, float] = {}
        if self._time is not None and now > self._time:
            speed = {n: c / (now - self._time) for n, c in counts.items() if c is not None}
        self._step, self._time = step, now
        self._latest = (loss, speed)
        if self._show:
            self._print(now, _progress_line(step, self._total_steps, loss, speed))
        return {f"speed/{name}_per_second": value for name, value in speed.items()}

    def show_step(self, step: int) -> None:
        now = time.monotonic()
        if self._show and self._is_terminal and now - self._shown_time >= 1:
            self._print(now, _progress_line(step, self._total_steps, *self._latest))

    def _print(self, now: float, line: str) -> None:
        self._shown_time = now
        if self._is_terminal:
            # Clears the rest of the line and goes back to its start, where the next line overwrites
            # it, be it progress or a log message.
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"{line[:width]}\x1b[K\r")
            sys.stderr.flush()
        elif now - self._log_time >= self._log_every or self._step == self._total_steps:
            self._log_time = now
            _log.info("%s", line)

    def close(self) -> None:
        if self._show and self._is_terminal and self._shown_time > -math.inf:
            sys.stderr.write("\n")
        self._show = False


def _progress_line(
    step: int, total_steps: int | None, loss: float | None, speed: Mapping[str, float]
) -> str:
    parts = [f"step {step:,}" + (f"/{total_steps:,}" if total_steps is not None else "")]
    if loss is not None:
        parts.append(f"loss {loss:.4g}")
    parts += [f"{_short(value)} {name}/s" for name, value in speed.items()]
    if total_steps is not None and speed.get("steps", 0) > 0:
        seconds = round((total_steps - step) / speed["steps"])
        parts.append(f"ETA {datetime.timedelta(seconds=seconds)}")
    return "  ".join(parts)


def _short(value: float) -> str:
    """Returns three digits and a unit: 1234567 -> "1.23M"."""
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _scalar(name: str, value: Any) -> float:
    """Returns a metric as a Python int or float."""
    if name in _RESERVED:
        raise ValueError(f"metric {name!r}: this name is taken in metrics.jsonl; choose another")
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if type(value) not in (int, float):
        raise TypeError(
            f"metric {name!r}: expected a Python or NumPy number, got {type(value).__name__}; "
            "fetch device arrays with jax.device_get and reduce other arrays first"
        )
    return value
