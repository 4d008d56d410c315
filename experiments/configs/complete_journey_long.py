"""Next purchase on Complete Journey, with more passes and longer windows."""

import dataclasses

from experiments.configs import complete_journey
from stca_jax.experiment import ExperimentConfig, TrainingConfig
from stca_jax.input.length import BetaLength


def get_config() -> ExperimentConfig:
    """Returns the experiment."""
    short = complete_journey.get_config()
    return dataclasses.replace(
        short,
        input=dataclasses.replace(
            short.input, length=BetaLength(minimum=8, maximum=4096, average=1024, alpha=0.25)
        ),
        training=TrainingConfig(num_epochs=2),
    )
