"""What the modules of the comparison on Complete Journey share: the main job.

Command: python -m experiments.compare --config=experiments/configs/compare.py --workdir=DIR
    --steps=655
Reaches: docs/rivals.md
Measured: a core of an AMD EPYC server (AVX-512), 2026-11-29

655 steps of STCA are the main job's epoch. Fewer requests and lengths are evaluated than there.
"""

import dataclasses

from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments.configs import complete_journey


def get_config() -> ExperimentConfig:
    """Returns what the modules share."""
    main_job = complete_journey.get_config()
    return dataclasses.replace(
        main_job,
        evaluation=dataclasses.replace(
            main_job.evaluation, lengths=(50, 200, 1_000, 4_000), max_requests=1_000
        ),
    )
