"""Rival sequence modules against float64 oracles, which see one target and its own window."""

import functools

import jax
import numpy as np
import pytest
import rival_oracles
from flax import nnx
from strategies import SCHEMA, SHARED_LAYOUT, make_batch
from tiny_ranker import compile_fast, random_params, with_params

from stca_jax.config import apply_overrides, from_dict, to_dict
from stca_jax.errors import UserError
from stca_jax.models import din, hstu, sdim, sequence_o1, top_k, transact
from stca_jax.models.din import DinConfig
from stca_jax.models.hstu import HstuConfig
from stca_jax.models.longer import LongerConfig
from stca_jax.models.mixformer import MixFormerConfig
from stca_jax.models.ranker import Ranker, RankerConfig
from stca_jax.models.sasrec import SasRecConfig
from stca_jax.models.sdim import SdimConfig
from stca_jax.models.sequence import SequenceInput
from stca_jax.models.sequence_o1 import SequenceO1Config
from stca_jax.models.target_attention import TargetAttentionConfig
from stca_jax.models.top_k import TopKConfig
from stca_jax.models.transact import TransActConfig
from stca_jax.models.transformer import TransformerConfig
from stca_jax.models.ultra_hstu import UltraHstuConfig
from stca_jax.ops.range_sum import range_sum
from stca_jax.ops.tiles import BlockSizes
from stca_jax.ranges import Ranges

D, L = 8, 12
SMALL = {"width": D, "num_heads": 2}
# Every limit below the 12 events of a row, so that each has something to cut.
CONFIGS = {
    "din": DinConfig(width=D, hidden_width=5),
    "hstu": HstuConfig(**SMALL, num_layers=3, max_length=16),
    "hstu without bias": HstuConfig(**SMALL, relative_bias=False, max_length=16),
    "longer": LongerConfig(**SMALL, num_layers=3, merged_events=2, num_recent=2),
    "mixformer": MixFormerConfig(**SMALL),
    "sasrec": SasRecConfig(**SMALL),
    "sequence_o1": SequenceO1Config(**SMALL, num_prototypes=3, recent_length=4),
    "sdim": SdimConfig(**SMALL, num_groups=3, bits=1, recent_length=3),
    "sim": TopKConfig(**SMALL, search="sim", num_selected=4, recent_length=3),
    "target attention": TargetAttentionConfig(**SMALL),
    "transact": TransActConfig(**SMALL, recent_length=5, num_outputs=2),
    "transformer": TransformerConfig(**SMALL, num_layers=3),
    "twin": TopKConfig(**SMALL, num_selected=4, recent_length=3),
    "ultra_hstu": UltraHstuConfig(
        **SMALL, num_layers=4, local_length=2, global_length=2, num_tail_layers=2, tail_length=4,
        max_length=16,
    ),
}  # fmt: skip
ORACLES = {name: getattr(rival_oracles, name.replace(" ", "_"), None) for name in CONFIGS} | {
    "hstu without bias": rival_oracles.hstu,
    "sim": rival_oracles.top_k,
    "twin": rival_oracles.top_k,
}
# Ranges of five targets; the last is empty. Requests may share tokens, or else there are two, with
# a token between them that nobody reads.
SHARED = [(0, 12), (0, 6), (4, 9), (4, 9), (7, 7)]
EXCLUSIVE = [(0, 5), (6, 12), (6, 12), (0, 5), (7, 7)]


def layouts(name):
    """Ranges of five targets: nested and overlapping where tokens may be shared."""
    if CONFIGS[name].needs_exclusive_history:
        return [EXCLUSIVE, [(2, 3), (2, 3), (3, 12), (3, 12), (0, 2)], [(0, 12)] * 4 + [(0, 0)]]
    return [SHARED, EXCLUSIVE, [(0, 1), (1, 12), (3, 5), (0, 0), (0, 12)]]


