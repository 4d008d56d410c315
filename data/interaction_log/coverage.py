"""How much of what a log says reaches the model: ids of their own, numbers, and side tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stca_jax.data.interaction_log.encoders import fit_scale
from stca_jax.data.interaction_log.events import LogSource, read_side_table
from stca_jax.data.interaction_log.moments import Moments
from stca_jax.data.interaction_log.statistics import ValueCounts
from stca_jax.errors import UserError

_UNREADABLE = 0.1  # share of the values of a numeric feature that may be no numbers
_FEW = 0.9  # share of ids that side tables should have


def check_features(source: LogSource, counts: ValueCounts) -> list[tuple[str, str]]:
    """Checks that something is left of the log's own features, in training events.

    Returns:
      Lines of the profile.

    Raises:
      UserError: no value of a feature has an id of its own, or many are no numbers.
    """
    lines = []
    num_train = int(pc.sum(counts.columns["item"]["count"]).as_py() or 0)
    for column, table in counts.columns.items():
        name, count = column.removeprefix("feature_"), table["count"].to_numpy()
        own = count[count >= source.config.min_count]
        if not len(own) and count.sum():
            raise UserError(
                f"{name}: none of {len(count):,} values occurs {source.config.min_count} times in "
                f"training (min_count), so that none has an id of its own; the most frequent "
                f"occurs {count.max():,} times. Give --min_count=1, or leave {name} out"
            )
        missing = 1 - count.sum() / max(num_train, 1)
        lines.append((
            f"  {name}",
            f"{len(own):,} of {len(count):,} values have ids of their own, in "
            f"{own.sum() / max(num_train, 1):.1%} of training events; missing in {missing:.1%}",
        ))  # fmt: skip
    scalings = source.config.scalings
    for column, moments in counts.moments.items():
        name = column.removeprefix("feature_")
        lines.append(_check_numbers(name, moments, scalings.get(name, "")))
    return lines


def check_side_tables(
    source: LogSource, counts: ValueCounts
) -> tuple[list[tuple[str, str]], list[str]]:
    """Checks that the item and user tables have the log's ids.

    Returns:
      Lines of the profile, and warnings.

    Raises:
      UserError: a table has none of them.
    """
    lines, warnings = [], []
    items = counts.columns["item"]["value"].combine_chunks()
    for what, ids in (("items", items), ("users", counts.users)):
        if getattr(source, what) is None or not len(ids):
            continue
        table = read_side_table(source, what)["id"].combine_chunks()
        has = np.asarray(pc.is_in(ids, table))
        found = (
            f"{has.sum():,} of {len(ids):,} {what} of the log are in the table ({has.mean():.1%})"
        )
        lines.append((f"table of {what}", found))
        if has.mean() >= _FEW:
            continue
        option = f"{what[:-1]}_id"
        column = getattr(source.config, option)
        text = (
            f"{found}: the log has {_examples(ids.filter(pa.array(~has)))}, {what} has "
            f"{_examples(table)}. SQL can make them equal (it reads both): "
            f"--{option}=\"{what[:-1]}=ltrim(trim({column}::VARCHAR), 'P0')\""
        )
        if not has.any():
            raise UserError(text)
        warnings.append(text)
    return lines, warnings


def _check_numbers(name: str, moments: Moments, scaling: str) -> tuple[str, str]:
    present = moments.count + moments.unreadable
    share = moments.unreadable / max(present, 1)
    if share > _UNREADABLE:
        raise UserError(
            f"{name}: {moments.unreadable:,} of {present:,} values in training ({share:.1%}) are "
            f'no numbers within float32. Mend them by SQL, such as "{name}=TRY_CAST(regexp_replace('
            f"COLUMN, '[^0-9.eE+-]', '', 'g') AS DOUBLE)\", or give {name}:categorical"
        )
    if not moments.count:
        raise UserError(f"{name}: no training event has a value; leave {name} out")
    entries = present + moments.missing
    scale = fit_scale(moments, scaling)
    return f"  {name}", (
        f"min {moments.least:g}, p50 {moments.quantile(0.5):g}, p99 {moments.quantile(0.99):g}, "
        f"max {moments.most:g}, mean {moments.mean:g}, scaled {scale.describe()}; missing in "
        f"{moments.missing / entries:.1%}, unreadable in {moments.unreadable / entries:.1%}"
    )


def _examples(ids: pa.Array) -> str:
    return ", ".join(repr(i) for i in ids[:3].to_pylist()) or "none"
