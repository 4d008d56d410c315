"""What a user says about a log: where it lies, what its columns mean, what to make of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from stca_jax.data.interaction_log.columns import ROW
from stca_jax.errors import UserError
from stca_jax.input.encoding import Clock
from stca_jax.input.trends import parse_window, trend_names

TIME_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DERIVED = ("item", "log_popularity", "hour", "weekday")  # features that every log gets
SCALINGS = ("linear", "log")
NEGATIVES = ("training", "uniform")  # ways to sample besides a window
_CLOCK_WINDOW, _ORDERED_WINDOW = "7d", "1000s"  # in a log without a clock, a row is a second
ORDER = "order"  # the timestamp of a log without a clock
_NEXT_ITEM = "next"  # the task of logs without labels
DEFAULT_NULL_WORDS = ("NULL", "null", "NaN", "nan", "None", r"\N")
# A cast to a type of SQL, "x::numeric", has two colons.
_COLUMN = re.compile(
    r"(?:(?P<name>\w+)=(?!=))?(?P<expression>.+?)(?:(?<!:):(?P<kind>numeric|categorical|linear|log))?",
    re.DOTALL,
)
_QUOTED_NAME = re.compile(r'"(?:[^"]|"")+"')
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]")  # in a name of which files are made


@dataclasses.dataclass(frozen=True)
class Column:
    """A feature or label, and how to read it from a table.

    Attributes:
      name: What it is called in the prepared dataset.
      expression: A column's name, or an SQL expression of columns.
      is_sql: Which of the two.
      kind: "categorical"; "numeric", or "linear" or "log", which say how numbers are scaled; or ""
        to go by the type: floats are numeric.
    """

    name: str
    expression: str
    is_sql: bool
    kind: str

    @classmethod
    def parse(cls, text: str) -> Column:
        """Reads "COLUMN" or "NAME=SQL", each with a kind such as ":numeric" behind it or not.

        A name with commas, colons or equals signs stands in double quotes, as in SQL.

        Raises:
          UserError: the text is empty.
        """
        match = _COLUMN.fullmatch(text.strip())
        if match is None:
            raise UserError(f"{text!r} is no column; write COLUMN, or NAME=SQL EXPRESSION")
        name, expression, kind = match.group("name", "expression", "kind")
        if name is None and _QUOTED_NAME.fullmatch(expression):
            expression = expression[1:-1].replace('""', '"')
        return cls(name or expression, expression, name is not None, kind or "")


def split_list(text: str) -> list[str]:
    """Splits at commas that are in no quotes and no parentheses.

    Raises:
      UserError: a quote mark or a parenthesis is not closed.
    """
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote or c in "'\"":
            quote = "" if c == quote else quote or c
        else:
            depth += (c == "(") - (c == ")")
        if c == "," and not quote and not depth:
            parts.append("")
        else:
            parts[-1] += c
    if quote or depth:
        raise UserError(
            f"{text!r} has a {quote or 'parenthesis'} that is not closed; a column's name with one "
            'stands in double quotes: "the user\'s"'
        )
    return [part.strip() for part in parts]


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """A log of interactions and what to build from it.

    An id, the time, a feature or a label is the name of a column, or "NAME=SQL": an expression of
    columns in DuckDB's SQL (columns of text files are text there, e.g.
    "like=rating::DOUBLE >= 4").  ":numeric" or ":categorical" behind a feature overrides the
    type, and ":linear" or ":log" says how a number is scaled.

    Attributes:
      log: Parquet or text (CSV) files, or folders of them; all are one log.
      user_id: Column of the user, an integer or text, or SQL; likewise in `users`.
      item_id: Column of the item, an integer or text, or SQL; likewise in `items`.
      timestamp: Column of the time: a number, a date, or text of either, or SQL, e.g.
        "try_strptime(day, '%m/%d/%Y')"; or "order" for a log without a clock, whose rows stand in
        the order of time: each then counts as a second.
      time_unit: Unit of numbers: "s", "ms", "us", "ns", or "auto" to go by their size, which must
        then be a time since 1970 in 1995 to 2050.
      request_id: Column of the request that a labelled event was shown in.  Without it, events of
        a user that are at most `session_gap` seconds apart are a request.
      session_gap: Seconds; 0 joins events of one timestamp only.
      labels: Tasks, 0 or 1.  Every event with labels is a target, and one without is history only.
        With no labels, the task is to tell a user's next items from sampled ones.
      target_features: Known when an item is shown: features of the target, and of the history.
      history_features: Known only afterwards, such as an action or a watch time: features of the
        history only.  Labels are among them without being named.
      history_filter: SQL; events for which it does not hold are no history (without labels: are
        left out altogether).
      items: Files with a row per item, having the column `item_id`.
      item_features: Features of the item table.
      users: Files with a row per user, having the column `user_id`.
      user_features: Features of the user table.
      validation_start: Where requests for training end: a share of the events, such as "0.8", or a
        date, such as "2024-03-01" or "2024-03-01 06:00", in `time_zone`.
      test_start: Likewise, where requests for validation end.
      item_trends: Windows such as 1d,7d,28d,91d: for each, how often an event had the target's item
        in that time before the request, and how often with each label; and the item's age.
      trends_of: What to count so: "item", and categorical features of `item_features`.
      user_trends: Windows: for each, how many events of the history lie in that time before the
        request.
      negatives: Without labels, how items are sampled: by their popularity in a window before the
        request, such as 7d, by that in "training", or "uniform" over those seen before.  "auto" is
        7d, and 1,000 rows in a log without a clock.
      negatives_per_positive: Without labels: sampled items for each true one.
      max_positives: Without labels: true items of a request, at most.
      label_delay: After how long an event's label is known, such as 7d; until then it is no
        feature.
      time_zone: Of hours, weekdays, and dates of splits, such as Europe/Paris.
      min_count: Training events that earn a value an id of its own.
      num_oov: Ids that all other values of a feature are hashed into.
      seed: Of all random choices.
      delimiter: Between the columns of text files: one character, "tab", or "auto" to go by suffix
        and header.
      quote: Around values of text files: one character, "none", or "auto": a double quote, but none
        in files with tabs whose header has none.
      null_words: Texts that stand for a missing value, as an empty one does.
      allow_odd: Largest share of rows that may be rejected, be equal to another row, or lie within
        another row's quotes; of rows of a side table that may repeat an id; and of events of one
        user, if more than a third.
    """

    log: tuple[str, ...]
    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    time_unit: str = "auto"
    request_id: str = ""
    session_gap: int = 0
    labels: tuple[str, ...] = ()
    target_features: tuple[str, ...] = ()
    history_features: tuple[str, ...] = ()
    history_filter: str = ""
    items: tuple[str, ...] = ()
    item_features: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    user_features: tuple[str, ...] = ()
    validation_start: str = "0.8"
    test_start: str = "0.9"
    item_trends: tuple[str, ...] = ()
    trends_of: tuple[str, ...] = ("item",)
    user_trends: tuple[str, ...] = ()
    negatives: str = "auto"
    negatives_per_positive: int = 1
    max_positives: int = 16
    label_delay: str = "0s"
    time_zone: str = "UTC"
    min_count: int = 5
    num_oov: int = 16
    seed: int = 0
    delimiter: str = "auto"
    quote: str = "auto"
    null_words: tuple[str, ...] = DEFAULT_NULL_WORDS
    allow_odd: float = 0.1

    def __post_init__(self) -> None:
        """Raises UserError, naming the option, for values that cannot be meant."""
        if not self.log:
            raise UserError("log is empty; give the log's files or folders")
        if self.time_unit != "auto" and self.time_unit not in TIME_UNITS:
            raise UserError(f"time_unit is {self.time_unit!r}; use auto or one of {[*TIME_UNITS]}")
        for name, minimum in (
            ("session_gap", 0),
            ("negatives_per_positive", 1),
            ("max_positives", 1),
            ("min_count", 1),
            ("num_oov", 1),
        ):
            if getattr(self, name) < minimum:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        for name, word in (("delimiter", "tab"), ("quote", "none")):
            value = getattr(self, name)
            if value not in ("auto", word, r"\t") and not (len(value) == 1 and value.isascii()):
                raise UserError(f"{name} is {value!r}; give one ASCII character, {word}, or auto")
        if not 0 <= self.allow_odd <= 1:
            raise UserError(f"allow_odd is {self.allow_odd}; give a share from 0 to 1")
        for features, table in (("item_features", "items"), ("user_features", "users")):
            if bool(getattr(self, features)) != bool(getattr(self, table)):
                raise UserError(f"{table} and {features} need each other: give both or neither")
        if self.target_features and not self.labels:
            raise UserError(
                "target_features need labels: a sampled item has no row of the log to read "
                f"{', '.join(self.target_features)} from. Give them as history_features"
            )
        if self.request_id and not self.labels:
            raise UserError("request_id needs labels: without them requests are runs of events")
        for text in (*self.item_trends, *self.user_trends):
            parse_window(text)
        if self.negatives not in NEGATIVES:
            try:
                parse_window(self.sampling)
            except UserError:
                raise UserError(
                    f"negatives is {self.negatives!r}; give a window such as 7d, or "
                    f"{' or '.join(NEGATIVES)}"
                ) from None
        if unknown := [n for n in self.trends_of if n not in self._id_features]:
            raise UserError(
                f"trends_of has {unknown[0]!r}; give some of {', '.join(self._id_features)}"
            )
        if self.label_seconds and not self.labels:
            raise UserError("label_delay needs labels")
        self.clock  # noqa: B018 - raises for a zone that does not exist
        self._check_names()

    @property
    def clock(self) -> Clock:
        """Of hours and weekdays."""
        return Clock(self.time_zone)

    @property
    def label_seconds(self) -> int:
        """After how many seconds labels are known."""
        return 0 if self.label_delay.strip() in ("", "0", "0s") else parse_window(self.label_delay)

    @property
    def sampling(self) -> str:
        """How negatives are sampled: `negatives`, with "auto" decided."""
        recent = _ORDERED_WINDOW if self.is_ordered else _CLOCK_WINDOW
        return recent if self.negatives.strip() == "auto" else self.negatives

    @property
    def trend_windows(self) -> dict[str, int]:
        """Seconds of the items' windows, by name."""
        return {text.strip(): parse_window(text) for text in self.item_trends}

    @property
    def user_windows(self) -> dict[str, int]:
        """Seconds of the users' windows, by the feature's name."""
        return {f"user_events_{text.strip()}": parse_window(text) for text in self.user_trends}

    @property
    def _id_features(self) -> tuple[str, ...]:
        """What events can be counted by."""
        return ("item", *(c.name for c in map(Column.parse, self.item_features)))

    def _check_names(self) -> None:
        columns = self.feature_columns.values()
        made = [*self._trend_names, *self.user_windows]
        names = [*_DERIVED, *made, *(n for c in columns for n in map(_name, c))]
        repeated = {n for n in names if names.count(n) > 1}
        if repeated:
            raise UserError(
                f"features are named twice, or like one that every log gets ({', '.join(_DERIVED)})"
                f": {', '.join(sorted(repeated))}. Rename with NEW_NAME=COLUMN"
            )
        if unsafe := [n for n in names if _UNSAFE.search(n)]:
            raise UserError(
                f"{unsafe[0]!r} cannot name a feature, since files are called by it; give it "
                f"another name: NAME={quoted(unsafe[0])}"
            )

    @property
    def key_columns(self) -> dict[str, Column]:
        """Columns of an event that are no features: "user", "item", "time", "request"."""
        texts = {"user": self.user_id, "item": self.item_id, "time": self.timestamp}
        texts |= {"request": self.request_id} if self.request_id else {}
        columns = {name: _key_column(name, text) for name, text in texts.items()}
        if self.is_ordered:
            columns["time"] = Column(ORDER, ROW, True, "")
        return columns

    @property
    def is_ordered(self) -> bool:
        """Whether the log has no clock: its rows stand in the order of time."""
        return self.timestamp.strip() == ORDER

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LogConfig:
        """Rebuilds what `dataclasses.asdict` gave, lists for tuples or not."""
        fields: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in values.items()
        }
        return cls(**fields)

    @property
    def scalings(self) -> dict[str, str]:
        """How numeric features are to be scaled, where the user said it."""
        columns = (c for cs in self.feature_columns.values() for c in cs)
        return {c.name: c.kind for c in columns if c.kind in SCALINGS}

    @property
    def feature_columns(self) -> Mapping[str, tuple[Column, ...]]:
        """Columns by where they come from: "label", "target", "history", "item", "user"."""
        return {
            "label": tuple(map(Column.parse, self.labels)),
            "target": tuple(map(Column.parse, self.target_features)),
            "history": tuple(map(Column.parse, self.history_features)),
            "item": tuple(map(Column.parse, self.item_features)),
            "user": tuple(map(Column.parse, self.user_features)),
        }

    @property
    def feature_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the prepared dataset's features by level, as `Schema` has them."""
        names = {level: tuple(map(_name, cs)) for level, cs in self.feature_columns.items()}
        item = ("item", *names["item"], *names["target"])
        return {
            "history": (*item, *names["history"], *names["label"]),
            "target": (*item, "log_popularity", *self._trend_names),
            "request": (
                *(() if self.is_ordered else ("hour", "weekday")),
                *names["user"],
                *self.user_windows,
            ),
            "tasks": names["label"] or (_NEXT_ITEM,),
        }

    @property
    def _trend_names(self) -> tuple[str, ...]:
        labels = tuple(map(_name, map(Column.parse, self.labels)))
        return trend_names(self.trends_of, tuple(self.trend_windows), labels)


def _key_column(name: str, text: str) -> Column:
    """As `Column.parse`; a function of columns needs no name."""
    if re.fullmatch(r"\w+\(.*\)(::\w+)?", text.strip(), re.DOTALL):
        return Column(name, text.strip(), True, "")
    return Column.parse(text)


def _name(column: Column) -> str:
    return column.name
