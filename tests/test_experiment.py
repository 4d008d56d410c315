"""Configs that cannot work are refused before anything is trained."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from stca_jax import config as config_lib
from stca_jax.batch import empty_batch
from stca_jax.evaluation.evaluator import EvaluationConfig
from stca_jax.experiment import experiment_program
from stca_jax.experiments.configs import tiny
from stca_jax.models.ranker import Ranker
from stca_jax.trainer import train


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "acu"}, "'acu', which is no metric; it must be one of auc, gauc_user"),
        ({"metric": "log_loss"}, "a smaller log_loss is better: set larger_is_better=false"),
        ({"min_history": -1}, "min_history is -1; it must be at least 0"),
        ({"max_requests": 0}, "max_requests is 0; it must be at least 1"),
        ({"validation_requests": 0}, "validation_requests is 0; it must be at least 1"),
        ({"validation_length": 0}, "validation_length is 0; it must be at least 1"),
        ({"lengths": ()}, "give at least one"),
        ({"lengths": (50, 0)}, "each at least 1"),
    ],
)
def test_evaluation_that_cannot_work_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**values)


@pytest.mark.parametrize(("seed", "weighting"), [(0, "target"), (7, "request")])
def test_program_has_the_seed_and_the_weighting_of_the_config(tiny_dataset, seed, weighting):
    config = config_lib.apply_overrides(
        tiny.get_config(), {"seed": seed, "training.loss_weighting": weighting}
    )
    program = experiment_program(config, tiny_dataset.schema, num_steps=9)
    expected = Ranker(config.model, program._stored, rngs=nnx.Rngs(seed))
    for a, b in zip(
        jax.tree.leaves(nnx.state(program.new_ranker())), jax.tree.leaves(nnx.state(expected)),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(a, b)
    loss, *others = program.losses
    assert not others
    batch = empty_batch(tiny_dataset.schema, 1, 4, 3, shared_history=True).replace(
        target_mask=np.array([[True, True, True]]), num_request_targets=np.array([[1, 2, 2]])
    )
    assert float(loss.total_weight(batch)) == {"target": 3, "request": 2}[weighting]


def test_metrics_of_either_direction_can_choose_the_best():
    EvaluationConfig(metric="log_loss", larger_is_better=False)
    EvaluationConfig(metric="gauc_user")


# Every class that can stand somewhere, so that all their fields are met.
VARIANTS = [
    {},
    {"input.length": "BetaLength", "input.length.minimum": "8", "input.length.maximum": "256",
     "input.length.average": "64", "input.length.alpha": "1", "model.sequence": "DinConfig",
     "wandb": "WandbConfig",
     "wandb.project": "p"},
    {"input.length": "FixedLength", "model.sequence": "TransformerConfig",
     "training.max_gradient_norm": "9", "optimizer.base_width": "8"},
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_is_no_value_of_any_number(variant):
    config = config_lib.apply_overrides(tiny.get_config(), variant)
    numbers = [
        path
        for path, value in config_lib.flatten(config).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    assert len(numbers) > 40
    for path in numbers:
        for nan in ("nan", math.nan):
            with pytest.raises(config_lib.ConfigError, match=f"config.{path}: .*nan"):
                config_lib.apply_overrides(config, variant | {path: nan})


def test_nan_within_a_tuple_or_a_saved_config_is_refused():
    with pytest.raises(config_lib.ConfigError, match=r"input.length.curriculum.0.0: nan"):
        config_lib.apply_overrides(
            tiny.get_config(), VARIANTS[1] | {"input.length.curriculum": "(nan,16),(1,64)"}
        )
    saved = config_lib.to_dict(tiny.get_config())
    saved["optimizer"]["learning_rate"] = math.nan
    with pytest.raises(config_lib.ConfigError, match=r"optimizer.learning_rate: nan"):
        config_lib.from_dict(type(tiny.get_config()), saved)


def test_a_config_made_in_python_is_checked_before_the_workdir_is_made(tmp_path):
    with pytest.raises(config_lib.ConfigError, match=r"config.seed: expected int, got nan"):
        train(dataclasses.replace(tiny.get_config(), seed=math.nan), None, tmp_path / "run")
    assert not (tmp_path / "run").exists()
