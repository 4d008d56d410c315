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
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stca_jax.data.interaction_log import event_sql, times
from stca_jax.data.interaction_log.columns import ROW, BadRow
from stca_jax.data.interaction_log.event_sql import LEFT_OUT
from stca_jax.data.interaction_log.log_config import ORDER, SCALINGS, Column, LogConfig
from stca_jax.data.interaction_log.source import Part, Table, fingerprint, open_table
from stca_jax.data.interaction_log.suggestions import flag, name_of, sql_of
from stca_jax.data.interaction_log.times import NS, TimeReading
from stca_jax.errors import UserError
from stca_jax.input.hashing import counter_hash, text_hash

DUPLICATE = "equal to another row"  # counted with the rejected rows, though nothing is wrong
_SHARD = 5  # a stream of hashes of its own
_SHOWN = 200  # characters of each value of a rejected row
_OTHER_ROWS = re.compile(r'"class":\s*"(WINDOW|SUBQUERY)"')  # in a parsed query
_FLOATS = ("FLOAT", "DOUBLE", "DECIMAL")
_INTEGERS = ("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT")


@dataclasses.dataclass(frozen=True)
class LogSource:
    """A log's files, opened and checked against its config; small enough to send to workers.

    Attributes:
      config: What the user said.
      log: The files of the log.
      items: The files of the item table, if there is one.
      users: The files of the user table, if there is one.
      time: How timestamps are read.
      kinds: "integer", "text" or "number" of each feature, by name.
      id_sql_types: SQL types of the columns "user", "item" and "request" of the log.
    """

    config: LogConfig
    log: Table
    items: Table | None
    users: Table | None
    time: TimeReading
    kinds: dict[str, str]
    id_sql_types: dict[str, str]

    @classmethod
    def open(cls, config: LogConfig) -> LogSource:
        """Looks at the files' columns and at the first rows.

        Raises:
          UserError: a file or column is missing or damaged, or an SQL expression is wrong.
        """
        columns, keys = config.feature_columns, config.key_columns
        of_event = [*keys.values(), *columns["label"], *columns["target"], *columns["history"]]
        log = open_table("log", config.log, of_event, config, config.history_filter)
        side: dict[str, Table | None] = {}
        for what in ("items", "users"):
            of_table = [keys[what[:-1]], *columns[what[:-1]]]
            paths = getattr(config, what)
            side[what] = open_table(what, paths, of_table, config) if paths else None
        kinds: dict[str, str] = {}
        for table, table_columns in (
            (log, columns["target"] + columns["history"]),
            (side["items"], columns["item"]),
            (side["users"], columns["user"]),
        ):
            kinds |= {c.name: _kind(table, c) for c in table_columns if table}
        kinds |= {c.name: "integer" for c in columns["label"]}
        ids = {level: _id_type(log, c) for level, c in keys.items() if level != "time"}
        time = _read_times(config, log)
        source = cls(config, log, side["items"], side["users"], time, kinds, ids)
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
            _evaluate(self.log, self.log.sql(column), f"labels: {column.name}")
        if self.config.history_filter:
            where = self.log.sql_expression(self.config.history_filter)
            _evaluate(self.log, f"({where})::BOOLEAN", "history_filter")

    @property
    def id_types(self) -> dict[str, pa.DataType]:
        """How ids are stored: int64 or string."""
        return {
            level: pa.string() if event_sql.is_text_id(type_) else pa.int64()
            for level, type_ in self.id_sql_types.items()
        }


@dataclasses.dataclass(frozen=True)
class Events:
    """What a block of rows holds.

    Attributes:
      table: The events, in the order of the rows; "time" in nanoseconds since 1970.
      row: The row of each within the file.
      shard: To which shard each event's user belongs.
      rejected: Rows that cannot be used: reason, file, row and content.
      reasons: How many rows were left out, by reason.
      lines: Of the part's file, read so far; 0 for Parquet.
    """

    table: pa.Table
    row: np.ndarray
    shard: np.ndarray
    rejected: list[tuple[str, str, int, str]]
    reasons: collections.Counter[str]
    lines: int


