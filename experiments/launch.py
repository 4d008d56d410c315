"""What all launchers share: flags, config arguments, and errors that a user can read."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging

from stca_jax import config as config_lib
from stca_jax.errors import UserError
from stca_jax.training import distributed

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of errors that a user can mend.")
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where prepared datasets lie; by default in the user's cache directory."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, to train with several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join other processes as Cloud TPU, SLURM or Kubernetes describe them."
)
_overrides: dict[str, str] = {}
_config_path: str | None = None


def run(main: Callable[[], int | None], *, takes_config: bool = False) -> None:
    """Parses the command line, runs `main`, and exits with its status.

    A `UserError` or `OSError` is printed as one paragraph, without a traceback, with exit status 1.

    Args:
      main: Returns the exit status; None is 0.
      takes_config: Accept `--config=FILE` and `--config.NAME=VALUE`; see `load_config`.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        global _config_path, _overrides
        if takes_config:
            _config_path, _overrides, argv = config_lib.parse_config_args(argv)
        if {"--help", "-h"} & set(argv):
            if _config_path:
                _print_config_help()
            app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
        rest = app.parse_flags_with_usage(list(argv))
        if rest[1:]:
            app.usage(detailed_error=f"unexpected argument {rest[1]!r}", exitcode=2)
        _set_up_logging()
        return rest

    def guarded(_: Sequence[str]) -> int | None:
        try:
            _join_other_processes()
            return main()
        except Exception as error:
            is_expected = isinstance(error, UserError | OSError)  # a missing source, a full disk
            if distributed.is_joined():
                if not is_expected or _DEBUG.value:
                    traceback.print_exc()
                distributed.leave(_report(error if is_expected else _lost(error)))
            if not is_expected or _DEBUG.value:
                raise
            return _report(error)

    try:
        app.run(guarded, flags_parser=parse)
    except UserError as error:  # a wrong --config argument, before flags are known
        sys.exit(_report(error))


def _join_other_processes() -> None:
    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or any(x is not None for x in given):
        distributed.join(*given)
        if not distributed.is_main_process():
            _set_levels(logging.WARNING)


def _lost(error: Exception) -> UserError:
    """What an error that is not the user's most often means where several processes compute."""
    return UserError(
        f"process {jax.process_index()} stops, with the {type(error).__name__} above: a mistake in "
        "the program, or another process ended or cannot be reached; its own output says why. Run "
        "the same commands again to go on from the latest checkpoint"
    )


def _set_up_logging() -> None:
    """Shows what this project reports; of the libraries, only errors."""
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.ERROR)
    _set_levels(logging.INFO)


def _set_levels(level: int) -> None:
    for name in ("stca_jax", "experiments", "data", "__main__"):
        logging.getLogger(name).setLevel(level)


def load_config() -> Any:
    """The config that the command line describes."""
    return config_lib.load_config(_config_path, _overrides)


def _report(error: Exception) -> int:
    # Not print: the text layer of sys.stderr loses lines while other threads write to it.
    os.write(2, f"error: {error}\n".encode())
    return 1


def _print_config_help() -> None:
    print(f"values of {_config_path}, each set with --config.NAME=VALUE:\n")
    for name, value in config_lib.flatten(load_config()).items():
        print(f"  --config.{name}={value}")
    print()
