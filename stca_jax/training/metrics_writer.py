"""Writes a run's scalars to JSON lines, TensorBoard and Weights & Biases.

Every point stands once in each output, even when a run is killed and goes on from an older
checkpoint: a writer that starts at step s first drops what its predecessor wrote after s. So one
directory has one writer at a time.
"""

import dataclasses
import json
import logging
import math
import operator
import os
import socket
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
    """Where Weights & Biases puts the run; it needs `pip install -e ".[wandb]"`.

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
    """Writes scalars; on all but the main process it only checks them.

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
        wandb: WandbConfig | None = None,
        config: Mapping[str, Any] | None = None,
        is_main_process: bool = True,
    ):
        """Opens the outputs and drops what a previous writer wrote after `start_step`.

        Args:
          workdir: directory for the files; it is made if need be.
          start_step: the step of the checkpoint this run goes on from, whose own metrics stay; at 0
            nothing of a previous run stays.
          wandb: also log to Weights & Biases.
          config: the run's settings by name, shown by Weights & Biases.
          is_main_process: whether this process writes; of several hosts' processes only one may.

        Raises:
          ImportError: `wandb` is given but Weights & Biases is not installed.
        """
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

    def flush(self) -> None:
        """Makes what was written survive a crash of the machine, not only of the process."""
        for output in self._outputs:
            output.flush()

    def close(self) -> None:
        """Closes the outputs; a second call does nothing."""
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
                'pip install -e ".[wandb]", or set wandb to none'
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
            allow_val_change=True,  # A resumed run may be a longer one.
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
