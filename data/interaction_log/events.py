"""From rows of a log to events: typed, checked, sorted by user, each once.  SQL, run by DuckDB.

    user   time  item  request  label_…  feature_…  in_history
    BIGINT or VARCHAR, seconds since 1970, …; NULL where a label or a feature is missing

Ties are ordered by content, and equal rows are one event, so that a log gives the same events
however it is spread over files.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stca_jax.data.interaction_log.log_config import TIME_UNITS, Column, LogConfig, quoted
from stca_jax.data.interaction_log.source import ROW, BadRow, Part, Table, fingerprint, open_table
from stca_jax.errors import UserError
from stca_jax.input import request_building as rb

# Counted with the rejected rows, though none of either is wrong.
LEFT_OUT = "left out by history_filter"
DUPLICATE = "equal to another row"
_END_OF_TIME = 2**32  # in 2106; records count seconds in 31 bits from the log's first day
_SHARD = 5  # a stream of hashes of its own


@dataclasses.dataclass(frozen=True)
class LogSource:
    """A log's files, opened and checked against its config; small enough to send to workers.

    Attributes:
      config: What the user said.
      log: The files of the log.
      items: The files of the item table, if there is one.
      users: The files of the user table, if there is one.
      time_unit: Units of the timestamp in a second, if it is a number.
      kinds: "integer", "text" or "number" of each feature, by name.
    """

    config: LogConfig
    log: Table
    items: Table | None
    users: Table | None
    time_unit: int
    kinds: dict[str, str]

    @classmethod
    def open(cls, config: LogConfig) -> LogSource:
        """Looks at the files' columns and at the first rows.

        Raises:
          UserError: a file or column is missing or damaged, or an SQL expression is wrong.
        """
        columns = config.feature_columns
        ids = [config.user_id, config.item_id, config.timestamp]
        of_event = [*columns["label"], *columns["target"], *columns["history"]]
        log = open_table(
            "log",
            config.log,
            [*ids, *([config.request_id] if config.request_id else []), *_plain_names(of_event)],
            [*(c.expression for c in of_event if c.is_sql), config.history_filter],
        )
        side = {}
        for what, key in (("items", config.item_id), ("users", config.user_id)):
            of_table = columns[what[:-1]]
            side[what] = getattr(config, what) and open_table(
                what,
                getattr(config, what),
                [key, *_plain_names(of_table)],
                [c.expression for c in of_table if c.is_sql],
            )
        kinds: dict[str, str] = {}
        for table, table_columns in (
            (log, columns["target"] + columns["history"]),
            (side["items"], columns["item"]),
            (side["users"], columns["user"]),
        ):
            kinds |= {c.name: _kind(table, c) for c in table_columns}
        kinds |= {c.name: "integer" for c in columns["label"]}
        unit = _time_unit(config, log)
        source = cls(config, log, side["items"] or None, side["users"] or None, unit, kinds)
        source.check_expressions()
        return source

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the config and the state of the files, as they were when first asked for."""
        return fingerprint(self.config, [t for t in (self.log, self.items, self.users) if t])

    def check_expressions(self) -> None:
        """Runs the SQL on no rows.

        Raises:
          UserError: naming the expression that DuckDB does not accept.
        """
        for column in self.config.feature_columns["label"]:
            _evaluate(self.log, column.sql, f"labels: {column.name}")
        if self.config.history_filter:
            _evaluate(self.log, f"({self.config.history_filter})::BOOLEAN", "history_filter")

    @property
    def id_types(self) -> dict[str, pa.DataType]:
        """How ids are stored: int64 or string."""
        names = {"user": self.config.user_id, "item": self.config.item_id}
        if self.config.request_id:
            names["request"] = self.config.request_id
        return {level: _id_sql(self.log, name)[1] for level, name in names.items()}


@dataclasses.dataclass(frozen=True)
class Events:
    """What a block of rows holds.

    Attributes:
      table: The events, in the order of the rows.
      shard: To which shard each event's user belongs.
      rejected: Rows that cannot be used: reason, file, row and content.
      reasons: How many rows were left out, by reason.
    """

    table: pa.Table
    shard: np.ndarray
    rejected: list[tuple[str, str, int, str]]
    reasons: collections.Counter[str]


