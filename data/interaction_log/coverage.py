"""How much of what a log says reaches the model: ids of their own, numbers, and side tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stca_jax.data.interaction_log.encoders import fit_scale
from stca_jax.data.interaction_log.events import LogSource, SideTable
from stca_jax.data.interaction_log.id_matching import distinct_ids, find_mending
from stca_jax.data.interaction_log.log_config import SCALINGS, Column
from stca_jax.data.interaction_log.moments import Moments
from stca_jax.data.interaction_log.number_texts import describe_mending
from stca_jax.data.interaction_log.odd_rows import allow
from stca_jax.data.interaction_log.source import Table
from stca_jax.data.interaction_log.statistics import ValueCounts, sum_counts
from stca_jax.data.interaction_log.suggestions import flag, name_of
from stca_jax.errors import UserError

_UNREADABLE = 0.1  # share of the values of a numeric feature that may be no numbers
_FEW = 0.9  # share of ids that side tables should have

Lines = list[tuple[str, str]]


def check_features(source: LogSource, counts: ValueCounts) -> Lines:
    """Checks that something is left of the log's own features, in training events.

    Returns:
      Lines of the profile.

    Raises:
      UserError: no value of a feature has an id of its own, or many are no numbers.
    """
    columns = source.config.feature_columns
    by_name = {c.name: c for c in (*columns["target"], *columns["history"])}
    events = _num_events(counts.columns["item"])
    lines = []
    for key, table in counts.columns.items():
        name = key.removeprefix("feature_")
        lines.append(_check_values(name, table, events, source.config.min_count))
    for key, moments in counts.moments.items():
        column = by_name[key.removeprefix("feature_")]
        option = "target_features" if column in columns["target"] else "history_features"
        both = moments, counts.later_moments[key]
        lines.append(_check_numbers(source.log, option, column, *both))
    return lines


def check_side_tables(
    source: LogSource, counts: ValueCounts, tables: Mapping[str, SideTable]
) -> tuple[Lines, list[str]]:
    """Checks that the item and user tables have the log's ids, and that their features say much.

    Args:
      source: The log.
      counts: Of it.
      tables: "items" and "users", as `events.read_side_table` gives them.

    Returns:
      Lines of the profile, and warnings.

    Raises:
      UserError: a table has no id of the log, or many ids twice, or nothing is left of a feature.
    """
    lines: Lines = []
    warnings: list[str] = []
    for what, (side, num_repeated) in tables.items():
        known = counts.columns["item"] if what == "items" else counts.users
        ids = known["value"].combine_chunks()
        row = pc.index_in(ids, side["id"].combine_chunks(), skip_nulls=True)
        has = np.asarray(row.is_valid())
        found = f"{has.sum():,} of {len(ids):,} {what} of the log are in the table"
        shares = _shares(known.filter(pa.array(has)), _num_events(known))
        repeated = _check_repeated(source, what, len(side), num_repeated)
        line = f"{found} ({has.mean():.1%}), {_of_events(shares)}{repeated}"
        lines.append((f"table of {what}", line))
        warnings += _check_ids(source, what, ids.filter(pa.array(~has)), found, has.mean())
        for column in source.config.feature_columns[what[:-1]]:
            values = side[f"feature_{column.name}"].combine_chunks().take(row)
            lines.append(_check_side_feature(source, what, column, values, known))
    return lines, warnings


def _check_repeated(source: LogSource, what: str, num_ids: int, num_repeated: int) -> str:
    """What to say of rows whose id came before, such as those of a table of changes."""
    if not num_repeated:
        return ""
    share = num_repeated / (num_ids + num_repeated)
    text = f"{num_repeated:,} of {num_ids + num_repeated:,} rows ({share:.1%}) repeat an id"
    if share > source.config.allow_odd:
        raise UserError(
            f"{what}: {text}, and only the first of each is read; give a table with one row for "
            f"each id{allow(share)}"
        )
    return f"; {text} and are left out"


def _check_ids(
    source: LogSource, what: str, lacking: pa.Array, found: str, share: float
) -> list[str]:
    """Warns of ids that the table lacks, or that only look different in it."""
    if not len(lacking):
        return []
    mending = find_mending(source, what, share)
    if share >= _FEW and mending is None:
        return []
    of_table = distinct_ids(getattr(source, what), source.config.key_columns[what[:-1]])
    text = (
        f"{found} ({share:.1%}): the log has {_examples(lacking)}, {what} has "
        f"{_examples(of_table.sort())}. "
    )
    if mending is not None:
        text += f"SQL can make them equal: {mending.describe()}"
    else:
        level = what[:-1]
        column = source.config.key_columns[level]
        own = flag(f"{level}_id", name_of(column, level), "SQL")
        text += (
            "Blanks, decimal points, leading zeros, case, and letters or signs around numbers are "
            f"not what tells them apart. Give SQL of your own, which reads both, {own}, or another "
            f"table, or leave --{what} out"
        )
    if not share:
        raise UserError(text)
    return [text]


def _check_side_feature(
    source: LogSource, what: str, column: Column, values: pa.Array, known: pa.Table
) -> tuple[str, str]:
    if pa.types.is_floating(values.type):
        is_train = pc.greater(known["count"], 0).combine_chunks()
        train, later = values.filter(is_train), values.filter(pc.invert(is_train))
        option = f"{what[:-1]}_features"
        return _check_numbers(
            getattr(source, what), option, column, Moments.of(train), Moments.of(later)
        )
    table = pa.table({"value": values, "count": known["count"], "later": known["later"]})
    counted = sum_counts(table.filter(pc.is_valid(values)))
    # A user's features are known of each user; an item's vocabulary is fitted on events.
    min_count = 1 if what == "users" else source.config.min_count
    return _check_values(column.name, counted, _num_events(known), min_count)


def _check_values(
    name: str, table: pa.Table, events: np.ndarray, min_count: int
) -> tuple[str, str]:
    """Of a categorical feature: "value", "count" in training, "later"; `events` are all of both."""
    count = table["count"].to_numpy()
    is_own = count >= min_count
    if not is_own.any() and len(table):
        raise UserError(
            f"{name}: none of {len(table):,} values occurs {min_count} times in training "
            f"(min_count), so that none has an id of its own; the most frequent occurs "
            f"{count.max():,} times. Give --min_count=1, or leave {name} out"
        )
    if not len(table):
        raise UserError(f"{name}: no event has a value; leave {name} out")
    own = _shares(table.filter(pa.array(is_own)), events)
    present = _shares(table, events)
    return f"  {name}", (
        f"{is_own.sum():,} of {len(table):,} values have ids of their own, "
        f"{_of_events(own)}; out of vocabulary {_pair(present - own)}; missing {_pair(1 - present)}"
    )


def _check_numbers(
    table: Table, option: str, column: Column, train: Moments, later: Moments
) -> tuple[str, str]:
    name, present = column.name, train.count + train.unreadable
    share = train.unreadable / max(present, 1)
    if share > _UNREADABLE:
        raise UserError(
            f"{name}: {train.unreadable:,} of {present:,} values in training ({share:.1%}) are no "
            f"numbers within float32, {describe_mending(table, option, column)}, or give "
            f"{name}:categorical"
        )
    if not train.count:
        raise UserError(f"{name}: no training event has a value; leave {name} out")
    scale = fit_scale(train, column.kind if column.kind in SCALINGS else "")
    return f"  {name}", (
        f"min {train.least:g}, p50 {train.quantile(0.5):g}, p99 {train.quantile(0.99):g}, "
        f"max {train.most:g}, mean {train.mean:g}, scaled {scale.describe()}; "
        f"missing {_pair(np.array([_missing(train), _missing(later)]))}, "
        f"unreadable {_pair(np.array([_unreadable(train), _unreadable(later)]))}"
    )


def _num_events(table: pa.Table) -> np.ndarray:
    """In training and later."""
    return np.array([table["count"].to_numpy().sum(), table["later"].to_numpy().sum()])


def _shares(table: pa.Table, events: np.ndarray) -> np.ndarray:
    """Of training events and of later ones, that have one of the values."""
    return _num_events(table) / np.maximum(events, 1)


def _of_events(shares: np.ndarray) -> str:
    return f"in {shares[0]:.1%} of training events and {shares[1]:.1%} of later ones"


def _pair(shares: np.ndarray) -> str:
    return f"in {shares[0]:.1%} and {shares[1]:.1%}"


def _missing(moments: Moments) -> float:
    return moments.missing / max(moments.missing + moments.count + moments.unreadable, 1)


def _unreadable(moments: Moments) -> float:
    return moments.unreadable / max(moments.missing + moments.count + moments.unreadable, 1)


def _examples(ids: pa.Array) -> str:
    return ", ".join(repr(i) for i in ids[:3].to_pylist()) or "none"
