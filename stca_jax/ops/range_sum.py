"""Sums over each target's range of a function of target and token, a pair of tiles at a time.

What attention without softmax is made of: HSTU's weights of SiLU, or a summary whose weights are
normalised otherwise.  Work follows the ranges, as in `stca_jax.ops.tiles`: pairs of tiles that no
range touches are not computed, forward and backward, and nothing of size M x L is ever stored.  The
backward pass needs no more than the inputs, since the result is a plain sum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from stca_jax.ops.sharded import on_mesh, platform
from stca_jax.ops.tiles import (
    BlockSizes,
    Tiling,
    make_tiling,
    tile_targets,
    tile_tokens,
    touched_pairs,
    untile_targets,
)
from stca_jax.ranges import Ranges

Contribution = Callable[[Any, Any, Any, Bool[Array, "C T"]], Array]


def range_sum(
    contribution: Contribution,
    weights: Any,
    per_target: Any,
    per_token: Any,
    ranges: Ranges,
    *,
    block_sizes: BlockSizes | None = None,
) -> Array:
    """The sum over each target's range, [R, M, ...] in float32; 0 for an empty range.

    Differentiable in all arrays of floats.

    Args:
      contribution: (weights, C targets, T tokens, which are in range [C, T]) -> [C, ...], summed
        over the tokens in range. It must be a function that compares equal to itself, without
        arrays of its own; targets and tokens are pytrees like those given, without R.
      weights: Arrays that every pair of tiles needs.
      per_target: Arrays [R, M, ...].
      per_token: Arrays [R, L, ...]; tokens that no range covers must be finite.
      ranges: Of each target.
      block_sizes: Tiles of `history` tokens and `targets` targets.

    Raises:
      ValueError: rows or length do not divide over the mesh, see `on_mesh`.
    """
    here = block_sizes or (
        BlockSizes(history=1024, targets=1024)
        if platform() == "gpu"
        else BlockSizes(history=256, targets=128)
    )
    local = functools.partial(_on_device, contribution, here)
    return on_mesh(local, lax.psum, weights, per_target, per_token, ranges)


def _on_device(
    contribution: Contribution,
    sizes: BlockSizes,
    weights: Any,
    per_target: Any,
    per_token: Any,
    ranges: Ranges,
) -> Array:
    R, M = ranges.start.shape
    length = jax.tree.leaves(per_token)[0].shape[1]
    if 0 in (R, M, length):
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape[2:]), x.dtype), (per_target, per_token)
        )
        mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
        shape = jax.eval_shape(contribution, weights, *one, mask).shape
        return jnp.zeros((R, M, *shape[1:]), jnp.float32)
    tiling = dataclasses.replace(make_tiling(R, length, M, sizes), tiles_per_block=1)
    floats, integers, structure = _divide(
        (
            jax.tree.map(lambda x: tile_targets(x, tiling), per_target),
            jax.tree.map(lambda x: tile_tokens(x, tiling), per_token),
        )
    )
    work = (tuple(tile_targets(x, tiling) for x in ranges), touched_pairs(ranges, tiling))
    static = _Static(contribution, tiling, structure)
    return untile_targets(_sum(static, weights, floats, integers, work), tiling, M)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known when the sum is traced.

    Attributes:
      contribution: Of a pair of tiles.
      tiling: How the batch is cut.
      structure: For targets and for tokens, their tree and which of its leaves are floats.
    """

    contribution: Contribution
    tiling: Tiling
    structure: tuple[tuple[Any, tuple[bool, ...]], ...]

    def of_pair(
        self, weights: Any, floats: Any, integers: Any, in_range: Bool[Array, "C T"]
    ) -> Array:
        """The contribution of a pair of tiles, whose leaves are still divided."""
        trees = []
        for (tree, are_floats), some, others in zip(self.structure, floats, integers, strict=True):
            left, right = iter(some), iter(others)
            trees.append(tree.unflatten([next(left if f else right) for f in are_floats]))
        targets, tokens = trees
        return self.contribution(weights, targets, tokens, in_range).astype(jnp.float32)


