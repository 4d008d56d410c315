"""Prepares a dataset: published files, or a log of interactions of one's own.

python -m stca_jax.experiments.prepare --dataset=DATASET[/CONFIG] [--manual_dir=DIR]
    [--data_dir=DIR] [--name=NAME --item_trends=7d,28d ...]
python -m stca_jax.experiments.prepare --dataset=interaction_log --name=NAME --log=PATH
    [--user_id=COLUMN --item_id=COLUMN --timestamp=COLUMN --labels=COLUMN,... ...] [--dry_run]

Of a log it first prints a profile; --dry_run stops there. The same command goes on after a kill.
A published log (MovieLens, KuaiRand, Yambda) can be prepared otherwise than its builder says: with
a name it is interaction_log/NAME, and each option that is given replaces the builder's.
At the end it writes a config that suits the dataset, and prints the command that trains with it.

Exit status: 0 prepared, 1 an error.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from stca_jax.config_source import python_source
from stca_jax.data import preparation
from stca_jax.data.interaction_log.log_config import LogConfig, split_list
from stca_jax.data.running import beam_runner
from stca_jax.errors import UserError
from stca_jax.experiments import launch
from stca_jax.experiments.command_help import attribute_descriptions
from stca_jax.files import cache_dir, local_path, replacing
from stca_jax.input.dataset import RequestDataset
from stca_jax.recommended import recommended_config

_DATASET = flags.DEFINE_string("dataset", None, "Dataset, or DATASET/CONFIG.", required=True)
_MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "Folder of files downloaded by hand.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Stop after the profile.")
_NAME = flags.DEFINE_string(
    "name", None, "What it is called: interaction_log/NAME; of a published log, to change options."
)
_BEAM = flags.DEFINE_multi_string(
    "beam",
    None,
    "Run the steps as Apache Beam pipelines with this option, such as --beam=--runner=FlinkRunner. "
    "Workers must see all files under the same paths.",
)
_CONFIG = "train_config.py"  # in the dataset's folder
_PATHS = ("log", "items", "users")
_LOG_OPTIONS: dict[str, flags.FlagHolder] = {}


def main() -> None:
    """Prints a log's profile, prepares the dataset, and says where it lies."""
    data_dir = local_path("data_dir", launch.DATA_DIR.value or cache_dir())
    builder = _builder(data_dir)
    if _BEAM.value:
        builder.run = beam_runner(_BEAM.value)
    if hasattr(builder, "stage"):
        print(_profile(builder), flush=True)
        if _DRY_RUN.value:
            print("\nNothing was built or kept: --dry_run.")
            return
    elif _DRY_RUN.value:
        raise UserError(f"--dry_run is for logs; {_DATASET.value} is not one")
    folder = preparation.prepare_builder(builder, data_dir, manual_dir=_MANUAL_DIR.value)
    dataset = RequestDataset(folder)
    size = sum(file["bytes"] for file in dataset.metadata["record_files"].values())
    print(f"\n{len(dataset):,} users, {len(dataset.index):,} requests, {size / 1e6:,.1f} MB")
    name = f"{preparation.OWN_LOGS}/{_NAME.value}" if _NAME.value else _DATASET.value
    config = _write_config(dataset, name)
    elsewhere = f" --data_dir={shlex.quote(str(data_dir))}" if launch.DATA_DIR.value else ""
    print(
        f"Train with\n  python -m stca_jax.experiments.train --config={shlex.quote(str(config))}"
        f"{elsewhere} --workdir=DIR\nor another config and --config.dataset={name}\n"
        f"The dataset is in {folder}"
    )


def _write_config(dataset: RequestDataset, name: str) -> pathlib.Path:
    """Writes what is recommended for a dataset beside it, unless a user's own version is there."""
    path = dataset.directory / _CONFIG
    if not path.exists():
        earlier = np.quantile(dataset.index.history_end, (0.5, 0.99, 1)).astype(int)
        described = (
            f"Recommended for {name}: where to begin, not the best there is.\n\n"
            f"Of its {len(dataset.index):,} requests, half have {earlier[0]:,} earlier events or "
            f"more, 1% {earlier[1]:,} or more; the most is {earlier[2]:,}.\n"
        )
        source = python_source(recommended_config(dataset, name), described)
        with replacing(path) as output:
            output.write(source.encode())
    return path


