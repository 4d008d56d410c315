"""The task of MLPerf Training's DLRMv4: is half of a track heard, after 4,086 events.

Command: python -m experiments.train --config=experiments/configs/dlrm_v4.py --workdir=DIR
Reaches: not measured; the data cannot be had here. MLPerf's own target, with HSTU: AUC .75.

Add --config.model.sequence=HstuConfig --config.input.rows=request for HSTU. Prepare the data first:
data/yambda/README.md.
"""

from stca_jax.evaluation.evaluator import EvaluationConfig
from stca_jax.experiment import ExperimentConfig
from stca_jax.input.length import FixedLength
from stca_jax.input.planning import InputConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.training.checkpointing import CheckpointConfig

_LENGTH = 4_086


def get_config() -> ExperimentConfig:
    """Returns the experiment."""
    return ExperimentConfig(
        dataset="yambda/dlrm_v4_50m",
        input=InputConfig(
            length=FixedLength(_LENGTH),
            row_length=5_120,
            targets_per_row=1_024,
            targets_per_chunk=1_024,
            rows_per_batch=4,
            rows="user",
        ),
        model=RankerConfig(
            sequence=StcaConfig(width=256, num_layers=3, num_heads=4, skip_paths=True),
            dtype="bfloat16",
            remat="history",
        ),
        evaluation=EvaluationConfig(
            lengths=(100, 1_024, _LENGTH), validation_length=_LENGTH, validation_targets=300_000
        ),
        checkpoint=CheckpointConfig(every_steps=2_000),
    )
