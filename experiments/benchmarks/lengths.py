"""How many events training requests read, by planning an epoch: no record is read.

python -m stca_jax.experiments.benchmarks.lengths --config=experiments/configs/complete_journey.py
    [--config.NAME=VALUE ...] [--data_dir=DIR]

Mean and quartiles over the requests of the first epoch: what the length sampler draws, what they
would read if each drew for itself (less where a user has fewer events), and what they do read.
"""

from __future__ import annotations

import numpy as np

from stca_jax.data.preparation import prepare
from stca_jax.evaluation.tables import format_table
from stca_jax.experiments import launch
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.planning import Planner

_QUANTILES = 1_024


def main() -> None:
    """Prints the table."""
    config = launch.load_config()
    dataset = RequestDataset(prepare(config.dataset, launch.DATA_DIR.value))
    planner = Planner(dataset.index, config.input)
    units = planner.units(0)
    drawn = config.input.length.lengths((np.arange(_QUANTILES) + 0.5) / _QUANTILES)
    history_end = planner.index.history_end
    alone = np.minimum(np.random.default_rng(0).choice(drawn, len(history_end)), history_end)
    # A request split into pieces counts once for each.
    read = units.piece_stop - units.piece_start
    rows = [
        {"events": name, "mean": values.mean().round(1)}
        | {f"p{q}": int(np.percentile(values, q)) for q in (25, 50, 75)}
        for name, values in {"drawn": drawn, "alone": alone, "read": read}.items()
    ]
    print(format_table(rows))


if __name__ == "__main__":
    launch.run(main, takes_config=True)
