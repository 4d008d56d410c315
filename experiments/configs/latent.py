"""Similarity in a latent space of 64 dimensions, which neither counts nor narrow models reach.

Command: python -m experiments.train --config=experiments/configs/latent.py --workdir=DIR
Not trained yet. AUC of the truth .815, of counting .683, over 150 users (28,352 targets
of all splits), on one core of an AMD EPYC server (AVX-512), 2026-11-28. What a model has learned:
python -m experiments.diagnose --workdir=DIR
"""

from stca_jax.evaluation.evaluator import EvaluationConfig
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.length import BetaLength
from stca_jax.input.planning import InputConfig


def get_config() -> ExperimentConfig:
    """Returns the experiment."""
    return ExperimentConfig(
        dataset="synthetic_interests/latent",
        input=InputConfig(
            length=BetaLength(minimum=8, maximum=1_024, average=512, alpha=0.25),
            row_length=2_048,
            targets_per_row=512,
            targets_per_chunk=256,
            rows_per_batch=1,
            rows="user",
        ),
        evaluation=EvaluationConfig(lengths=(64, 256, 1_024), validation_length=1_024),
    )
