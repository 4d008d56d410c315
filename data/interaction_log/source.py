"""Reads a log's files block by block, whatever their format, and tells what is wrong with them.

files        part-0.parquet                    part-1.parquet      (or CSV, gzipped or not)
parts        ├──── 0 ────┤├──── 1 ────┤        ├──── 2 ────┤       units of work and of restarts
blocks       ├─┤├─┤├─┤├─┤ …                                        what is in memory at once
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from stca_jax.data.interaction_log.log_config import LogConfig
from stca_jax.errors import UserError

_PARQUET = (".parquet", ".pq")
_CSV = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst")
_ROWS_PER_PART = 2_000_000
_ROWS_PER_BLOCK = 500_000
_CSV_BLOCK_BYTES = 32 << 20
_CSV_HEAD_BYTES = 1 << 20
_CSV_BYTES_PER_ROW = 40  # a guess, to size shards before a CSV file is read
_EVENTS_PER_SHARD = 2_000_000
_VERSION = 1  # of the prepared records: change it when the same log gives other ones


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a log: some row groups of a Parquet file, or a whole CSV file.

    Attributes:
      file: Its path.
      row_groups: Of a Parquet file.
      first_row: Rows of the file before the part.
    """

    file: str
    row_groups: tuple[int, ...] = ()
    first_row: int = 0


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that could not be read as text in columns.

    Attributes:
      row: Its number within the file, 0 is the first after the header.
      reason: What is wrong with it.
      text: What it holds, as far as that can be shown.
    """

    row: int
    reason: str
    text: str


@dataclasses.dataclass(frozen=True)
class Block:
    """Some rows of a file.

    Attributes:
      rows: The columns read, and `ROW`: each row's number within the file.
      bad: Rows left out.
    """

    rows: pa.Table
    bad: Sequence[BadRow]


ROW = "__row__"


@dataclasses.dataclass(frozen=True)
class Table:
    """Files of one format that make up a table.

    Attributes:
      files: Paths, sorted.
      columns: Names and types of the columns all files have; text for CSV.
      all_columns: Every column of the first file, read or not.
    """

    files: tuple[str, ...]
    columns: dict[str, pa.DataType]
    all_columns: tuple[str, ...]

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """Units of work, in order."""
        parts: list[Part] = []
        for file in self.files:
            parts += _parquet_parts(file) if _is_parquet(file) else [Part(file)]
        return tuple(parts)

    @property
    def num_rows(self) -> int:
        """How many rows there are: exact for Parquet, a guess by size for CSV."""
        if _is_parquet(self.files[0]):
            return sum(pq.read_metadata(f).num_rows for f in self.files)
        return sum(pathlib.Path(f).stat().st_size for f in self.files) // _CSV_BYTES_PER_ROW

    @functools.cached_property
    def num_shards(self) -> int:
        """How many record files to make, so that the users of one fit into memory."""
        return max(1, -(-self.num_rows // _EVENTS_PER_SHARD))

    def blocks(self, part: Part) -> Iterator[Block]:
        """Reads a part; columns that are text hold valid UTF-8.

        Raises:
          UserError: the file is damaged.
        """
        read = _parquet_tables if _is_parquet(part.file) else _csv_tables
        next_row, malformed, reported = part.first_row, list[BadRow](), 0
        try:
            for table in read(part, list(self.columns), malformed):
                skipped = [m.row for m in malformed]
                ahead = np.arange(next_row, next_row + table.num_rows + len(skipped))
                number = np.setdiff1d(ahead, skipped, assume_unique=True)[: table.num_rows]
                next_row = int(number[-1]) + 1
                rows, bad = _as_text(table.append_column(ROW, pa.array(number)))
                yield Block(_unify(rows, self.columns), [*malformed[reported:], *bad])
                reported = len(malformed)
            if malformed[reported:]:
                schema = pa.schema([*self.columns.items(), (ROW, pa.int64())])
                yield Block(schema.empty_table(), malformed[reported:])
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{part.file} cannot be read: {_first_line(error)}") from error

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Changes when a file does: name, size and time of change of each."""
        stats = [(f, pathlib.Path(f).stat()) for f in self.files]
        return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def open_table(
    what: str, paths: Sequence[str], names: Sequence[str], expressions: Sequence[str] = ()
) -> Table:
    """Finds a table's files and checks that each can be read and has the columns.

    Args:
      what: The option that names the table, for errors.
      paths: Files and folders.
      names: Columns to read.
      expressions: SQL; columns that occur in it are read as well.

    Raises:
      UserError: there is no file, formats are mixed, a file is empty or damaged, or lacks a column.
    """
    schemas = {file: _schema(file) for file in _find(what, paths)}
    whole = {file: schema for file, schema in schemas.items() if schema is not None}
    if not whole:
        raise UserError(f"{what}: {', '.join(paths)} holds no rows; every file is empty")
    all_columns = tuple(next(iter(whole.values())).names)
    read = dict.fromkeys([*names, *(n for n in all_columns if _occurs(n, expressions))])
    columns: dict[str, pa.DataType] = {}
    for file, schema in whole.items():
        for name in read:
            if (count := schema.names.count(name)) != 1:
                raise UserError(_wrong_count(what, file, name, count, schema.names))
            columns[name] = _common(columns.get(name), _plain(schema.field(name).type, file, name))
    return Table(tuple(whole), columns, all_columns)