def read_events(source: LogSource, part: Part) -> Iterator[Events]:
    """The events of a part of the log, block by block.

    Raises:
      UserError: the file is damaged, or an SQL expression fails on a value.
    """
    query = _events_query(source)
    with connect() as connection:
        for block in source.log.blocks(part):
            connection.register("log", block.rows)
            with _explain_sql("the log", part.file):
                found = connection.sql(query).to_arrow_table()
            reason = found["reason"]
            good = found.filter(reason.is_null()).drop_columns([ROW, "reason"])
            rejected = list(_rejected(part, block.rows, found, block.bad))
            reasons = collections.Counter(r for r, *_ in rejected)
            if left_out := pc.sum(pc.equal(reason, LEFT_OUT)).as_py():
                reasons[LEFT_OUT] = left_out
            shard = _shard_of(good["user"], source.log.num_shards)
            yield Events(good, shard, rejected, reasons)


def group_events(tables: Sequence[pa.Table], temporary: str | os.PathLike[str]) -> pa.Table:
    """Sorts the events of a shard by user, time and content, and keeps one of equal ones.

    Args:
      tables: Of the same columns.
      temporary: Where DuckDB may put what does not fit into its memory.
    """
    with connect(temporary) as connection:
        connection.register("events", pa.concat_tables(tables))
        query = "SELECT DISTINCT * FROM events ORDER BY ALL"
        return connection.sql(query).to_arrow_table().combine_chunks()


