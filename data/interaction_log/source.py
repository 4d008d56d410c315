"""Reads a log's files block by block, whatever their format, and tells what is wrong with them.

files        part-0.parquet                    part-1.parquet      (or CSV, gzipped or not)
parts        ├──── 0 ────┤├──── 1 ────┤        ├──── 2 ────┤       units of work and of restarts
blocks       ├─┤├─┤├─┤├─┤ …                                        what is in memory at once
"""

from __future__ import annotations

import collections
import contextlib
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

from stca_jax.data.interaction_log import formats
from stca_jax.data.interaction_log.columns import (
    ROW,
    BadRow,
    as_text,
    common_type,
    plain_type,
    unify,
)
from stca_jax.data.interaction_log.formats import CountedLines, Format
from stca_jax.data.interaction_log.log_config import Column, LogConfig, quoted
from stca_jax.errors import UserError
from stca_jax.files import local_path

_ROWS_PER_PART = 2_000_000
_ROWS_PER_BLOCK = 500_000
_SAMPLED_ROWS = 1_000  # of a Parquet file, to know how large rows are
_BYTES_PER_BLOCK = 256 << 20
_TEXT_BYTES_PER_ROW = 40  # a guess, to size shards before a text file is read
_COMPRESSION = 5  # likewise
_EVENTS_PER_SHARD = 2_000_000
_VERSION = 4  # of the prepared records: change it when the same log gives other ones
_OURS = re.compile("__.*__")  # names that SQL of ours uses
# String literals, quoted names, and words: what SQL is made of.
_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")+"|[^\W\d]\w*""")


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
class Block:
    """Some rows of a file.

    Attributes:
      rows: The columns read, and `ROW`: each row's number within the file.
      bad: Rows left out.
      lines: Of a text file, so far, without the header; 0 for Parquet.
    """

    rows: pa.Table
    bad: Sequence[BadRow]
    lines: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """Files that make up a table, all of them Parquet or all of them text.

    Attributes:
      formats: How each file is read, by path, in order.
      columns: Names and types of the columns all files have; text for text files.
      all_columns: Every column of the first file, read or not.
      not_read: Files of its folders that by their names are no part of it, or are empty.
    """

    formats: dict[str, Format]
    columns: dict[str, pa.DataType]
    all_columns: tuple[str, ...]
    not_read: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Paths."""
        return tuple(self.formats)

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """Units of work, in order."""
        parts: list[Part] = []
        for file, format_ in self.formats.items():
            parts += _parquet_parts(file) if format_.is_parquet else [Part(file)]
        return tuple(parts)

    @property
    def num_rows(self) -> int:
        """How many rows there are: exact for Parquet, a guess by size for text."""
        return sum(
            pq.read_metadata(file).num_rows
            if format_.is_parquet
            else pathlib.Path(file).stat().st_size
            * (_COMPRESSION if format_.compression else 1)
            // _TEXT_BYTES_PER_ROW
            for file, format_ in self.formats.items()
        )

    def rows_before(self, file: str) -> int:
        """Rows of the files before a file.

        Raises:
          UserError: they are text, of which rows are not known before they are read.
        """
        before = self.files[: self.files.index(file)]
        if any(not self.formats[name].is_parquet for name in before):
            raise UserError(
                "timestamp=order needs the whole log in one text file, or files of Parquet: the "
                f"order of {', '.join(self.files[:3])} is not known"
            )
        return sum(pq.read_metadata(name).num_rows for name in before)

    @functools.cached_property
    def num_shards(self) -> int:
        """How many record files to make, so that the users of one fit into memory."""
        return max(1, -(-self.num_rows // _EVENTS_PER_SHARD))

    @functools.cached_property
    def sql_names(self) -> dict[str, str]:
        """What columns are called in SQL, where case does not count and some names are ours."""
        same = collections.Counter(name.lower() for name in self.columns)
        return {
            name: f"__column_{k}__" if same[name.lower()] > 1 or _OURS.fullmatch(name) else name
            for k, name in enumerate(self.columns)
        }

    def sql(self, column: Column) -> str:
        """SQL for a column's values.

        Raises:
          UserError: it is an expression with a name that two columns have but for its case.
        """
        if not column.is_sql:
            return quoted(self.sql_names[column.expression])
        return f"({self.sql_expression(column.expression)})"

    def sql_expression(self, expression: str) -> str:
        """An expression with the names that columns have in SQL; raises likewise."""
        renamed = {name: inner for name, inner in self.sql_names.items() if name != inner}

        def rename(match: re.Match) -> str:
            token = match[0]
            name = token[1:-1].replace('""', '"') if token.startswith('"') else token
            if token.startswith("'") or expression[match.end() :].lstrip().startswith("("):
                return token
            if name in renamed:
                return quoted(renamed[name])
            if alike := [n for n in renamed if n.lower() == name.lower()]:
                raise UserError(
                    f"{expression}: {name} is any of the columns {', '.join(alike)}, which differ "
                    "in case only; write it as one of them"
                )
            return token

        return _TOKEN.sub(rename, expression) if renamed else expression

    def blocks(self, part: Part) -> Iterator[Block]:
        """Reads a part; columns are named as in SQL, and those that are text hold valid UTF-8.

        Raises:
          UserError: the file is damaged.
        """
        format_ = self.formats[part.file]
        read = _parquet_tables if format_.is_parquet else _text_tables
        names = [*self.sql_names.values(), ROW]
        next_row, malformed, reported, lines = part.first_row, list[BadRow](), 0, 0
        try:
            for table, lines in read(part, format_, list(self.columns), malformed):
                if not table.num_rows:
                    continue
                skipped = [m.row for m in malformed]
                ahead = np.arange(next_row, next_row + table.num_rows + len(skipped))
                number = np.setdiff1d(ahead, skipped, assume_unique=True)[: table.num_rows]
                next_row = int(number[-1]) + 1
                table, number, bad = as_text(table, number)
                typed = unify(table, self.columns, format_.null_words)
                rows = typed.append_column(ROW, pa.array(number)).rename_columns(names)
                yield Block(rows, [*malformed[reported:], *bad], lines)
                reported = len(malformed)
            yield Block(self.empty(), malformed[reported:], lines)
        except (pa.ArrowException, OSError, EOFError, UnicodeError) as error:
            raise UserError(f"{part.file} cannot be read: {_first_line(error)}") from error

    def empty(self) -> pa.Table:
        """No rows of a block."""
        types = [*self.columns.values(), pa.int64()]
        names = [*self.sql_names.values(), ROW]
        return pa.schema(list(zip(names, types, strict=True))).empty_table()

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Changes when a file does: name, size and time of change of each."""
        stats = [(f, pathlib.Path(f).stat()) for f in self.files]
        return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def open_table(what: str, paths: Sequence[str], columns: Sequence[Column], config: LogConfig,
               sql: str = "") -> Table:  # fmt: skip
    """Finds a table's files and checks that each can be read and has the columns.

    Args:
      what: The option that names the table, for errors.
      paths: Files and folders.
      columns: To read; of expressions, the columns that occur in them.
      config: Says how text files are written.
      sql: One more expression.

    Raises:
      UserError: there is no file, formats are mixed, a file is empty or damaged, or lacks a column.
    """
    files, not_read = _find(what, paths)
    found = {file: formats.detect(file, config) for file in files}
    schemas = {file: _schema(file, format_) for file, format_ in found.items()}
    whole = {file: schema for file, schema in schemas.items() if schema is not None}
    if not whole:
        raise UserError(f"{what}: {', '.join(paths)} holds no rows; every file is empty")
    if len({found[file].is_parquet for file in whole}) > 1:
        raise UserError(f"{what}: files are Parquet and CSV; give files of one format")
    all_columns = tuple(next(iter(whole.values())).names)
    named = [c.expression for c in columns if not c.is_sql]
    used = _occurring(all_columns, [*(c.expression for c in columns if c.is_sql), sql])
    types: dict[str, pa.DataType] = {}
    for file, schema in whole.items():
        for name in dict.fromkeys([*named, *used]):
            if (count := schema.names.count(name)) != 1:
                raise UserError(_wrong_count(what, file, name, count, schema.names))
            type_ = plain_type(schema.field(name).type, file, name)
            common = common_type(types.get(name), type_)
            if common is None:
                raise UserError(
                    f"{what}: column {name!r} is a {types[name]} in one file and a {type_} in "
                    f"{file}; write both files with one type"
                )
            types[name] = common
    not_read += [file for file in found if file not in whole]
    return Table({file: found[file] for file in whole}, types, all_columns, tuple(not_read))


def _occurring(names: Sequence[str], expressions: Sequence[str]) -> Iterator[str]:
    """The columns that occur in expressions; of names that differ in case, those written so."""
    tokens = {
        t[1:-1].replace('""', '"') if t.startswith('"') else t
        for expression in expressions
        for t in _TOKEN.findall(expression)
        if not t.startswith("'")
    }
    lower = {token.lower() for token in tokens - set(names)}
    return (name for name in names if name and (name in tokens or name.lower() in lower))


def fingerprint(config: LogConfig, tables: Sequence[Table]) -> str:
    """Identifies a config and the state of the files it names."""
    content = [_VERSION, dataclasses.asdict(config), [t.fingerprint() for t in tables]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _find(what: str, paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files that are a table's, and other files of its folders."""
    files: list[pathlib.Path] = []
    others: list[pathlib.Path] = []
    for text in paths:
        path = local_path(what, text).absolute()
        if path.is_dir():
            inside, beside = formats.tables_in(path)
            if not inside:
                suffixes = " or ".join(formats.ALL_SUFFIXES)
                raise UserError(
                    f"{what}: folder {path} has no {suffixes}; files that are called "
                    "otherwise are read if they are named one by one"
                )
            files += inside
            others += beside
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{what}: there is no file or folder {path}")
    return [str(f) for f in files], [str(f) for f in others]


def _schema(file: str, format_: Format) -> pa.Schema | None:
    """A file's columns, or None if it has no bytes or no rows."""
    if not pathlib.Path(file).stat().st_size:
        return None
    try:
        if format_.is_parquet:
            return pq.read_schema(file) if pq.read_metadata(file).num_rows else None
        return formats.text_schema(file, format_)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        if "Empty CSV" in str(error):
            return None
        raise UserError(f"{file} cannot be read: {_first_line(error)}") from error


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


def _parquet_tables(
    part: Part, format_: Format, names: list[str], malformed: list[BadRow]
) -> Iterator[tuple[pa.Table, int]]:
    del format_, malformed  # a Parquet file cannot have rows of a wrong width
    groups = list(part.row_groups)
    with pq.ParquetFile(part.file, pre_buffer=False) as file:
        head = next(file.iter_batches(_SAMPLED_ROWS, groups, names), None)
        row_bytes = head.nbytes / head.num_rows if head is not None and head.num_rows else 1
        rows = int(max(1, min(_ROWS_PER_BLOCK, _BYTES_PER_BLOCK / row_bytes)))
        for batch in file.iter_batches(rows, groups, names):
            yield pa.Table.from_batches([batch]).select(names), 0


def _text_tables(
    part: Part, format_: Format, names: list[str], malformed: list[BadRow]
) -> Iterator[tuple[pa.Table, int]]:
    schema = formats.text_schema(part.file, format_)

    def note(row: pa_csv.InvalidRow) -> str:
        reason = f"row has {row.actual_columns} columns, not {row.expected_columns}"
        malformed.append(BadRow(row.number - 2, reason, row.text))  # the header is row 1
        return "skip"

    with contextlib.closing(CountedLines(part.file, format_)) as stream:
        with formats.open_text(stream, format_, schema, names, note) as reader:
            for batch in reader:
                yield pa.Table.from_batches([batch]), max(0, stream.lines - 1)
        yield pa.table({}), max(0, stream.lines - 1)  # rows left out may have followed


def _wrong_count(what: str, file: str, name: str, count: int, names: Sequence[str]) -> str:
    if count:
        return f"{what}: {file} has {count} columns called {name!r}; rename all but one"
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    if re.search(r"[(:]|\bcase\b", name, re.IGNORECASE):
        hint += f"an expression of SQL is written NAME={name}. "
    return f"{what}: {file} has no column {name!r}; {hint}It has {', '.join(names)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
