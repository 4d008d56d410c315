"""Trains one model at many training lengths and seeds, and scores each at every length.

python -m stca_jax.experiments.length_study --config=experiments/configs/length_study.py
    --workdir=DIR [--seeds=3] [--points=length] [--config.NAME=VALUE ...] [--data_dir=DIR]

The config is what all points share. Its `input.length` is a `BetaLength`, whose maximum is the full
length; a point replaces a few values, by the names that --config.NAME takes. --points names points
(see `stca_jax.length_study.points`) or parts of the study:

    length     fixed at 1/16 of the full length, at 1/5 and at all of it, uniform, and Beta with an
               average of 1/5 of the full length and alpha 0.02, 0.1, 0.25 and 1
    robustness fixed at 1/2, and at 1/16 with options against losses beyond the trained length, one
               at a time
    model      alpha 0.25 with the recency score, without additions of ours, without features but
               the item, and with Adam for the tables, one at a time
    window     the most recent, a random and the oldest window, each request with its own tokens
    request    each request with its own tokens, as in the paper: full and stochastic windows, and
               time since the event as a token feature against the recency score
    capacity   half, once and twice the width, each at the three fixed lengths

Each point is an ordinary run in WORKDIR/POINT/seed-K, made by the ordinary trainer. The trainer
scores it on the validation split, which settings are chosen on; the ordinary evaluation scores its
last checkpoint on the test split at every length. Seeds are the outer loop, so that a study that is
stopped has whole seeds. After each run these files of WORKDIR are written anew:

    results.csv    a row per point, seed, split and length, and the references' rows
    summary.csv    a row per point: quality over seeds, cost, and the share of the full gain kept
    capacity.csv   a power law of log loss in width and training length, with standard errors
    *.png          figures, with bars of one standard deviation over seeds

Kill it at any time: the same command goes on, also with more seeds or points.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence

from absl import flags

from stca_jax import config as config_lib
from stca_jax.data.preparation import prepare
from stca_jax.errors import UserError
from stca_jax.evaluation.report.drawing import draw
from stca_jax.evaluation.tables import Row, format_table, write_table
from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments import launch
from stca_jax.experiments.reference_rows import reference_rows
from stca_jax.experiments.study_runs import check_evaluation, score, scored_config
from stca_jax.files import read_json_lines
from stca_jax.input.dataset import RequestDataset
from stca_jax.length_study.figures import charts
from stca_jax.length_study.points import Point, choose_points, make_points
from stca_jax.length_study.power_law import capacity_law
from stca_jax.length_study.results import (
    COLUMNS,
    COSTS,
    is_scored,
    result_rows,
    summary_rows,
)
from stca_jax.trainer import train
from stca_jax.workdir import check_workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the study.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each point.", 1)
_POINTS = flags.DEFINE_list("points", ["length"], "Names of points or of their parts.")
_log = logging.getLogger(__name__)


def main() -> int:
    """Runs what is missing."""
    base = launch.load_config()
    workdir = launch.local_path("workdir", _WORKDIR.value)
    dataset = RequestDataset(prepare(base.dataset, launch.DATA_DIR.value))
    if len(dataset.schema.tasks) > 1:
        raise UserError(
            f"the study compares one task, and {base.dataset} has "
            f"{', '.join(dataset.schema.tasks)}: prepare it with one label"
        )
    points = make_points(base)
    chosen = choose_points(points, _POINTS.value)
    check_evaluation(workdir, base)
    references = workdir / "references.jsonl"
    if not references.exists():
        with launch.working("Scoring the references"):
            write_table(references, reference_rows(base, dataset, "test"))
    for seed in range(_SEEDS.value):
        for point in chosen:
            overrides = {**point.overrides, "seed": seed, "input.seed": seed}
            config = config_lib.apply_overrides(base, overrides)
            directory = workdir / point.name / f"seed-{seed}"
            check_workdir(directory, config)
            if is_scored(directory):
                continue
            _log.info("point %s, seed %d", point.name, seed)
            result = train(config, dataset, directory)
            if result.signal is not None:
                _log.warning("stopped by %s; the same command goes on", result.signal.name)
                return 128 + result.signal
            score(scored_config(config, base), dataset, directory, result.step)
            write_results(points, base, dataset, workdir)
    print(format_table(write_results(points, base, dataset, workdir)))
    print(f"results are in {workdir}: results.csv, summary.csv, figures")
    return 0


def write_results(
    points: Sequence[Point], base: ExperimentConfig, dataset: RequestDataset, workdir: pathlib.Path
) -> list[Row]:
    """Writes tables and figures of the runs that are finished, and returns the summary."""
    rows = result_rows(points, workdir)
    references = read_json_lines(workdir / "references.jsonl")
    named = [{"point": row["model"], "split": "test", **row} for row in references]
    columns = ("point", "seed", *COLUMNS, *COSTS)
    write_table(
        workdir / "results.csv", [{n: row.get(n) for n in columns} for row in [*rows, *named]]
    )
    summary = summary_rows(points, rows, base, dataset)
    write_table(workdir / "summary.csv", summary)
    law = capacity_law(points, rows, base)
    if law is not None:
        write_table(workdir / "capacity.csv", [law._asdict()])
    for chart in charts(points, rows, summary, references):
        draw(chart).savefig(workdir / f"{chart.name}.png", dpi=160, facecolor="white")
    return summary


if __name__ == "__main__":
    launch.run(
        main, takes_config=True, when_interrupted="finished runs are kept; the same command goes on"
    )
