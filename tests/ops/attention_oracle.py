"""float64 NumPy oracle of the op, one target at a time, and directional derivatives of it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stca_jax.ops.attention import AttentionOptions, history_layer, target_to_history_attention
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ranges import Ranges


class Problem(NamedTuple):
    """Inputs of the op; `encoder` and `history_score` may be None."""

    query: Any
    tokens: Any
    encoder: Any
    w_key: Any
    w_value: Any
    history_score: Any


class Case(NamedTuple):
    """A problem, its ranges, and the cotangents of output and log-sum-exp."""

    problem: Problem
    start: np.ndarray
    end: np.ndarray
    d_output: np.ndarray
    d_log_sum_exp: np.ndarray

    @property
    def ranges(self) -> Ranges:
        return Ranges(self.start, self.end)


def make_case(
    start: Any, end: Any, L: int, *, H: int = 2, K: int = 4, D: int = 8, fused: bool = False,
    skip: bool = False, score: bool = False, logit_scale: float = 1.0, seed: int = 0,
    garbage: float = np.nan,
) -> Case:  # fmt: skip
    """Random inputs for the given ranges, with `garbage` in every token that no range covers."""
    rng = np.random.default_rng(seed)
    start, end = np.asarray(start, np.int32), np.asarray(end, np.int32)
    R, M = start.shape

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    encoder = None
    if fused:
        F = 2 * D
        up, gate = (normal(D, F) / np.sqrt(D) for _ in range(2))
        scale, bias = 1 + 0.1 * normal(D), 0.1 * normal(D)
        encoder = HistoryEncoder(up, gate, normal(F, D) / np.sqrt(F), scale, bias, skip)
    tokens = normal(R, L, D)
    history_score = normal(R, L, H) if score else None
    for r in range(R):
        covered = np.zeros(L, bool)
        for s, e in zip(start[r], end[r], strict=True):
            covered[s:e] = True
        tokens[r, ~covered] = garbage
        if history_score is not None:
            history_score[r, ~covered] = garbage
    w_key, w_value = (normal(D, H, K) / np.sqrt(D) for _ in range(2))
    problem = Problem(
        logit_scale * normal(R, M, H, K), tokens, encoder, w_key, w_value, history_score
    )
    return Case(problem, start, end, normal(R, M, H, K), normal(R, M, H))


def oracle(case: Case, problem: Problem | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp in float64."""
    p = problem or case.problem
    R, M, H, K = p.query.shape
    output, log_sum_exp = np.zeros((R, M, H, K)), np.full((R, M, H), -np.inf)
    for r, m in np.ndindex(R, M):
        window = slice(case.start[r, m], case.end[r, m])
        x = np.asarray(p.tokens[r, window], np.float64)
        if not len(x):
            continue
        if p.encoder is not None:
            x = encode(p.encoder, x)
        for h in range(H):
            score = (x @ p.w_key[:, h]) @ p.query[r, m, h] / np.sqrt(K)
            if p.history_score is not None:
                score = score + p.history_score[r, window, h]
            weight = np.exp(score - score.max())
            log_sum_exp[r, m, h] = np.log(weight.sum()) + score.max()
            output[r, m, h] = weight / weight.sum() @ (x @ p.w_value[:, h])
    return output, log_sum_exp


def encode(encoder: HistoryEncoder, x: np.ndarray) -> np.ndarray:
    gate = x @ encoder.gate
    y = (x @ encoder.up * gate / (1 + np.exp(-gate))) @ encoder.out
    y = y + x if encoder.skip else y
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    return y * encoder.scale + encoder.bias


def objective(case: Case, problem: Problem | None = None) -> float:
    """The scalar whose gradients are compared: both outputs against their cotangents."""
    output, log_sum_exp = oracle(case, problem)
    finite = np.where(np.isfinite(log_sum_exp), log_sum_exp, 0)
    return float((output * case.d_output).sum() + (finite * case.d_log_sum_exp).sum())


