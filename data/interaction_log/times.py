"""What a log's timestamps mean: found out from its first rows, then held against every row.

Times are kept to the nanosecond until events are sorted and equal ones are found.
"""

from __future__ import annotations

import dataclasses
import datetime

import duckdb
import numpy as np

from stca_jax.data.interaction_log.log_config import ORDER, TIME_UNITS, Column, quoted
from stca_jax.errors import UserError
from stca_jax.schema import SECONDS_PER_DAY

NS = 10**9
MIXED = "is another kind of time than in the first rows"
_ZERO = "is 0, which stands for a missing time"
_OUTSIDE = "is outside 1970 to 2106"
_UNLIKELY = "is outside 1995 to 2050, which time_unit=auto takes for a mistake"
_UNREADABLE = "is neither a number nor a date"
_END_OF_TIME = 2**32  # in 2106; records count seconds in 31 bits from the log's first day
_PLAUSIBLE = (788_918_400, 2_524_608_000)  # 1995 to 2050: what auto takes numbers for
_SAMPLE = 100_000
_DATES = ("DATE", "TIMESTAMP")
_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
_NUMBERS = (*_INTEGERS, "FLOAT", "DOUBLE", "DECIMAL")
_YEARS = "1995 to 2050"


@dataclasses.dataclass(frozen=True)
class TimeReading:
    """How timestamps are read.

    Attributes:
      name: Of the timestamp, for people.
      sql_type: Of its values: a date, a number, or text.
      is_date: Whether values are dates or their text, or else numbers or their text.
      unit: Of numbers, in a second.
      is_strict: Whether numbers must be times from 1995 to 2050, as time_unit=auto wants.
      zero_is_missing: Whether 0 stands for a missing time, as in a log of times since 1970.
    """

    name: str
    sql_type: str
    is_date: bool
    unit: int
    is_strict: bool
    zero_is_missing: bool

    def describe(self) -> str:
        """For people."""
        if self.name == ORDER and not self.zero_is_missing:
            return "the order of rows"
        if self.is_date:
            return "dates; in UTC if they name no zone"
        unit = next(name for name, size in TIME_UNITS.items() if size == self.unit)
        return f"numbers of {unit} since 1970" + (", by their size" if self.is_strict else "")

    def any_kind_sql(self, raw: str) -> str:
        """SQL that users can write for a log of dates and numbers of several units since 1970."""
        is_text = self.sql_type == "VARCHAR"
        number = f"TRY_CAST({raw} AS DOUBLE)" if is_text else f"{raw}::DOUBLE"
        unit = f"CASE WHEN {number} > 1e17 THEN 1e9 WHEN {number} > 1e14 THEN 1e6 " \
               f"WHEN {number} > 1e11 THEN 1e3 ELSE 1 END"  # fmt: skip
        moment = f"to_timestamp({number} / {unit})"
        return f"COALESCE(TRY_CAST({raw} AS TIMESTAMPTZ), {moment})" if is_text else moment

    def parsed_sql(self, raw: str) -> str:
        """The number or date of a timestamp; NULL where text is neither."""
        if self.is_date:
            if self.sql_type == "VARCHAR":
                return f"TRY_CAST({raw} AS TIMESTAMPTZ)"
            # Of years that microseconds do not reach, there is nothing to read.
            is_coarse = self.sql_type in ("DATE", "TIMESTAMP_S", "TIMESTAMP_MS")
            return f"TRY_CAST({raw} AS TIMESTAMP)" if is_coarse else raw
        if self.sql_type == "VARCHAR":
            # A double has 53 bits, which nanoseconds do not fit.
            return f"TRY_CAST({raw} AS {'HUGEINT' if self.unit == NS else 'DOUBLE'})"
        return f"CAST({raw} AS DOUBLE)" if self.sql_type.startswith("DECIMAL") else raw

    def ns_sql(self, parsed: str) -> str:
        """Nanoseconds since 1970; NULL where it is no time that records can hold."""
        if self.is_date:
            return (
                f"CASE WHEN {parsed} >= TIMESTAMP '1970-01-01' AND {parsed} < TIMESTAMP "
                f"'2106-02-07 06:28:16' THEN epoch_ns({parsed}) END"
            )
        low, high = _PLAUSIBLE if self.is_strict else (0, _END_OF_TIME)
        factor = NS // self.unit
        whole = f"CAST({parsed} AS BIGINT) * {factor}"
        if self._is_fractional:
            whole = f"CAST(round({parsed} * {factor}) AS BIGINT)"
        return (
            f"CASE WHEN {parsed} >= {low * self.unit} AND {parsed} < {high * self.unit} "
            f"THEN {whole} END"
        )

    def reasons(self, raw: str, parsed: str, ns: str) -> list[tuple[str, str]]:
        """SQL conditions of values that are no time, and what is wrong with them, in order."""
        found = [(f"{raw} IS NULL", "is missing")]
        if self.zero_is_missing:
            found.append((f"{ns} = 0" if self.is_date else f"{parsed} = 0", _ZERO))
        # Most rows are times: one check of them is enough.
        checks = (
            self._date_checks(raw, parsed) if self.is_date else self._number_checks(raw, parsed)
        )
        found += [(f"{ns} IS NULL AND {condition}", reason) for condition, reason in checks]
        found.append((f"{ns} IS NULL", _OUTSIDE))
        return [(condition, f"{self.name} {reason}") for condition, reason in found]

    def _date_checks(self, raw: str, parsed: str) -> list[tuple[str, str]]:
        if self.sql_type != "VARCHAR":
            return []
        number = f"TRY_CAST({raw} AS DOUBLE)"
        return [
            (f"{parsed} IS NULL AND isfinite({number})", MIXED),
            (f"{parsed} IS NULL", _UNREADABLE),
        ]

    def _number_checks(self, raw: str, parsed: str) -> list[tuple[str, str]]:
        checks = []
        if self._is_fractional:
            checks.append((f"NOT isfinite({parsed})", "is not finite"))
        if self.sql_type == "VARCHAR":
            date = f"TRY_CAST({raw} AS TIMESTAMPTZ)"
            checks.append((f"{parsed} IS NULL AND {date} IS NOT NULL", MIXED))
            checks.append((f"{parsed} IS NULL", _UNREADABLE))
        if self.is_strict:
            low, high = _PLAUSIBLE
            others = [u for u in TIME_UNITS.values() if u != self.unit]
            checks += [(f"{parsed} BETWEEN {low * u} AND {high * u}", MIXED) for u in others]
            checks.append((f"{parsed} BETWEEN 0 AND {_END_OF_TIME * self.unit}", _UNLIKELY))
        return checks

    @property
    def _is_fractional(self) -> bool:
        if self.sql_type == "VARCHAR":
            return self.unit != NS
        return self.sql_type.removeprefix("U") not in _INTEGERS


