"""UniRank's protocol on KuaiRand (arXiv 2607.19987), in its budget, with its histories of 100.

Command: python -m experiments.train --config=experiments/configs/unirank.py --workdir=DIR
Reaches: not measured; the data cannot be had here. Published results: docs/rivals.md.

Three layers, d = 256, embeddings of 16, one epoch over all impressions, 8,192 targets a step, AdamW
at 1e-4, Adagrad at .05 for the tables, no decay. unirank_1024.py and unirank_10000.py read longer
histories of the same targets. Prepare the data first: data/kuairand/README.md.
"""

from stca_jax.evaluation.evaluator import EvaluationConfig
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.length import FixedLength
from stca_jax.input.planning import InputConfig
from stca_jax.models.embedding import EmbeddingConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.training.checkpointing import CheckpointConfig
from stca_jax.training.optimizer import OptimizerConfig
from stca_jax.training.train_step import TrainingConfig

_TARGETS = 1_024  # of a row


def get_config() -> ExperimentConfig:
    """Returns the experiment."""
    return of_length(100)


def of_length(length: int) -> ExperimentConfig:
    """The experiment with histories of that many events.

    Every impression is a target, so that a row of one user's has a token for each target, and the
    window of the first.
    """
    return ExperimentConfig(
        dataset="kuairand/unirank",
        input=InputConfig(
            length=FixedLength(length),
            row_length=-(-(length + _TARGETS) // 128) * 128,
            targets_per_row=_TARGETS,
            targets_per_chunk=_TARGETS,
            rows_per_batch=8,
            rows="user",
        ),
        model=RankerConfig(
            sequence=StcaConfig(width=256, num_layers=3, num_heads=4, skip_paths=True),
            embedding=EmbeddingConfig(item_width=16, feature_width=16, linear_path=True),
            dtype="bfloat16",
            remat="history",
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, table_learning_rate=0.05, warmup_steps=0, final_fraction=1.0
        ),
        training=TrainingConfig(num_epochs=1),
        evaluation=EvaluationConfig(
            lengths=(length,), validation_length=length, validation_targets=1_000_000
        ),
        checkpoint=CheckpointConfig(every_steps=4_000),
    )
