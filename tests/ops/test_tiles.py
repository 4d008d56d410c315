"""Tiles: what is touched, and whether the default sizes suit what the batch is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import random_ranges

from stca_jax.ops.attention import (
    AttentionOptions,
    cheaper_order,
    target_to_history_attention,
)
from stca_jax.ops.tiled import Tiled
from stca_jax.ops.tiles import (
    BlockSizes,
    default_block_sizes,
    make_tiling,
    targets_per_token,
    touched_pairs,
)
from stca_jax.ranges import Ranges, SharedRanges

GRID = [BlockSizes(512, h, t) for h in (64, 128, 256, 512) for t in (16, 32, 64, 128)]
# Measured on a CPU core (docs/performance.md): a pair of tiles costs as much as so many pairs of
# target and token beside its own, and narrow tiles compute slower.
_OF_A_PAIR, _OF_NARROWNESS = 1_000, 8


def requests(length: int, num_targets: int, number: int) -> Ranges:
    """One row of requests with equal parts of its tokens and targets."""
    start = np.arange(num_targets) * number // num_targets * (length // number)
    return Ranges(start[None], start[None] + length // number)


def users(length: int, num_targets: int, number: int) -> Ranges:
    """One row of users, whose requests of 16 targets read nested windows of random length."""
    rng = np.random.default_rng(0)
    request = np.arange(num_targets) // 16
    of_user = num_targets // 16 // number
    tokens = length // number
    first = request // of_user * tokens
    end = first + tokens * (request % of_user + 1) // of_user
    window = np.maximum(8, rng.beta(0.25, 1.1, num_targets // 16) * tokens).astype(int)[request]
    return Ranges(np.maximum(first, end - window)[None], end[None])


# L, M, whether all targets read one range, and the ranges.
BATCHES = {
    "a request, a page of targets": (10_240, 16, True, requests(10_240, 16, 1)),
    "a request, a hundred targets": (10_240, 100, True, requests(10_240, 100, 1)),
    "a request, a thousand targets": (10_240, 1_024, True, requests(10_240, 1_024, 1)),
    "requests of 1,000 tokens": (10_000, 160, False, requests(10_000, 160, 10)),
    "requests of 32 tokens": (4_608, 2_304, False, requests(4_608, 2_304, 144)),
    "users": (4_608, 2_304, False, users(4_608, 2_304, 6)),
}


def counted(ranges: Ranges, length: int, sizes: BlockSizes) -> tuple[int, int]:
    """Touched pairs of tiles and their pairs of target and token, from a mask of every pair."""
    R, M = ranges.start.shape
    tiling = make_tiling(R, length, M, sizes)
    position = np.arange(tiling.tiles_per_row * tiling.history)
    reads = (position >= ranges.start[..., None]) & (position < ranges.end[..., None])
    padding = tiling.target_tiles_per_row * tiling.targets - M
    reads = np.pad(reads, ((0, 0), (0, padding), (0, 0)))
    tiles = reads.reshape(R, -1, tiling.targets, tiling.tiles_per_row, tiling.history)
    num_pairs = int(tiles.any((2, 4)).sum())
    return num_pairs, num_pairs * tiling.history * tiling.targets


def cost(ranges: Ranges, length: int, sizes: BlockSizes) -> float:
    """What touched pairs cost, in pairs of target and token."""
    num_pairs, elements = counted(ranges, length, sizes)
    tiling = make_tiling(*ranges.start.shape[:1], length, ranges.start.shape[1], sizes)
    return elements * (1 + _OF_NARROWNESS / tiling.targets) + _OF_A_PAIR * num_pairs


@pytest.mark.parametrize("seed", range(3))
def test_touched_pairs_are_those_that_a_range_has_a_token_of(seed):
    R, M, L = 3, 37, 70
    ranges = Ranges(*random_ranges(np.random.default_rng(seed), R, M, L))
    sizes = BlockSizes(tokens=24, history=8, targets=5)
    pairs = touched_pairs(Ranges(*map(jnp.asarray, ranges)), make_tiling(R, L, M, sizes))
    assert int(pairs.num_pairs.sum()) == counted(ranges, L, sizes)[0]


@pytest.mark.parametrize("name", BATCHES)
def test_default_sizes_suit_the_batch(name):
    """Within a quarter of the best of a grid, where the grid's worst cost at least half as much."""
    length, num_targets, is_shared, ranges = BATCHES[name]
    costs = [cost(ranges, length, sizes) for sizes in GRID]
    default = default_block_sizes(length, num_targets, "cpu", is_shared=is_shared)
    assert max(costs) > 1.4 * min(costs)
    assert cost(ranges, length, default) < 1.25 * min(costs)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("a request, a hundred targets", "requests of 1,000 tokens"),
        ("a request, a thousand targets", "requests of 32 tokens"),
        ("requests of 1,000 tokens", "a request, a hundred targets"),
        ("requests of 32 tokens", "a request, a thousand targets"),
        ("users", "a request, a page of targets"),
    ],
)
def test_sizes_of_another_batch_cost_more(name, other):
    length, num_targets, is_shared, ranges = BATCHES[name]
    right = default_block_sizes(length, num_targets, "cpu", is_shared=is_shared)
    wrong = default_block_sizes(*BATCHES[other][:2], "cpu", is_shared=BATCHES[other][2])
    assert cost(ranges, length, wrong) > 1.15 * cost(ranges, length, right)


