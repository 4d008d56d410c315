"""Result rows as a table to read, CSV or JSON lines.

A row is a flat dictionary such as `{"model": "stca", "length": 512, "auc": 0.807}`. Rows may lack
columns: the cell stays empty.
"""

import csv
import fcntl
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stca_jax.files import read_json_lines, replacing

Row = Mapping[str, Any]


def format_table(rows: Sequence[Row], digits: int = 4) -> str:
    """Lays rows out as an aligned table, to print in a terminal or to paste into Markdown.

    Args:
      rows: cells by column name; columns appear in the order in which rows first name them.
      digits: decimals of floats; integers are written in full.

    Returns:
      Lines joined by newlines, numbers to the right, text to the left; "" without rows.
    """
    columns = _columns(rows)
    if not columns:
        return ""
    cells = [[_text(row.get(column), digits) for column in columns] for row in rows]
    headings = [_text(column, digits) for column in columns]
    widths = [max(3, *map(len, column)) for column in zip(headings, *cells, strict=True)]
    to_right = [not any(isinstance(row.get(column), str) for row in rows) for column in columns]

    def line(texts: Sequence[str]) -> str:
        aligned = zip(texts, widths, to_right, strict=True)
        return "| " + " | ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in aligned) + " |"

    rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, to_right, strict=True)]
    return "\n".join([line(headings), line(rule), *map(line, cells)])


def add_rows(path: str | os.PathLike[str], rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """Adds rows to a table in JSON lines, where they replace rows of the same keys.

    Args:
      path: File ending in `.jsonl`, in an existing directory.
      rows: cells by column name.
      keys: Columns that tell rows apart; one that a row lacks is None.

    Returns:
      All rows of the table now.
    """
    path = pathlib.Path(path)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job may add rows of its own
        new = {tuple(row.get(key) for key in keys) for row in rows}
        old = [r for r in read_json_lines(path) if tuple(r.get(key) for key in keys) not in new]
        write_table(path, [*old, *rows])
        return [*old, *rows]


def write_table(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes rows in the format that the file's suffix names, replacing the file in one step.

    A reader never sees half a file, and an interrupted write leaves the old one. Floats keep full
    precision in CSV and JSON lines. JSON has no NaN or infinity: they become null.

    Args:
      path: file ending in `.csv`, `.jsonl` or `.md`, in an existing directory.
      rows: cells by column name: text, numbers, booleans or None.

    Raises:
      ValueError: if the suffix is another.
    """
    path = pathlib.Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(
            f"{path.name} ends in {path.suffix!r}, expected one of {', '.join(_FORMATS)}: rename "
            "it to choose the format."
        )
    with replacing(path) as file:
        file.write(_FORMATS[path.suffix](rows).encode())


def _columns(rows: Sequence[Row]) -> list[str]:
    """Returns all column names, in the order of first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def _text(value: Any, digits: int) -> str:
    """Returns one cell of a Markdown table."""
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return " ".join(str(value).split()).replace("|", r"\|")


def _plain(value: Any) -> Any:
    """Returns the Python number of a NumPy or JAX scalar, anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _markdown(rows: Sequence[Row]) -> str:
    return format_table(rows) + "\n"


def _csv(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: _plain(value) for column, value in row.items()} for row in rows)
    return file.getvalue()


def _json_lines(rows: Sequence[Row]) -> str:
    def finite(value: Any) -> Any:
        value = _plain(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return "".join(
        json.dumps({column: finite(value) for column, value in row.items()}, allow_nan=False) + "\n"
        for row in rows
    )


_FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    ".csv": _csv,
    ".jsonl": _json_lines,
    ".md": _markdown,
}
