"""Tiles of a packed batch, and which pairs of them a range touches.

A row of L tokens is cut into n equal history tiles and its M targets into equal target tiles, so
that no tile crosses a row; several history tiles make one block, the unit that is encoded at once:

    row 0   | tile 0 | tile 1 | tile 2 |      a block of 2 tiles: (0, 1) (2, 3) (4, 5)
    row 1   | tile 3 | tile 4 | tile 5 |
    targets of row 0: tiles 0, 1     of row 1: tiles 2, 3

Work is a list of (history tile, target tile) pairs.  A pair is in the list only if the range of one
of its targets has a token in the history tile, so the work follows the ranges, not M x L.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from stca_jax.ranges import Ranges

_TARGETS_OF_A_REQUEST = 16  # typically


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of the tiled op's blocks; they change its speed, never its result.

    Attributes:
      tokens: Tokens encoded at once.
      history: Most tokens of a history tile.
      targets: Most targets of a target tile.
    """

    tokens: int = 512
    history: int = 512
    targets: int = 16

    def __post_init__(self) -> None:
        """Raises ValueError for sizes below 1."""
        for name in ("tokens", "history", "targets"):
            if getattr(self, name) < 1:
                raise ValueError(f"BlockSizes.{name} is {getattr(self, name)}; at least 1")


def targets_per_token(length: int, num_targets: int, *, is_shared: bool = False) -> int:
    """How many targets read a token, as far as the shapes of a row tell.

    All of them if they read one range, or are at least one for every 16 tokens: requests share
    tokens then, or have few of their own. Else a row packs requests, which typically have 16.

    Args:
      length: L, tokens per row.
      num_targets: M, targets per row.
      is_shared: Whether the targets of a row read one range, see `SharedRanges`.
    """
    if is_shared or num_targets * _TARGETS_OF_A_REQUEST >= length:
        return num_targets
    return min(num_targets, _TARGETS_OF_A_REQUEST)