def read_events(source: LogSource, part: Part) -> Iterator[Events]:
    """The events of a part of the log, block by block.

    Raises:
      UserError: the file is damaged, or an SQL expression fails on a value.
    """
    query, names = event_sql.events_query(
        source.config,
        source.log,
        source.time,
        source.id_sql_types,
        source.kinds,
        source.log.rows_before(part.file) if source.config.is_ordered else 0,
    )
    with connect() as connection:
        for block in source.log.blocks(part):
            connection.register("log", block.rows)
            with _explain_sql("the log", part.file):
                found = connection.sql(query).to_arrow_table().rename_columns(names)
            reason = found["reason"]
            good = found.filter(reason.is_null())
            rejected = list(_rejected(source.log, part, block.rows, found, block.bad))
            reasons = collections.Counter(r for r, *_ in rejected)
            if left_out := pc.sum(pc.equal(reason, LEFT_OUT)).as_py():
                reasons[LEFT_OUT] = left_out
            shard = _shard_of(good["user"], source.log.num_shards)
            row = good[ROW].to_numpy()
            events = good.drop_columns([ROW, "reason"])
            yield Events(events, row, shard, rejected, reasons, block.lines)


def group_events(tables: Sequence[pa.Table], temporary: str | os.PathLike[str]) -> pa.Table:
    """Sorts the events of a shard by user, time and content, and keeps one of equal ones.

    Args:
      tables: Of the same columns, "time" in nanoseconds.
      temporary: Where DuckDB may put what does not fit into its memory.

    Returns:
      The events, "time" in seconds.
    """
    events = pa.concat_tables(tables)
    names = events.column_names
    with connect(temporary) as connection:
        connection.register("events", events.rename_columns([f"c{k}" for k in range(len(names))]))
        query = "SELECT DISTINCT * FROM events ORDER BY ALL"
        found = connection.sql(query).to_arrow_table().combine_chunks().rename_columns(names)
    seconds = pc.divide(found["time"], NS)  # exact, since times are not negative
    return found.set_column(names.index("time"), "time", seconds)


