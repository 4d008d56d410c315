"""The paper's tier of 6 M dense parameters; its data are those of paper_133m.

Compiled and planned only: no data set of this size is public.
Command: python -m experiments.plan --config=experiments/configs/paper_6m.py --topology=v5e:2x4
Planned: 7.2 of 16 GiB on v5e:2x4, of which tables take 6.1; compiling took about a
minute on 2 cores of an AMD EPYC server (AVX2), 2026-11-25.

The paper gives the size alone; N = 2, h = 8, d = 256 is our reading of its ablation, which starts
from 2 layers and 8 heads.
"""

from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments.configs.paper_133m import get_schema as get_schema
from stca_jax.experiments.configs.paper_133m import two_layers


def get_config() -> ExperimentConfig:
    """Returns the experiment."""
    return two_layers(width=256)