def read_times(
    connection: duckdb.DuckDBPyConnection, sql: str, sql_type: str, column: Column, unit: str
) -> TimeReading:
    """Finds out what the timestamps of the table `log`, the log's first rows, are.

    Args:
      connection: Has the table.
      sql: The timestamp.
      sql_type: Its type.
      column: As the config names it.
      unit: As in `LogConfig.time_unit`.

    Raises:
      UserError: they are no times, or with "auto" no numbers of a known unit; says what they would
        be, and what to write instead.
    """
    name = column.name
    base = sql_type.removeprefix("U").partition("(")[0]
    if not sql_type.startswith(_DATES) and base not in (*_NUMBERS, "VARCHAR", '"NULL"'):
        raise UserError(
            f"{name} is a {sql_type}, which is no point in time; give a date, a number, or SQL "
            'such as --timestamp="time=DAY_COLUMN + TIME_COLUMN"'
        )
    sql_type = "VARCHAR" if sql_type == '"NULL"' else sql_type
    if sql_type.startswith(_DATES):
        if unit == "auto":
            _check_dates(connection, sql, name)
        return TimeReading(name, sql_type, True, 1, False, True)
    numbers, shown, num_dates = _sample(connection, sql)
    if sql_type == "VARCHAR" and num_dates >= len(numbers):
        return TimeReading(name, sql_type, True, 1, False, True)
    size = (
        float(np.quantile(np.abs(numbers[numbers != 0]), 0.5, method="lower"))
        if any(numbers)
        else 0
    )
    low, high = _PLAUSIBLE
    if unit != "auto":
        per_second = TIME_UNITS[unit]
        is_epoch = low * per_second <= size < high * per_second
        return TimeReading(name, sql_type, False, per_second, False, is_epoch)
    likely = next((u for u in TIME_UNITS.values() if low * u <= size < high * u), None)
    if len(numbers) and likely is None:
        raise UserError(_implausible(column, numbers, size))
    _check_precision(name, numbers, shown, sql_type, likely or 1)
    return TimeReading(name, sql_type, False, likely or 1, True, True)


