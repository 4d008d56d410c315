"""Several processes that train together: joining, stopping after the same step, losing one."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from stca_jax.errors import UserError

# A process is given up after so many seconds of silence, and then ends all others.
HEARTBEAT_SECONDS = 30
_JOIN_SECONDS = 120
_SHUTDOWN_SECONDS = 60
_log = logging.getLogger(__name__)


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of a job; call it before anything that touches a device.

    Args:
      coordinator: HOST:PORT at which process 0 listens. Without it, all three are taken from the
        environment: Cloud TPU, SLURM, Open MPI, Kubernetes.
      num_processes: Processes of the job.
      process_id: This one, from 0.

    Raises:
      UserError: the arguments are incomplete, the environment is not one of those, or the others do
        not come within two minutes.
    """
    given = (coordinator, num_processes, process_id)
    if any(x is not None for x in given) and None in given:
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together: give all three, or "
            "--distributed where the environment knows them"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} is not in [0, {num_processes})")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        where = coordinator or "the coordinator that the environment names"
        raise UserError(f"cannot join the other processes at {where}: {error}") from error
    _log.info(
        "process %d of %d, with %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


def is_joined() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized()


def is_main_process() -> bool:
    """Whether this is the one process that writes metrics, tables and marks."""
    return jax.process_index() == 0


def leave(status: int) -> NoReturn:
    """Ends this process at once, without waiting for the others, which then end as well.

    The orderly way out waits for processes that may be waiting for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def on_all_processes(value: bool) -> bool:
    """Whether the value is true on all processes; every process must ask."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))