@contextlib.contextmanager
def connect(temporary: str | os.PathLike[str] | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of its own, in memory, with UTC as its time zone."""
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone='UTC'; SET memory_limit='3GB'")
        if temporary is not None:
            connection.execute(f"SET temp_directory={event_sql.text_sql(os.fspath(temporary))}")
        yield connection


class SideTable(NamedTuple):
    """The item or user table: "id", typed as in the log, and features; of each id the first row."""

    rows: pa.Table
    num_repeated: int  # rows left out because their id came before


def read_side_table(source: LogSource, what: str) -> SideTable:
    """Reads the item or user table.

    Args:
      source: The log.
      what: "items" or "users".

    Raises:
      UserError: a file is damaged, a row cannot be read, or a category is a long text.
    """
    table: Table = getattr(source, what)
    config, level = source.config, what[:-1]
    key = config.key_columns[level]
    query, names = event_sql.side_query(
        table,
        key,
        _id_type(table, key),
        config.feature_columns[level],
        source.kinds,
        is_text=pa.types.is_string(source.id_types[level]),
    )
    pieces, first_row = [], 0  # rows are numbered over all files
    with connect() as connection:
        for part in table.parts:
            last = -1
            for block in table.blocks(part):
                if block.bad:
                    raise UserError(_bad_side_row(what, part.file, block.bad[0]))
                if not block.rows.num_rows:
                    continue
                connection.register("side", block.rows)
                with _explain_sql(what, part.file):
                    rows = connection.sql(query).to_arrow_table().rename_columns(names)
                _check_side_texts(what, part, rows, config.feature_columns[level])
                number = pc.add(rows[ROW], first_row)
                pieces.append(rows.set_column(rows.num_columns - 1, ROW, number))
                last = block.rows[ROW][-1].as_py()
            first_row += last + 1
        if not pieces:
            raise UserError(f"{what}: no rows in {', '.join(table.files)}; leave them out")
        everything = pa.concat_tables(pieces)
        connection.register("rows", _with_safe_names(everything))
        found = connection.sql(event_sql.FIRST_OF_EACH_ID).to_arrow_table()
    rows = found.combine_chunks().rename_columns(names[:-1])
    return SideTable(rows, len(everything) - len(rows))


def id_keys(ids: pa.Array) -> np.ndarray:
    """A 64-bit number for each id, the same in every run: itself, or a hash of the text."""
    if pa.types.is_integer(ids.type):
        return ids.to_numpy(zero_copy_only=False).astype(np.int64)
    return text_hash(ids.to_pylist())


def _with_safe_names(rows: pa.Table) -> pa.Table:
    """The id as "id", and features by number, since SQL does not tell names apart by case."""
    numbers = [f"c{k}" for k in range(1, rows.num_columns - 1)]
    return rows.rename_columns(["id", *numbers, ROW])


def _check_side_texts(what: str, part: Part, rows: pa.Table, columns: Sequence[Column]) -> None:
    """Raises UserError, naming the row, if a category is as long as a text."""
    for column in columns:
        values = rows[f"feature_{column.name}"]
        if not pa.types.is_string(values.type):
            continue
        is_long = pc.fill_null(pc.greater(pc.utf8_length(values), event_sql.LONGEST), False)
        if pc.any(is_long).as_py():
            short = flag(
                f"{what[:-1]}_features", name_of(column, "text"), f"left({sql_of(column)}, 100)"
            )
            raise UserError(
                f"{what}: {part.file}: row {rows[ROW].filter(is_long)[0]} (the first is 0): "
                f"{event_sql.LONG_FEATURE.format(column.name)}. Shorten it: {short}, or leave it "
                "out"
            )


def _bad_side_row(what: str, file: str, bad: BadRow) -> str:
    return (
        f"{what}: {file}: row {bad.row} (the first is 0): {bad.reason}: "
        f"{' '.join(bad.text.split())}; mend or remove it"
    )


def _id_type(table: Table, column: Column) -> str:
    """The SQL type of an id.

    Raises:
      UserError: it is neither an integer nor text.
    """
    type_ = _evaluate(table, table.sql(column), column.name)
    if event_sql.is_text_id(type_) is None:
        raise UserError(
            f"column {column.name!r} is a {type_}; ids are integers or text, such as "
            f"NAME={column.expression}::VARCHAR"
        )
    return type_


def _read_times(config: LogConfig, log: Table) -> TimeReading:
    """How timestamps are read, by the first rows of the log."""
    column = config.key_columns["time"]
    if config.is_ordered:
        log.rows_before(log.files[-1])
        return TimeReading(ORDER, "BIGINT", False, 1, False, False)
    sql = log.sql(column)
    type_ = _evaluate(log, sql, column.name)
    blocks = (b.rows for p in log.parts for b in log.blocks(p) if b.rows.num_rows)
    with connect() as connection:
        connection.register("log", next(blocks, log.empty()))
        with _explain_sql("timestamp", column.expression):
            return times.read_times(connection, sql, type_, column, config.time_unit)


def _kind(table: Table, column: Column) -> str:
    """How a feature is stored, by its type and the user's word."""
    type_ = _evaluate(table, table.sql(column), f"feature {column.name}")
    is_float = type_.startswith(_FLOATS)
    if column.kind in ("numeric", *SCALINGS) or (is_float and column.kind != "categorical"):
        return "number"
    return "integer" if type_.removeprefix("U") in _INTEGERS and type_ != "UBIGINT" else "text"


def _evaluate(table: Table, sql: str, what: str) -> str:
    """The SQL type of an expression over no rows.

    Raises:
      UserError: it is wrong, or looks at other rows than its own.
    """
    query = f"SELECT {sql} AS value FROM log"
    with connect() as connection, _explain_sql(what, sql):
        connection.register("log", table.empty())
        found = connection.sql(query)
        ((tree,),) = connection.execute("SELECT json_serialize_sql(?)", [query]).fetchall()
        # Aggregates give a row where there is none.
        if len(found) or _OTHER_ROWS.search(tree):
            raise UserError(
                f"{what}: {sql} looks at other rows than its own, by an aggregate, a window "
                "or a query, but is evaluated on some rows at a time; write its values into "
                "a column of the log first"
            )
        return str(found.types[0])


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
    of_user = counter_hash(_SHARD, id_keys(encoded.dictionary)) % np.uint64(num_shards)
    return of_user.astype(np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]


def _rejected(
    log: Table, part: Part, rows: pa.Table, found: pa.Table, bad: Sequence[BadRow]
) -> Iterator[tuple[str, str, int, str]]:
    for row in bad:
        yield row.reason, part.file, row.row, row.text[: 10 * _SHOWN]
    wrong = found.select([ROW, "reason"]).filter(
        pc.fill_null(pc.not_equal(found["reason"], LEFT_OUT), False)
    )
    position = pc.index_in(wrong[ROW], rows[ROW].combine_chunks()).to_pylist()
    content = rows.drop_columns([ROW]).take(pa.array(position, pa.int64()))
    columns = [_shown(column) for column in content.columns]
    for k, row in enumerate(wrong.to_pylist()):
        values = {name: column[k] for name, column in zip(log.columns, columns, strict=True)}
        yield row["reason"], part.file, row[ROW], json.dumps(values, default=str)


def _shown(values: pa.ChunkedArray) -> list[object]:
    try:
        found = values.to_pylist()
    except (OverflowError, ValueError):  # dates that Python has not
        found = pc.cast(values, pa.string()).to_pylist()
    return [value[:_SHOWN] if isinstance(value, str) else value for value in found]
