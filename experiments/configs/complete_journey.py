"""Next purchase on the 84.51 degrees Complete Journey grocery data: the README's main job.

Command: python -m experiments.train --config=experiments/configs/complete_journey.py --workdir=DIR
Reaches: test AUC .843 at 4,000 events, .713 at 50 (python -m experiments.evaluate --workdir=DIR)
Measured: mean of seeds 0, 1, 2, a minute and a half each, a core of an AMD EPYC server (AVX-512),
2026-11-29, version 2.0.0 of the dataset; what each option is for: docs/similarity.md

One row a batch: for a mesh of several devices, raise input.rows_per_batch.
"""

import dataclasses

from stca_jax.evaluation.evaluator import EvaluationConfig
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.length import BetaLength
from stca_jax.input.planning import InputConfig
from stca_jax.models.ranker import similarity_config
from stca_jax.training.checkpointing import CheckpointConfig
from stca_jax.training.optimizer import OptimizerConfig
from stca_jax.training.train_step import TrainingConfig


def get_config() -> ExperimentConfig:
    """Returns the experiment."""
    model = similarity_config()
    return ExperimentConfig(
        dataset="complete_journey/next_purchase",
        input=InputConfig(
            length=BetaLength(minimum=8, maximum=4096, average=768, alpha=0.25),
            row_length=4608,
            targets_per_row=2304,
            targets_per_chunk=256,
            rows_per_batch=1,
            rows="user",
        ),
        model=dataclasses.replace(
            model, embedding=dataclasses.replace(model.embedding, cooccurrence_share=0.85)
        ),
        optimizer=OptimizerConfig(learning_rate=0.005, table_learning_rate=0.01),
        training=TrainingConfig(ema_decay=0.98),
        evaluation=EvaluationConfig(min_history=1_000, max_requests=5_000),
        checkpoint=CheckpointConfig(every_steps=300),
    )
