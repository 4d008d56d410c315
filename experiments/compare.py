"""Trains sequence modules to the same budget, and compares quality, cost and latency.

python -m stca_jax.experiments.compare --config=experiments/configs/compare.py --workdir=DIR
    (--steps=N | --minutes=N | --flops=N) [--modules=stca,hstu,my_package.module:MyConfig]
    [--variants=full,plain] [--seeds=3] [--rate_factors=0.4,1,2.5] [--search=NAME=VALUE,VALUE ...]
    [--search_share=0.25] [--config.NAME=VALUE ...] [--data_dir=DIR]

The config is what all share: data, features, sizes, evaluation. Each of --modules replaces its
sequence module, "stca" by the config's own; a module of one's own is named by import path. "full"
is the config as it is, "plain" without match channel, skip paths and tables that start from
co-occurrence, so that no module is beaten by an addition that it was refused. An ablation is
--modules=stca with the variants no_match_channel, no_soft_counts and no_time_scales (of the match
channel: exact counts alone; the item's statistics alone), no_skip_paths, no_cooccurrence,
linear_path (it has them as well), and paper, the published equations. Models of events that
interact or depend on the request train on rows of a request's own tokens.

The budget is of one training: --steps of the first module, of whose targets each then reads as
many; --minutes of training steps, at the speed measured before; or --flops of matrix products.
Before its seeds, each entry is trained with --search_share of the budget at every combination of
--rate_factors, which multiply both learning rates, and --search; the best on validation is taken.
If a whole training ends below its search and another's, its settings diverge, and the next best are
taken. Seeds are the outer loop. These files of WORKDIR are written anew after each run:

    results.csv      a row per entry, seed, split and length, and the references' rows
    summary.csv      a row per entry: quality in full, what was spent, tokens/s of training, memory,
                     latency of a request of 1, 100 and 1,000 targets, parameters, settings chosen
    search.csv       a row per entry and setting tried, its validation, and if it diverged later
    comparison.html  the tables, and quality against length, training time and latency; also as PNG

Kill it at any time: the same command goes on, also with more seeds or modules.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from stca_jax import config as config_lib
from stca_jax.comparison.costs import Budget, Costs, measure
from stca_jax.comparison.entries import MODULES, VARIANTS, Entry, make_entries, make_settings
from stca_jax.comparison.results import charts, summary_rows, write_page, write_tables
from stca_jax.data.preparation import prepare
from stca_jax.errors import UserError
from stca_jax.evaluation.report.runs import load_run
from stca_jax.evaluation.tables import Row, format_table, write_table
from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments import launch
from stca_jax.experiments.reference_rows import reference_rows
from stca_jax.experiments.study_runs import check_evaluation, score, scored_config
from stca_jax.files import read_json_lines, write_json
from stca_jax.input.dataset import RequestDataset
from stca_jax.length_study.points import Point
from stca_jax.length_study.results import is_scored, result_rows
from stca_jax.trainer import TrainingResult, train
from stca_jax.workdir import check_workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the comparison.", required=True)
_MODULES = flags.DEFINE_list(
    "modules",
    [name for name in MODULES if name != "sequence_o1"],  # it is for histories beyond 10,000
    "Sequence modules, by name or import path.",
)
_VARIANTS = flags.DEFINE_list(
    "variants", ["full", "plain"], f"Of each module: {', '.join(VARIANTS)}."
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each entry.", 1)
_STEPS = flags.DEFINE_integer("steps", None, "Budget: steps of the first module.")
_MINUTES = flags.DEFINE_float("minutes", None, "Budget: minutes of training steps.")
_FLOPS = flags.DEFINE_float("flops", None, "Budget: FLOPs of matrix products.")
_RATE_FACTORS = flags.DEFINE_list(
    "rate_factors", ["0.4", "1", "2.5"], "Multiples of the learning rates that are searched."
)
_SEARCH = flags.DEFINE_multi_string(
    "search", [], "NAME=VALUE,VALUE: a further value of the config that is searched."
)
_SEARCH_SHARE = flags.DEFINE_float("search_share", 0.25, "Budget of a search run.", 0, 1)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """What the functions below share."""

    base: ExperimentConfig
    dataset: RequestDataset
    workdir: pathlib.Path
    entries: Sequence[Entry]
    costs: Mapping[str, Costs]
    budget: Budget

    def steps(self, entry: Entry, share: float = 1) -> int:
        """Steps of a run."""
        first = self.costs[self.entries[0].name]
        return max(1, round(share * self.budget.steps_of(self.costs[entry.name], first)))


def main() -> int:
    """Runs what is missing."""
    base = launch.load_config()
    workdir = launch.local_path("workdir", _WORKDIR.value)
    budget = Budget(_STEPS.value, _MINUTES.value, _FLOPS.value)
    dataset = RequestDataset(prepare(base.dataset, launch.DATA_DIR.value))
    if len(dataset.schema.tasks) > 1:
        raise UserError(
            f"the comparison is of one task, and {base.dataset} has "
            f"{', '.join(dataset.schema.tasks)}: prepare it with one label"
        )
    entries = make_entries(base, _MODULES.value, _VARIANTS.value)
    check_evaluation(workdir, base)
    references = workdir / "references.jsonl"
    if not references.exists():
        with launch.working("Scoring the references"):
            write_table(references, reference_rows(base, dataset, "test"))
    costs = {entry.name: measured_costs(entry, dataset, workdir) for entry in entries}
    comparison = _Comparison(base, dataset, workdir, entries, costs, budget)
    settings: dict[str, dict[str, Any]] = {}
    for seed in range(_SEEDS.value):
        for entry in entries:
            interrupted = run_seeds(comparison, entry, settings, seed + 1)
            if interrupted is not None:
                return stopped(interrupted)
            summary = write_results(comparison)
    print(format_table(summary))
    print(f"results are in {workdir}: results.csv, summary.csv, search.csv, comparison.html")
    return 0


def stopped(result: TrainingResult) -> int:
    """Says that a signal came, and returns the exit status."""
    assert result.signal is not None
    _log.warning("stopped by %s; the same command goes on", result.signal.name)
    return 128 + result.signal


def measured_costs(entry: Entry, dataset: RequestDataset, workdir: pathlib.Path) -> Costs:
    """Measures an entry once; budgets and tables go by what was measured then."""
    path = workdir / entry.name / "costs.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with launch.working(f"Measuring {entry.name}"):
            write_json(path, dataclasses.asdict(measure(entry.config, dataset)))
    return Costs(**json.loads(path.read_text()))


def run_config(
    comparison: _Comparison, entry: Entry, overrides: Mapping[str, Any], steps: int, seed: int
) -> ExperimentConfig:
    """The config of one run; it is checkpointed and scored at its end."""
    return config_lib.apply_overrides(
        entry.config,
        {**overrides, "seed": seed, "input.seed": seed, "training.max_steps": steps,
         "training.num_epochs": 1_000, "checkpoint.every_steps": max(steps, 1_000)},
    )  # fmt: skip


def run_seeds(
    comparison: _Comparison, entry: Entry, settings: dict[str, dict[str, Any]], num_seeds: int
) -> TrainingResult | None:
    """Runs what is missing of an entry's first seeds; how a training ended that was interrupted.

    Args:
      comparison: What is compared.
      entry: Of it.
      settings: Chosen for each entry; filled in.
      num_seeds: How many seeds; all again where settings turn out to diverge.
    """
    while True:
        if entry.name not in settings:
            chosen = searched_settings(comparison, entry)
            if isinstance(chosen, TrainingResult):
                return chosen
            settings[entry.name] = chosen
        for seed in range(num_seeds):
            result = run_entry(comparison, entry, settings[entry.name], seed)
            if result is not None and result.signal is not None:
                return result
        if len(settings_to_try(entry)) == 1 or not set_diverged_aside(comparison, entry):
            return None
        del settings[entry.name]


def set_diverged_aside(comparison: _Comparison, entry: Entry) -> bool:
    """Whether a seed ended below its settings' own search and another's; if so, moves them all."""
    search = comparison.workdir / entry.name / "search.jsonl"
    evaluation = comparison.base.evaluation
    sign = 1 if evaluation.larger_is_better else -1
    rows = [row for row in read_json_lines(search) if not row["diverged"]]
    reached = {row["settings"]: sign * row[evaluation.metric] for row in rows}
    (chosen,) = (row["settings"] for row in rows if row["chosen"])
    own = reached.pop(chosen)
    seeds = sorted(search.parent.glob("seed-*"))
    # One that an earlier launch was interrupted in has no validation yet.
    ended = [validation(seed)[evaluation.metric] for seed in seeds if is_scored(seed)]
    worst = min(sign * value for value in ended)
    if not reached or worst >= min(own, max(reached.values())):
        return False
    _log.warning(
        "%s diverges with %s: its %s ends at %.4g, and was %.4g after a share of the budget; the "
        "next best settings are taken",
        entry.name, chosen, evaluation.metric, sign * worst, sign * own,
    )  # fmt: skip
    aside = diverged_folder(comparison, entry, chosen)
    moving = aside.with_name(f"{aside.name}.moving")  # a kill leaves that, and seeds are run again
    shutil.rmtree(moving, ignore_errors=True)
    moving.mkdir(parents=True)
    for seed in seeds:
        seed.rename(moving / seed.name)
    moving.rename(aside)
    return True


def diverged_folder(comparison: _Comparison, entry: Entry, settings: str) -> pathlib.Path:
    """Where runs of settings lie that diverged."""
    return comparison.workdir / entry.name / "diverged" / folder_name(settings)


def folder_name(settings: str) -> str:
    """Of runs with settings as `described`."""
    return re.sub("[^A-Za-z0-9._]+", "-", settings)


def validation(directory: pathlib.Path) -> Row:
    """The validation at the end of a run."""
    return [r for r in load_run(directory, "").rows if r["split"] == "validation"][-1]


def settings_to_try(entry: Entry) -> list[dict[str, Any]]:
    """What the launch asks for; if it is one alone, there is no search."""
    search = dict(text.split("=", 1) for text in _SEARCH.value)
    return make_settings(
        entry.config,
        [float(factor) for factor in _RATE_FACTORS.value],
        {name: values.split(",") for name, values in search.items()},
    )


def searched_settings(comparison: _Comparison, entry: Entry) -> dict[str, Any] | TrainingResult:
    """The best settings that have not diverged; how a training ended that was interrupted."""
    tried = settings_to_try(entry)
    if len(tried) == 1:
        return tried[0]
    steps = comparison.steps(entry, _SEARCH_SHARE.value)
    rows = []
    for overrides in tried:
        name = described(overrides)
        directory = comparison.workdir / entry.name / "search" / folder_name(name)
        result = train(
            run_config(comparison, entry, overrides, steps, 0), comparison.dataset, directory
        )
        if result.signal is not None:
            return result
        metric = comparison.base.evaluation.metric
        rows.append(
            {"entry": entry.name, "settings": name, "steps": steps,
             metric: validation(directory)[metric],
             "diverged": diverged_folder(comparison, entry, name).exists()}
        )  # fmt: skip
    sign = 1 if comparison.base.evaluation.larger_is_better else -1
    left = [k for k, row in enumerate(rows) if not row["diverged"]]
    best = max(left, key=lambda k: sign * rows[k][metric])
    for k, row in enumerate(rows):
        row["chosen"] = k == best
    write_table(comparison.workdir / entry.name / "search.jsonl", rows)
    return tried[best]


def described(overrides: Mapping[str, Any]) -> str:
    """Settings by the last parts of their names."""
    return ", ".join(
        f"{name.rpartition('.')[2]} {value:.3g}" if isinstance(value, float)
        else f"{name.rpartition('.')[2]} {value}"
        for name, value in overrides.items()
    )  # fmt: skip


def run_entry(
    comparison: _Comparison, entry: Entry, overrides: Mapping[str, Any], seed: int
) -> TrainingResult | None:
    """Trains and scores one seed; None if that is done already."""
    config = run_config(comparison, entry, overrides, comparison.steps(entry), seed)
    directory = comparison.workdir / entry.name / f"seed-{seed}"
    check_workdir(directory, config)
    if is_scored(directory):
        return None
    _log.info("%s, seed %d", entry.name, seed)
    result = train(config, comparison.dataset, directory)
    if result.signal is None:
        score(scored_config(config, comparison.base), comparison.dataset, directory, result.step)
    return result


def write_results(comparison: _Comparison) -> list[Row]:
    """Writes tables, figures and page of the runs that are finished, and returns the summary."""
    workdir, entries = comparison.workdir, comparison.entries
    points = [Point(entry.name, (), {}) for entry in entries]
    rows = result_rows(points, workdir)
    references = read_json_lines(workdir / "references.jsonl")
    searched = [
        row for entry in entries
        if (path := workdir / entry.name / "search.jsonl").exists() for row in read_json_lines(path)
    ]  # fmt: skip
    metric = comparison.base.evaluation.metric
    summary = summary_rows(entries, rows, comparison.costs, searched, metric)
    named = [{"point": row["model"], "split": "test", **row} for row in references]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    tables = [{name: row.get(name) for name in columns} for row in [*rows, *named]]
    write_tables(workdir, tables, summary, searched)
    write_page(
        workdir,
        comparison.base.dataset,
        charts(entries, rows, summary, references),
        {"Summary, at the longest history": summary, "Search on validation": searched},
    )
    return summary


if __name__ == "__main__":
    launch.run(
        main, takes_config=True, when_interrupted="finished runs are kept; the same command goes on"
    )
