"""Writes what a server needs of a checkpoint into one folder, whole or not at all.

`stca_jax.serving.folder` says what is in it, and reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import save_file

import stca_jax
from stca_jax import config as config_lib
from stca_jax.errors import UserError
from stca_jax.evaluation.evaluator import request_logits
from stca_jax.experiment import ExperimentConfig
from stca_jax.export.programs import (
    PLATFORMS,
    SCORE_PROGRAMS,
    PackedFeatures,
    ServedRanker,
    abstract_ranker,
    flatten,
    lower_all,
)
from stca_jax.files import write_json
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.records import SPLITS
from stca_jax.ops.paged import PAGE
from stca_jax.schema import Schema
from stca_jax.serving import folder as folders
from stca_jax.serving.golden import check_golden
from stca_jax.serving.model import ServingModel
from stca_jax.serving.paged_cache import PagedCache, bytes_of_user
from stca_jax.serving.row_cache import RowCache
from stca_jax.training.state import TrainState
from stca_jax.training.table_rows import stored_row
from stca_jax.training.train_step import Program
from stca_jax.workdir import restore_for_evaluation

_GOLDEN_REQUESTS = 64
_GOLDEN_EVENTS = 50_000  # of all of them: a server encodes them when it starts
_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}  # of logits, by compute dtype
_MEASURED = ("keys_values", "int8")  # caches whose golden requests are scored here
_TABLE_ROWS = 1 << 18  # written at once


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
      max_history: Events of a user that the server reads, the latest; None is the longest length
        of the config's evaluation.
      uncached: Encode the whole history for every request, which any model can.
    """

    max_history: int | None = None
    uncached: bool = False


def export_checkpoint(
    config: ExperimentConfig,
    dataset: RequestDataset,
    workdir: pathlib.Path,
    step: int,
    output: pathlib.Path,
    options: ExportOptions | None = None,
) -> dict[str, Any]:
    """Exports a checkpoint.

    Args:
      config: Of the run.
      dataset: That it was trained on.
      workdir: Of the run.
      step: Of the checkpoint.
      output: A folder that does not exist.
      options: How.

    Returns:
      What model.json has.

    Raises:
      UserError: the model cannot be served so, the output exists, or what was written does not
        reproduce the evaluation.
    """
    options = options or ExportOptions()
    max_history = options.max_history or max(config.evaluation.lengths)
    if not options.uncached:
        check_cacheable(config)
    if output.exists():
        raise UserError(f"--output={output} exists: name a new folder, or remove it")
    program, state = restore_for_evaluation(config, dataset, workdir, step)
    schema = config.model.read_schema(dataset.schema)
    ranker = abstract_ranker(config.model, schema)
    served = ServedRanker(ranker)
    dense = state.optimizer.average if config.training.ema_decay else state.dense
    with _new_folder(output) as folder:
        _write_weights(folder, dense)
        _write_tables(folder, state.tables, schema, config.model.embedding.replicated_rows)
        lowered = lower_all(served, max_history=max_history, uncached=options.uncached)
        for path, program_bytes in lowered.items():
            file = folder / folders.PROGRAMS / f"{path}.stablehlo"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(program_bytes)
        programs: list[tuple[str, int | None, int]]
        programs = [(p.name, p.most, p.multiple) for p in SCORE_PROGRAMS]
        if options.uncached:
            programs = [(name, None, 1) for name in lowered]
        golden = golden_arrays(program, state, dataset, config, max_history)
        save_file(golden, folder / folders.GOLDEN)
        features = dataset.directory / folders.FEATURES
        if features.exists():
            shutil.copytree(features, folder / folders.FEATURES)
        values = {
            "format": folders.FORMAT,
            "stca_jax": stca_jax.__version__,
            "jax": jax.__version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "platforms": PLATFORMS,
            "step": step,
            "parameters": "averaged" if config.training.ema_decay else "last",
            "config": config_lib.to_dict(config),
            "schema": schema.to_dict(),
            "dataset": {
                "name": config.dataset,
                "time_origin": dataset.metadata["time_origin"],
                "fingerprint": dataset.fingerprint,
            },
            "max_history": max_history,
            "page": PAGE,
            **_describe(served, options.uncached, _TOLERANCE[config.model.dtype]),
            "score_programs": programs,
        }
        _finish(folder, values)
    return values


def check_cacheable(config: ExperimentConfig) -> None:
    """Raises UserError if an event cannot be encoded once, naming what to do."""
    sequence, embedding = config.model.sequence, config.model.embedding
    name = type(sequence).__name__
    for option in ("time_delta", "recency_index"):
        if getattr(embedding, option):
            raise UserError(
                f"model.embedding.{option} makes tokens depend on the request, so that an event "
                "cannot be encoded once: train with it off and "
                "--config.model.sequence.recency_score=true, or export with --uncached, which "
                "encodes the whole history for every request"
            )
    if not sequence.can_cache_history:
        why = (
            "lets history tokens interact"
            if sequence.needs_exclusive_history
            else "has no way to keep what it makes of an event"
        )
        raise UserError(
            f"{name} {why}, so that there is nothing of an event to keep: train StcaConfig, or "
            "export with --uncached, which encodes the whole history for every request"
        )


