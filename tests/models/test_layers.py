"""SwiGLU, LayerNorm and Linear against the oracle, and rows in chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from tiny_ranker import compile_fast, random_params, with_params

from stca_jax.models.layers import LayerNorm, Linear, SwiGLU, in_chunks

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


def weighed_products(weight, rows):
    """Two arrays become one, row by row."""
    wide, narrow = rows
    return jnp.tanh(wide @ weight) * narrow


@pytest.mark.parametrize("shape", [(2, 450), (1, 100), (0, 7)])
def test_chunks_equal_the_whole(shape):
    """Values and gradients, of rows that are no multiple of a chunk, of few, and of none."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    rows = [jnp.asarray(rng.normal(size=(*shape, n)), jnp.float32) for n in (6, 4)]

    def loss(function):
        return lambda *inputs: jnp.square(function(*inputs)).sum()

    def chunked(weight, rows):
        return in_chunks(functools.partial(weighed_products, weight), rows)

    assert chunked(weight, rows).shape == (*shape, 4)
    found, expected = (
        jax.tree.leaves(jax.value_and_grad(loss(f), (0, 1))(weight, rows))
        for f in (chunked, weighed_products)
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_chunks_store_no_hidden_layer_of_all_rows():
    rows, hidden = 4_096, 512

    def layer(x):
        return jnp.tanh(x @ jnp.ones((8, hidden))) @ jnp.ones((hidden, 1))

    def temporary_bytes(function):
        compiled = jax.jit(jax.grad(lambda x: function(x).sum())).lower(jnp.ones((rows, 8)))
        return compiled.compile().memory_analysis().temp_size_in_bytes

    all_hidden = 4 * rows * hidden
    assert temporary_bytes(lambda x: in_chunks(layer, x)) < all_hidden / 3 < temporary_bytes(layer)
