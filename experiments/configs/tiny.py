"""The whole way in seconds: a small synthetic dataset and a small model.

Command: python -m experiments.train --config=experiments/configs/tiny.py --workdir=DIR
"""

from stca_jax.evaluation.evaluator import EvaluationConfig
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.length import FixedLength
from stca_jax.input.planning import InputConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.training.checkpointing import CheckpointConfig
from stca_jax.training.train_step import TrainingConfig


def get_config() -> ExperimentConfig:
    """Returns the experiment."""
    return ExperimentConfig(
        dataset="synthetic_interests/tiny",
        input=InputConfig(
            length=FixedLength(128),
            row_length=256,
            targets_per_row=128,
            rows_per_batch=8,
            rows="user",
        ),
        model=RankerConfig(sequence=StcaConfig(width=16, num_layers=2, num_heads=2)),
        training=TrainingConfig(num_epochs=8, log_every_steps=5),
        checkpoint=CheckpointConfig(every_steps=20),
        evaluation=EvaluationConfig(lengths=(16, 64, 256), validation_length=256),
    )