def default_block_sizes(
    length: int, num_targets: int, platform: str, *, is_shared: bool = False
) -> BlockSizes:
    """Sizes measured best on a CPU core, where a block's FFN activations stay in its cache.

    A GPU takes far larger ones: blocks follow one another, and each has to fill it.  On a CPU a
    pair of tiles costs as much as a thousand pairs of target and token beside its own, so that
    tiles are as large as the ranges allow: in a tile that two ranges share, each is computed for
    the targets of both.

    - Where the targets of a row read one range, few are one tile, and many are tiles of 32, which
      are faster than larger ones.
    - Otherwise a tile of 16 holds a typical request, whose targets have one range.
    - Where targets are many for the tokens of a row, they belong to requests that share tokens, or
      have few of their own: history tiles of 64 tokens follow such ranges closely, for 32 targets
      at once.

    Args:
      length: L, tokens per row.
      num_targets: M, targets per row.
      platform: As JAX names it.
      is_shared: Whether the targets of a row read one range, see `SharedRanges`.
    """
    if platform == "gpu":
        return BlockSizes(tokens=16_384, history=1024 if num_targets > 64 else 4096)
    if is_shared:
        return BlockSizes(targets=num_targets if num_targets < 128 else 32)
    if 64 < num_targets == targets_per_token(length, num_targets):
        return BlockSizes(history=64, targets=32)
    return BlockSizes()


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a batch of R rows, L tokens and M targets is cut.

    Attributes:
      rows: R.
      history: Tokens of a history tile.
      tiles_per_row: History tiles of a row.
      tiles_per_block: History tiles of a block.
      targets: Targets of a target tile.
      target_tiles_per_row: Target tiles of a row.
    """

    rows: int
    history: int
    tiles_per_row: int
    tiles_per_block: int
    targets: int
    target_tiles_per_row: int

    @property
    def num_blocks(self) -> int:
        """Blocks of the batch."""
        return -(-self.rows * self.tiles_per_row // self.tiles_per_block)

    @property
    def num_target_tiles(self) -> int:
        """Target tiles of the batch."""
        return self.rows * self.target_tiles_per_row

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.tiles_per_block * self.history


def make_tiling(rows: int, length: int, targets: int, sizes: BlockSizes) -> Tiling:
    """Equal tiles no larger than `sizes`, with as little padding as the shapes allow.

    Args:
      rows: R, at least 1.
      length: L, at least 1.
      targets: M, at least 1.
      sizes: Most tokens and targets.
    """
    tiles_per_row = -(-length // sizes.history)
    history = -(-length // tiles_per_row)
    num_tiles = rows * tiles_per_row
    most = max(1, min(sizes.tokens // history, num_tiles))
    # A divisor avoids padding tiles; below half the block it would cost more than it saves.
    divisors = [c for c in range(most, most // 2, -1) if num_tiles % c == 0]
    target_tiles_per_row = -(-targets // sizes.targets)
    return Tiling(
        rows=rows,
        history=history,
        tiles_per_row=tiles_per_row,
        tiles_per_block=divisors[0] if divisors else most,
        targets=-(-targets // target_tiles_per_row),
        target_tiles_per_row=target_tiles_per_row,
    )


def tile_tokens(x: Array, tiling: Tiling) -> Array:
    """[R, L, ...] to [blocks, tokens of a block, ...], zero-padded."""
    length = tiling.tiles_per_row * tiling.history
    x = _pad(x, 1, length).reshape(tiling.rows * length, *x.shape[2:])
    total = tiling.num_blocks * tiling.tokens
    return _pad(x, 0, total).reshape(tiling.num_blocks, tiling.tokens, *x.shape[1:])


def tile_targets(x: Array, tiling: Tiling) -> Array:
    """[R, M, ...] to [target tiles, targets of a tile, ...], zero-padded."""
    x = _pad(x, 1, tiling.target_tiles_per_row * tiling.targets)
    return x.reshape(tiling.num_target_tiles, tiling.targets, *x.shape[2:])


def untile_targets(x: Array, tiling: Tiling, targets: int) -> Array:
    """The inverse of `tile_targets`."""
    padded = tiling.target_tiles_per_row * tiling.targets
    return x.reshape(tiling.rows, padded, *x.shape[2:])[:, :targets]


def target_bands(
    first: Int[Array, " J"], last: Int[Array, " J"], tiling: Tiling, tile: int
) -> tuple[Int[Array, "R tiles"], Int[Array, "R tiles"]]:
    """First and one past the last target tile of the row that need each tile of so many tokens.

    Args:
      first: First history tile that each target tile needs.
      last: One past the last one; not above `first` if none.
      tiling: How the batch is cut.
      tile: Tokens of a tile; they divide the padded row, and need not be those of a history tile.
    """
    first, last = (x[:, None] * tiling.history for x in (first, last))
    begin = tile * jnp.arange(tiling.tiles_per_row * tiling.history // tile)
    needs = (first < begin + tile) & (begin < last)
    needs = needs.reshape(tiling.rows, tiling.target_tiles_per_row, -1)
    after_last = needs.shape[1] - needs[:, ::-1].argmax(1)
    return (
        needs.argmax(1).astype(jnp.int32),
        jnp.where(needs.any(1), after_last, 0).astype(jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class PairList:
    """The pairs of tiles that a range touches, block by block.

    Attributes:
      blocks: The blocks with at least one pair come first.
      num_blocks: How many those are.
      history_tile: Tile within the block, for each pair; the first `num_pairs` count.
      target_tile: Target tile of the batch.
      num_pairs: Pairs of each block.
    """

    blocks: Int[Array, " blocks"]
    num_blocks: Int[Array, ""]
    history_tile: Int[Array, "blocks pairs"]
    target_tile: Int[Array, "blocks pairs"]
    num_pairs: Int[Array, " blocks"]


jax.tree_util.register_dataclass(PairList)


def touched_pairs(ranges: Ranges, tiling: Tiling) -> PairList:
    """Lists the pairs of history tile and target tile that have work.

    Args:
      ranges: Of each target.
      tiling: How the batch is cut.
    """
    start, end = ranges
    first = jnp.arange(tiling.tiles_per_row) * tiling.history
    nonempty = (end > start)[..., None]
    hit = nonempty & (start[..., None] < first + tiling.history) & (end[..., None] > first)
    hit = tile_targets(hit, tiling).any(1)  # [target tiles, tiles of its row]
    hit = hit.reshape(tiling.rows, tiling.target_tiles_per_row, tiling.tiles_per_row)
    hit = hit.swapaxes(1, 2).reshape(tiling.rows * tiling.tiles_per_row, -1)
    hit = _pad(hit, 0, tiling.num_blocks * tiling.tiles_per_block)
    hit = hit.reshape(tiling.num_blocks, -1)
    size = hit.shape[1]
    # Touched pairs keep their order and come first; the others follow.
    pair = jnp.sort(jnp.where(hit, 0, size) + jnp.arange(size), axis=1) % size
    history_tile = pair // tiling.target_tiles_per_row
    row = (
        jnp.arange(tiling.num_blocks)[:, None] * tiling.tiles_per_block + history_tile
    ) // tiling.tiles_per_row
    num_pairs = hit.sum(1, dtype=jnp.int32)
    return PairList(
        blocks=jnp.argsort(num_pairs == 0, stable=True),
        num_blocks=(num_pairs > 0).sum(dtype=jnp.int32),
        history_tile=history_tile,
        target_tile=row * tiling.target_tiles_per_row + pair % tiling.target_tiles_per_row,
        num_pairs=num_pairs,
    )


def _pad(x: Array, axis: int, size: int) -> Array:
    x = jnp.asarray(x)
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
