"""The recommended config: sizes that follow the histories, and a file that makes it again."""

import dataclasses

import numpy as np
import pytest

from stca_jax.config_source import python_source
from stca_jax.errors import UserError
from stca_jax.experiments.configs import complete_journey, tiny, topics
from stca_jax.input.length import UniformLength
from stca_jax.input.pipeline import count_steps, epoch_fill
from stca_jax.recommended import LONGEST, recommended_config


@pytest.mark.parametrize("module", [tiny, topics, complete_journey])
def test_a_written_config_makes_an_equal_one(module):
    config = module.get_config()
    namespace = {}
    exec(python_source(config, "Text."), namespace)
    assert namespace["__doc__"] == "Text."
    assert namespace["get_config"]() == config


def test_sizes_follow_the_histories(tiny_dataset):
    config = recommended_config(tiny_dataset, "synthetic_interests/tiny")
    longest = config.input.length.longest
    covered = (tiny_dataset.index.history_end <= longest).mean()
    assert covered >= 0.99
    assert (tiny_dataset.index.history_end <= longest - 8).mean() < 0.99
    assert config.evaluation.validation_length == config.evaluation.lengths[-1] == longest
    assert isinstance(config.input.length, UniformLength)  # none is long here
    fill = epoch_fill(tiny_dataset, config.input).metrics()
    assert min(fill.values()) > 0.5  # what one of the two leaves empty is paid for
    steps = count_steps(tiny_dataset, config.input, 1)
    assert config.training.num_epochs == 10  # a small log is read as often as is allowed
    assert config.optimizer.warmup_steps <= steps * config.training.num_epochs // 5
    assert config.evaluation.patience * config.checkpoint.every_steps < steps * 10


class _Indexed:
    """A dataset of which only the index is looked at."""

    def __init__(self, dataset, **changes):
        self.index = dataclasses.replace(dataset.index, **changes)
        self.schema, self.fingerprint = dataset.schema, dataset.fingerprint


def test_windows_are_never_longer_than_the_longest(tiny_dataset):
    longer = _Indexed(tiny_dataset, history_end=tiny_dataset.index.history_end + np.int32(50_000))
    assert recommended_config(longer, "mine").input.length.longest == LONGEST


def test_a_log_without_training_requests_is_refused(tiny_dataset):
    index = tiny_dataset.index
    tests_only = _Indexed(tiny_dataset, split=np.full_like(index.split, 2))
    with pytest.raises(UserError, match="mine has no training request"):
        recommended_config(tests_only, "mine")
