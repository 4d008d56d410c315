"""What all launchers share: flags, config arguments, and errors that a user can read."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from stca_jax import config as config_lib
from stca_jax.errors import UserError

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of errors that a user can mend.")
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
            return main()
        except (UserError, OSError) as error:  # of OSError: a missing source, a full disk
            if _DEBUG.value:
                raise
            return _report(error)

    try:
        app.run(guarded, flags_parser=parse)
    except UserError as error:  # a wrong --config argument, before flags are known
        sys.exit(_report(error))


def _set_up_logging() -> None:
    """Shows what this project reports; of the libraries, only errors."""
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.ERROR)
    for name in ("stca_jax", "experiments", "data", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)


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
