"""What a part of a log held besides events, and whether so much of it can be meant."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stca_jax.data.interaction_log.event_sql import LEFT_OUT, LONG_FEATURE
from stca_jax.data.interaction_log.events import DUPLICATE, Events, LogSource
from stca_jax.data.interaction_log.suggestions import flag, name_of, sql_of
from stca_jax.data.interaction_log.times import MIXED, NS
from stca_jax.errors import UserError

_LONGEST = 2**31 - 1  # seconds that a record's times can span
_ONE_USER = 1 / 3
_SHOWN_REASONS = 5
_NUMBERS = ("FLOAT", "DOUBLE", "DECIMAL")


@dataclasses.dataclass
class PartSummary:
    """Counts over one part of a log; adding up gives those of the log.

    Attributes:
      reasons: Rows left out, by reason.
      examples: File and row of the first, by reason.
      num_rows: Rows, left out or not.
      num_lines: Lines of text files, without headers; 0 for Parquet.
      times: First and last time with file and row: (nanoseconds, file, row); empty without events.
    """

    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, list] = dataclasses.field(default_factory=dict)
    num_rows: int = 0
    num_lines: int = 0
    times: list[list] = dataclasses.field(default_factory=list)

    def add(self, events: Events, file: str) -> None:
        """Counts a block of the part."""
        self.reasons += events.reasons
        for reason, _, row, _ in events.rejected:
            self.examples.setdefault(reason, [file, row])
        self.num_rows += len(events.row) + sum(events.reasons.values())
        self.num_lines = events.lines
        if len(events.row):
            time = events.table["time"].to_numpy()
            found = (
                (int(time[i]), file, int(events.row[i])) for i in (time.argmin(), time.argmax())
            )
            self._widen([list(t) for t in found])

    def _widen(self, times: Sequence[list]) -> None:
        both = sorted([*self.times, *times])
        self.times = [both[0], both[-1]] if both else []

    def __add__(self, other: PartSummary) -> PartSummary:
        """Of two parts together."""
        total = PartSummary(
            self.reasons + other.reasons,
            other.examples | self.examples,
            self.num_rows + other.num_rows,
            self.num_lines + other.num_lines,
            self.times,
        )
        total._widen(other.times)
        return total

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form, the inverse of `from_dict`."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PartSummary:
        """Rebuilds what `to_dict` gave."""
        return cls(**{**values, "reasons": collections.Counter(values["reasons"])})


def check_rows(source: LogSource, read: PartSummary, file: pathlib.Path) -> None:
    """Checks that most rows of the log could be read, and that their times belong together.

    Args:
      source: The log.
      read: What was read of it.
      file: Where the rejected rows are.

    Raises:
      UserError: no row can be used, more are odd than `allow_odd`, times are of several kinds or
        too far apart; names reasons, examples and ways out.
    """
    config = source.config
    reasons = {r: n for r, n in read.reasons.items() if r != LEFT_OUT}
    rejected, usable = sum(reasons.values()), read.num_rows - sum(read.reasons.values())
    why = _describe(reasons, read, file)
    if not usable:
        left_out = f"; {read.reasons[LEFT_OUT]:,} are {LEFT_OUT}" if read.reasons[LEFT_OUT] else ""
        if not read.num_rows:
            raise UserError(
                f"no row of the log can be used: {', '.join(source.log.files)} has none"
            )
        raise UserError(
            f"no row of the log can be used{left_out}{why}. {_ways_out(reasons, source)}"
        )
    mixed = {r: n for r, n in reasons.items() if r.endswith(MIXED)}
    if mixed:
        column = sql_of(config.key_columns["time"])
        raise UserError(
            f"timestamps are of several kinds: most are {source.time.describe()}, from "
            f"{_date(read.times[0][0])} to {_date(read.times[1][0])}, but "
            f"{_describe(mixed, read, file)[2:]}. Give --time_unit to take all numbers as that and "
            "reject what is none, or SQL that reads both, such as "
            f"{flag('timestamp', 'time', source.time.any_kind_sql(column))}"
        )
    _check_texts(source, reasons, why)
    if rejected > config.allow_odd * read.num_rows:
        share = rejected / read.num_rows
        raise UserError(
            f"{rejected:,} of {read.num_rows:,} rows of the log ({share:.1%}) cannot be used{why}. "
            f"{_ways_out(reasons, source)}{allow(share)}"
        )
    swallowed = read.num_lines - read.num_rows
    if swallowed > config.allow_odd * read.num_lines:
        share = swallowed / read.num_lines
        raise UserError(
            f"{', '.join(source.log.files)}: {read.num_lines:,} lines gave {read.num_rows:,} rows; "
            f"the others are empty or within quote marks. If a quote mark opens and never closes, "
            f"give --quote=none{allow(share)}"
        )
    _check_span(read.times)


def check_events(source: LogSource, duplicates: int, log_length: collections.Counter[int]) -> None:
    """Checks that not too many rows are equal, or one user's.

    Args:
      source: The log.
      duplicates: Rows equal to another.
      log_length: Users by their number of events.

    Raises:
      UserError: more than `allow_odd` are, or one user has more than a third of the events, and
        thrice an equal share.
    """
    num_users, most_of_a_user = log_length.total(), max(log_length)
    num_events = sum(length * users for length, users in log_length.items())
    allowed, rows = source.config.allow_odd, duplicates + num_events
    if duplicates > allowed * rows:
        raise UserError(
            f"{duplicates:,} of {rows:,} rows ({duplicates / rows:.1%}) are {DUPLICATE} in all "
            "columns that are used, and would be one event. If each is an event, give "
            "a column that tells them apart, such as a finer time, or one more of "
            f"--history_features{allow(duplicates / rows)}"
        )
    share = most_of_a_user / max(num_events, 1)
    if share > max(_ONE_USER, allowed, 3 / num_users):
        user = source.config.key_columns["user"]
        known = flag("user_id", name_of(user, "user"), f"NULLIF({sql_of(user)}, 'ID')")
        raise UserError(
            f"one user has {most_of_a_user:,} of {num_events:,} events ({share:.1%}). If its id "
            f"stands for unknown users, name it in --null_words, or leave it out by SQL: {known}"
            f"{allow(share)}"
        )


def lines_of_profile(source: LogSource, read: PartSummary) -> list[tuple[str, str]]:
    """How the files were understood, for the profile."""
    formats = sorted({f.describe() for f in source.log.formats.values()})
    lines = f" of {read.num_lines:,} lines" if read.num_lines else ""
    return [
        ("files", f"{len(source.log.files):,}, {read.num_rows:,} rows{lines}"),
        *([("files not read", _names(source.log.not_read))] if source.log.not_read else []),
        ("read as", "; ".join(formats)),
        ("times read as", source.time.describe()),
    ]


def _check_texts(source: LogSource, reasons: Mapping[str, int], why: str) -> None:
    columns = source.config.feature_columns
    for option in ("target", "history"):
        for column in columns[option]:
            if LONG_FEATURE.format(column.name) in reasons:
                short = flag(
                    f"{option}_features", name_of(column, "text"), f"left({sql_of(column)}, 100)"
                )
                raise UserError(
                    f"{column.name} is a text{why}. Shorten it: {short}, or leave it out"
                )


def _names(files: Sequence[str]) -> str:
    shown = ", ".join(pathlib.Path(f).name for f in files[:_SHOWN_REASONS])
    return shown + (f" and {len(files) - _SHOWN_REASONS:,} more" if files[_SHOWN_REASONS:] else "")


def _describe(reasons: Mapping[str, int], read: PartSummary, file: pathlib.Path) -> str:
    """The most frequent reasons, with an example each, and where all rejected rows are."""
    if not reasons:
        return ""
    most = collections.Counter(reasons).most_common()
    shown = []
    for reason, count in most[:_SHOWN_REASONS]:
        where, row = read.examples[reason]
        shown.append(f"{count:,}: {reason} (first: row {row} of {where}; the first is 0)")
    if len(most) > _SHOWN_REASONS:
        shown.append(f"{len(most) - _SHOWN_REASONS} other reasons")
    return f": {'; '.join(shown)}; all are in {file}"


def _ways_out(reasons: Mapping[str, int], source: LogSource) -> str:
    """What helps against the most frequent reason."""
    config, (reason, _) = source.config, collections.Counter(reasons).most_common(1)[0] if reasons \
        else ("", 0)  # fmt: skip
    time, words = source.time.name, ", ".join(config.null_words)
    if reason.startswith(f"{time} is ") and "missing" not in reason:
        parsed = f"try_strptime({sql_of(config.key_columns['time'])}, '%m/%d/%Y %H:%M')"
        return (
            f"Times are read as {source.time.describe()}; --time_unit says otherwise, or SQL: "
            f"{flag('timestamp', 'time', parsed)}"
        )
    if "missing" in reason:
        of_numbers = any(t.startswith(_NUMBERS) for t in source.id_sql_types.values())
        whole = "; as numbers, ids are whole, and below 2^53 as floats" if of_numbers else ""
        return f"Empty values, and the words {words} (--null_words), stand for missing ones{whole}"
    if "columns, not" in reason:
        return "--delimiter and --quote say how text files are written"
    if "UTF-8" in reason:
        return "Convert the files: iconv -f LATIN1 -t UTF-8 OLD > NEW"
    return "NAME=SQL in place of a column can mend values"


def allow(share: float) -> str:
    """How to go on with a share of odd rows that is too large otherwise."""
    return f". If it is meant, allow it: --allow_odd={np.ceil(share * 100) / 100:.2f}"


def _check_span(times: Sequence[Sequence[Any]]) -> None:
    (first, first_file, first_row), (last, last_file, last_row) = times
    if (last - first) // NS > _LONGEST:
        raise UserError(
            f"times run from {_date(first)} (row {first_row} of {first_file}; the first is 0) to "
            f"{_date(last)} (row {last_row} of {last_file}), more than the 68 years that records "
            "can span; mend or remove the wrong one, or leave it out by SQL: "
            '--timestamp="time=CASE WHEN ... THEN ... END"'
        )


def _date(ns: int) -> str:
    return datetime.datetime.fromtimestamp(ns // NS, datetime.UTC).strftime("%Y-%m-%d %H:%M")