@contextlib.contextmanager
def connect(temporary: str | os.PathLike[str] | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of its own, in memory, with UTC as its time zone."""
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone='UTC'; SET memory_limit='3GB'")
        if temporary is not None:
            connection.execute(f"SET temp_directory='{os.fspath(temporary)}'")
        yield connection


def read_side_table(source: LogSource, what: str) -> pa.Table:
    """The item or user table: "id", typed as in the log, and the features; one row per id.

    Of rows with the same id, the first is kept.

    Args:
      source: The log.
      what: "items" or "users".

    Raises:
      UserError: a file is damaged, or a row cannot be read.
    """
    table: Table = getattr(source, what)
    config, level = source.config, what[:-1]
    key = {"items": config.item_id, "users": config.user_id}[what]
    is_text = pa.types.is_string(source.id_types[level])
    columns = [f"TRY_CAST({_id_sql(table, key)[0]} AS {'VARCHAR' if is_text else 'BIGINT'}) AS id"]
    columns += [
        f"{_feature_sql(c, source.kinds[c.name])} AS {quoted('feature_' + c.name)}"
        for c in config.feature_columns[level]
    ]
    query = f"""
        SELECT * EXCLUDE ({ROW}) FROM (SELECT {", ".join(columns)}, {ROW} FROM side)
        WHERE id IS NOT NULL QUALIFY row_number() OVER (PARTITION BY id ORDER BY {ROW}) = 1
        ORDER BY id"""
    with connect() as connection:
        connection.register("side", _side_rows(table, what))
        with _explain_sql(what, table.files[0]):
            return connection.sql(query).to_arrow_table().combine_chunks()


def id_keys(ids: pa.Array) -> np.ndarray:
    """A 64-bit number for each id, the same in every run: itself, or a hash of the text."""
    if pa.types.is_integer(ids.type):
        return ids.to_numpy(zero_copy_only=False).astype(np.int64)
    return rb.text_hash(ids.to_pylist())


def _side_rows(table: Table, what: str) -> pa.Table:
    """All rows of the item or user table, numbered over all of its files.

    Raises:
      UserError: a file is damaged, a row cannot be read, or there is none.
    """
    blocks = []
    for part in table.parts:
        for block in table.blocks(part):
            if block.bad:
                raise UserError(_bad_side_row(what, part.file, block.bad[0]))
            blocks.append(block.rows)
    if not blocks:
        raise UserError(f"{what}: no rows in {', '.join(table.files)}; leave them out")
    rows = pa.concat_tables(blocks)
    number = pa.array(np.arange(rows.num_rows))  # until here each file has a row 0
    return rows.set_column(rows.schema.get_field_index(ROW), ROW, number)


def _bad_side_row(what: str, file: str, bad: BadRow) -> str:
    return (
        f"{what}: {file}: row {bad.row} (the first is 0): {bad.reason}: "
        f"{' '.join(bad.text.split())}; mend or remove it"
    )


def _plain_names(columns: Sequence[Column]) -> list[str]:
    return [c.expression for c in columns if not c.is_sql]


def _events_query(source: LogSource) -> str:
    """SQL from a table `log` to events, with `reason` where a row cannot be one."""
    config, log = source.config, source.log
    columns = config.feature_columns
    read = {
        "user": _id_sql(log, config.user_id)[0],
        "seconds": _seconds_sql(source),
        "item": _id_sql(log, config.item_id)[0],
        "no_time": f"{quoted(config.timestamp)} IS NULL",
    }
    if config.request_id:
        read["request"] = _id_sql(log, config.request_id)[0]
    labels = {f"label_{c.name}": _label_sql(c) for c in columns["label"]}
    features = {
        f"feature_{c.name}": _feature_sql(c, source.kinds[c.name])
        for c in (*columns["target"], *columns["history"])
    }
    read |= labels | features
    if config.history_filter:
        read["in_history"] = f"coalesce(({config.history_filter})::BOOLEAN, false)"
    # Names of their own, since a log may have a column called like one of ours.
    typed = ", ".join(f"{sql} AS {_inner(name)}" for name, sql in read.items())
    kept = {"user": _inner("user"), "time": f"TRY_CAST(floor({_inner('seconds')}) AS BIGINT)"}
    kept |= {
        name: _inner(name)
        for name in read
        if name not in ("user", "seconds", "no_time")
        and (name != "in_history" or config.labels)  # without labels it holds for all that stay
    }
    selected = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in kept.items())
    return f"""
        SELECT {selected}, {_reason_sql(config, list(labels))} AS reason, {ROW}
        FROM (SELECT {typed}, {ROW} FROM log)"""


def _reason_sql(config: LogConfig, labels: Sequence[str]) -> str:
    """Why a row cannot be an event; NULL if it can."""
    seconds = _inner("seconds")
    cases = [
        (f"{_inner('user')} IS NULL", f"{config.user_id} is missing or no id"),
        (f"{_inner('item')} IS NULL", f"{config.item_id} is missing or no id"),
        (_inner("no_time"), f"{config.timestamp} is missing"),
        (f"{seconds} IS NULL", f"{config.timestamp} is neither a number nor a date"),
        (f"NOT isfinite({seconds})", f"{config.timestamp} is not finite"),
        (
            f"{seconds} < 0 OR {seconds} >= {_END_OF_TIME}",
            f"{config.timestamp} is outside 1970 to 2106",
        ),
    ]
    for name in labels:
        shown = name.removeprefix("label_")
        cases.append((f"{_inner(name)} = 2", f"label {shown} is neither 0 nor 1"))
    missing = " + ".join(f"({_inner(name)} IS NULL)::INT" for name in labels)
    if len(labels) > 1:
        cases.append((f"{missing} NOT IN (0, {len(labels)})", "some labels are missing"))
    if config.request_id:
        unknown = f"{_inner('request')} IS NULL AND {missing} = 0"
        cases.append((unknown, f"{config.request_id} is missing"))
    if config.history_filter and not labels:
        cases.append((f"NOT {_inner('in_history')}", LEFT_OUT))
    when = " ".join(f"WHEN {condition} THEN {_text(reason)}" for condition, reason in cases)
    return f"CASE {when} END"


def _inner(name: str) -> str:
    return quoted(f"__{name}__")


def _id_sql(table: Table, name: str) -> tuple[str, pa.DataType]:
    """How an id is read and as what: NULL where it is missing or no id.

    Raises:
      UserError: the column is neither integers nor text.
    """
    type_, column = table.columns[name], quoted(name)
    if pa.types.is_uint64(type_):  # ids above 2^63 do not fit a signed integer
        return f"CAST({column} AS VARCHAR)", pa.string()
    if pa.types.is_integer(type_):
        return f"CAST({column} AS BIGINT)", pa.int64()
    if pa.types.is_string(type_):
        return f"NULLIF({column}, '')", pa.string()
    if pa.types.is_floating(type_):  # what pandas makes of integers some of which are missing
        whole = f"isfinite({column}) AND {column} = floor({column}) AND abs({column}) < 2.0 ** 53"
        return f"CASE WHEN {whole} THEN CAST({column} AS BIGINT) END", pa.int64()
    if pa.types.is_null(type_):
        return "CAST(NULL AS VARCHAR)", pa.string()
    raise UserError(f"column {name!r} is a {type_}; ids are integers or text")


def _seconds_sql(source: LogSource) -> str:
    """The time in seconds since 1970; NULL where text is unreadable."""
    name = source.config.timestamp
    type_, column, unit = source.log.columns[name], quoted(name), source.time_unit
    if pa.types.is_temporal(type_):
        return f"epoch({column})"
    if pa.types.is_integer(type_):
        return f"CAST({column} // {unit} AS DOUBLE)"
    if pa.types.is_string(type_):
        date = f"epoch(TRY_CAST({column} AS TIMESTAMPTZ))"
        return f"coalesce(TRY_CAST({column} AS DOUBLE) / {unit}, {date})"
    return f"CAST({column} AS DOUBLE) / {unit}"


def _time_unit(config: LogConfig, log: Table) -> int:
    """Units in a second: as configured, or by the size of the first numbers."""
    if config.time_unit != "auto":
        return TIME_UNITS[config.time_unit]
    block = next((b for p in log.parts for b in log.blocks(p) if b.rows.num_rows), None)
    if block is None or pa.types.is_temporal(log.columns[config.timestamp]):
        return 1
    with connect() as connection:
        connection.register("log", block.rows.select([config.timestamp]))
        number = f"TRY_CAST(CAST({quoted(config.timestamp)} AS VARCHAR) AS DOUBLE)"
        query = f"SELECT median(abs(n)) FROM (SELECT {number} AS n FROM log) WHERE isfinite(n)"
        row = connection.execute(query).fetchone()
    size = (row and row[0]) or 0.0
    return next((unit for unit in TIME_UNITS.values() if size < 1e11 * unit), TIME_UNITS["ns"])


def _label_sql(column: Column) -> str:
    """0 or 1, 2 for anything else, NULL if it is missing."""
    text = f"NULLIF(CAST({column.sql} AS VARCHAR), '')"
    number = f"coalesce(TRY_CAST({text} AS DOUBLE), TRY_CAST({text} AS BOOLEAN)::DOUBLE)"
    return (
        f"CAST(CASE WHEN {text} IS NULL OR isnan({number}) THEN NULL "
        f"WHEN {number} IN (0, 1) THEN {number} ELSE 2 END AS TINYINT)"
    )


def _feature_sql(column: Column, kind: str) -> str:
    """A feature as BIGINT, VARCHAR or DOUBLE; NULL if it is missing."""
    if kind == "integer":
        return f"CAST({column.sql} AS BIGINT)"
    if kind == "text":
        return f"NULLIF(CAST({column.sql} AS VARCHAR), '')"
    number = f"TRY_CAST({column.sql} AS DOUBLE)"
    return f"CASE WHEN isfinite({number}) THEN {number} END"


def _kind(table: Table, column: Column) -> str:
    """How a feature is stored, by its type and the user's word."""
    type_ = _evaluate(table, column.sql, f"feature {column.name}")
    is_float = type_ in ("FLOAT", "DOUBLE") or type_.startswith("DECIMAL")
    if column.kind == "numeric" or (is_float and column.kind != "categorical"):
        return "number"
    small = ("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT")
    return "integer" if type_.removeprefix("U") in small and type_ != "UBIGINT" else "text"


def _evaluate(table: Table, sql: str, what: str) -> str:
    """The SQL type of an expression over no rows."""
    with connect() as connection:
        empty = pa.schema(list(table.columns.items())).empty_table()
        connection.register("log", empty)
        with _explain_sql(what, sql):
            return str(connection.sql(f"SELECT {sql} AS value FROM log").types[0])


@contextlib.contextmanager
def _explain_sql(what: str, where: str) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        hint = (
            " (columns of CSV files are text: write COLUMN::DOUBLE to compute with one)"
            if "VARCHAR" in str(error)
            else ""
        )
        raise UserError(f"{what}: {where}: {' '.join(str(error).split())}{hint}") from error


def _shard_of(users: pa.ChunkedArray, num_shards: int) -> np.ndarray:
    """By a hash of the user, so that it does not depend on what else is in the log."""
    encoded = users.combine_chunks().dictionary_encode()
    of_user = rb.counter_hash(_SHARD, id_keys(encoded.dictionary)) % np.uint64(num_shards)
    return of_user.astype(np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]


def _rejected(
    part: Part, rows: pa.Table, found: pa.Table, bad: Sequence[BadRow]
) -> Iterator[tuple[str, str, int, str]]:
    for row in bad:
        yield row.reason, part.file, row.row, row.text
    wrong = found.select([ROW, "reason"]).filter(
        pc.fill_null(pc.not_equal(found["reason"], LEFT_OUT), False)
    )
    position = pc.index_in(wrong[ROW], rows[ROW].combine_chunks()).to_pylist()
    content = rows.drop_columns([ROW]).take(pa.array(position, pa.int64())).to_pylist()
    for row, values in zip(wrong.to_pylist(), content, strict=True):
        yield row["reason"], part.file, row[ROW], json.dumps(values, default=str)


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
