"""What the points of the length study on synthetic_interests share: histories of 10,240 events.

Command: python -m experiments.length_study --workdir=DIR --points=length
    --config=experiments/configs/length_study_synthetic.py
Reaches: AUC .842 at 10,240 events with full windows, .690 at 256; the true function has .877 and
.711, logistic regression .851 and .699. 8 to 15 minutes of training a run on one core
of an Intel Xeon 2.5 GHz server (AVX-512), 2026-11-27.
"""

from stca_jax.evaluation.evaluator import EvaluationConfig
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.length import BetaLength
from stca_jax.input.planning import InputConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.training.checkpointing import CheckpointConfig
from stca_jax.training.train_step import TrainingConfig


def get_config() -> ExperimentConfig:
    """Returns what the points share."""
    return ExperimentConfig(
        dataset="synthetic_interests/default",
        input=InputConfig(
            length=BetaLength(minimum=8, maximum=10_240, average=2_048, alpha=0.25),
            row_length=12_288,
            targets_per_row=1_024,
            targets_per_chunk=512,
            rows_per_batch=1,
            rows="user",
        ),
        # Without the number of a user's events, which version 1.0.0 of the dataset did not have.
        model=RankerConfig(features=("category",)),
        training=TrainingConfig(num_epochs=3, log_every_steps=20),
        evaluation=EvaluationConfig(
            lengths=(256, 512, 1_024, 2_048, 5_120, 10_240),
            validation_length=10_240,
            validation_requests=1_500,
        ),
        checkpoint=CheckpointConfig(every_steps=5_000, keep_last=1),
    )