def _occurs(name: str, expressions: Sequence[str]) -> bool:
    pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
    return any(re.search(pattern, e, re.IGNORECASE) for e in expressions)


def fingerprint(config: LogConfig, tables: Sequence[Table]) -> str:
    """Identifies a config and the state of the files it names."""
    content = [_VERSION, dataclasses.asdict(config), [t.fingerprint() for t in tables]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _find(what: str, paths: Sequence[str]) -> list[str]:
    files: list[pathlib.Path] = []
    for text in paths:
        path = pathlib.Path(text).expanduser()
        if path.is_dir():
            inside = [f for f in sorted(path.rglob("*")) if _is_data(f.relative_to(path))]
            if not inside:
                raise UserError(f"{what}: folder {path} has no {' or '.join((*_PARQUET, *_CSV))}")
            files += inside
        elif path.exists():
            if not _is_data(pathlib.Path(path.name)):
                raise UserError(f"{what}: {path} is none of {', '.join((*_PARQUET, *_CSV))}")
            files.append(path)
        else:
            raise UserError(f"{what}: there is no file or folder {path}")
    if len({_is_parquet(str(f)) for f in files}) > 1:
        raise UserError(f"{what}: files are Parquet and CSV; give files of one format")
    return [str(f) for f in files]


def _is_data(path: pathlib.Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return not hidden and path.name.endswith((*_PARQUET, *_CSV))


def _is_parquet(file: str) -> bool:
    return file.endswith(_PARQUET)


def _schema(file: str) -> pa.Schema | None:
    """A file's columns, or None if it has no bytes or no rows."""
    if not pathlib.Path(file).stat().st_size:
        return None
    try:
        if _is_parquet(file):
            return pq.read_schema(file) if pq.read_metadata(file).num_rows else None
        with _open_csv(file, None, []) as reader:
            return reader.schema
    except (pa.ArrowException, OSError) as error:
        if "Empty CSV" in str(error):
            return None
        raise UserError(f"{file} cannot be read: {_first_line(error)}") from error


def _plain(type_: pa.DataType, file: str, name: str) -> pa.DataType:
    """The type as which values are handled.

    Raises:
      UserError: the column holds lists or structures.
    """
    if pa.types.is_dictionary(type_):
        return _plain(type_.value_type, file, name)
    if _is_textual(type_):
        return pa.string()
    if pa.types.is_nested(type_):
        raise UserError(f"{file}: column {name!r} is a {type_}; flatten it to one value a row")
    return type_


def _is_textual(type_: pa.DataType) -> bool:
    return (
        pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_string_view(type_)
        or pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_)
        or pa.types.is_binary_view(type_)
    )


def _common(a: pa.DataType | None, b: pa.DataType) -> pa.DataType:
    """The type of a column that has two in different files: the wider number, or text."""
    if a is None or a == b or pa.types.is_null(a):
        return b
    if pa.types.is_null(b):
        return a
    if pa.types.is_integer(a) and pa.types.is_integer(b):
        wide = pa.types.is_uint64(a) or pa.types.is_uint64(b)
        return pa.string() if wide else pa.int64()
    if pa.types.is_temporal(a) and pa.types.is_temporal(b):
        return pa.timestamp("us")
    numbers = [pa.types.is_integer(t) or pa.types.is_floating(t) for t in (a, b)]
    return pa.float64() if all(numbers) else pa.string()


def _unify(table: pa.Table, columns: dict[str, pa.DataType]) -> pa.Table:
    """The table with the types that all files have in common."""
    for name, type_ in columns.items():
        if table.schema.field(name).type != type_:
            table = _replace(table, name, table[name].cast(type_, safe=False))
    return table


def _parquet_parts(file: str) -> list[Part]:
    metadata = pq.read_metadata(file)
    parts: list[Part] = []
    groups: list[int] = []
    first, rows = 0, 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= _ROWS_PER_PART or group == metadata.num_row_groups - 1:
            parts.append(Part(file, tuple(groups), first))
            first, rows, groups = first + rows, 0, []
    return parts


def _parquet_tables(part: Part, names: list[str], malformed: list[BadRow]) -> Iterator[pa.Table]:
    del malformed  # a Parquet file cannot have rows of a wrong width
    with pq.ParquetFile(part.file, pre_buffer=False) as file:
        for batch in file.iter_batches(_ROWS_PER_BLOCK, list(part.row_groups), names):
            yield pa.Table.from_batches([batch])


def _csv_tables(part: Part, names: list[str], malformed: list[BadRow]) -> Iterator[pa.Table]:
    with _open_csv(part.file, names, malformed) as reader:
        for batch in reader:
            if batch.num_rows:
                yield pa.Table.from_batches([batch])


def _open_csv(
    file: str, names: list[str] | None, malformed: list[BadRow]
) -> pa_csv.CSVStreamingReader:
    """Opens a CSV file; all columns are bytes, since only some rows may be valid text."""

    def note(row: pa_csv.InvalidRow) -> str:
        reason = f"row has {row.actual_columns} columns, not {row.expected_columns}"
        malformed.append(BadRow(row.number - 2, reason, row.text))  # the header is row 1
        return "skip"

    def open_with(block_bytes: int, columns: list[str]) -> pa_csv.CSVStreamingReader:
        return pa_csv.open_csv(
            pa.input_stream(file, compression="detect"),
            # One thread: rows are numbered only then.
            pa_csv.ReadOptions(use_threads=False, block_size=block_bytes),
            pa_csv.ParseOptions(
                delimiter="\t" if ".tsv" in pathlib.Path(file).name else ",",
                newlines_in_values=True,
                invalid_row_handler=note,
            ),
            pa_csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.binary()),
                include_columns=names,
                strings_can_be_null=True,
                null_values=[""],
                check_utf8=False,
            ),
        )

    with open_with(_CSV_HEAD_BYTES, []) as head:
        columns = head.schema.names
    malformed.clear()
    return open_with(_CSV_BLOCK_BYTES, columns)


