"""What the modules of the comparison on Complete Journey share.

Command: python -m experiments.compare --config=experiments/configs/compare.py --workdir=DIR
    --steps=150
Reaches: docs/rivals.md
Measured: a core of an AMD EPYC server (AVX-512), 2026-11-29

The main job's data, features, windows and evaluation, over requests with at least 500 earlier
events. A budget of 150 steps is about a quarter of an epoch.
"""

import dataclasses

from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments.configs import length_study


def get_config() -> ExperimentConfig:
    """Returns what the modules share."""
    base = length_study.get_config()
    return dataclasses.replace(
        base,
        evaluation=dataclasses.replace(
            base.evaluation, lengths=(50, 200, 1_000, 4_000), max_requests=1_000
        ),
    )
