"""Rankers small enough to compare with the oracle, each compiled once for all tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from strategies import SCHEMA

from stca_jax.batch import RequestBatch
from stca_jax.models.embedding import EmbeddingConfig
from stca_jax.models.ranker import Ranker, RankerConfig, paper_config
from stca_jax.models.rankmixer import RankMixerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.training.loss import binary_cross_entropy

Params = dict[Any, Any]

_SEQUENCE = StcaConfig(width=8, num_layers=2, num_heads=2)
_EMBEDDING = EmbeddingConfig(feature_width=3)
# "shared" and "exclusive" are everything a model may use on either kind of rows.
CONFIGS = {
    "paper": dataclasses.replace(
        paper_config(_SEQUENCE),
        embedding=dataclasses.replace(_EMBEDDING, time_delta=True, recency_index=True),
    ),
    "shared": RankerConfig(
        sequence=dataclasses.replace(
            _SEQUENCE,
            skip_paths=True,
            recency_score=True,
            temperature_length=3,
            attention_sink=True,
        ),
        embedding=dataclasses.replace(_EMBEDDING, item_width=5, linear_path=True),
        backbone=RankMixerConfig(num_blocks=1),
        match_time_scales_days=(1.0, 28.0),
        match_soft_counts=True,
    ),
    "exclusive": RankerConfig(
        sequence=dataclasses.replace(_SEQUENCE, recency_score=True),
        embedding=dataclasses.replace(
            _EMBEDDING, time_delta=True, recency_index=True, linear_path=True
        ),
        match_soft_counts=True,
    ),
}
CONFIGS["few_features"] = dataclasses.replace(
    CONFIGS["shared"], features=("price", "segment"), sequence=_SEQUENCE
)
CONFIGS["bfloat16"] = dataclasses.replace(CONFIGS["shared"], dtype="bfloat16")


def random_params(module: nnx.Module, seed: int = 0) -> Params:
    """Random values for every parameter, so that no initial 0 or 1 hides a mistake.

    Args:
      module: May be abstract: drawing in NumPy takes no time to compile.
      seed: Of the generator.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: Any) -> np.ndarray:
        name = path[-1].key
        fan_in = leaf.shape[-2] if leaf.ndim > 1 and name != "rows" else 1
        fan_in = leaf.shape[0] if name.startswith("w_") else fan_in
        scale = {"recency_rate": 0.02}.get(name, fan_in**-0.5)
        value = scale * rng.normal(size=leaf.shape)
        return (1 + 0.3 * value if name == "scale" else value).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def with_params(module: nnx.Module, params: Params) -> Any:
    """The module, which may be abstract, with values for its parameters."""
    graphdef, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def compile_fast(function: Callable, **options: Any) -> Callable:
    """`jax.jit` in half the compile time; the little that tests then run is slower."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


class Evaluation(NamedTuple):
    """Loss, logits and, from `backward`, the loss's gradients."""

    loss: jax.Array
    logits: jax.Array
    grads: Params | None = None


class TinyRanker:
    """A ranker with random parameters and its compiled functions.

    `forward` builds the module where it runs; `backward` merges it from its graph and state, as the
    trainer does.  NNX orders the entries of the two differently: both must agree with the oracle.
    """

    def __init__(self, config: RankerConfig):
        self.config = config
        self.module = nnx.eval_shape(self._build)
        self.params = random_params(self.module)
        self._forward = compile_fast(self._loss_of_built)
        self._backward = compile_fast(jax.value_and_grad(self._loss_of_merged, has_aux=True))

    def _build(self) -> Ranker:
        return Ranker(self.config, SCHEMA, rngs=nnx.Rngs(0))

    def _loss_of_built(self, params: Params, batch: RequestBatch) -> tuple[jax.Array, jax.Array]:
        module = self._build()
        nnx.update(module, params)
        logits = module(batch)
        return binary_cross_entropy(logits, batch), logits

    def _loss_of_merged(self, params: Params, batch: RequestBatch) -> tuple[jax.Array, jax.Array]:
        logits = with_params(self.module, params)(batch)
        return binary_cross_entropy(logits, batch), logits

    def forward(self, batch: RequestBatch) -> Evaluation:
        return Evaluation(*self._forward(self.params, batch))

    def backward(self, batch: RequestBatch) -> Evaluation:
        (loss, logits), grads = self._backward(self.params, batch)
        return Evaluation(loss, logits, grads)

    @property
    def params64(self) -> Params:
        """The parameters for the oracle."""
        return jax.tree.map(lambda p: p.astype(np.float64), self.params)


@functools.cache
def tiny_ranker(name: str) -> TinyRanker:
    """The ranker of `CONFIGS[name]`."""
    return TinyRanker(CONFIGS[name])