def make_inputs(ranges, seed=0):
    rng = np.random.default_rng(seed)
    start, end = np.array(ranges, np.int32).T[:, None]
    inside = np.zeros(L, bool)
    for a, b in ranges:
        inside[a:b] = True
    tokens = rng.normal(size=(1, L, D)) * inside[:, None]
    return SequenceInput(
        tokens=tokens.astype(np.float32),
        targets=rng.normal(size=(1, 5, D)).astype(np.float32),
        history_time=np.cumsum(rng.integers(0, 50, (1, L)), 1, dtype=np.int32),
        request_time=rng.integers(700, 9_000, (1, 5)).astype(np.int32),
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
    rows = []
    for k, target in enumerate(inputs.targets[0]):
        window = slice(inputs.ranges.start[0, k], inputs.ranges.end[0, k])
        moment = rival_oracles.Moment(inputs.history_time[0, window], inputs.request_time[0, k])
        tokens = np.float64(inputs.tokens[0, window])
        rows.append(ORACLES[name](params, CONFIGS[name], tokens, np.float64(target), moment))
    return np.array(rows)[None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(din, "_BLOCK", 5)
    monkeypatch.setattr(sdim, "_TILE", 4)
    for module in (sdim, top_k, transact):
        monkeypatch.setattr(module, "_CHUNK", 2)
    tiles = BlockSizes(history=5, targets=3)
    monkeypatch.setattr(sequence_o1, "_BLOCKS", BlockSizes(history=5, targets=1))
    monkeypatch.setattr(hstu, "range_sum", functools.partial(range_sum, block_sizes=tiles))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_target_sees_its_own_range(name):
    params, gather, _ = rival(name)
    for seed, ranges in enumerate(layouts(name)):
        inputs = make_inputs(ranges, seed)
        expected = expected_summaries(name, params, inputs)
        np.testing.assert_allclose(gather(params, inputs), expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_else_of_the_row_matters(name):
    """Other targets and their tokens, a thousand times as large, leave a target as it is."""
    params, gather, _ = rival(name)
    inputs = make_inputs(layouts(name)[0])
    expected = gather(params, inputs)[0, 0]
    start, end = (x[0, 0] for x in inputs.ranges)
    outside = (np.arange(L) < start) | (np.arange(L) >= end)
    tokens = np.where(outside[:, None], 1_000 * inputs.tokens, inputs.tokens)
    targets = inputs.targets * np.array([1, 1_000, 1_000, 1_000, 1_000], np.float32)[:, None]
    found = gather(params, inputs._replace(tokens=tokens, targets=targets))[0, 0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_match_finite_differences_of_the_oracle(name):
    """Each parameter, the tokens and the targets on their own, along a random direction."""
    params, _, gradients = rival(name)
    inputs = make_inputs(layouts(name)[0])
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
        RankerConfig(), {"sequence": type(config).__name__, "sequence.width": "16"}
    )
    assert type(chosen.sequence) is type(config)
    assert chosen.sequence.width == 16
    assert from_dict(RankerConfig, to_dict(chosen)) == chosen


@pytest.mark.parametrize("name", ["hstu", "longer", "sasrec", "transformer", "ultra_hstu"])
def test_what_lets_events_interact_refuses_rows_that_requests_share(name):
    ranker = nnx.eval_shape(
        lambda: Ranker(RankerConfig(sequence=CONFIGS[name]), SCHEMA, rngs=nnx.Rngs(0))
    )
    with pytest.raises(UserError, match=r"use --config\.input\.rows=request"):
        ranker(make_batch(SHARED_LAYOUT, shared=True))


def test_a_sketch_that_was_kept_serves_other_targets_exactly():
    """Of a window's first target, kept and read by four others."""
    name = "sequence_o1"
    params, gather, _ = rival(name)
    module = nnx.eval_shape(lambda: CONFIGS[name].make(remat=True, rngs=nnx.Rngs(0)))
    inputs = make_inputs([(2, 11)] * 5)

    @compile_fast
    def sketch_states(params, tokens, ranges):
        return with_params(module, params).sketch(tokens, ranges).states

    @compile_fast
    def read(params, inputs, states):
        kept = sequence_o1.Sketch(states, np.zeros((1, 5), np.int32))
        return with_params(module, params).read(inputs, kept).summary

    states = sketch_states(params, inputs.tokens, Ranges(*(x[:, :1] for x in inputs.ranges)))
    newest = np.arange(L)[:, None] >= 11 - CONFIGS[name].recent_length
    recent_only = inputs._replace(tokens=np.where(newest, inputs.tokens, 0))
    found = read(params, recent_only, states)
    np.testing.assert_allclose(found, gather(params, inputs), rtol=1e-6, atol=1e-6)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="num_heads 3 does not divide width 8"):
        TransformerConfig(width=8, num_heads=3)
    with pytest.raises(ValueError, match="hidden_width is 0; it must be at least 1"):
        DinConfig(hidden_width=0)
    with pytest.raises(ValueError, match="square of num_heads 4 does not divide width 24"):
        MixFormerConfig(width=24, num_heads=4)
    with pytest.raises(ValueError, match="num_tail_layers 4 leaves no layer of 4"):
        UltraHstuConfig(num_tail_layers=4)
    with pytest.raises(ValueError, match="num_outputs 10 is more than recent_length 5"):
        TransActConfig(recent_length=5)
