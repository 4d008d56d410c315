"""Columns as files have them, brought to the few types that a log is handled in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stca_jax.errors import UserError

ROW = "__row__"


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


def plain_type(type_: pa.DataType, file: str, name: str) -> pa.DataType:
    """The type as which values are handled.

    Raises:
      UserError: the column holds lists or structures.
    """
    if pa.types.is_dictionary(type_):
        return plain_type(type_.value_type, file, name)
    if _is_textual(type_) or pa.types.is_decimal256(type_):
        return pa.string()
    if pa.types.is_float16(type_):
        return pa.float32()
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


def common_type(a: pa.DataType | None, b: pa.DataType) -> pa.DataType | None:
    """The type of a column that has two in different files: the wider number, or text.

    None if one is neither a number, a date, nor text, so that equal values would look different.
    """
    if a is None or a == b or pa.types.is_null(a):
        return b
    if pa.types.is_null(b):
        return a
    both = {_kind(a), _kind(b)}
    if None in both:
        return None
    if both == {"date"}:
        return pa.timestamp("us")
    if both <= {"integer", "boolean"}:
        wide = pa.types.is_uint64(a) or pa.types.is_uint64(b)
        return pa.string() if wide else pa.int64()
    if both <= {"integer", "decimal"}:
        scale = max(_digits(a)[1], _digits(b)[1])
        precision = max(_digits(a)[0], _digits(b)[0]) + scale
        return pa.decimal128(precision, scale) if precision <= 38 else pa.string()
    return pa.float64() if both <= {"integer", "float", "decimal"} else pa.string()


def _kind(type_: pa.DataType) -> str | None:
    kinds = {
        "text": pa.types.is_string,
        "boolean": pa.types.is_boolean,
        "integer": pa.types.is_integer,
        "decimal": pa.types.is_decimal,
        "float": pa.types.is_floating,
        "date": lambda t: pa.types.is_date(t) or pa.types.is_timestamp(t),
    }
    return next((kind for kind, is_kind in kinds.items() if is_kind(type_)), None)


def _digits(type_: pa.DataType) -> tuple[int, int]:
    """Of an integer or decimal, before and after the point."""
    if pa.types.is_integer(type_):
        return 20 if pa.types.is_uint64(type_) else 19, 0
    return type_.precision - type_.scale, type_.scale


def unify(table: pa.Table, columns: dict[str, pa.DataType], null_words: Sequence[str]) -> pa.Table:
    """The table with the types that all files have in common, and nulls for words that say so."""
    words = pa.array(null_words, pa.string())
    for name, type_ in columns.items():
        values = table[name]
        if pa.types.is_string(values.type) and null_words:
            is_null = pc.is_in(values, words)
            if pc.any(is_null).as_py():
                values = pc.if_else(is_null, None, values)
        if values.type != type_:
            is_decimal = pa.types.is_decimal(values.type)
            values = values.cast(type_, safe=False)
            if is_decimal and pa.types.is_string(type_):  # as other numbers are written
                values = pc.replace_substring_regex(values, r"\.0+$", "")
        if values is not table[name]:
            table = _replace(table, name, values)
    return table


def as_text(table: pa.Table, number: np.ndarray) -> tuple[pa.Table, np.ndarray, list[BadRow]]:
    """Turns bytes into text; leaves out rows that are not UTF-8, and their numbers."""
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
        return table, number, []
    rows = [BadRow(int(number[i]), "text is not UTF-8", text) for i, text in bad.items()]
    is_good = np.array([i not in bad for i in range(table.num_rows)])
    return table.filter(pa.array(is_good)), number[is_good], rows


def _decoded(value: bytes | None) -> tuple[str | None, bool]:
    if value is None:
        return None, True
    try:
        return value.decode(), True
    except UnicodeDecodeError:
        return value.decode(errors="backslashreplace"), False


def _replace(table: pa.Table, name: str, values: pa.ChunkedArray | pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)
