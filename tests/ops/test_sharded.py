"""Rows and histories split over eight CPU devices: same results, and no history crosses devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import own_process
import pytest

from stca_jax.ranges import Ranges

DEVICES = 8


def inputs(fused: bool):
    from attention_oracle import make_case, random_ranges

    start, end = random_ranges(np.random.default_rng(0), 4, 6, 64)
    case = make_case(start, end, 64, fused=fused, score=True)
    problem = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case.problem)
    return problem, jnp.asarray(start), jnp.asarray(end), case


def step(fused: bool, order: str, case):
    from stca_jax.ops.attention import AttentionOptions, history_layer, target_to_history_attention
    from stca_jax.ops.tiles import BlockSizes

    options = AttentionOptions(order, block_sizes=BlockSizes(16, 8, 4))

    def loss(p, start, end):
        weights = (p.w_key, p.w_value, Ranges(start, end))
        shared = {"history_score": p.history_score, "options": options}
        if fused:
            out = history_layer(p.query, p.tokens, p.encoder, *weights, **shared)
        else:
            out = target_to_history_attention(p.query, p.tokens, *weights, **shared)
        counts = jnp.where(jnp.isfinite(out.log_sum_exp), out.log_sum_exp, 0)
        return (out.output * case.d_output).sum() + (counts * case.d_log_sum_exp).sum(), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def place(mesh, problem, start, end):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    rows, tokens = NamedSharding(mesh, P("data")), NamedSharding(mesh, P("data", "sequence"))
    whole = NamedSharding(mesh, P())
    placed = jax.tree.map(lambda x: jax.device_put(x, whole), problem)
    placed = placed._replace(
        query=jax.device_put(problem.query, rows),
        tokens=jax.device_put(problem.tokens, tokens),
        history_score=jax.device_put(problem.history_score, tokens),
    )
    return placed, jax.device_put(start, rows), jax.device_put(end, rows)


def make_mesh(data: int, sequence: int):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, sequence), ("data", "sequence"), axis_types=kinds)


def check_attention():
    for fused, order, shape in (
        (True, "absorbed", (2, 4)), (False, "projected", (1, 8)), (True, "projected", (4, 1)),
    ):  # fmt: skip
        problem, start, end, case = inputs(fused)
        expected = step(fused, order, case)(problem, start, end)
        mesh = make_mesh(*shape)
        with jax.set_mesh(mesh):
            arguments = place(mesh, problem, start, end)
            compiled = step(fused, order, case).lower(*arguments).compile()
            found = compiled(*arguments)
        for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            scale = np.abs(np.where(np.isfinite(want), want, 0)).max()
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale)
        for line in compiled.as_text().splitlines():
            assert not re.search(r" (all-gather|all-to-all|collective-permute)\(", line), line
            for dims in re.findall(r"\[([\d,]+)\]", line) if " all-reduce(" in line else []:
                # Nothing with a token axis: neither 64 tokens nor a device's share of them.
                assert "64" not in dims.split(","), line


def check_match():
    from stca_jax.ops.match import match_statistics

    rng = np.random.default_rng(0)
    from attention_oracle import random_ranges

    start, end = random_ranges(rng, 4, 6, 64)
    ids, time = {"item": rng.integers(0, 5, (4, 64))}, np.sort(rng.integers(0, 99, (4, 64)), 1)
    targets, now = {"item": rng.integers(0, 5, (4, 6))}, np.full((4, 6), 100)

    def statistics():
        return match_statistics(targets, ids, time, now, Ranges(start, end), decay_seconds=30.0)

    expected = jax.jit(statistics)()
    with jax.set_mesh(make_mesh(2, 4)):
        found = jax.jit(statistics)()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), expected, found)


def check_soft_counts():
    """Values and gradients; fields are rows of the op, which must not move rows between devices."""
    from attention_oracle import random_ranges
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from stca_jax.ops.soft_match import soft_counts

    rng = np.random.default_rng(0)
    start, end = random_ranges(rng, 4, 6, 64)
    target, history = (rng.normal(size=(4, n, 2, 16)).astype(np.float32) for n in (6, 64))
    weight = rng.normal(size=(4, 6, 2))

    def loss(target, history, sharpness, start, end):
        return (soft_counts(target, history, sharpness, Ranges(start, end)) * weight).sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    arguments = target, history, np.array([5.0, 2.0], np.float32), start, end
    expected = step(*arguments)
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        axes = P("data"), P("data", "sequence"), P(), P("data"), P("data")
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arguments, axes, strict=True)
        ]
        compiled = step.lower(*placed).compile()
        found = compiled(*placed)
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert not re.search(r" (all-gather|all-to-all|collective-permute)\(", compiled.as_text())


def check_indivisible():
    problem, start, end, case = inputs(False)
    with (
        jax.set_mesh(make_mesh(8, 1)),
        pytest.raises(ValueError, match="rows 4 does not divide over mesh axis 'data' of size 8"),
    ):
        step(False, "absorbed", case)(problem, start, end)


@pytest.mark.parametrize(
    "name", ["check_attention", "check_match", "check_soft_counts", "check_indivisible"]
)
def test_on_eight_devices(name):
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    own_process.call("test_sharded", name, XLA_FLAGS=flags)
