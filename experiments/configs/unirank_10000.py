"""UniRank's protocol on KuaiRand with histories of 10,000 events.

Command: python -m experiments.train --config=experiments/configs/unirank_10000.py --workdir=DIR
Reaches: not measured; the data cannot be had here. Only the length differs from unirank.py.
"""

from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments.configs import unirank


def get_config() -> ExperimentConfig:
    """Returns the experiment."""
    return unirank.of_length(10_000)
