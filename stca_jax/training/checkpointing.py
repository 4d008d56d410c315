"""Checkpoints: state, input position and config of one step, written whole or not at all.

    workdir/
      config.json            the resolved config of the run
      checkpoints/STEP/      state (parameters, optimizer, step), input (position), by Orbax
      best.json              {"step": …, metric: …}: the checkpoint that retention never deletes

Orbax writes a checkpoint into a temporary directory and renames it, so a half-written one is never
listed; a later run removes what is left of it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from stca_jax.errors import UserError
from stca_jax.files import write_json
from stca_jax.training.distributed import is_main_process, on_all_processes
from stca_jax.training.state import TrainState

_BEST = "best.json"
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class Checkpointer:
    """Saves and restores the checkpoints of one working directory."""

    def __init__(self, workdir: str | os.PathLike[str], config: CheckpointConfig | None = None):
        """Opens the directory.

        Args:
          workdir: Created if missing, unless `config` is None.
          config: None opens it for reading only, as an evaluation job does.
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
                    [checkpoint_managers.LatestN(config.keep_last), _KeepBest(self.workdir)]
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


class _KeepBest(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint that best.json names, whoever wrote it."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        del context
        best = read_best(self._workdir)
        return [best is not None and c.step == best["step"] for c in checkpoints]


def read_best(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The best checkpoint so far: its "step", "metric" and "value"; None if none is marked."""
    try:
        return json.loads((pathlib.Path(workdir) / _BEST).read_text())
    except FileNotFoundError:
        return None


def mark_best(
    workdir: str | os.PathLike[str], step: int, metric: str, value: float, *, larger_is_better: bool
) -> bool:
    """Marks a checkpoint as the best if it beats the one marked before; says whether it did.

    A value that is not finite beats none, and a checkpoint that is gone is beaten by any.
    """
    best = read_best(workdir)
    if not math.isfinite(value):
        _log.warning("%s of checkpoint %d is %s: it is not marked as the best", metric, step, value)
        return False
    sign = 1 if larger_is_better else -1
    is_there = best and (pathlib.Path(workdir) / "checkpoints" / str(best["step"])).exists()
    if best and is_there and best["metric"] == metric and sign * best["value"] >= sign * value:
        return False
    write_json(
        pathlib.Path(workdir) / _BEST, {"step": step, "metric": metric, "value": float(value)}
    )
    return True


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


def first_line(error: Exception) -> str:
    """Kind and first line of an error, for one line of a log."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
