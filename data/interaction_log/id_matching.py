"""SQL that makes the ids of a log and of a side table equal, tried on both before it is offered."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from stca_jax.data.interaction_log.events import LogSource, connect
from stca_jax.data.interaction_log.log_config import Column
from stca_jax.data.interaction_log.source import Table
from stca_jax.data.interaction_log.suggestions import flag, name_of, sql_of

# From the most harmless to the boldest, each of which does all that matters of those before.
_NUMBER = r"'^\s*0*([0-9]+)([.]0*)?\s*$', '\1'"
_RULES = (
    "trim({}::VARCHAR)",
    r"regexp_replace(trim({}::VARCHAR), '^\s*([+-]?[0-9]+)([.]0*)?\s*$', '\1')",
    f"regexp_replace(trim({{}}::VARCHAR), {_NUMBER})",
    f"regexp_replace(lower(trim({{}}::VARCHAR)), {_NUMBER})",
    f"regexp_replace(regexp_replace(lower({{}}::VARCHAR), '[^a-z0-9.]', '', 'g'), {_NUMBER})",
    r"regexp_extract(lower({}::VARCHAR), '^[^0-9]*0*([0-9]+)([.]0*)?[^0-9a-z]*$', 1)",
    r"regexp_extract({}::VARCHAR, '0*([0-9]+)', 1)",
)
_SAFE = 4  # rules that make nothing equal but numbers, blanks and case
_TRIED_IDS = 100_000  # of the log
_GAIN = 0.01  # share of ids, below which a rule is not worth its words


@dataclasses.dataclass(frozen=True)
class Mending:
    """What a rule would do.

    Attributes:
      option: To give, such as '--item_id="item=trim(item::VARCHAR)"'.
      share: Ids of the log that the table then has.
      merged: Ids of the log that would be another's, or none.
      lost: Likewise of the table.
    """

    option: str
    share: float
    merged: int
    lost: int

    def describe(self) -> str:
        """For people."""
        also = [
            f"{count:,} of {of} become another's"
            for count, of in ((self.merged, "the log's"), (self.lost, "the table's"))
            if count
        ]
        return "; ".join([f"{self.option} reads both, and gives {self.share:.1%}", *also])


def find_mending(source: LogSource, what: str, share: float) -> Mending | None:
    """The rule that matches most ids, or None if none matches more.

    Args:
      source: The log.
      what: "items" or "users".
      share: Ids of the log that the table has as they are.
    """
    level = what[:-1]
    column = source.config.key_columns[level]
    of_log = distinct_ids(source.log, column, _TRIED_IDS)
    of_table = distinct_ids(getattr(source, what), column)
    best = None
    with connect() as connection:
        connection.register("log_ids", pa.table({"id": of_log}))
        connection.register("table_ids", pa.table({"id": of_table}))
        for place, rule in enumerate(_RULES):
            sql = f"NULLIF({rule.format('id')}, '')"
            found = connection.sql(f"""
                SELECT avg(coalesce(key IN (SELECT {sql} FROM table_ids), false)::INT),
                       count(*) - count(DISTINCT key),
                       (SELECT count(*) - count(DISTINCT {sql}) FROM table_ids)
                FROM (SELECT {sql} AS key FROM log_ids)""").fetchall()
            ((matched, merged, lost),) = found
            # What would take two things for one is no remedy.
            is_safe = place < _SAFE or not (merged or lost)
            if is_safe and (matched or 0) >= (best.share if best else share) + _GAIN:
                option = flag(f"{level}_id", name_of(column, level), rule.format(sql_of(column)))
                best = Mending(option, matched, merged, lost)
    return best


def distinct_ids(table: Table, column: Column, enough: int | None = None) -> pa.Array:
    """Distinct ids as texts, not brought to a common type; the first if they are enough."""
    sql = table.sql(column)
    known = pa.table({"id": pa.array([], pa.string())})
    with connect() as connection:
        for part in table.parts:
            for block in table.blocks(part):
                connection.register("log", block.rows)
                connection.register("known", known)
                known = connection.sql(f"""
                    SELECT id FROM known UNION
                    SELECT CAST({sql} AS VARCHAR) AS id FROM log WHERE {sql} IS NOT NULL
                """).to_arrow_table()
                if enough is not None and len(known) >= enough:
                    return known["id"]
    return known["id"]