def _check_dates(connection: duckdb.DuckDBPyConnection, sql: str, name: str) -> None:
    """Whether dates are of 1970, as those are that were made from numbers of another unit.

    Raises:
      UserError: most are.
    """
    moments = f"SELECT TRY_CAST({sql} AS TIMESTAMP) AS v FROM log LIMIT {_SAMPLE}"
    query = f"SELECT median(epoch(v)) FROM ({moments})"
    row = connection.execute(query).fetchone()
    if row and row[0] is not None and 0 <= row[0] < 365 * SECONDS_PER_DAY:
        raise UserError(
            f"most times of {name} are of 1970, such as {_date(row[0])}: were they made from "
            "numbers of another unit? Write them anew, or give --time_unit=s to take them "
            "as they are"
        )


def _sample(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[np.ndarray, list[str], int]:
    """Finite numbers of the first rows, a few values as text, and how many others are dates."""
    query = f"""
        SELECT TRY_CAST(v AS DOUBLE) AS number, CAST(v AS VARCHAR) AS text,
               number IS NULL AND TRY_CAST(text AS TIMESTAMPTZ) IS NOT NULL AS is_date
        FROM (SELECT {sql} AS v FROM log LIMIT {_SAMPLE}) WHERE v IS NOT NULL"""
    table = connection.sql(query).to_arrow_table()
    numbers = table["number"].drop_null().to_numpy()
    shown = table["text"].slice(0, 3).to_pylist()
    return numbers[np.isfinite(numbers)], shown, sum(table["is_date"].to_pylist())


def _check_precision(
    name: str, numbers: np.ndarray, shown: list[str], sql_type: str, unit: int
) -> None:
    """Whether times went through float32, which keeps 24 bits: 128 seconds of today.

    Raises:
      UserError: they did.
    """
    whole = np.unique(numbers).astype(np.int64)
    if len(whole) < 10 or whole[0] <= 0:
        return
    step = int(np.gcd.reduce(np.diff(whole)))
    if step < np.spacing(np.float32(whole[0])) or step == 1:
        return
    # Clocks tick in minutes, hours or days; steps of rounding are powers of 2 or 10, without a 3.
    is_clock = step % (60 * unit) == 0
    is_short = any("e" in text.lower() for text in shown)
    if sql_type == "FLOAT" or (not is_clock and (is_short or not step & (step - 1))):
        raise UserError(
            f"{name} is rounded: all values, such as {', '.join(shown)}, are {step} apart or "
            "more, as float32 keeps them, so that the order of events is lost. Write the times as "
            "integers or float64; or give --time_unit to take them as they are"
        )


def _implausible(timestamp: Column, numbers: np.ndarray, size: float) -> str:
    """What is wrong with numbers that are no times of today in any unit, and what to do."""
    name, column = timestamp.name, f"({timestamp.expression})"
    if not timestamp.is_sql:
        column = name if name.isidentifier() else quoted(name)
    low, high = (f"{x:.15g}" for x in (numbers.min(), numbers.max()))
    read = ", ".join(
        f"{date} in {unit}" for unit, u in TIME_UNITS.items() if (date := _date(size / u))
    )
    ways = "give --time_unit=s, ms, us or ns if they count from 1970 or from any other moment"
    if (day := _as_day(f"{size:.0f}")) is not None:
        ways = (
            f'they look like {day}: give --timestamp="time=try_strptime({column}::BIGINT::VARCHAR, '
            f"'{day}')\""
        )
    elif 20_000 <= size < 80_000:
        ways = (
            "they look like days of a spreadsheet: give "
            "--timestamp=\"time=TIMESTAMP '1899-12-30' + "
            f'to_microseconds((86400000000 * {column}::DOUBLE)::BIGINT)"; or ' + ways
        )
    return (
        f"{name} is a number from {low} to {high}, which is no time of {_YEARS} in any unit (the "
        f"median would be {read or 'none that exists'}); {ways}; or any SQL: "
        '--timestamp="time=EXPRESSION"'
    )


def _as_day(text: str) -> str | None:
    """The format of a date that is written as a number of 8, 10, 12 or 14 digits."""
    for form, digits in (("%Y%m%d", 8), ("%Y%m%d%H", 10), ("%Y%m%d%H%M", 12), ("%Y%m%d%H%M%S", 14)):
        if len(text) == digits and "1990" <= text[:4] < "2050":
            try:
                datetime.datetime.strptime(text[:8], "%Y%m%d")
            except ValueError:
                return None
            return form
    return None


def _date(seconds: float) -> str:
    if not 0 <= seconds < 200 * 366 * SECONDS_PER_DAY:
        return ""
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
    return f"{moment:%Y-%m-%d}"
