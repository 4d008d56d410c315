"""What the points of the length study on Complete Journey share.

Command: python -m experiments.length_study --config=experiments/configs/length_study.py
    --workdir=DIR
Reaches: AUC .832 at 4,000 events with full windows, .818 with windows of 256; the rest is in
docs/length.md. One core of an Intel Xeon 2.5 GHz server (AVX-512), 2026-11-27, version 1.0.0 of the
dataset, whose negatives followed popularity in training.

A point is a quarter of an epoch over the requests after at least 500 events, about the same number
of targets for all: small enough for dozens of them. For a whole epoch add
--config.training.max_steps=none.
"""

import dataclasses

from stca_jax.experiment import ExperimentConfig
from stca_jax.experiments.configs import complete_journey
from stca_jax.training.checkpointing import CheckpointConfig
from stca_jax.training.train_step import TrainingConfig


def get_config() -> ExperimentConfig:
    """Returns what the points share."""
    main_job = complete_journey.get_config()
    return dataclasses.replace(
        main_job,
        input=dataclasses.replace(main_job.input, targets_per_row=768, min_history=500),
        optimizer=dataclasses.replace(main_job.optimizer, warmup_steps=30),
        training=TrainingConfig(max_steps=150, log_every_steps=10),
        evaluation=dataclasses.replace(
            main_job.evaluation,
            lengths=(50, 200, 500, 1_000, 2_000, 4_000),
            max_requests=2_000,
            validation_length=4_000,
            validation_requests=1_500,
        ),
        checkpoint=CheckpointConfig(every_steps=1_000, keep_last=1),
    )
