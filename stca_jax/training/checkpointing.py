"""Checkpoints: state, input position and config of one step, written whole or not at all.

    workdir/
      config.json            the resolved config of the run
      checkpoints/STEP/      state (parameters, optimizer, step), input (position), by Orbax

Orbax writes a checkpoint into a temporary directory and renames it, so a half-written one is never
listed; a later run removes what is left of it.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from stca_jax.errors import UserError, first_line
from stca_jax.training.distributed import is_main_process, on_all_processes
from stca_jax.training.state import TrainState

_METADATA_BYTES = 1 << 20  # what writing a checkpoint takes besides its arrays
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
      every_steps: Steps between checkpoints; the last step is always saved.
      keep_last: How many of the latest checkpoints to keep, besides the best.
    """

    every_steps: int = 500
    keep_last: int = 2

    def __post_init__(self) -> None:
        """Raises ValueError for values below 1."""
        for name in ("every_steps", "keep_last"):
            if not getattr(self, name) >= 1:  # NaN is refused
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether a checkpoint is saved, and scored, after that step of so many."""
        return step % self.every_steps == 0 or step == num_steps


class Checkpointer:
    """Saves and restores the checkpoints of one working directory."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        kept: Callable[[], Collection[int]] = tuple,
    ):
        """Opens the directory.

        Args:
          workdir: Created if missing, unless `config` is None.
          config: None opens it for reading only, as an evaluation job does.
          kept: Steps that retention never deletes, asked at each save.
        """
        self.workdir = pathlib.Path(workdir).absolute()
        if config is None:
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0
            )
        else:
            options = ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(config.keep_last), _Keep(kept)]
                ),
            )
        self._manager = ocp.CheckpointManager(
            self.workdir / "checkpoints",
            options=options,
            item_names=("state", "input"),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "input": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: TrainState, step: int, position: dict[str, Any]) -> None:
        """Starts writing a checkpoint; the state may be donated as soon as this returns.

        Args:
          state: Of the run after `step` steps.
          step: Names the checkpoint.
          position: Of the input, JSON-serialisable.

        Raises:
          UserError: the disk is full; earlier checkpoints stay whole.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_as_tree(state)), input=ocp.args.JsonSave(position)
        )
        with _explain_disk_full(self.workdir):
            self._manager.wait_until_finished()
            self._require_space(state)
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Blocks until the checkpoint being written is whole.

        Raises:
          UserError: the disk is full; earlier checkpoints stay whole.
        """
        with _explain_disk_full(self.workdir):
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending; read from the directory at each call."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads one checkpoint.

        Args:
          step: One of `steps()`.
          abstract_state: Shapes, dtypes, shardings and layouts to restore to, on any mesh.

        Returns:
          The state and the input's position.

        Raises:
          UserError: the checkpoint's tree, shapes or dtypes differ; says which.
        """
        self._check_tree(step, abstract_state)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_as_tree(abstract_state), support_layout=True),
                input=ocp.args.JsonRestore(),
            ),
        )
        return _from_tree(restored["state"]), restored["input"]

    def restore_latest(
        self, abstract_state: TrainState
    ) -> tuple[int, TrainState, dict[str, Any]] | None:
        """Reads the latest checkpoint that can be read, or None if there is none.

        A checkpoint that cannot be read is passed over for the one before it, and renamed once that
        was read: if none can be read, the cause may be elsewhere, and all stay.

        Raises:
          UserError: a checkpoint belongs to another model, or none of several can be read.
        """
        unreadable: dict[int, str] = {}
        for step in reversed(self.steps()):
            restored = None
            try:
                restored = self.restore(step, abstract_state)
            except UserError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds
                unreadable[step] = f"checkpoint {step}: {first_line(error)}"
                _log.error("%s; falling back to the one before it", unreadable[step])
            # Another process may have read its part all the same.
            if on_all_processes(restored is not None) and restored is not None:
                for failed in unreadable:
                    self._set_aside(failed)
                return step, *restored
            unreadable.setdefault(step, f"checkpoint {step}: another process cannot read it")
        if unreadable:
            raise UserError(
                f"no checkpoint in {self.workdir} can be read: {'; '.join(unreadable.values())}. "
                "If they are damaged, remove its folder checkpoints to train from the beginning"
            )
        return None

    def close(self) -> None:
        """Waits for the last write and releases the directory."""
        with _explain_disk_full(self.workdir):
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        """Closes, unless it would keep an error or a Ctrl-C waiting for other processes.

        A checkpoint that was being written is then not there; the one before it is.
        """
        if error is None or (isinstance(error, Exception) and jax.process_count() == 1):
            self.close()

    def _require_space(self, state: TrainState) -> None:
        """Sees a full disk before Orbax does, whose writing threads print a traceback each."""
        needed = _METADATA_BYTES + sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        )
        free = shutil.disk_usage(self.workdir).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"No space left: a checkpoint takes {needed:,} bytes, {free:,} are free",
            )

    def _set_aside(self, step: int) -> None:
        if is_main_process():
            aside, number = self.workdir / f"unreadable-{step}", 1
            while aside.exists():
                number += 1
                aside = self.workdir / f"unreadable-{step}-{number}"
            os.rename(self.workdir / "checkpoints" / str(step), aside)
        on_all_processes(True)  # waits for the main process
        self._manager.reload()

    def _check_tree(self, step: int, abstract_state: TrainState) -> None:
        metadata = self._manager.item_metadata(step)["state"]
        if metadata is None:
            raise FileNotFoundError(f"checkpoint {step} lacks its metadata")
        stored = {
            _name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in _leaves(metadata)
        }
        expected = {
            _name(path): (tuple(leaf.shape), str(leaf.dtype))
            for path, leaf in _leaves(_as_tree(abstract_state))
        }
        differences = [
            f"{name}: checkpoint has {_shown(stored.get(name))}, "
            f"this model {_shown(expected.get(name))}"
            for name in sorted(stored.keys() | expected.keys())
            if stored.get(name) != expected.get(name)
        ]
        if differences:
            listed = "\n  ".join(differences[:10])
            raise UserError(
                f"checkpoint {step} in {self.workdir} is of another model "
                f"({len(differences)} arrays differ):\n  {listed}\n"
                "Use the config it was trained with, or another --workdir"
            )


class _Keep(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoints that others name."""

    def __init__(self, steps: Callable[[], Collection[int]]):
        self._steps = steps

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        del context
        steps = self._steps()
        return [c.step in steps for c in checkpoints]


class _explain_disk_full:  # noqa: N801 (used like a function)
    """Turns "no space left" errors, whichever layer raises them, into one UserError."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and "No space left" in str(error):
            detail = f" ({error.strerror})" if isinstance(error, OSError) else ""
            raise UserError(
                f"no space left on the disk of {self._workdir}: the checkpoint was not written and "
                "earlier ones are whole. Free some space, then run the same command to go on"
                + detail
            ) from error


def _as_tree(state: TrainState) -> dict[str, Any]:
    """Nested dicts with string keys: independent of this package's classes."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return fields


def _from_tree(tree: dict[str, Any]) -> TrainState:
    return TrainState(**tree)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _name(path: Sequence[Any]) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _shown(found: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if found is None else f"{found[1]}{list(found[0])}"
