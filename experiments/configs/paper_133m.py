"""The paper's largest tier: 133 M dense parameters, histories of 10,000 events, 100 M items.

Compiled and planned only: no data set of this size is public.
Command: python -m experiments.plan --config=experiments/configs/paper_133m.py --topology=v5e:2x4
    --config.input.rows_per_batch=8
Planned: 8.7 of 16 GiB on v5e:2x4, 8.6 of 32 GiB on v6e:2x4 and 9.5 of 80 GiB on h100:8 with 8
rows; 3.7 of 95 GiB on v5p:4x4x4 with training.accumulate_steps=4; 2.3 of 16 GiB on v5e:16x16.
Compiling took 5 to 15 minutes each on one core of an Intel Xeon server (AVX-512), 2026-11-27,
beside other jobs.

Width, layers and heads are those of SequenceO1's production model (arXiv 2609.08443): N = 4,
h = 16, d = 1024, r = 2.  One row a device of v5e:16x16; elsewhere change input.rows_per_batch or
training.accumulate_steps.
"""

import dataclasses

from stca_jax.experiment import ExperimentConfig
from stca_jax.input.length import BetaLength
from stca_jax.input.planning import InputConfig
from stca_jax.models.embedding import EmbeddingConfig
from stca_jax.models.ranker import RankerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.schema import Schema


def get_schema() -> Schema:
    """What such a data set would contain."""
    return Schema(
        history=("item", "author", "category", "tag", "duration", "action", "surface"),
        target=("item", "author", "category", "tag", "duration", "popularity"),
        request=("country", "hour", "device"),
        vocabularies={
            "item": 100_000_000,
            "author": 10_000_000,
            "category": 10_000,
            "tag": 100_000,
            "duration": 64,
            "action": 16,
            "surface": 64,
            "country": 256,
            "hour": 24,
            "device": 1_024,
        },
        tasks=("finish", "like"),
    )


def get_config() -> ExperimentConfig:
    """Returns the experiment."""
    return ExperimentConfig(
        dataset="planned_only",
        input=InputConfig(
            length=BetaLength(minimum=8, maximum=10_000, average=2_000, alpha=0.05),
            row_length=10_240,
            targets_per_row=128,
            rows_per_batch=256,
        ),
        model=RankerConfig(
            sequence=StcaConfig(
                width=1_024,
                num_layers=4,
                num_heads=16,
                initialization="independent",
                count_channel=False,
            ),
            embedding=EmbeddingConfig(
                item_width=128, feature_width=64, time_delta=True, recency_index=True
            ),
            match_channel=False,
            dtype="bfloat16",
        ),
    )


def two_layers(width: int) -> ExperimentConfig:
    """A smaller tier: 2 layers and 8 heads of that width, and fewer rows a batch."""
    large = get_config()
    assert isinstance(large.model.sequence, StcaConfig)
    sequence = dataclasses.replace(large.model.sequence, width=width, num_layers=2, num_heads=8)
    return dataclasses.replace(
        large,
        input=dataclasses.replace(large.input, rows_per_batch=32),
        model=dataclasses.replace(
            large.model,
            sequence=sequence,
            embedding=dataclasses.replace(large.model.embedding, feature_width=32),
        ),
    )
