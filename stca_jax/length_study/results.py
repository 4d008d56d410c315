"""Tables of the study's finished runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from stca_jax import config as config_lib
from stca_jax.evaluation.report.runs import load_run
from stca_jax.evaluation.tables import Row
from stca_jax.experiment import ExperimentConfig
from stca_jax.files import read_json_lines
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import epoch_fill
from stca_jax.input.planning import InputConfig
from stca_jax.length_study.points import Point

COLUMNS = ("split", "length", "auc", "gauc_user", "log_loss", "calibration")
COSTS = ("steps", "train_tokens", "train_seconds")
SCORES = "evaluation/study.jsonl"  # in the directory of a run


def is_scored(directory: pathlib.Path) -> bool:
    """Whether a run of the study is finished: its test scores are written last."""
    return (directory / SCORES).exists()


def result_rows(points: Sequence[Point], workdir: pathlib.Path) -> list[dict[str, Any]]:
    """A row for each finished point, seed, split and length, with what the training cost."""
    rows = []
    for point in points:
        for directory in sorted((workdir / point.name).glob("seed-*")):
            if not is_scored(directory):
                continue
            run = load_run(directory, point.name)
            speed, tokens = run.steps_per_second(), run.tokens_per_step()
            (steps,) = {row["step"] for row in read_json_lines(directory / SCORES)}
            of_study = (r for r in run.rows if r["model"] == "stca" and r["step"] == steps)
            for row in of_study:
                rows.append(
                    {
                        "point": point.name,
                        "seed": int(directory.name.removeprefix("seed-")),
                        **{name: row[name] for name in COLUMNS},
                        "steps": steps,
                        "train_tokens": round(tokens * steps) if tokens else None,
                        "train_seconds": round(steps / speed, 1) if speed else None,
                    }
                )
    return rows


def summary_rows(
    points: Sequence[Point],
    rows: Sequence[Row],
    base: ExperimentConfig,
    dataset: RequestDataset,
) -> list[Row]:
    """A row for each point: means and standard deviations over seeds, on the test split.

    `gain_kept` is the share of the gain from training and serving short to training and serving
    in full that the point keeps, served in full; seed by seed, and relative to runs of which each
    request brings its own tokens if it is one of them. `unshared_tokens` are those of an
    epoch in which each request brings its own tokens.
    """
    short, full = points[0], points[1]
    window = short.overrides["input.length.length"]
    nearest = min(base.evaluation.lengths, key=lambda n: abs(math.log(n / window)))

    def at(length: int) -> dict[tuple[str, int], Row]:
        chosen = (r for r in rows if r["split"] == "test" and r["length"] == length)
        return {(r["point"], r["seed"]): r for r in chosen}

    at_full, at_short = at(max(base.evaluation.lengths)), at(nearest)
    validation = {(r["point"], r["seed"]): r["auc"] for r in rows if r["split"] == "validation"}

    def gains(prefix: str) -> dict[int, tuple[float, float]]:
        return {
            seed: (low["auc"], at_full[prefix + full.name, seed]["auc"])
            for (name, seed), low in at_short.items()
            if name == prefix + short.name and (prefix + full.name, seed) in at_full
        }

    summary: list[Row] = []
    for point in points:
        seeds = [seed for name, seed in at_full if name == point.name]
        if not seeds:
            continue
        runs = [at_full[point.name, seed] for seed in seeds]
        own_tokens = "input.rows" in point.overrides
        kept = [
            (at_full[point.name, seed]["auc"] - low) / (high - low)
            for seed, (low, high) in gains("request-" if own_tokens else "").items()
            if seed in seeds
        ]
        config = config_lib.apply_overrides(base, point.overrides).input
        unshared = dataclasses.replace(config, rows="request", targets_per_chunk=None)
        summary.append(
            {
                "point": point.name,
                "seeds": len(seeds),
                **_spread("validation_auc", [validation[point.name, seed] for seed in seeds]),
                **_spread("auc", [run["auc"] for run in runs]),
                **_spread("log_loss", [run["log_loss"] for run in runs]),
                **_spread("calibration", [run["calibration"] for run in runs]),
                **_spread("gain_kept", kept),
                **_spread("train_tokens", [run["train_tokens"] for run in runs]),
                **_spread("train_seconds", [run["train_seconds"] for run in runs]),
                "unshared_tokens": _epoch_tokens(dataset, unshared),
            }
        )
    return summary


@functools.cache  # asked again after every run of a study
def _epoch_tokens(dataset: RequestDataset, config: InputConfig) -> int:
    return epoch_fill(dataset, config).tokens


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, and standard deviation over seeds, of what is known."""
    known = [value for value in values if value is not None]
    return {
        name: statistics.fmean(known) if known else None,
        f"{name}_sd": statistics.stdev(known) if len(known) > 1 else None,
    }