def _divide(trees: tuple[Any, Any]) -> tuple[Any, Any, tuple[Any, ...]]:
    """Leaves of floats, the other leaves, and how to put them together again."""
    floats, integers, structure = [], [], []
    for tree in trees:
        leaves, definition = jax.tree.flatten(tree)
        are_floats = tuple(bool(jnp.issubdtype(x.dtype, jnp.floating)) for x in leaves)
        floats.append([x for x, f in zip(leaves, are_floats, strict=True) if f])
        integers.append([x for x, f in zip(leaves, are_floats, strict=True) if not f])
        structure.append((definition, are_floats))
    return tuple(floats), tuple(integers), tuple(structure)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(static: _Static, weights: Any, floats: Any, integers: Any, work: Any) -> Array:
    tiling = static.tiling
    (target_floats, token_floats), (target_integers, token_integers) = floats, integers
    _, pairs = work

    def block_step(i: Array, total: Array) -> Array:
        block = pairs.blocks[i]
        tokens, token_ids = _at((token_floats, token_integers), block)

        def pair_step(p: Array, total: Array) -> Array:
            tile = pairs.target_tile[block, p]
            targets, target_ids = _at((target_floats, target_integers), tile)
            in_range = _in_range(tiling, work, block, tile)
            part = static.of_pair(weights, (targets, tokens), (target_ids, token_ids), in_range)
            return total.at[tile].add(part)

        return lax.fori_loop(0, pairs.num_pairs[block], pair_step, total)

    first = _at((floats, integers), 0)
    part = jax.eval_shape(static.of_pair, weights, *first, _in_range(tiling, work, 0, 0))
    total = jnp.zeros((tiling.num_target_tiles, *part.shape), jnp.float32)
    return lax.fori_loop(0, pairs.num_blocks, block_step, total)


def _forward(static: _Static, weights: Any, floats: Any, integers: Any, work: Any):
    return _sum(static, weights, floats, integers, work), (weights, floats, integers, work)


def _backward(static: _Static, residuals: Any, d_total: Array):
    weights, (target_floats, token_floats), (target_integers, token_integers), work = residuals
    _, pairs = work

    def block_step(i: Array, gradients: Any) -> Any:
        d_weights, d_targets, d_tokens = gradients
        block = pairs.blocks[i]
        tokens, token_ids = _at((token_floats, token_integers), block)

        def pair_step(p: Array, carry: Any) -> Any:
            d_weights, d_targets, d_here = carry
            tile = pairs.target_tile[block, p]
            targets, target_ids = _at((target_floats, target_integers), tile)
            in_range = _in_range(static.tiling, work, block, tile)
            _, vjp = jax.vjp(
                lambda w, x, y: static.of_pair(w, (x, y), (target_ids, token_ids), in_range),
                weights,
                targets,
                tokens,
            )
            w, x, y = vjp(d_total[tile])
            d_targets = jax.tree.map(lambda d, part: d.at[tile].add(part), d_targets, x)
            return _add(d_weights, w), d_targets, _add(d_here, y)

        carry = (d_weights, d_targets, _zeros(tokens))
        d_weights, d_targets, d_here = lax.fori_loop(0, pairs.num_pairs[block], pair_step, carry)
        d_tokens = jax.tree.map(lambda d, part: d.at[block].set(part), d_tokens, d_here)
        return d_weights, d_targets, d_tokens

    inputs = (weights, target_floats, token_floats)
    sums = lax.fori_loop(0, pairs.num_blocks, block_step, _zeros(inputs))
    d_weights, *d_floats = jax.tree.map(lambda d, x: d.astype(x.dtype), sums, inputs)
    return d_weights, tuple(d_floats), None, None


_sum.defvjp(_forward, _backward)


def _at(tree: Any, index: Array | int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(lambda t, p: t + p.astype(jnp.float32), total, part)


def _in_range(
    tiling: Tiling, work: Any, block: Array | int, tile: Array | int
) -> Bool[Array, "C T"]:
    (start, end), _ = work
    position = (block % tiling.tiles_per_row) * tiling.history + jnp.arange(tiling.history)
    return (position >= start[tile][:, None]) & (position < end[tile][:, None])