def _builder(data_dir: pathlib.Path) -> preparation.UserDatasetBuilder:
    """The builder that the flags describe.

    Raises:
      UserError: flags that do not go together, or a log prepared differently under the same name.
    """
    given = {name: _value(name) for name in _LOG_OPTIONS if flags.FLAGS[name].present}
    is_own = _DATASET.value == preparation.OWN_LOGS
    if not (is_own or given or _NAME.value):
        return preparation.make_builder(_DATASET.value, data_dir)
    module = preparation.import_builder(preparation.OWN_LOGS)
    published = None if is_own else preparation.make_builder(_DATASET.value, data_dir)
    if published and not isinstance(published, module.LogDatasetBuilder):
        raise UserError(
            f"--{next(iter(given), 'name')} is of logs, and {_DATASET.value} is none; its configs "
            f"are {', '.join(published.builder_configs)}"
        )
    if not _NAME.value or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", _NAME.value):
        raise UserError(f"--name is {_NAME.value!r}; call the log by letters, digits, -, _ and .")
    if not published:
        config = LogConfig(**{name: _value(name) for name in _LOG_OPTIONS})
    else:
        config = dataclasses.replace(published.describe(_manual_dir()), **given)
    builder = module.make_builder(_NAME.value, config, data_dir)
    module.check_same(builder)
    return builder


def _profile(builder: preparation.UserDatasetBuilder) -> str:
    """Reads and sorts the log, unless it is prepared already; a dry run keeps nothing of it."""
    folder = pathlib.Path(builder.data_path)
    if folder.exists():
        return (folder / "profile.txt").read_text()
    with preparation.exclusive(folder.parent):
        staging = builder.stage(_manual_dir())
        profile = staging.profile()
        if _DRY_RUN.value:
            staging.discard()
        return profile


def _manual_dir() -> pathlib.Path | None:
    given = _MANUAL_DIR.value
    return local_path("manual_dir", given) if given else None


def _value(name: str) -> Any:
    """A flag's value; lists are written with commas, or as repeated flags."""
    value = _LOG_OPTIONS[name].value
    if name == "null_words":  # as they are, quote marks and all
        return tuple(word for text in value for word in text.split(","))
    if isinstance(value, int | float | str):
        return value
    if name in _PATHS:
        return tuple(path for text in value or () for path in _paths(name, text))
    return tuple(part for text in value or () for part in split_list(text))


def _paths(name: str, text: str) -> list[str]:
    """Paths between commas; or one that has commas itself.

    Raises:
      UserError: one is empty, as where a variable of a shell is not set.
    """
    if text and os.path.exists(os.path.expanduser(text)):  # without an error for unknown users
        return [text]
    paths = [path.strip() for path in text.split(",")]
    if not all(paths):
        raise UserError(f"--{name}={text} names an empty path; give files or folders")
    return paths


def _define_log_options() -> None:
    """One flag for each attribute of `LogConfig`, described by its docstring."""
    descriptions = attribute_descriptions(LogConfig)
    for field in dataclasses.fields(LogConfig):
        default = None if field.default is dataclasses.MISSING else field.default
        if isinstance(default, tuple):
            default = list(default)
        define: Callable[..., flags.FlagHolder] = flags.DEFINE_multi_string
        if isinstance(default, int):
            define = flags.DEFINE_integer
        elif isinstance(default, float):
            define = flags.DEFINE_float
        elif isinstance(default, str):
            define = flags.DEFINE_string
        _LOG_OPTIONS[field.name] = define(field.name, default, descriptions[field.name])


_define_log_options()

if __name__ == "__main__":
    launch.run(
        main,
        flag_groups={"of a log, with --name": ["name", "dry_run", *_LOG_OPTIONS]},
        when_interrupted="finished steps of a log are kept; the same command goes on",
    )
