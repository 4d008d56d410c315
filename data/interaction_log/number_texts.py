"""SQL that makes numbers of texts that are none, tried on some before it is offered."""

from __future__ import annotations

import re

import duckdb
import pyarrow as pa

from stca_jax.data.interaction_log.events import connect
from stca_jax.data.interaction_log.log_config import Column
from stca_jax.data.interaction_log.source import Table
from stca_jax.data.interaction_log.suggestions import flag, name_of, sql_of

_TRIED = 10_000  # distinct texts
# One number among words and signs.  What has two, as 3/5 has, or is in parentheses, is none.
_POINT = (
    r"TRY_CAST(regexp_replace(regexp_extract({}, '^[^0-9.,+(-]*([+-]?[0-9, ]*[.]?[0-9]+)[^0-9]*$', "
    r"1), '[, ]', '', 'g') AS DOUBLE)"
)
_COMMA = (
    r"TRY_CAST(replace(regexp_replace(regexp_extract({}, "
    r"'^[^0-9.,+(-]*([+-]?[0-9. ]*,?[0-9]+)[^0-9]*$', 1), '[. ]', '', 'g'), ',', '.') AS DOUBLE)"
)
_TOO_LARGE = "CASE WHEN abs(TRY_CAST({0} AS DOUBLE)) < 1e38 THEN TRY_CAST({0} AS DOUBLE) END"
_HAS_POINT = re.compile(r"\.\d{1,2}\D*$|,\d{3}\.")
_HAS_COMMA = re.compile(r",\d{1,2}\D*$|,\d{4}|\.\d{3},")


def describe_mending(table: Table, option: str, column: Column) -> str:
    """Examples of a column's values that are no numbers within float32, and the SQL to write.

    Args:
      table: Has the column.
      option: That names it, such as "history_features".
      column: Some of its values are no such numbers.
    """

    def offer(sql: str) -> str:
        return flag(option, name_of(column, "number"), sql)

    with connect() as connection:
        texts = _unreadable(connection, table, table.sql(column))
        rule, meaning = _choose(texts)
        connection.register("texts", pa.table({"text": pa.array(texts, pa.string())}))
        tried = f"SELECT avg(({rule.format('text')} IS NOT NULL)::INT) FROM texts"
        ((share,),) = connection.sql(tried).fetchall()
    mended = offer(rule.format(f"{sql_of(column)}::VARCHAR"))
    if rule is _TOO_LARGE:
        remedy = f"SQL can leave them out: {mended}"
    elif share:
        remedy = f"SQL can read {share:.0%} of such texts{meaning}: {mended}"
    else:
        remedy = f"Give SQL of your own: {offer('SQL')}"
    return f"such as {', '.join(map(repr, texts[:3]))}. {remedy}"


def _unreadable(connection: duckdb.DuckDBPyConnection, table: Table, sql: str) -> list[str]:
    """Texts of the first block that has some."""
    for block in (b for part in table.parts for b in table.blocks(part)):
        connection.register("log", block.rows)
        found = connection.sql(
            f"SELECT DISTINCT CAST({sql} AS VARCHAR) FROM log WHERE {sql} IS NOT NULL AND NOT "
            f"coalesce(isfinite(TRY_CAST({sql} AS FLOAT)), false) ORDER BY 1 LIMIT {_TRIED}"
        ).fetchall()
        if found:
            return [text for (text,) in found]
    return []


def _choose(texts: list[str]) -> tuple[str, str]:
    """The rule to offer, and what it takes commas for."""
    if all(map(_is_number, texts)):
        return _TOO_LARGE, ""
    if any(map(_HAS_COMMA.search, texts)) and not any(map(_HAS_POINT.search, texts)):
        return _COMMA, ", commas as decimal points"
    return _POINT, ", commas between thousands" if any("," in text for text in texts) else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
