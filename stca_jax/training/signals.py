"""Signals that stop a run after a step."""

from __future__ import annotations

import collections
import logging
import signal
import threading
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stca_jax.training.sharding import MESH_AXES

_log = logging.getLogger(__name__)


class Signals:
    """Remembers SIGTERM and SIGINT while the loop runs, instead of dying within a step.

    A second Ctrl-C is a KeyboardInterrupt at once. Outside the main thread, which alone can handle
    signals, nothing is remembered.

    Attributes:
      received: The first signal, if one came.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None: it was not set from Python, and cannot be set back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
        _log.warning(
            "%s: saving a checkpoint as soon as possible; Ctrl-C stops without one",
            signal.Signals(number).name,
        )


class SharedSignal:
    """A signal that any process received, as all processes see it: after the same step.

    A tiny reduction follows each step on the devices and is read two steps later, so that no step
    waits for it.
    """

    _DELAY = 2

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        self._latest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._running: collections.deque[jax.Array] = collections.deque()

    def agree(self, received: signal.Signals | None) -> signal.Signals | None:
        """The signal to act on after this step; every process must ask after every step.

        Args:
          received: By this process.
        """
        if jax.process_count() == 1:
            return received
        here = np.full(jax.local_device_count(), received or 0, np.int32)
        with jax.transfer_guard_host_to_device("allow"):
            flags = jax.make_array_from_process_local_data(self._sharding, here)
        self._running.append(self._latest(flags))
        if len(self._running) <= self._DELAY:
            return None
        number = int(jax.device_get(self._running.popleft()))
        return signal.Signals(number) if number else None
