"""The SQL that turns rows of a log into events: typed, and each with what is wrong with it.

Columns are called by number on the way, since SQL does not tell names apart that differ in case.
"""

from __future__ import annotations

from collections.abc import Sequence

from stca_jax.data.interaction_log.columns import ROW
from stca_jax.data.interaction_log.log_config import Column, LogConfig
from stca_jax.data.interaction_log.source import Table
from stca_jax.data.interaction_log.times import TimeReading
from stca_jax.input.encoding import LARGEST

LEFT_OUT = "left out by history_filter"  # counted with the rejected rows, though nothing is wrong
NO_LABEL = "label {} is neither 0 nor 1"
LONGEST = 1_000  # characters of an id, or of a category
LONG_FEATURE = f"{{}} has a text of more than {LONGEST:,} characters, which is no category"


def events_query(
    config: LogConfig,
    log: Table,
    time: TimeReading,
    id_types: dict[str, str],
    kinds: dict[str, str],
    rows_before: int = 0,
) -> tuple[str, list[str]]:
    """SQL from a table `log` to events.

    Args:
      config: What columns mean.
      log: The table.
      time: How timestamps are read.
      id_types: SQL types of "user", "item" and "request".
      kinds: "integer", "text" or "number" of each feature.
      rows_before: In a log without a clock, rows of the files before.

    Returns:
      The query, and the names of its columns: those of the events, `ROW`, and last "reason", which
      says why a row cannot be an event.
    """
    keys, columns = config.key_columns, config.feature_columns
    read = {level: id_sql(log.sql(keys[level]), id_types[level]) for level in id_types}
    labels = {f"label_{c.name}": label_sql(log.sql(c)) for c in columns["label"]}
    features = {
        f"feature_{c.name}": feature_sql(log.sql(c), kinds[c.name])
        for c in (*columns["target"], *columns["history"])
    }
    read |= labels | features
    if config.history_filter:
        where = log.sql_expression(config.history_filter)
        read["in_history"] = f"coalesce(({where})::BOOLEAN, false)"
    inner = {name: f"__{k}__" for k, name in enumerate(read)}
    raw_time = f"({ROW} + {rows_before})" if config.is_ordered else log.sql(keys["time"])
    typed = ", ".join(f"{sql} AS {inner[name]}" for name, sql in read.items())
    kept = ["user", "time", "item", *(n for n in read if n not in ("user", "item"))]
    if not config.labels:  # without labels it holds for all that stay
        kept = [name for name in kept if name != "in_history"]
    inner["time"] = "__ns__"
    reasons = [
        *_id_reasons(keys, inner, id_types),
        *time.reasons("__raw__", "__parsed__", "__ns__"),
        *_row_reasons(config, inner, list(labels)),
        *(
            (f"length({inner[f'feature_{c.name}']}) > {LONGEST}", LONG_FEATURE.format(c.name))
            for c in (*columns["target"], *columns["history"])
            if kinds[c.name] == "text"
        ),
    ]
    when = " ".join(f"WHEN {condition} THEN {text_sql(reason)}" for condition, reason in reasons)
    query = f"""
        SELECT {", ".join(inner[name] for name in kept)}, {ROW}, CASE {when} END AS __reason__
        FROM (SELECT *, {time.ns_sql("__parsed__")} AS __ns__
              FROM (SELECT *, {time.parsed_sql("__raw__")} AS __parsed__
                    FROM (SELECT {typed}, {raw_time} AS __raw__, {ROW} FROM log)))"""
    return query, [*kept, ROW, "reason"]


def id_sql(sql: str, type_: str) -> str:
    """How an id of an SQL type is read: NULL where it is missing or no id."""
    if type_ == "VARCHAR":
        # Only what may begin with a blank is trimmed, which takes six times as long as comparing.
        return (
            f"CASE WHEN {sql} BETWEEN '!' AND '~' THEN {sql} WHEN trim({sql}) <> '' THEN {sql} END"
        )
    if type_ in ("UBIGINT", "HUGEINT", "UHUGEINT", "UUID"):  # 2^63 and more fit no signed integer
        return f"CAST({sql} AS VARCHAR)"
    if type_ == "BLOB":
        return f"lower(hex({sql}))"
    if type_ in ("FLOAT", "DOUBLE"):  # what pandas makes of integers some of which are missing
        bits = 24 if type_ == "FLOAT" else 53
        whole = f"isfinite({sql}) AND {sql} = floor({sql}) AND abs({sql}) < 2.0 ** {bits}"
        return f"CASE WHEN {whole} THEN CAST({sql} AS BIGINT) END"
    if type_.startswith("DECIMAL"):
        number = f"CAST(CAST({sql} AS HUGEINT) AS {_decimal_id(type_)})"
        return f"CASE WHEN {sql} = floor({sql}) THEN {number} END"
    if type_ == '"NULL"':
        return "CAST(NULL AS VARCHAR)"
    return f"CAST({sql} AS BIGINT)"


