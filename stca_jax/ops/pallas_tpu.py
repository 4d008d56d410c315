"""TPU kernels of the op (Mosaic): ranges by scalar prefetch, so skipped tiles are not even read."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from stca_jax.ops import encoder_tpu
from stca_jax.ops.attention_kernels import dot, mask_scores, score_gradients, softmax_step
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.kernels import Inputs, Kernels, Outcome, Unencoded
from stca_jax.ops.tiled import LOWEST_PEAK
from stca_jax.ops.tiles import BlockSizes, Tiling

# Mosaic gives a kernel 16 MiB of VMEM by default on every generation since v4; the compiler needs
# some of it for itself.
_VMEM_BYTES = 14 * 2**20
_LANES = 128
_SUBLANES = 16  # of a bfloat16 register


@dataclasses.dataclass(frozen=True)
class MosaicKernels(Kernels):
    """`Kernels` of the TPU.

    Attributes:
      interpret: Run on the CPU, by JAX's interpreter of Pallas.
      encodes: Encode the tokens too, where they can; without it, XLA does.
    """

    interpret: Any = False
    encodes: bool = True

    @property
    def platform(self) -> str | None:
        """See `Kernels`."""
        return None if self.interpret else "tpu"

    def default_block_sizes(self, heads_per_group: int, width: int, dtype: Any) -> BlockSizes:
        """See `Kernels`: 512 tokens and one to two vector registers of targets x heads."""
        return BlockSizes(history=512, targets=max(8, 2 * _LANES // heads_per_group))

    def padded_sizes(self, width: int, columns: int, history: int) -> tuple[int, int, int]:
        """See `Kernels`: a tile of tokens is whole registers."""
        return width, columns, -(-history // _SUBLANES) * _SUBLANES

    def can_encode(self, encoder: HistoryEncoder, dtype: Any) -> bool:
        """See `Kernels`."""
        return self.encodes and encoder_tpu.can_encode(encoder, dtype)

    def encode(self, unencoded: Unencoded) -> Array:
        """See `Kernels`."""
        return encoder_tpu.encode(unencoded, self.interpret)

    def encode_backward(
        self, unencoded: Unencoded, d_encoded: Array
    ) -> tuple[HistoryEncoder, Array]:
        """See `Kernels`."""
        return encoder_tpu.encode_backward(unencoded, d_encoded, self.interpret)

    def forward(self, tiling: Tiling, inputs: Inputs) -> tuple[Array, Array]:
        """See `Kernels`."""
        J, G, E, C = inputs.query.shape
        _check_vmem(tiling, inputs)
        spec = _target_specs(E, C)
        return pl.pallas_call(
            functools.partial(_forward_kernel, tile=tiling.history),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(J, G, tiling.tiles_per_row),
                in_specs=[spec.row, spec.row, spec.wide, *_key_specs(tiling, inputs)],
                out_specs=[spec.wide, spec.head_row],
                scratch_shapes=[
                    pltpu.VMEM((1, C), jnp.float32),
                    pltpu.VMEM((1, C), jnp.float32),
                    pltpu.VMEM((E, C), jnp.float32),
                ],
            ),
            out_shape=[
                jax.ShapeDtypeStruct((J, G, E, C), jnp.float32),
                jax.ShapeDtypeStruct((J, G, 1, C), jnp.float32),
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=self.interpret,
            name="target_to_history_forward",
        )(inputs.first, inputs.last, inputs.start, inputs.end, inputs.query, *inputs.history)

    def backward(
        self, tiling: Tiling, inputs: Inputs, outcome: Outcome
    ) -> tuple[Array, tuple[Array, ...]]:
        """See `Kernels`."""
        J, G, E, C = inputs.query.shape
        spec = _target_specs(E, C)
        arguments = (inputs.first, inputs.last, inputs.start, inputs.end, outcome.log_sum_exp,
                     outcome.delta, inputs.query, outcome.d_output)  # fmt: skip
        targets = [spec.row, spec.row, spec.head_row, spec.head_row, spec.wide, spec.wide]
        d_query = pl.pallas_call(
            functools.partial(_query_kernel, tile=tiling.history),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(J, G, tiling.tiles_per_row),
                in_specs=[*targets, *_key_specs(tiling, inputs)],
                out_specs=spec.wide,
                scratch_shapes=[pltpu.VMEM((E, C), jnp.float32)],
            ),
            out_shape=jax.ShapeDtypeStruct((J, G, E, C), jnp.float32),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=self.interpret,
            name="target_to_history_backward_query",
        )(*arguments, *inputs.history)
        return d_query, self._history_gradients(tiling, arguments, inputs.history)

    def _history_gradients(
        self, tiling: Tiling, arguments: tuple[Array, ...], history: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        R, G, _, E = history[0].shape
        C = arguments[2].shape[-1]
        per_row = tiling.target_tiles_per_row
        spec = _target_specs(E, C, lambda r, g, i, j: (r * per_row + j, g))
        block = pl.BlockSpec((1, 1, tiling.history, E), lambda r, g, i, j, *_: (r, g, i, 0))
        accumulator = pltpu.VMEM((tiling.history, E), jnp.float32)
        targets = [spec.row, spec.row, spec.head_row, spec.head_row, spec.wide, spec.wide]
        d_history = pl.pallas_call(
            functools.partial(_key_kernel, tile=tiling.history, tiles_per_row=per_row),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(R, G, tiling.tiles_per_row, per_row),
                in_specs=[*targets, *[block] * len(history)],
                out_specs=[block] * len(history),
                scratch_shapes=[accumulator] * len(history),
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in history],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
            ),
            interpret=self.interpret,
            name="target_to_history_backward_key",
        )(*arguments, *history)
        return tuple(d_history)


@dataclasses.dataclass(frozen=True)
class _TargetSpecs:
    """Blocks of arrays by target tile: [J, 1, C], [J, G, 1, C] and [J, G, E, C]."""

    row: pl.BlockSpec
    head_row: pl.BlockSpec
    wide: pl.BlockSpec


def _target_specs(E: int, C: int, tile_of: Any = lambda j, g, *_: (j, g)) -> _TargetSpecs:
    """Specs for grids whose first four ids `tile_of` maps to target tile and group."""

    def index(*ids: Any) -> tuple[Any, ...]:
        return (*tile_of(*ids[:4]), 0, 0)

    def row(*ids: Any) -> tuple[Any, ...]:
        return (tile_of(*ids[:4])[0], 0, 0)

    return _TargetSpecs(
        row=pl.BlockSpec((1, 1, C), row),
        head_row=pl.BlockSpec((1, 1, 1, C), index),
        wide=pl.BlockSpec((1, 1, E, C), index),
    )


def _key_specs(tiling: Tiling, inputs: Inputs) -> list[pl.BlockSpec]:
    """Keys and values of the band; past its end the last block stays, and nothing is fetched."""

    def index(j: Any, g: Any, i: Any, first: Any, last: Any) -> tuple[Any, ...]:
        inside = jnp.clip(first[j] + i, 0, jnp.maximum(last[j] - 1, 0))
        return lax.div(j, jnp.int32(tiling.target_tiles_per_row)), g, inside, 0

    block = (1, 1, tiling.history, inputs.key.shape[-1])
    return [pl.BlockSpec(block, index)] * len(inputs.history)


def _check_vmem(tiling: Tiling, inputs: Inputs) -> None:
    E, C = inputs.query.shape[2:]
    wide, lanes = (-(-x // _LANES) * _LANES for x in (E, C))
    size = inputs.key.dtype.itemsize
    blocks = 2 * 2 * tiling.history * wide * (size + 4)  # keys, values, their gradients; twice
    tiles = 2 * 4 * E * lanes * 4
    scores = 4 * tiling.history * lanes * 4
    needed = blocks + tiles + scores
    if needed > _VMEM_BYTES:
        raise ValueError(
            f"blocks of {tiling.history} tokens x {C} targets and heads, width {E}, need about "
            f"{needed / 2**20:.0f} MiB of VMEM; the kernel has {_VMEM_BYTES / 2**20:.0f} MiB. "
            "Pass smaller block_sizes"
        )


def _forward_kernel(first, last, start, end, query, *refs, tile):
    *history, output, log_sum_exp, peak, total, summed = refs
    j, i = pl.program_id(0), pl.program_id(2)

    @pl.when(i == 0)
    def _():
        peak[...] = jnp.full_like(peak, LOWEST_PEAK)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    @pl.when(first[j] + i < last[j])
    def _():
        score = dot(history[0][0, 0], query[0, 0], 1, 0)
        score = mask_scores(score, start[0], end[0], (first[j] + i) * tile)
        weight, rescale, peak[...], total[...] = softmax_step(score, peak[...], total[...])
        block = history[-1][0, 0]
        summed[...] = summed[...] * rescale + dot(block, weight.astype(block.dtype), 0, 0)

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        nonempty = total[...] > 0
        safe_total = jnp.where(nonempty, total[...], 1)
        output[0, 0] = summed[...] / safe_total
        log_sum_exp[0, 0] = jnp.where(nonempty, peak[...] + jnp.log(safe_total), 0)


def _gradients(ranges, statistics, query, d_output, history, position):
    """[t, C] weights and gradients of the scores, in the dtype of the keys."""
    start, end = (x[0] for x in ranges)
    score = mask_scores(dot(history[0][0, 0], query[0, 0], 1, 0), start, end, position)
    d_weight = dot(history[-1][0, 0], d_output[0, 0], 1, 0)
    factors = score_gradients(score, d_weight, *(x[0, 0] for x in statistics))
    weight, d_score = (x.astype(query.dtype) for x in factors)
    return weight, d_score


def _query_kernel(first, last, start, end, log_sum_exp, delta, query, d_output, *refs, tile):
    *history, d_query, summed = refs
    j, i = pl.program_id(0), pl.program_id(2)

    @pl.when(i == 0)
    def _():
        summed[...] = jnp.zeros_like(summed)

    @pl.when(first[j] + i < last[j])
    def _():
        _, d_score = _gradients(
            (start, end), (log_sum_exp, delta), query, d_output, history, (first[j] + i) * tile
        )
        summed[...] += dot(history[0][0, 0], d_score, 0, 0)

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        d_query[0, 0] = summed[...]


def _key_kernel(first, last, start, end, log_sum_exp, delta, query, d_output, *refs, tile,
                tiles_per_row):  # fmt: skip
    arrays = len(refs) // 3
    history, d_history, sums = refs[:arrays], refs[arrays : 2 * arrays], refs[2 * arrays :]
    r, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    target_tile = r * tiles_per_row + j

    @pl.when(j == 0)
    def _():
        for summed in sums:
            summed[...] = jnp.zeros_like(summed)

    @pl.when((first[target_tile] <= i) & (i < last[target_tile]))
    def _():
        weight, d_score = _gradients(
            (start, end), (log_sum_exp, delta), query, d_output, history, i * tile
        )
        # Where keys are the values, both gradients are of one array.
        sums[0][...] += dot(d_score, query[0, 0], 1, 1)
        sums[-1][...] += dot(weight, d_output[0, 0], 1, 1)

    @pl.when(j == tiles_per_row - 1)
    def _():
        for d_ref, summed in zip(d_history, sums, strict=True):
            d_ref[0, 0] = summed[...].astype(d_ref.dtype)
