"""E1-E7 against the float64 oracle, the mistakes of public re-implementations, and the start."""

import dataclasses
import functools
import typing

import jax
import numpy as np
import oracle
import pytest
from flax import nnx
from tiny_ranker import compile_fast, random_params, with_params

from stca_jax.models.sequence import SequenceInput
from stca_jax.models.stca import Stca, StcaConfig
from stca_jax.ranges import Ranges

DAY = 86_400
CONFIG = StcaConfig(
    width=8,
    num_layers=3,
    num_heads=2,
    recency_score=True,
    temperature_length=4,
    attention_sink=True,
)
# Two nested ranges, one target twice as candidates of a request, and an empty range.
START, END = [[0, 0, 4, 4, 7]], [[12, 6, 9, 9, 7]]


_gather = functools.partial(oracle.stca, temperature_length=CONFIG.temperature_length)


@functools.cache
def stca():
    """Abstract module, random parameters, and the compiled function of both and an input."""
    module = nnx.eval_shape(lambda: Stca(CONFIG, rngs=nnx.Rngs(0)))
    params = random_params(module)

    @compile_fast
    def gather(params, inputs):
        return with_params(module, params)(inputs)

    return params, gather


@functools.cache
def stca_with_skip_paths():
    config = dataclasses.replace(CONFIG, skip_paths=True)
    module = nnx.eval_shape(lambda: Stca(config, rngs=nnx.Rngs(0)))
    params = random_params(module)
    return params, compile_fast(lambda params, inputs: with_params(module, params)(inputs))


def make_inputs(seed=0):
    rng = np.random.default_rng(seed)
    return SequenceInput(
        tokens=rng.normal(size=(1, 12, 8)).astype(np.float32),
        targets=rng.normal(size=(1, 5, 8)).astype(np.float32),
        history_time=np.sort(rng.integers(0, 100 * DAY, (1, 12))).astype(np.int32),
        request_time=rng.integers(100 * DAY, 130 * DAY, (1, 5)).astype(np.int32),
        ranges=Ranges(np.array(START, np.int32), np.array(END, np.int32)),
    )


def windows(inputs):
    """Tokens, target and ages in days, in float64, of each target."""
    for m in range(inputs.targets.shape[1]):
        window = slice(inputs.ranges.start[0, m], inputs.ranges.end[0, m])
        age = inputs.request_time[0, m] - inputs.history_time[0, window].astype(np.int64)
        yield inputs.tokens[0, window].astype(float), inputs.targets[0, m].astype(float), age / DAY


@functools.cache
def summaries_of_the_model():
    params, gather = stca()
    inputs = make_inputs()
    return inputs, jax.tree.map(lambda p: p.astype(float), params), gather(params, inputs)


def test_summary_and_counts_match_oracle():
    inputs, params, found = summaries_of_the_model()
    for m, window in enumerate(windows(inputs)):
        expected = _gather(params, *window)
        np.testing.assert_allclose(found.summary[0, m], expected.summary, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.counts[0, m], expected.counts, rtol=1e-5, atol=1e-5)


def test_skip_paths_match_oracle():
    """LN(x + SwiGLU(x)) on both sides: what is a mistake in the paper's equations is an option."""
    (params, gather), inputs = stca_with_skip_paths(), make_inputs()
    found = gather(params, inputs)
    params = jax.tree.map(lambda p: p.astype(float), params)
    for m, window in enumerate(windows(inputs)):
        expected = _gather(params, *window, skip_paths=True)
        np.testing.assert_allclose(found.summary[0, m], expected.summary, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.counts[0, m], expected.counts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mistake", typing.get_args(oracle.Mistake))
def test_no_known_mistake(mistake):
    """The oracle with the mistake is far from the model, for every target that has a history."""
    inputs, params, found = summaries_of_the_model()
    for m, window in enumerate(windows(inputs)):
        wrong = _gather(params, *window, mistake=mistake).summary
        if len(window[0]):
            assert np.abs(found.summary[0, m] - wrong).max() > 1e-2


def test_targets_are_not_compared_with_each_other():
    """Mistake 6: a model that appends a request's other targets to its history."""
    inputs, params, found = summaries_of_the_model()
    (x, first, age), (_, second, _) = list(windows(inputs))[2:4]
    wrong = _gather(params, np.append(x, [second], 0), first, np.append(age, 0)).summary
    assert np.abs(found.summary[0, 2] - wrong).max() > 1e-2


def test_empty_history_gathers_nothing():
    """o^i = 0 and counts of 0, so the summary is a function of the target alone."""
    _, params, found = summaries_of_the_model()
    assert (found.counts[0, 4] == 0).all()
    target = make_inputs().targets[0, 4].astype(float)
    weight = params["output_fusion"]["weight"][-8:]
    expected = oracle.swiglu(params["output_ffn"], target @ weight)
    np.testing.assert_allclose(found.summary[0, 4], expected, rtol=1e-5, atol=1e-5)


def test_recency_score_depends_on_ages_only():
    """Moving all times of a row changes nothing: the rate multiplies an age, not a date."""
    params, gather = stca()
    inputs = make_inputs()
    later = inputs._replace(
        history_time=inputs.history_time + 1000 * DAY, request_time=inputs.request_time + 1000 * DAY
    )
    expected, found = gather(params, inputs), gather(params, later)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, found)


def test_matched_initialisation_finds_the_targets_item():
    """At step 0, in every layer, the event that equals the target has the highest score.

    The encoders of target and history are equal, and W_Q = W_K is orthogonal.
    """
    config = StcaConfig(width=32, num_layers=2, num_heads=4)
    build = compile_fast(lambda: nnx.state(Stca(config, rngs=nnx.Rngs(0)), nnx.Param))
    params = nnx.to_pure_dict(build())
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for layer in params["layers"].values():
        square = layer["w_query"].reshape(32, 32)
        np.testing.assert_allclose(square @ square.T, np.eye(32), atol=1e-6)
        np.testing.assert_array_equal(layer["w_key"], layer["w_query"])
        jax.tree.map(np.testing.assert_array_equal, layer["history_ffn"], layer["query_ffn"])
    rng = np.random.default_rng(0)
    for _ in range(10):
        x = rng.normal(size=(200, 32)) / np.sqrt(32)  # tokens are about as long as table rows
        gathered = oracle.stca(params, x, x[150], np.zeros(200))
        for attention in gathered.attention:
            assert np.log(attention).sum(0).argmax() == 150


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0; it must be at least 1"),
        ({"ffn_ratio": 0}, "ffn_ratio is 0; it must be at least 1"),
        ({"width": 10, "num_heads": 4}, "num_heads 4 does not divide width 10"),
    ],
)
def test_config_rejects_impossible_shapes(options, message):
    with pytest.raises(ValueError, match=message):
        StcaConfig(**options)
