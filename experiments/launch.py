"""What all launchers share: flags, config arguments, help, progress, and errors for readers."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import pathlib
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from tqdm import tqdm

from stca_jax import config as config_lib
from stca_jax.compilation_cache import keep_programs
from stca_jax.errors import UserError
from stca_jax.experiments import command_help
from stca_jax.files import refuse_scheme
from stca_jax.training import distributed
from stca_jax.workdir import check_path

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
_GENERAL = ("data_dir", "debug")
_PROCESSES = ("coordinator", "num_processes", "process_id", "distributed")
_INTERRUPTED = 130
_overrides: dict[str, str] = {}
_config_path: str | None = None


def run(
    main: Callable[[], int | None],
    *,
    takes_config: bool = False,
    flag_groups: Mapping[str, Collection[str]] | None = None,
    when_interrupted: str = "nothing was written; the same command starts again",
) -> None:
    """Parses the command line, runs `main`, and exits with its status.

    A wrong flag, a `UserError` or an `OSError` is printed as one paragraph, without a traceback,
    with exit status 1; Ctrl-C likewise, with what is left and the command to go on, with 130.

    Args:
      main: Returns the exit status; None is 0.
      takes_config: Accept `--config=FILE` and `--config.NAME=VALUE`; see `load_config`.
      flag_groups: Names of the launcher's own flags that --help shows under headings of their own.
      when_interrupted: What a Ctrl-C leaves, and what the same command then does.
    """
    groups = flag_groups or {}

    def parse(argv: Sequence[str]) -> list[str]:
        global _config_path, _overrides
        if takes_config:
            path, _overrides, argv = config_lib.parse_config_args(argv)
            _config_path = path and _find_config(path)
        if {"--help", "-h"} & set(argv):
            _print_help(takes_config, groups)
            sys.exit(0)
        rest = _parse_flags(argv)
        _set_up_logging()
        return rest

    def guarded(_: Sequence[str]) -> int | None:
        try:
            _refuse_addresses(groups)
            _join_other_processes()
            keep_programs()
            return main()
        except KeyboardInterrupt:
            _print_error(f"interrupted: {when_interrupted}:\n  {command()}")
            # A library's threads may be at work; the orderly way out would wait for them.
            distributed.leave(_INTERRUPTED)
        except Exception as error:
            is_expected = isinstance(error, UserError | OSError)  # a missing source, a full disk
            if distributed.is_joined():
                if not is_expected or _is_debugging():
                    traceback.print_exc()
                distributed.leave(_report(error if is_expected else _lost(error)))
            if not is_expected or _is_debugging():
                raise
            return _report(error)

    try:
        app.run(guarded, flags_parser=parse)
    except (UserError, OSError) as error:  # a mistake in the command line, or --debug
        if _is_debugging():
            raise
        sys.exit(_report(error))


def load_config() -> Any:
    """The config that the command line describes."""
    return config_lib.load_config(_config_path, _overrides)


def has_config() -> bool:
    """Whether --config was given."""
    return _config_path is not None


def config_path() -> str:
    """The file that --config names; call it after `load_config`, which says if there is none."""
    return str(_config_path)


def local_path(name: str, value: str) -> pathlib.Path:
    """The directory or file that a flag names.

    Raises:
      UserError: it has a scheme, such as gs://, or cannot hold checkpoints.
    """
    try:
        return check_path(value)
    except UserError as error:
        raise UserError(f"--{name}: {error}") from None


@contextlib.contextmanager
def working(on: str) -> Iterator[None]:
    """Shows on a terminal what takes its time, and how long it has taken.

    Args:
      on: What is being done, such as "Compiling".
    """
    ended = threading.Event()
    bar = tqdm(desc=on, bar_format="{desc}: {elapsed}", leave=False, delay=1, disable=None)

    def show() -> None:
        while not ended.wait(1):
            bar.update()
            bar.refresh()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        bar.close()


def _find_config(path: str) -> str:
    """The file as named or, outside a checkout, experiments/configs/… of the installed package."""
    installed = pathlib.Path(__file__).parents[1] / path
    is_ours = path.startswith("experiments/configs/") and not os.path.exists(path)
    return str(installed) if is_ours and installed.exists() else path


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """The arguments that are left once the flags are parsed.

    Raises:
      UserError: an unknown flag, naming the near ones; a missing one, or a wrong value.
    """
    try:
        rest = flags.FLAGS(list(argv))
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"there is no flag --{error.flagname}; {_near(error.flagname)}") from None
    except flags.Error as error:
        # "flag --split=foo: value should be one of …", or "…: Flag --workdir must have a value …"
        if missing := re.search(r"Flag --(\w+) must have a value other than None", str(error)):
            name = missing[1]
            raise UserError(
                f"--{name} is missing. {flags.FLAGS[name].help} --help lists all flags"
            ) from None
        raise UserError(str(error).removeprefix("flag ")) from None
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}: flags begin with --; see --help")
    return rest


def _near(name: str) -> str:
    """The flags, or values of the config, whose name is near."""
    known = {flag: f"--{flag}" for group in _groups({}).values() for flag in group}
    if _config_path:
        for path in config_lib.flatten(load_config()):
            known.setdefault(path.rpartition(".")[2], f"--config.{path}")
    names = difflib.get_close_matches(name.partition("=")[0], known)
    if not names:
        return "--help lists all flags"
    return f"did you mean {' or '.join(known[n] for n in names)}?"


def _groups(own: Mapping[str, Collection[str]]) -> dict[str, Collection[str]]:
    """Names of all flags by heading, the launcher's own first."""
    defined = flags.FLAGS.flags_by_module_dict().get(sys.argv[0], [])
    grouped = {name for names in own.values() for name in names}
    flags_of_main = [flag.name for flag in defined if flag.name not in grouped]
    return {
        "flags": flags_of_main,
        **own,
        "of all launchers": _GENERAL,
        "several processes": _PROCESSES,
    }


def _refuse_addresses(own: Mapping[str, Collection[str]]) -> None:
    """Raises UserError, naming the flag, for a value such as gs://bucket, whatever it is for."""
    for names in _groups(own).values():
        for name in names:
            value = flags.FLAGS[name].value
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    refuse_scheme(f"--{name}", text)


def _print_help(takes_config: bool, own: Mapping[str, Collection[str]]) -> None:
    """The launcher's docstring, its flags, and the values of the config if one is named."""
    text = [(sys.modules["__main__"].__doc__ or "").rstrip()]
    text.append(command_help.describe_flags(_groups(own)))
    if _config_path:
        text.append(command_help.describe_config(load_config(), _config_path))
    elif takes_config:
        text.append("\n--config=FILE --help lists the values of a config as well")
    try:
        print("\n".join(text), flush=True)
    except BrokenPipeError:  # into head, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_debugging() -> bool:
    return _DEBUG.value if flags.FLAGS.is_parsed() else "--debug" in sys.argv


def command() -> str:
    """The command as it was typed, to be given again."""
    return shlex.join(sys.orig_argv)


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
    for name in ("stca_jax", "__main__"):
        logging.getLogger(name).setLevel(level)


def _report(error: Exception) -> int:
    _print_error(f"error: {error}")
    return 1


def _print_error(text: str) -> None:
    # Not print: the text layer of sys.stderr loses lines while other threads write to it.
    os.write(2, f"{text}\n".encode())
