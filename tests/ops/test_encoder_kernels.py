"""The encoder's kernels against a float64 oracle: values, and gradients by finite differences."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_matches_oracle, encode
from attention_oracle import make_case as attention_case
from attention_oracle import run as run_attention
from test_attention import ragged_case
from test_kernels import ANY_KERNELS, KERNELS, SMALL, exact_products  # noqa: F401

from stca_jax.experiments.benchmarks.compiled_bytes import weights
from stca_jax.ops.attention import IMPLEMENTATIONS, AttentionOptions, history_layer
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.encoder_kernels import Unencoded
from stca_jax.ops.kernels import encode_tokens
from stca_jax.ops.pallas_mosaic_gpu import MosaicGpuKernels
from stca_jax.ops.pallas_triton import GPUS, TritonKernels


class Size(NamedTuple):
    """R rows of n tokens of width D, padded to L, and F hidden units."""

    R: int
    n: int
    L: int
    D: int
    F: int


ODD = Size(2, 37, 48, 24, 40)
PARTS = Size(1, 20, 32, 48, 16)  # columns are cut into 32 and 16
TILES = Size(2, 150, 192, 32, 64)  # several tiles of tokens, and chunks of hidden units
ONE_TOKEN = Size(1, 1, 16, 16, 16)


@functools.cache
def make_case(size, skip, dtype):
    """Weights, tokens, what is covered, and a cotangent, all of them exact in `dtype`."""
    R, n, L, D, F = size
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return np.asarray(jnp.asarray(scale * rng.normal(size=shape), dtype), np.float64)

    encoder = HistoryEncoder(
        normal(D, F, scale=D**-0.5), normal(D, F, scale=D**-0.5), normal(F, D, scale=F**-0.5),
        1 + normal(D, scale=0.25), normal(D, scale=0.25), skip,
    )  # fmt: skip
    covered = np.zeros((R, L, 1), bool)
    covered[:, : max(1, n - 5)] = True
    covered[0, :n] = True
    covered[:, 3:7] = False
    return encoder, normal(R, n, D), covered, normal(R, L, D) * covered


def objective(encoder, tokens, covered, cotangent):
    """Sum of the encoded tokens times the cotangent, by token."""
    n = tokens.shape[1]
    used = np.where(covered[:, :n], tokens, 0.0)
    return np.where(covered[:, :n], encode(encoder, used) * cotangent[:, :n], 0).sum(-1)


def some_derivatives(case, leaf, rng):
    """Coordinates of a weight, and the derivatives of the objective there."""
    encoder, tokens, covered, cotangent = case
    step, leaves = 1e-5, jax.tree.leaves(encoder)
    at = [rng.integers(0, size, 24) for size in leaves[leaf].shape]
    found = []
    for coordinate in zip(*at, strict=True):
        sides = []
        for sign in (1, -1):
            moved = [w.copy() for w in leaves]
            moved[leaf][coordinate] += sign * step
            moved = jax.tree.unflatten(jax.tree.structure(encoder), moved)
            sides.append(objective(moved, tokens, covered, cotangent).sum())
        found.append((sides[0] - sides[1]) / (2 * step))
    return tuple(at), np.array(found)


def token_derivatives(case):
    """Of every token: each has a part of the objective of its own."""
    encoder, tokens, covered, cotangent = case
    step, found = 1e-5, np.zeros_like(tokens)
    for d in range(tokens.shape[-1]):
        change = step * (np.arange(tokens.shape[-1]) == d)
        above, below = (
            objective(encoder, tokens + sign * change, covered, cotangent) for sign in (1, -1)
        )
        found[..., d] = (above - below) / (2 * step)
    return found


def assert_close(actual, expected, tolerance, name):
    actual = np.asarray(actual, np.float64)
    scale = np.abs(expected).max(initial=1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=name)


def run(kernels, case, dtype):
    """Encoded tokens and gradients; what is not covered is NaN, and so is its cotangent."""
    encoder, tokens, covered, cotangent = case
    if isinstance(kernels, str):
        kernels = IMPLEMENTATIONS[kernels].here()
    tokens = np.where(covered[:, : tokens.shape[1]], tokens, np.nan)
    cotangent = np.where(covered, cotangent, np.nan)
    encoder = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), encoder)
    tokens, cotangent = (jnp.asarray(x, dtype) for x in (tokens, cotangent))

    @jax.jit
    def step(encoder, tokens, covered, cotangent):
        forward = lambda *x: encode_tokens(kernels, Unencoded(*x, covered))  # noqa: E731
        encoded, gradients = jax.vjp(forward, encoder, tokens)
        return encoded, *gradients(cotangent)

    return step(encoder, tokens, jnp.asarray(covered), cotangent)


@pytest.mark.parametrize(
    ("size", "skip", "dtype"),
    [
        pytest.param(ODD, False, "float32", id="odd"),
        pytest.param(ODD, True, "bfloat16", id="odd_skip_bfloat16"),
        pytest.param(PARTS, True, "float32", id="parts_skip"),
        pytest.param(TILES, True, "float32", id="tiles_skip"),
        pytest.param(TILES, False, "bfloat16", id="tiles_bfloat16"),
        pytest.param(ONE_TOKEN, True, "float32", id="one_token_skip"),
    ],
)
@ANY_KERNELS
def test_values_and_gradients(kernels, size, skip, dtype):
    case = encoder, tokens, covered, _ = make_case(size, skip, dtype)
    tolerance = 0.02 if dtype == "bfloat16" else 1e-5
    encoded, d_encoder, d_tokens = run(kernels, case, dtype)
    assert encoded.dtype == d_tokens.dtype == dtype
    assert np.all(np.isfinite(encoded))
    here = covered[:, : size.n]
    expected = np.where(here, encode(encoder, np.where(here, tokens, 0)), 0)
    assert_close(np.where(here, encoded[:, : size.n], 0), expected, tolerance, "encoded")
    assert_close(d_tokens, token_derivatives(case), tolerance, "d_tokens")
    assert np.all(np.asarray(d_tokens)[~np.broadcast_to(here, tokens.shape)] == 0)
    rng = np.random.default_rng(1)
    for leaf, name in enumerate(("up", "gate", "out", "scale", "bias")):
        at, derivatives = some_derivatives(case, leaf, rng)
        gradient = np.asarray(getattr(d_encoder, name))
        assert gradient.dtype == np.float32
        assert_close(gradient[at], derivatives, tolerance, name)


def test_shares_of_the_tokens():
    """Four programs have six tiles of each chunk of hidden units: one has none."""
    gpu = dataclasses.replace(GPUS["8.0"], multiprocessors=8)
    case = make_case(Size(2, 90, 96, 16, 32), True, "float32")
    shared = run(TritonKernels(gpu, interpret=True), case, "float32")
    each = run(KERNELS["triton"], case, "float32")
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(each), strict=True):
        assert_close(a, np.asarray(b, np.float64), 1e-5, "shares")


@ANY_KERNELS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_encoded_where_they_are_read(kernels, dtype):
    """With one target tile to a row; most tiles of the second row are in no range.

    Triton encodes 32 tokens at a time here, where a history tile is of 16.
    """
    case = attention_case(
        [[0, 17, 270], [5, 40, 40]], [[300, 290, 271], [60, 41, 40]], 310, D=40, fused=True,
        skip=True,
    )  # fmt: skip
    options = {"implementation": kernels, "order": "absorbed", "block_sizes": SMALL}
    tolerance = 2e-5 if dtype == "float32" else 0.03
    assert_matches_oracle(case, dtype=jnp.dtype(dtype), tolerance=tolerance, **options)
    problem = jax.tree.map(lambda x: jnp.asarray(x, dtype), case.problem)

    def scored(query, tokens, encoder):
        weights = problem.w_key, problem.w_value, case.ranges
        return history_layer(query, tokens, encoder, *weights, options=AttentionOptions(**options))

    arguments = problem.query, problem.tokens, problem.encoder
    output, log_sum_exp = jax.jit(scored)(*arguments)  # which keeps no encoded tokens
    trained, _ = run_attention(case, jnp.dtype(dtype), **options)
    np.testing.assert_array_equal(output, trained.output)
    np.testing.assert_array_equal(log_sum_exp, trained.log_sum_exp)
    if not isinstance(kernels, str):
        traced = str(jax.make_jaxpr(scored)(*arguments))
        assert "history_layer_forward" in traced
        assert "history_encoder_forward" not in traced


def test_wide_tokens_are_encoded_by_xla():
    """In front of the kernels of the attention."""
    case = ragged_case(D=264, fused=True, skip=True)
    widest = {"mosaic_tpu": 256, "triton": 256, "mosaic_gpu": 128}
    for name, kernels in KERNELS.items():
        assert kernels.can_encode(weights(widest[name]), jnp.bfloat16)
        assert not kernels.can_encode(weights(256), jnp.float16)
        assert not kernels.can_encode(weights(512), jnp.float32)
        assert not dataclasses.replace(kernels, encodes=False).can_encode(weights(64), jnp.float32)
    assert not KERNELS["triton"].can_encode(weights(264), jnp.float32)
    assert not KERNELS["mosaic_gpu"].can_encode(weights(136), jnp.bfloat16)
    assert not MosaicGpuKernels().can_encode(weights(64), jnp.float32)  # interpreted only
    assert_matches_oracle(case, implementation=KERNELS["triton"], block_sizes=SMALL)
