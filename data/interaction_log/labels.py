"""Labels that cannot be meant: other values than 0 and 1, or one class only."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from stca_jax.data.interaction_log.event_sql import NO_LABEL, label_sql, text_sql
from stca_jax.data.interaction_log.events import LogSource, connect
from stca_jax.data.interaction_log.log_config import Column
from stca_jax.data.interaction_log.statistics import ShardStatistics, ValueCounts
from stca_jax.data.interaction_log.suggestions import flag, name_of, sql_of
from stca_jax.errors import UserError
from stca_jax.input.records import SPLITS

_COUNTED = 10_000  # distinct values; a label that has more is read no further
_SHOWN = 6
_FEW = 0.1  # share of values that may be slips among 0 and 1
_HIGH = 0.75  # of the range of a rating, from where it is a good one


def check_values(source: LogSource, reasons: Mapping[str, int]) -> None:
    """Checks that labels are 0 or 1.

    Args:
      source: The log.
      reasons: How many rows cannot be used, by reason.

    Raises:
      UserError: a label has other values; shows how often each occurs, and the SQL to write.
    """
    for column in source.config.feature_columns["label"]:
        if not reasons.get(NO_LABEL.format(column.name)):
            continue
        good, odd = _count_values(source, column)
        counts = good + odd
        most = [f"{text!r} ({n:,})" for text, n in counts.most_common(_SHOWN)]
        more = f" and {len(counts) - _SHOWN:,} others" if len(counts) > _SHOWN else ""
        raise UserError(
            f"label {column.name} must be 0, 1, or missing (true and false are as good), but its "
            f"values are {', '.join(most)}{more}. Say in SQL which of them are 1: "
            f"{_ways_out(column, good, odd)}"
        )


def check_classes(source: LogSource, total: ShardStatistics, counts: ValueCounts) -> list[str]:
    """Checks that there is something to tell apart.

    Args:
      source: The log.
      total: Statistics of it.
      counts: Values of it.

    Returns:
      Warnings: of tasks that have one class in validation or test.

    Raises:
      UserError: the training events of a task are all 0 or all 1, or no negative can be sampled.
    """
    if not source.config.labels:
        train_items = int((counts.columns["item"]["count"].to_numpy() > 0).sum())
        if train_items < 2:
            raise UserError(
                f"the log has no labels, and {train_items} item in training: every target would be "
                "positive, since no other item can be sampled. Give --labels, a log with more "
                "items, or a later --validation_start"
            )
        if (total.fewest_items or 0) >= train_items:
            raise UserError(
                f"the log has no labels, and every request of training has all {train_items:,} "
                "items: every target would be positive, since no other item can be sampled. Give "
                f"--labels, a log with more items, or a --session_gap that makes shorter requests "
                f"(it is {source.config.session_gap:,} s)"
            )
        return []
    warnings = []
    columns = source.config.feature_columns["label"]
    for column, by_split in zip(columns, counts.classes.swapaxes(0, 1), strict=True):
        for split, (zeros, ones) in zip(SPLITS, by_split.tolist(), strict=True):
            if zeros and ones:
                continue
            only = "1" if ones else "0"
            found = f"label {column.name} is {only} in all {zeros + ones:,} targets of {split}"
            if split != SPLITS[0]:
                warnings.append(f"{found}, where its AUC is undefined")
                continue
            raise UserError(
                f"{found}; both 0 and 1 must occur. {_one_class_way_out(column, only, by_split)}"
            )
    return warnings


def _one_class_way_out(column: Column, only: str, by_split: Sequence[Sequence[int]]) -> str:
    ones_elsewhere = sum(split[1 - int(only)] for split in by_split)
    sql, name = sql_of(column), name_of(column, "label")
    if ones_elsewhere:
        return "Later targets have both: give a later --validation_start, or leave the label out"
    if only == "1":
        return (
            "If the log lists only what was chosen, leave --labels out to sample negatives. If a "
            f"missing value means 0: {flag('labels', name, f'coalesce({sql}::DOUBLE, 0)')}"
        )
    return f"Give another column, or SQL of what counts as 1: {flag('labels', name, 'SQL')}"


def _count_values(
    source: LogSource, column: Column
) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """How often each text that is 0 or 1 occurs, and each that is not; of a long log, at first."""
    sql = source.log.sql(column)
    good, odd = collections.Counter[str](), collections.Counter[str]()
    query = f"""
        SELECT CAST({sql} AS VARCHAR) AS text, {label_sql(sql)} AS label, count(*) AS n
        FROM log GROUP BY ALL HAVING label IS NOT NULL"""
    with connect() as connection:
        for part in source.log.parts:
            for block in source.log.blocks(part):
                connection.register("log", block.rows)
                for text, label, count in connection.sql(query).fetchall():
                    (odd if label == 2 else good)[text] += count
                if len(odd) > _COUNTED:
                    return good, odd
    return good, odd


def _ways_out(column: Column, good: collections.Counter[str], odd: collections.Counter[str]) -> str:
    sql, name = sql_of(column), name_of(column, "label")
    numbers = _numbers([*good, *odd])
    found = []
    few = odd.total() <= _FEW * good.total()
    if few:
        words = ", ".join(map(text_sql, sorted(good)))
        only = f"CASE WHEN {sql}::VARCHAR IN ({words}) THEN {sql} END"
        found.append(f"{flag('labels', name, only)} takes the others as missing")
    if numbers:
        ordered = sorted(numbers)
        high = ordered[0] + _HIGH * (ordered[-1] - ordered[0])
        threshold = 1.0 if few else next(n for n in ordered if n >= high)
        text = f"{threshold:.0f}" if threshold == int(threshold) else repr(threshold)
        found.append(flag("labels", name, f"{sql}::DOUBLE >= {text}"))
    elif not few:
        word = text_sql((good + odd).most_common(1)[0][0])
        found.append(f"{flag('labels', name, f'{sql} = {word}')} (or whichever value means 1)")
    return "; or ".join(found)


def _numbers(texts: Sequence[str]) -> list[float]:
    """The texts as finite numbers; none if any is none."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return []
    return numbers if all(abs(n) < float("inf") for n in numbers) else []
