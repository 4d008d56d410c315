"""Prepares datasets on first use."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import importlib
import io
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from data.base import UserDatasetBuilder
from stca_jax.errors import UserError

_log = logging.getLogger(__name__)
_FOLDER = pathlib.Path(__file__).parent


def dataset_names() -> list[str]:
    """Names of the datasets that have a builder in this package."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/*_dataset_builder.py"))


def default_data_dir() -> pathlib.Path:
    """Where datasets are prepared by default: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "stca_jax"


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    manual_dir: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """The folder of a prepared dataset; builds the dataset if it is not there yet.

    A dataset appears under its name only when it is whole.  Processes that ask for the same dataset
    at the same time wait for the one that builds it.

    Args:
      name: "dataset" or "dataset/config", e.g. "complete_journey/promotion_exposure".
      data_dir: Where prepared datasets lie; by default `default_data_dir()`.
      manual_dir: Folder of source files that were downloaded by hand.

    Returns:
      A folder that `stca_jax.input.dataset.RequestDataset` opens.

    Raises:
      UserError: there is no such dataset or config; the message names the nearest ones.
      FileNotFoundError: the source files are not there; the message says how to get them.
      OSError: the disk is full or cannot be written.
    """
    data_dir = pathlib.Path(data_dir or default_data_dir()).expanduser()
    builder = _builder(name, data_dir)
    folder = pathlib.Path(builder.data_path)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.parent):
        if not folder.exists():
            for interrupted in folder.parent.glob(f"incomplete.*_{folder.name}"):
                shutil.rmtree(interrupted)
            _log.info("Preparing %s in %s", name, folder)
            config = tfds.download.DownloadConfig(
                manual_dir=None if manual_dir is None else os.fspath(manual_dir)
            )
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints advice that does not hold
                builder.download_and_prepare(
                    download_dir=data_dir / "downloads", download_config=config
                )
    return folder


def _builder(name: str, data_dir: pathlib.Path) -> UserDatasetBuilder:
    dataset, _, config = name.partition("/")
    _check_name(dataset, dataset_names(), "dataset")
    module = importlib.import_module(f"data.{dataset}.{dataset}_dataset_builder")
    if config:
        _check_name(config, list(module.Builder.builder_configs), f"config of {dataset}")
    return module.Builder(data_dir=data_dir, config=config or None)


def _check_name(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise UserError(f"no {what} is called {name!r}; did you mean {' or '.join(near)}?")


@contextlib.contextmanager
def _exclusive(folder: pathlib.Path) -> Iterator[None]:
    """Holds a lock on the folder; the system drops it if the process dies."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
