"""Rival sequence modules against float64 oracles, which see one target and its own window."""

import functools

import jax
import numpy as np
import oracle
import pytest
from flax import nnx
from strategies import SCHEMA, SHARED_LAYOUT, make_batch
from tiny_ranker import compile_fast, random_params, with_params

from stca_jax.config import apply_overrides, from_dict, to_dict
from stca_jax.errors import UserError
from stca_jax.models import din
from stca_jax.models.din import DinConfig
from stca_jax.models.ranker import Ranker, RankerConfig
from stca_jax.models.sequence import SequenceInput
from stca_jax.models.transformer import TransformerConfig
from stca_jax.ranges import Ranges

D, L = 8, 12
CONFIGS = {
    "din": DinConfig(width=D, hidden_width=5),
    "transformer": TransformerConfig(width=D, num_layers=3, num_heads=2),
}
# Ranges of five targets; the last is empty. Requests may share tokens, or else there are two, with
# a token between them that nobody reads.
RANGES = {
    "din": [(0, 12), (0, 6), (4, 9), (4, 9), (7, 7)],
    "transformer": [(0, 5), (6, 12), (6, 12), (0, 5), (7, 7)],
}


def din_oracle(p, x, target):
    """With weights of q - k, as the paper has them; the module folds them into those of q and k."""
    difference = np.random.default_rng(7).normal(size=p["key"]["weight"].shape)
    weight = [
        p["query"]["weight"] - difference,
        p["key"]["weight"] + difference,
        difference,
        p["product"]["weight"],
    ]
    pooled = np.zeros(D)
    for event in x:
        features = np.concatenate([target, event, target - event, target * event])
        hidden = features @ np.concatenate(weight) + p["query"]["bias"]
        swish = hidden / (1 + np.exp(-hidden))
        pooled += (swish @ p["score"]["weight"][:, 0]) * event
    pooled /= np.sqrt(max(len(x), 1))
    return np.concatenate([pooled, target]) @ p["output"]["weight"]


def transformer_oracle(p, x, target):
    """All states of a sequence that ends with the target, which does not attend to itself."""
    states = [*x, target]
    for _, block in sorted(p["blocks"].items()):
        normed = [oracle.layer_norm(block["attention_norm"], s) for s in states]
        states = [
            transformer_block(block, state, normed[i], normed[: min(i + 1, len(x))])
            for i, state in enumerate(states)
        ]
    return oracle.layer_norm(p["output_norm"], states[-1])


def transformer_block(p, state, query, past):
    heads = []
    for h in range(p["w_query"].shape[1]):
        q = query @ p["w_query"][:, h]
        weights = [np.exp(q @ (y @ p["w_key"][:, h]) / np.sqrt(len(q))) for y in past]
        summed = sum((w * (y @ p["w_value"][:, h]) for w, y in zip(weights, past, strict=True)), 0)
        heads.append(summed / max(sum(weights), 1e-30) + np.zeros(len(q)))
    state = state + oracle.linear(p["w_output"], np.concatenate(heads))
    return state + oracle.swiglu(p["ffn"], oracle.layer_norm(p["ffn_norm"], state))


ORACLES = {"din": din_oracle, "transformer": transformer_oracle}


def make_inputs(name, seed=0):
    rng = np.random.default_rng(seed)
    start, end = np.array(RANGES[name], np.int32).T[:, None]
    return SequenceInput(
        tokens=rng.normal(size=(1, L, D)).astype(np.float32),
        targets=rng.normal(size=(1, 5, D)).astype(np.float32),
        history_time=np.zeros((1, L), np.int32),
        request_time=np.zeros((1, 5), np.int32),
        ranges=Ranges(start, end),
    )


@functools.cache
def rival(name):
    """Random parameters; the compiled function of them and an input, and its gradients."""
    module = nnx.eval_shape(lambda: CONFIGS[name].make(remat=True, rngs=nnx.Rngs(0)))

    def gather(params, inputs):
        return with_params(module, params)(inputs).summary

    def projected(params, inputs, direction):
        return (gather(params, inputs) * direction).sum()

    gradients = jax.grad(projected, argnums=(0, 1), allow_int=True)
    return random_params(module), compile_fast(gather), compile_fast(gradients)


def expected_summaries(name, params, inputs):
    """[1, M, D], each target with its window only."""
    params = jax.tree.map(np.float64, params)
    rows = [
        ORACLES[name](params, np.float64(inputs.tokens[0, start:end]), np.float64(target))
        for target, (start, end) in zip(inputs.targets[0], RANGES[name], strict=True)
    ]
    return np.array(rows)[None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(din, "_BLOCK", 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_target_sees_its_own_range(name):
    params, gather, _ = rival(name)
    inputs = make_inputs(name)
    expected = expected_summaries(name, params, inputs)
    np.testing.assert_allclose(gather(params, inputs), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_match_finite_differences_of_the_oracle(name):
    """Each parameter, the tokens and the targets on their own, along a random direction."""
    params, _, gradients = rival(name)
    inputs = make_inputs(name)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=inputs.targets.shape)
    found = gradients(params, inputs, weights.astype(np.float32))
    values, structure = jax.tree.flatten((params, inputs))
    for i, (value, gradient) in enumerate(zip(values, jax.tree.leaves(found), strict=True)):
        if not np.issubdtype(value.dtype, np.floating):
            continue
        direction = rng.normal(size=value.shape)

        def loss(distance, i=i, direction=direction):
            moved = [np.float64(v) + distance * direction if j == i else v
                     for j, v in enumerate(values)]  # fmt: skip
            return (expected_summaries(name, *jax.tree.unflatten(structure, moved)) * weights).sum()

        difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs((gradient * direction).sum() - difference) <= 1e-4 * size + 1e-7


@pytest.mark.parametrize("name", CONFIGS)
def test_is_chosen_and_set_on_the_command_line(name):
    config = CONFIGS[name]
    chosen = apply_overrides(
        RankerConfig(), {"sequence": type(config).__name__, "sequence.width": str(D)}
    )
    assert type(chosen.sequence) is type(config)
    assert chosen.sequence.width == D
    assert from_dict(RankerConfig, to_dict(chosen)) == chosen


def test_transformer_refuses_rows_that_requests_share():
    ranker = nnx.eval_shape(
        lambda: Ranker(RankerConfig(sequence=CONFIGS["transformer"]), SCHEMA, rngs=nnx.Rngs(0))
    )
    with pytest.raises(UserError, match=r"use --config\.input\.rows=request"):
        ranker(make_batch(SHARED_LAYOUT, shared=True))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads 3 does not divide width 8"):
        TransformerConfig(width=8, num_heads=3)
    with pytest.raises(ValueError, match="hidden_width is 0; it must be at least 1"):
        DinConfig(hidden_width=0)
