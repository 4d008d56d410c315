"""The points of the length study, and the tables and figures that its runs make."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stca_jax import config as config_lib
from stca_jax.errors import UserError
from stca_jax.evaluation.evaluator import Row
from stca_jax.evaluation.report import Chart, Line, load_run, mean_line
from stca_jax.experiment import ExperimentConfig
from stca_jax.files import read_json_lines
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.length import BetaLength
from stca_jax.input.pipeline import InputConfig, epoch_fill

COLUMNS = ("split", "length", "auc", "gauc_user", "log_loss", "calibration")
COSTS = ("steps", "train_tokens", "train_seconds")
SCORES = "evaluation/study.jsonl"  # in the directory of a run


class Point(NamedTuple):
    """One setting of the study.

    Attributes:
      name: Of its directory.
      parts: The comparisons it belongs to.
      overrides: Values that it replaces, by dotted path of the config.
    """

    name: str
    parts: tuple[str, ...]
    overrides: dict[str, Any]


def make_points(base: ExperimentConfig) -> list[Point]:
    """All points, in the order in which they are run.

    Raises:
      UserError: the config's length is not a `BetaLength`.
    """
    length = base.input.length
    if not isinstance(length, BetaLength):
        raise UserError(
            f"input.length is {length!r}; the study varies a BetaLength, whose maximum is the full "
            "length: set one in the config"
        )
    full = length.maximum
    short, average = max(8, full // 16), full // 40 * 8

    def fixed(length: int) -> dict[str, Any]:
        return {"input.length": "FixedLength", "input.length.length": length}

    def beta(alpha: float) -> dict[str, Any]:
        return {"input.length.average": float(average), "input.length.alpha": alpha}

    both = ("length", "capacity")
    points = [
        Point(f"fixed-{short}", both, fixed(short)),
        Point(f"fixed-{full}", both, fixed(full)),
        *(Point(f"beta-{alpha:g}", ("length",), beta(alpha)) for alpha in (0.25, 0.02, 0.1, 1.0)),
        Point(
            "uniform",
            ("length",),
            {
                "input.length": "UniformLength",
                "input.length.minimum": length.minimum,
                "input.length.maximum": full,
            },
        ),
        Point(f"fixed-{average}", both, fixed(average)),
    ]
    points.append(Point(f"fixed-{full // 2}", ("robustness",), fixed(full // 2)))
    # Options for lengths beyond the trained one, where they should show: trained on short windows.
    options: dict[str, dict[str, Any]] = {
        "temperature": {"model.sequence.temperature_length": short},
        "attention-sink": {"model.sequence.attention_sink": True},
        "recency-score": {"model.sequence.recency_score": True},
    }
    for name, change in options.items():
        points.append(Point(f"{name}-fixed-{short}", ("robustness",), fixed(short) | change))
    additions: dict[str, dict[str, Any]] = {
        "recency-score": options["recency-score"],
        "independent": {"model.sequence.initialization": "independent"},
        "no-count-channel": {"model.sequence.count_channel": False},
        "no-match-channel": {"model.match_channel": False},
        "item-only": {"model.features": ()},
        "adam-tables": {"optimizer.tables": "adam", "optimizer.table_learning_rate": 0.003},
    }
    for name, change in additions.items():
        points.append(Point(name, ("model",), beta(0.25) | change))
    # Rows of a request's own tokens hold fewer targets: so fewer slots, and twice the steps.
    per_request: dict[str, Any] = {
        "input.rows": "request",
        "input.targets_per_row": max(1, base.input.targets_per_row // 3),
        "input.targets_per_chunk": None,
    }
    if base.training.max_steps is not None:
        per_request["training.max_steps"] = 2 * base.training.max_steps
    # Windows other than the most recent, and times relative to the request, cannot share tokens.
    unshared: dict[str, dict[str, Any]] = {
        "window-suffix": {},
        "window-random": {"input.window": "random"},
        "window-prefix": {"input.window": "prefix"},
        "request-time-delta": {"model.embedding.time_delta": True},
        "request-recency-score": options["recency-score"],
    }
    for name, change in unshared.items():
        parts = ("window", "request") if name == "window-suffix" else (name.split("-")[0],)
        points.append(Point(name, parts, beta(0.25) | per_request | change))
    # A row of short windows has about as many targets as four of full ones.
    four_rows = {"input.rows_per_batch": 4 * base.input.rows_per_batch}
    points.append(
        Point(f"request-fixed-{full}", ("request",), fixed(full) | per_request | four_rows)
    )
    points.append(Point("request-beta-0.02", ("request",), beta(0.02) | per_request))
    points.append(Point(f"request-fixed-{short}", ("request",), fixed(short) | per_request))
    width = base.model.sequence.width
    for other in (width // 2, 2 * width):
        for n in (short, average, full):
            sized = fixed(n) | {"model.sequence.width": other}
            points.append(Point(f"width-{other}-fixed-{n}", ("capacity",), sized))
    return points


def choose_points(points: Sequence[Point], names: Sequence[str]) -> list[Point]:
    """The points of those names or of those parts, in their own order.

    Raises:
      UserError: a name is neither.
    """
    known = {name: None for point in points for name in (*point.parts, point.name)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"there is no point {unknown[0]!r}; --points takes {', '.join(known)}")
    return [point for point in points if {point.name, *point.parts} & set(names)]


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
) -> list[dict[str, Any]]:
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

    summary = []
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


def charts(
    points: Sequence[Point],
    rows: Sequence[Row],
    summary: Sequence[Row],
    references: Sequence[Row],
) -> list[Chart]:
    """The figures for which there are finished runs.

    Args:
      points: All points.
      rows: From `result_rows`.
      summary: From `summary_rows`.
      references: Rows of the references on the test split.
    """
    tested = [row for row in rows if row["split"] == "test"]
    seeds = {row["point"]: sorted({r["seed"] for r in tested if r["point"] == row["point"]})
             for row in tested}  # fmt: skip

    def lines(names: Sequence[str], metric: str) -> list[Line]:
        tables = {
            name: [[r for r in tested if (r["point"], r["seed"]) == (name, k)] for k in seeds[name]]
            for name in names
        }
        return [mean_line(name, of_seeds, "length", metric) for name, of_seeds in tables.items()]

    def chart(name: str, title: str, y_label: str, drawn: list[Line]) -> Chart:
        x_label = "served history length (events)"
        return Chart(name, title, "", x_label, y_label, drawn, lengths=True)

    finished = {part: [p.name for p in points if part in p.parts and p.name in seeds]
                for part in ("length", "window")}  # fmt: skip
    stochastic = [row for row in summary if row["point"].startswith("beta-")]
    best = max(stochastic, key=lambda row: row["validation_auc"], default={"point": None})["point"]
    shown = [n for n in finished["length"] if not n.startswith("beta-") or n == best]
    made = []
    for metric, label in (("auc", "AUC"), ("log_loss", "Log loss")):
        drawn = lines(shown, metric)
        for model in dict.fromkeys(row["model"] for row in references):
            of_model = [row for row in references if row["model"] == model]
            drawn.append(mean_line(model, [of_model], "length", metric, reference=model))
        drawn = [line for line in drawn if line.x]
        made.append(chart(f"length_{metric}", f"{label} by training length", label, drawn))
        if above := _above_logistic(drawn):
            title = f"{label} less that of logistic regression"
            made.append(chart(f"length_{metric}_difference", title, f"{label} difference", above))
    if finished["window"]:
        drawn = lines(finished["window"], "auc")
        made.append(chart("window_auc", "AUC by training window", "AUC", drawn))
    if drawn := _cost_lines(finished["length"], summary):
        made.append(
            Chart(
                "length_cost",
                "Gain of full training kept, by cost",
                "",
                "training tokens (share of full length)",
                "share of the gain",
                drawn,
            )
        )
    return made


def _above_logistic(lines: Sequence[Line]) -> list[Line]:
    """Differences from the logistic reference, of all but counting; nothing without it."""
    base = {line.label: dict(zip(line.x, line.y, strict=True)) for line in lines}.get("logistic")
    if base is None:
        return []
    return [
        line._replace(y=[y - base[x] for x, y in zip(line.x, line.y, strict=True)])
        for line in lines
        if line.label != "counting"
    ]


def _cost_lines(names: Sequence[str], summary: Sequence[Row]) -> list[Line]:
    """Gain kept against the tokens of an epoch relative to full length, a line per sampler."""
    rows = {row["point"]: row for row in summary if row["point"] in names and row["gain_kept"]}
    most = max((row["unshared_tokens"] for row in rows.values()), default=0)
    drawn = []
    for sampler in ("fixed", "beta", "uniform"):
        own = [row for name, row in rows.items() if name.startswith(sampler)]
        own.sort(key=lambda row: row["unshared_tokens"])
        x = [row["unshared_tokens"] / most for row in own]
        error = [row["gain_kept_sd"] or 0.0 for row in own]
        drawn.append(Line(sampler, x, [row["gain_kept"] for row in own], None, error))
    return [line for line in drawn if line.x]


class PowerLaw(NamedTuple):
    """loss = scale * width ** width_exponent * length ** length_exponent, with standard errors.

    Attributes:
      scale: At width and length 1.
      width_exponent: Negative where larger models are better.
      width_error: Its standard error.
      length_exponent: Of the training length.
      length_error: Its standard error.
    """

    scale: float
    width_exponent: float
    width_error: float
    length_exponent: float
    length_error: float


def fit_power_law(
    width: Sequence[float], length: Sequence[float], loss: Sequence[float]
) -> PowerLaw:
    """Ordinary least squares of the logarithms.

    Args:
      width: Of each run.
      length: Training length of each run.
      loss: Positive.

    Raises:
      ValueError: fewer than four runs, or all of one width or length.
    """
    x = np.column_stack([np.ones(len(loss)), np.log(width), np.log(length)])
    if len(x) < 4 or np.linalg.matrix_rank(x) < 3:
        raise ValueError(f"{len(x)} runs do not determine a power law of width and length")
    y = np.log(loss)
    solution, *_ = np.linalg.lstsq(x, y, rcond=None)
    residual = y - x @ solution
    variance = residual @ residual / (len(x) - 3) * np.linalg.inv(x.T @ x)
    error = np.sqrt(np.diag(variance))
    return PowerLaw(
        float(np.exp(solution[0])),
        float(solution[1]),
        float(error[1]),
        float(solution[2]),
        float(error[2]),
    )


def capacity_law(
    points: Sequence[Point], rows: Sequence[Row], base: ExperimentConfig
) -> PowerLaw | None:
    """The power law of test log loss at full length; None before there are runs of three widths."""
    overrides = {p.name: p.overrides for p in points if "capacity" in p.parts}
    longest = max(base.evaluation.lengths)
    runs = [
        row
        for row in rows
        if row["point"] in overrides and row["split"] == "test" and row["length"] == longest
    ]
    name = "model.sequence.width"
    width = [overrides[r["point"]].get(name, base.model.sequence.width) for r in runs]
    if len(set(width)) < 3:
        return None
    length = [overrides[r["point"]]["input.length.length"] for r in runs]
    return fit_power_law(width, length, [r["log_loss"] for r in runs])