def is_text_id(type_: str) -> bool | None:
    """Whether ids of an SQL type are kept as text, or as integers; None if it is no type of ids."""
    if type_ in ("VARCHAR", "UBIGINT", "HUGEINT", "UHUGEINT", "UUID", "BLOB", '"NULL"'):
        return True
    if type_.startswith("DECIMAL"):
        return _decimal_id(type_) == "VARCHAR"
    integers = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT")
    return False if type_ in ("FLOAT", "DOUBLE") or type_.removeprefix("U") in integers else None


def label_sql(sql: str) -> str:
    """0 or 1, 2 for anything else, NULL if it is missing."""
    text = f"NULLIF(CAST({sql} AS VARCHAR), '')"
    number = f"coalesce(TRY_CAST({text} AS DOUBLE), TRY_CAST({text} AS BOOLEAN)::DOUBLE)"
    return (
        f"CAST(CASE WHEN {text} IS NULL OR isnan({number}) THEN NULL "
        f"WHEN {number} IN (0, 1) THEN {number} ELSE 2 END AS TINYINT)"
    )


def feature_sql(sql: str, kind: str) -> str:
    """A feature as BIGINT, VARCHAR or DOUBLE; NULL if it is missing, NaN if it is no number."""
    if kind == "integer":
        return f"CAST({sql} AS BIGINT)"
    if kind == "text":
        return f"NULLIF(CAST({sql} AS VARCHAR), '')"
    number = f"TRY_CAST({sql} AS DOUBLE)"
    text = f"trim(CAST({sql} AS VARCHAR))"
    missing = f"{sql} IS NULL OR {text} = '' OR isnan({number})"
    return (
        f"CASE WHEN abs({number}) <= {LARGEST!r} THEN {number} "
        f"WHEN {missing} THEN NULL ELSE 'nan'::DOUBLE END"
    )


def text_sql(value: str) -> str:
    """A text in SQL."""
    return "'" + value.replace("'", "''") + "'"


def _decimal_id(type_: str) -> str:
    """BIGINT if all of "DECIMAL(digits,scale)" fit, or text."""
    digits, scale = map(int, type_.removeprefix("DECIMAL(").rstrip(")").split(","))
    return "BIGINT" if digits - scale <= 18 else "VARCHAR"


def _id_reasons(
    keys: dict[str, Column], inner: dict[str, str], id_types: dict[str, str]
) -> list[tuple[str, str]]:
    found = []
    for level, type_ in id_types.items():
        if level != "request":
            found.append((f"{inner[level]} IS NULL", f"{keys[level].name} is missing or no id"))
        if type_ == "VARCHAR":
            reason = f"{keys[level].name} is longer than {LONGEST:,} characters"
            found.append((f"length({inner[level]}) > {LONGEST}", reason))
    return found


def _row_reasons(
    config: LogConfig, inner: dict[str, str], labels: Sequence[str]
) -> list[tuple[str, str]]:
    cases = [
        (f"{inner[name]} = 2", NO_LABEL.format(name.removeprefix("label_"))) for name in labels
    ]
    missing = " + ".join(f"({inner[name]} IS NULL)::INT" for name in labels)
    if config.request_id:
        unknown = f"{inner['request']} IS NULL AND {missing} < {len(labels)}"
        cases.append((unknown, f"{config.key_columns['request'].name} is missing"))
    if config.history_filter and not labels:
        cases.append((f"NOT {inner['in_history']}", LEFT_OUT))
    return cases


def side_query(
    table: Table, key: Column, key_type: str, columns: Sequence[Column], kinds: dict[str, str],
    is_text: bool,
) -> tuple[str, list[str]]:  # fmt: skip
    """SQL from a table `side` to its rows with ids, and the names of its columns.

    Args:
      table: The item or user table.
      key: Its id.
      key_type: SQL type of the id.
      columns: Its features.
      kinds: Of each feature.
      is_text: Whether the log's ids are text.
    """
    id_ = id_sql(table.sql(key), key_type)
    if key_type == "VARCHAR" and not is_text:  # a cast would round 105.5 to 106
        id_ = rf"CASE WHEN regexp_full_match(trim({id_}), '[+-]?\d+(\.0*)?') THEN {id_} END"
    id_ = f"TRY_CAST({id_} AS {'VARCHAR' if is_text else 'BIGINT'})"
    read = {"id": id_} | {
        f"feature_{c.name}": feature_sql(table.sql(c), kinds[c.name]) for c in columns
    }
    selected = ", ".join(f"{sql} AS __{k}__" for k, sql in enumerate(read.values()))
    query = f"SELECT * FROM (SELECT {selected}, {ROW} FROM side) WHERE __0__ IS NOT NULL"
    return query, [*read, ROW]


FIRST_OF_EACH_ID = f"""
    SELECT * EXCLUDE ({ROW}) FROM rows
    QUALIFY row_number() OVER (PARTITION BY id ORDER BY {ROW}) = 1
    ORDER BY id"""
"""SQL from rows of a side table to one row per id, the first."""
