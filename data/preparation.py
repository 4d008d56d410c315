"""Prepares datasets on first use."""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import importlib
import io
import logging
import os
import pathlib
import shutil
import types
from collections.abc import Iterator, Sequence
from typing import IO

import tensorflow_datasets as tfds

from stca_jax.data.base import STAGING, UserDatasetBuilder
from stca_jax.errors import UserError
from stca_jax.files import cache_dir, local_path
from stca_jax.imports import find_path, import_object

OWN_LOGS = "interaction_log"  # the dataset whose configs are its users' own
_log = logging.getLogger(__name__)
_FOLDER = pathlib.Path(__file__).parent


def dataset_names() -> list[str]:
    """Names of the datasets that have a builder in this package."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/*_dataset_builder.py"))


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
      data_dir: Where prepared datasets lie; by default `files.cache_dir()`.
      manual_dir: Folder of source files that were downloaded by hand.

    Returns:
      A folder that `stca_jax.input.dataset.RequestDataset` opens.

    Raises:
      UserError: there is no such dataset or config; the message names the nearest ones.
      FileNotFoundError: the source files are not there; the message says how to get them.
      OSError: the disk is full or cannot be written.
    """
    data_dir = local_path("data_dir", data_dir or cache_dir())
    return prepare_builder(make_builder(name, data_dir), data_dir, manual_dir=manual_dir)


def prepare_builder(
    builder: UserDatasetBuilder,
    data_dir: pathlib.Path,
    *,
    manual_dir: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Likewise, for a builder that was made by hand."""
    folder = pathlib.Path(builder.data_path)
    if folder.exists():
        _remove_staging(folder.parent)
        return folder
    with exclusive(folder.parent):
        if not folder.exists():
            for interrupted in folder.parent.glob(f"incomplete.*_{folder.name}"):
                shutil.rmtree(interrupted)
            _log.info("Preparing %s in %s", builder.name, folder)
            config = tfds.download.DownloadConfig(
                manual_dir=manual_dir and os.fspath(local_path("manual_dir", manual_dir))
            )
            downloads = data_dir / "downloads"
            try:
                # TFDS prints advice that does not hold.
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.download_and_prepare(download_dir=downloads, download_config=config)
            finally:
                for made in (downloads / "extracted", downloads / "manual", downloads):
                    with contextlib.suppress(OSError):  # not there, or in use
                        made.rmdir()
    return folder


def make_builder(name: str, data_dir: pathlib.Path) -> UserDatasetBuilder:
    """The builder of "dataset" or "dataset/config"; of one's own, "package.module:Builder".

    Raises:
      UserError: there is no such dataset or config, or it needs a package that is not installed.
    """
    dataset, _, config = name.partition("/")
    if dataset not in dataset_names() and find_path(dataset):
        builder = import_object(dataset)
        if not (isinstance(builder, type) and issubclass(builder, UserDatasetBuilder)):
            raise UserError(f"dataset {dataset} does not derive from {UserDatasetBuilder.__name__}")
    else:
        module = import_builder(dataset)
        if dataset == OWN_LOGS:
            return module.find_builder(config, data_dir)
        builder = module.Builder
    if config:
        _check_name(config, list(builder.builder_configs), f"config of {dataset}")
    return builder(data_dir=data_dir, config=config or None)


def import_builder(dataset: str) -> types.ModuleType:
    """The module of a dataset's builder.

    Raises:
      UserError: there is no such dataset, or it needs a package that is not installed.
    """
    _check_name(dataset, dataset_names(), "dataset")
    try:
        return importlib.import_module(f"stca_jax.data.{dataset}.{dataset}_dataset_builder")
    except ModuleNotFoundError as error:
        if error.name != "duckdb":  # all that a builder needs beyond the package's requirements
            raise
        raise UserError(f'{dataset} needs duckdb: pip install -e ".[logs]"') from error


def _remove_staging(folder: pathlib.Path) -> None:
    """Removes what a kill has left between the dataset's last step and the end of tidying up."""
    if (folder / STAGING).exists():
        with contextlib.suppress(OSError), exclusive(folder):  # OSError: not ours to write
            shutil.rmtree(folder / STAGING, ignore_errors=True)


def _check_name(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise UserError(f"no {what} is called {name!r}; did you mean {' or '.join(near)}?")


@contextlib.contextmanager
def exclusive(folder: pathlib.Path) -> Iterator[None]:
    """Holds a lock on a folder, made if missing; the system drops it if the process dies.

    Folders that were made for nothing are removed.
    """
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    lock = folder / ".lock"
    with contextlib.ExitStack() as files:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                file = files.enter_context(open(lock, "w"))
            except FileNotFoundError:  # another process has removed the folder
                continue
            _lock(file)
            # Another process may have removed the file while this one waited for it.
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
        try:
            yield
        finally:
            if [f.name for f in folder.iterdir()] == [lock.name]:
                lock.unlink()
                with contextlib.suppress(OSError):  # not empty: someone else's
                    for empty in made or [folder]:
                        empty.rmdir()


def _lock(file: IO[str]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise
        _log.warning("%s cannot be locked: prepare in one process at a time", file.name)
