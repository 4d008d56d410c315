"""SwiGLU, LayerNorm and Linear against the oracle."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from tiny_ranker import compile_fast, random_params, with_params

from stca_jax.models.layers import LayerNorm, Linear, SwiGLU

LAYERS = {
    "linear": (lambda: Linear(6, 4, rngs=nnx.Rngs(0)), oracle.linear),
    "biased": (lambda: Linear(6, 4, rngs=nnx.Rngs(0), use_bias=True), oracle.linear),
    "swiglu": (lambda: SwiGLU(6, 10, 4, rngs=nnx.Rngs(0)), oracle.swiglu),
    "layer_norm": (lambda: LayerNorm(6, rngs=nnx.Rngs(0)), oracle.layer_norm),
}


def apply(build, x):
    """The layer with random parameters, and its output."""
    module = nnx.eval_shape(build)
    params = random_params(module)

    @compile_fast
    def run(params, x):
        return with_params(module, params)(x)

    return params, run(params, x)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_oracle(name):
    build, expected = LAYERS[name]
    x = 3 * np.random.default_rng(0).normal(size=(2, 5, 6))
    params, found = apply(build, x.astype(np.float32))
    np.testing.assert_allclose(found, expected(params, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_computes_in_the_dtype_of_its_input(name):
    _, found = apply(LAYERS[name][0], jnp.ones((3, 6), jnp.bfloat16))
    assert found.dtype == jnp.bfloat16


def test_layer_norm_statistics_are_float32():
    """Entries of 256 and 258 are exact in bfloat16; their mean and squares are not."""
    x = 256 + 2.0 * np.array([[0, 1, 0, 1, 1, 0]])
    params, found = apply(LAYERS["layer_norm"][0], jnp.asarray(x, jnp.bfloat16))
    expected = oracle.layer_norm(params, x)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0.01, atol=0.01)
