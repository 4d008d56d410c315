"""Options with SQL that an error offers, written so that they work when they are pasted."""

from __future__ import annotations

import re
import shlex

from stca_jax.data.interaction_log.log_config import Column, quoted


def sql_of(column: Column) -> str:
    """A column as its user would write it in SQL."""
    if column.is_sql:
        return f"({column.expression})"
    plain = re.fullmatch(r"[^\W\d]\w*", column.expression)
    return column.expression if plain else quoted(column.expression)


def name_of(column: Column, default: str) -> str:
    """Its name as it can stand before SQL, without blanks and quote marks."""
    return re.sub(r"\W+", "_", column.name).strip("_") or default


def flag(option: str, name: str, sql: str) -> str:
    """--option="name=sql", quoted for a shell."""
    text = f"{name}={sql}"
    special = re.search(r'["`]|\$[\w({]|\\[\\$]', text)
    return f"--{option}={shlex.quote(text)}" if special else f'--{option}="{text}"'