@pytest.mark.parametrize("name", BATCHES)
def test_the_order_suits_the_batch(name):
    """It is the faster one in docs/performance.md, at d = 64 and h = 4."""
    length, num_targets, is_shared, _ = BATCHES[name]
    faster = {"a request, a page of targets": "absorbed", "requests of 1,000 tokens": "absorbed"}
    readers = targets_per_token(length, num_targets, is_shared=is_shared)
    assert cheaper_order(readers, 4, 64) == faster.get(name, "projected")


@pytest.mark.parametrize(("kind", "order"), [(Ranges, "absorbed"), (SharedRanges, "projected")])
def test_the_op_takes_the_order_of_its_ranges(kind, order):
    """40 targets in 1,000 tokens: of several requests, or of one."""
    taken = []

    class Recording(Tiled):
        def attend(self, query, tokens, weights, ranges, order, block_sizes):
            taken.append(order)
            return super().attend(query, tokens, weights, ranges, order, block_sizes)

    M, L, H, D = 40, 1_000, 2, 32
    weight = jnp.ones((D, H, D // H))
    target_to_history_attention(
        jnp.ones((1, M, H, D // H)), jnp.ones((1, L, D)), weight, weight,
        kind(jnp.zeros((1, M), int), jnp.full((1, M), L)),
        options=AttentionOptions(implementation=Recording()),
    )  # fmt: skip
    assert taken == [order]


def test_one_request_computes_no_pair_that_nobody_needs():
    for num_targets in (1, 16, 128, 1_024, 2_048):
        ranges = requests(10_240, num_targets, 1)
        sizes = default_block_sizes(10_240, num_targets, "cpu", is_shared=True)
        assert counted(ranges, 10_240, sizes)[1] == ranges.lengths.sum()


def compiled(kind: type[Ranges], starts_are_known: bool) -> str:
    """The program of 48 targets that read 1,024 tokens."""
    R, M, L, D = 1, 48, 1_024, 16

    def attend(query, tokens, weight, start):
        start = jnp.zeros_like(start) if starts_are_known else start
        ranges = kind(start, jnp.full_like(start, L))
        options = AttentionOptions("projected", "xla")
        return target_to_history_attention(query, tokens, weight, weight, ranges, options=options)

    shapes = ((R, M, 2, 8), (R, L, D), (D, 2, 8))
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    start = jax.ShapeDtypeStruct((R, M), jnp.int32)
    return jax.jit(attend).lower(*arrays, start).compile().as_text()


def scores_of(program: str) -> set[str]:
    """Shapes [heads, tokens, targets] of the exponentials of pairs of tiles."""
    return set(re.findall(r"f32\[(\d+,\d+,\d+)\]\S* exponential\(", program))


def test_ranges_say_that_they_are_shared_to_the_op():
    assert scores_of(compiled(Ranges, False)) == {"2,512,16"}
    assert scores_of(compiled(SharedRanges, False)) == {"2,512,48"}


@pytest.mark.parametrize("starts_are_known", [False, True])
def test_known_ranges_are_no_constants_of_the_exponentials(starts_are_known):
    """XLA's loop over a mask of which one side is constant takes many times as long."""
    program = compiled(Ranges, starts_are_known)
    (loop,) = [c for c in program.split("\n\n") if re.search(r"f32\[2,512,16\]\S* exponential", c)]
    # Starts and ends: sliced in the loop or, since JAX 0.12, before it.
    given = re.findall(r"s32\[1,16\]\S* dynamic-slice\(|= s32\[16\]\S* parameter\(", loop)
    assert len(given) == 2