def golden_arrays(
    program: Program,
    state: TrainState,
    dataset: RequestDataset,
    config: ExperimentConfig,
    max_history: int,
) -> dict[str, np.ndarray]:
    """Requests of the test split, or else of an earlier one, with the evaluation's logits."""
    index = dataset.index
    split = next(s for s in reversed(SPLITS) if len(index.of_split(s)))
    place = {int(request): k for k, request in enumerate(index.request_id)}
    schema = config.model.read_schema(dataset.schema)
    columns: dict[str, list[np.ndarray]] = {}
    num_events, num_targets = [0], [0]
    with jax.default_matmul_precision("highest"):
        logits = dict(
            request_logits(
                program,
                state,
                dataset,
                config.input,
                split=split,
                length=max_history,
                max_requests=_GOLDEN_REQUESTS,
            )
        )
    for request, logit in sorted(logits.items()):
        k = place[request]
        end = int(index.history_end[k])
        events = slice(max(0, end - max_history), end)
        if sum(num_events) + end - events.start > _GOLDEN_EVENTS or len(logit) > 1_024:
            continue
        record = dataset.record(int(index.record[k]))
        position = int(index.position[k])
        targets = slice(*record.target_offset[position : position + 2])
        num_events.append(end - events.start)
        num_targets.append(len(logit))
        parts = {
            "time": record.event_time[events],
            "now": record.request_time[position : position + 1],
            "logit": logit,
            **{f"history/{n}": record.history[n][events] for n in schema.history},
            **{f"target/{n}": record.target[n][targets] for n in schema.target},
            **{f"request/{n}": record.request[n][position : position + 1] for n in schema.request},
        }
        for name, part in parts.items():
            columns.setdefault(name, []).append(part)
    arrays = {name: np.ascontiguousarray(np.concatenate(c)) for name, c in columns.items()}
    arrays["event_offset"] = np.cumsum(num_events, dtype=np.int64)
    arrays["target_offset"] = np.cumsum(num_targets, dtype=np.int64)
    return arrays


def _describe(served: ServedRanker, uncached: bool, tolerance: float) -> dict[str, Any]:
    """What programs take, and what a server has to allocate for them."""

    def level(packed: PackedFeatures) -> dict[str, Any]:
        return {"names": packed.names, "widths": packed.widths}

    caches = {} if uncached else served.caches
    return {
        "inputs": {
            "levels": {
                "history": level(served.history),
                "target": level(served.target),
                "request": level(served.request),
            },
            "match_fields": served.match_fields,
            "decay_seconds": served.decay_seconds,
            "soft_fields": served.soft_fields,
        },
        "caches": {
            name: {
                "arrays": {
                    n: {"layers": a.layers, "shape": a.shape, "dtype": a.dtype}
                    for n, a in cache.arrays.items()
                },
                "tolerance": tolerance,
            }
            for name, (cache, _) in caches.items()
        },
        "tolerance": tolerance,
    }


def _write_weights(folder: pathlib.Path, dense: Mapping[str, Any]) -> None:
    weights = {name: np.asarray(w) for name, w in flatten(dense).items()}
    save_file(weights, folder / folders.WEIGHTS)


def _write_tables(
    folder: pathlib.Path,
    tables: Mapping[str, Float[Array, "V W"]],
    schema: Schema,
    replicated_rows: int,
) -> None:
    """By id, some rows at a time: a table may be larger than the host's memory."""
    (folder / folders.TABLES).mkdir()
    for name, size in schema.vocabularies.items():
        table = tables[name]
        file = np.lib.format.open_memmap(
            folder / folders.TABLES / f"{name}.npy", "w+", table.dtype, (size, table.shape[1])
        )
        for first in range(0, size, _TABLE_ROWS):
            ids = np.arange(first, min(first + _TABLE_ROWS, size))
            stored = jnp.asarray(ids)
            if size > replicated_rows:
                stored = stored_row(stored, len(table))
            file[ids] = np.asarray(table[stored])
        file.flush()


def _finish(folder: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes model.json, and measures what the golden requests give.

    Raises:
      UserError: other logits than the evaluation's.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    values["files"] = {str(p.relative_to(folder)): folders.describe_file(p) for p in paths}
    exact = values["tolerance"]
    kinds = [name for name in _MEASURED if name in values["caches"]]
    for name in kinds[1:]:
        values["caches"][name]["tolerance"] = float("inf")
    write_json(folder / folders.MODEL, values)
    differences = {}
    for name in kinds or ["uncached"]:
        model = ServingModel.load(folder, cache=name)
        cache = PagedCache(model, bytes_of_user(model)) if kinds else RowCache(model, 0)
        differences[name] = check_golden(cache)
    for name in kinds[1:]:
        values["caches"][name]["tolerance"] = max(exact, 2 * differences[name])
    values["golden_differences"] = differences
    write_json(folder / folders.MODEL, values)


@contextlib.contextmanager
def _new_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that appears under its name, whole, once the block has ended."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
