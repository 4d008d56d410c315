"""Scores a file of requests by an exported model.

    python -m stca_jax.experiments.predict --model=DIR --requests=FILE.parquet --output=FILE.parquet
        [--histories=FILE.sqlite] [--encoded]

A row of --requests is a request: `user`, `time` (Unix seconds), a list for each target feature, a
value for each request feature and, unless --histories has the users' events, `history_time` and a
list for each history feature, `history_NAME`. Values are raw, as in the log; with --encoded, ids
and numbers as trained.

The output has the same rows in the same order: `user`, `time` and, for each task, a list with the
probability of each target. It is written whole or not at all, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from stca_jax.errors import UserError
from stca_jax.experiments import launch
from stca_jax.files import replacing
from stca_jax.serving import Events, Scorer, ServingModel, SqliteHistories
from stca_jax.serving.threads import compute_with_one_thread

_MODEL = flags.DEFINE_string("model", None, "Folder that experiments.export wrote.", required=True)
_REQUESTS = flags.DEFINE_string("requests", None, "Parquet file of requests.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Parquet file to write.", required=True)
_HISTORIES = flags.DEFINE_string("histories", None, "SQLite file with the users' events.")
_ENCODED = flags.DEFINE_bool("encoded", False, "Values are ids and numbers as trained.")
_ROWS = 256  # read at once
_HISTORY = "history_"


def main() -> None:
    """Scores every row."""
    compute_with_one_thread()
    histories = SqliteHistories(_HISTORIES.value) if _HISTORIES.value else None
    model = ServingModel.load(_MODEL.value)
    scorer = Scorer(model, histories, encoded=_ENCODED.value or None)
    requests = pq.ParquetFile(_REQUESTS.value)
    check_columns(scorer, requests.schema_arrow, has_store=histories is not None)
    tasks = model.info.schema.tasks
    user_type = requests.schema_arrow.field("user").type
    schema = pa.schema(
        [("user", user_type), ("time", pa.int64()), *((t, pa.list_(pa.float32())) for t in tasks)]
    )
    count = 0
    output = launch.local_path("output", _OUTPUT.value)
    with (
        launch.working("Scoring"),
        replacing(output) as file,
        pq.ParquetWriter(file, schema) as writer,
    ):
        for rows in requests.iter_batches(_ROWS):
            scored = [score_row(scorer, count + k, row) for k, row in enumerate(_rows(rows))]
            count += len(scored)
            columns = {name: [row[name] for row in scored] for name in schema.names}
            writer.write_table(pa.table(columns, schema))
    print(f"{count:,} requests are scored in {output}")


def check_columns(scorer: Scorer, found: pa.Schema, *, has_store: bool) -> None:
    """Raises UserError if the file lacks a column, naming it."""
    needed = ["user", "time", scorer.model.info.schema.item]
    if not has_store:
        needed += ["history_time", _HISTORY + scorer.model.info.schema.item]
    for name in needed:
        if name not in found.names:
            raise UserError(
                f"--requests={_REQUESTS.value} has no column {name!r}; it has "
                f"{', '.join(found.names)}"
            )


def score_row(scorer: Scorer, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the output.

    Args:
      scorer: Of the model.
      number: Of the row, for messages.
      row: Of the input.

    Raises:
      UserError: the request does not fit the model; names row, feature and value.
    """
    levels = scorer.model.info.levels
    targets = {n: row[n] for n in levels["target"].names if row.get(n) is not None}
    request = {n: row[n] for n in levels["request"].names if n in row}
    try:
        if row.get("history_time") is None:
            found = scorer.score(str(row["user"]), targets, request, row["time"])
        else:
            names = levels["history"].names
            columns = {n: row[_HISTORY + n] for n in names if _HISTORY + n in row}
            history = Events(np.asarray(row["history_time"], np.int64), columns)
            found = scorer.score_once(history, targets, request, row["time"], user=str(row["user"]))
    except UserError as error:
        raise UserError(f"row {number} of --requests={_REQUESTS.value}: {error}") from error
    return {"user": row["user"], "time": row["time"], **found}


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    return iter(batch.to_pylist())


if __name__ == "__main__":
    launch.run(main)
