"""The points of the length study: settings that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from stca_jax.errors import UserError
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.length import BetaLength

Overrides = dict[str, Any]


class Point(NamedTuple):
    """One setting of the study.

    Attributes:
      name: Of its directory.
      parts: The comparisons it belongs to.
      overrides: Values that it replaces, by dotted path of the config.
    """

    name: str
    parts: tuple[str, ...]
    overrides: Overrides


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
    uniform = {
        "input.length": "UniformLength",
        "input.length.minimum": length.minimum,
        "input.length.maximum": full,
    }
    both = ("length", "capacity")
    alphas = (0.25, 0.02, 0.1, 1.0)
    points = [
        Point(f"fixed-{short}", both, _fixed(short)),
        Point(f"fixed-{full}", both, _fixed(full)),
        *(Point(f"beta-{alpha:g}", ("length",), _beta(average, alpha)) for alpha in alphas),
        Point("uniform", ("length",), uniform),
        Point(f"fixed-{average}", both, _fixed(average)),
        Point(f"fixed-{full // 2}", ("robustness",), _fixed(full // 2)),
        # Options for lengths beyond the trained one, where they should show: on short windows.
        *(
            Point(f"{name}-fixed-{short}", ("robustness",), _fixed(short) | change)
            for name, change in _options(short).items()
        ),
        *(
            Point(name, ("model",), _beta(average, 0.25) | change)
            for name, change in _model_changes(short).items()
        ),
        *_unshared_points(base, short, average, full),
    ]
    width = base.model.sequence.width
    for other in (width // 2, 2 * width):
        for n in (short, average, full):
            sized = _fixed(n) | {"model.sequence.width": other}
            points.append(Point(f"width-{other}-fixed-{n}", ("capacity",), sized))
    return points


def _fixed(length: int) -> Overrides:
    return {"input.length": "FixedLength", "input.length.length": length}


def _beta(average: int, alpha: float) -> Overrides:
    return {"input.length.average": float(average), "input.length.alpha": alpha}


def _options(short: int) -> dict[str, Overrides]:
    return {
        "temperature": {"model.sequence.temperature_length": short},
        "attention-sink": {"model.sequence.attention_sink": True},
        "recency-score": {"model.sequence.recency_score": True},
    }


def _model_changes(short: int) -> dict[str, Overrides]:
    return {
        "recency-score": _options(short)["recency-score"],
        "independent": {"model.sequence.initialization": "independent"},
        "no-count-channel": {"model.sequence.count_channel": False},
        "no-match-channel": {"model.match_channel": False},
        "item-only": {"model.features": ()},
        "adam-tables": {"optimizer.tables": "adam", "optimizer.table_learning_rate": 0.003},
    }


def _unshared_points(base: ExperimentConfig, short: int, average: int, full: int) -> list[Point]:
    """Points whose requests bring their own tokens."""
    # Rows of a request's own tokens hold fewer targets: so fewer slots, and twice the steps.
    per_request: Overrides = {
        "input.rows": "request",
        "input.targets_per_row": max(1, base.input.targets_per_row // 3),
        "input.targets_per_chunk": None,
    }
    if base.training.max_steps is not None:
        per_request["training.max_steps"] = 2 * base.training.max_steps
    # Windows other than the most recent, and times relative to the request, cannot share tokens.
    changes: dict[str, Overrides] = {
        "window-suffix": {},
        "window-random": {"input.window": "random"},
        "window-prefix": {"input.window": "prefix"},
        "request-time-delta": {"model.embedding.time_delta": True},
        "request-recency-score": _options(short)["recency-score"],
    }
    points = []
    for name, change in changes.items():
        parts = ("window", "request") if name == "window-suffix" else (name.split("-")[0],)
        points.append(Point(name, parts, _beta(average, 0.25) | per_request | change))
    # A row of short windows has about as many targets as four of full ones.
    four_rows = {"input.rows_per_batch": 4 * base.input.rows_per_batch}
    of_full = _fixed(full) | per_request | four_rows
    return [
        *points,
        Point(f"request-fixed-{full}", ("request",), of_full),
        Point("request-beta-0.02", ("request",), _beta(average, 0.02) | per_request),
        Point(f"request-fixed-{short}", ("request",), _fixed(short) | per_request),
    ]


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