def _as_text(table: pa.Table) -> tuple[pa.Table, list[BadRow]]:
    """Turns bytes into text; leaves out rows that are not UTF-8."""
    bad: dict[int, str] = {}
    for field in table.schema:
        if pa.types.is_dictionary(field.type):
            table = _replace(table, field.name, table[field.name].cast(field.type.value_type))
        if not _is_textual(table.schema.field(field.name).type):
            continue
        values = table[field.name].cast(pa.large_binary())
        try:
            table = _replace(table, field.name, values.cast(pa.large_string()).cast(pa.string()))
        except pa.ArrowInvalid:
            shown = [_decoded(v) for v in values.to_pylist()]
            for i, (text, valid) in enumerate(shown):
                if not valid:
                    bad.setdefault(i, f"{field.name}: {text}")
            table = _replace(table, field.name, pa.array([text for text, _ in shown], pa.string()))
    if not bad:
        return table, []
    number = table[ROW]
    rows = [BadRow(number[i].as_py(), "text is not UTF-8", text) for i, text in bad.items()]
    return table.filter(pa.array([i not in bad for i in range(table.num_rows)])), rows


def _decoded(value: bytes | None) -> tuple[str | None, bool]:
    if value is None:
        return None, True
    try:
        return value.decode(), True
    except UnicodeDecodeError:
        return value.decode(errors="backslashreplace"), False


def _replace(table: pa.Table, name: str, values: pa.ChunkedArray | pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def _wrong_count(what: str, file: str, name: str, count: int, names: Sequence[str]) -> str:
    if count:
        return f"{what}: {file} has {count} columns called {name!r}; rename all but one"
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{what}: {file} has no column {name!r}; {hint}It has {', '.join(names)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