def run(case: Case, dtype: Any = jnp.float32, **options: Any):
    """The op's outputs and the gradients of `objective`."""
    problem = jax.tree.map(lambda x: jnp.asarray(x, dtype), case.problem)
    found = _run(case._replace(problem=problem), options=tuple(options.items()))
    return jax.tree.map(np.asarray, found)


@functools.partial(jax.jit, static_argnames="options")
def _run(case: Case, options: tuple[tuple[str, Any], ...]):
    def loss(p: Problem):
        shared: Any = {
            "history_score": p.history_score, "options": AttentionOptions(**dict(options))
        }  # fmt: skip
        weights = (p.w_key, p.w_value, case.ranges)
        if p.encoder is None:
            out = target_to_history_attention(p.query, p.tokens, *weights, **shared)
        else:
            out = history_layer(p.query, p.tokens, p.encoder, *weights, **shared)
        counts = jnp.where(jnp.isfinite(out.log_sum_exp), out.log_sum_exp, 0)
        total = (out.output.astype(jnp.float32) * case.d_output).sum()
        return total + (counts * case.d_log_sum_exp).sum(), out

    gradients, out = jax.grad(loss, has_aux=True)(case.problem)
    return out, gradients


def assert_matches_oracle(case: Case, *, dtype: Any = jnp.float32, tolerance: float = 2e-5,
                          **options: Any) -> None:  # fmt: skip
    """Values against `oracle`, gradients against its directional derivatives.

    `tolerance` is relative to the largest magnitude of each array.
    """
    rounded = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, dtype), np.float64), case.problem)
    case = case._replace(problem=rounded)
    out, gradients = run(case, dtype, **options)
    output, log_sum_exp = oracle(case)
    _assert_close(out.output, output, tolerance, "output")
    nonempty = case.end > case.start
    assert np.all(out.log_sum_exp[~nonempty] == -np.inf)
    assert np.all(out.output[~nonempty] == 0)
    _assert_close(out.log_sum_exp[nonempty], log_sum_exp[nonempty], tolerance, "log_sum_exp")
    leaves, _ = jax.tree_util.tree_flatten_with_path(case.problem)
    rng = np.random.default_rng(1)
    for i, ((path, value), gradient) in enumerate(
        zip(leaves, jax.tree.leaves(gradients), strict=True)
    ):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(gradient)), name
        assert np.all(np.asarray(gradient)[~np.isfinite(value)] == 0), name
        for _ in range(2):
            direction = np.where(np.isfinite(value), rng.normal(size=value.shape), 0)
            expected = _directional_derivative(case, i, direction)
            actual = float((np.asarray(gradient, np.float64) * direction).sum())
            size = np.linalg.norm(gradient) + 1e-3
            assert abs(actual - expected) <= 20 * tolerance * size, (name, actual, expected)


def _directional_derivative(case: Case, index: int, direction: np.ndarray) -> float:
    leaves, treedef = jax.tree.flatten(case.problem)
    step = 1e-5

    def at(sign: int) -> float:
        moved = list(leaves)
        moved[index] = leaves[index] + sign * step * direction
        return objective(case, jax.tree.unflatten(treedef, moved))

    return (at(1) - at(-1)) / (2 * step)


def _assert_close(actual: Any, expected: np.ndarray, tolerance: float, name: str) -> None:
    scale = np.abs(expected).max(initial=1e-3)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance * scale, err_msg=name
    )


def random_ranges(rng: np.random.Generator, R: int, M: int, L: int) -> tuple[np.ndarray, ...]:
    """Disjoint, nested, empty, single-token and full ranges, in no order."""
    start = rng.integers(0, L + 1, (R, M))
    end = np.minimum(L, start + rng.integers(0, L + 1, (R, M)) * rng.integers(0, 2, (R, M)))
    kind = rng.integers(0, 6, (R, M))
    start = np.where(kind <= 1, 0, start)  # nested prefixes
    end = np.where(kind == 2, start, end)  # empty
    single = kind == 3
    start = np.where(single, np.minimum(start, L - 1), start)
    end = np.where(single, start + 1, end)
    return start, np.maximum(start, end)
