"""TPU kernels of the op (Mosaic): ranges by scalar prefetch, so skipped tiles are not even read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from stca_jax.ops import attention_tpu, encoder_tpu
from stca_jax.ops.attention_tpu import Targets, band_block, key_specs, target_specs
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.encoder_kernels import Unencoded
from stca_jax.ops.kernels import Inputs, Kernels, Outcome
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
        incoming = encoder_tpu.of_array(unencoded, d_encoded)
        return encoder_tpu.encode_backward(unencoded, incoming, self.interpret)

    def forward(self, tiling: Tiling, inputs: Inputs) -> tuple[Array, Array]:
        """See `Kernels`."""
        _check_vmem(tiling, inputs)
        kernel = functools.partial(attention_tpu.forward_kernel, tile=tiling.history)
        output, log_sum_exp = self._attention(
            kernel, "target_to_history_forward", tiling, inputs, inputs.history,
            key_specs(tiling, inputs), [], [],
        )  # fmt: skip
        return output, log_sum_exp

    def layer_forward(
        self, tiling: Tiling, inputs: Inputs, unencoded: Unencoded, keep: bool
    ) -> tuple[Array, Array, Array | None]:
        """See `Kernels`: with one target tile to a row, tokens are encoded where they are read."""
        encoder, tokens, covered = unencoded
        fits = attention_tpu.fits_layer(tiling, inputs, encoder)
        if tiling.target_tiles_per_row > 1 or not fits:
            return super().layer_forward(tiling, inputs, unencoded, keep)
        _check_vmem(tiling, inputs)  # for the backward pass too
        (R, L, _), D, tile = covered.shape, tokens.shape[-1], tiling.history
        weights = encoder_tpu.weights_of(encoder, tokens.dtype)
        kept = [jax.ShapeDtypeStruct((R, 1, L, D), tokens.dtype)] * keep
        output, log_sum_exp, *key = self._attention(
            functools.partial(attention_tpu.layer_kernel, tile=tile, skip=encoder.skip),
            "history_layer_forward", tiling, inputs,
            (encoder_tpu.by_tile(covered, tile), tokens, *weights),
            [band_block(tiling, 1, 1, tile), band_block(tiling, tile, D),
             *map(encoder_tpu.whole, weights)],
            kept, [band_block(tiling, tile, D, group=True)] * keep,
        )  # fmt: skip
        return output, log_sum_exp, key[0] if keep else None

    def _attention(
        self, kernel: Any, name: str, tiling: Tiling, inputs: Inputs, arrays: Sequence[Array],
        specs: list[Any], results: list[Any], result_specs: list[Any],
    ) -> Sequence[Array]:  # fmt: skip
        """Weighted sums and log-sum-exps of the target tiles, and other results.

        Args:
          kernel: Of `attention_tpu`.
          name: In profiles.
          tiling: How the batch is cut.
          inputs: Of the target tiles.
          arrays: Of the history.
          specs: Their blocks.
          results: Shapes of other results.
          result_specs: Their blocks.
        """
        J, G, E, C = inputs.query.shape
        spec = target_specs(E, C)
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(J, G, tiling.tiles_per_row),
                in_specs=[spec.row, spec.row, spec.wide, *specs],
                out_specs=[spec.wide, spec.head_row, *result_specs],
                scratch_shapes=[
                    pltpu.VMEM((1, C), jnp.float32),
                    pltpu.VMEM((1, C), jnp.float32),
                    pltpu.VMEM((E, C), jnp.float32),
                ],
            ),
            out_shape=[
                jax.ShapeDtypeStruct((J, G, E, C), jnp.float32),
                jax.ShapeDtypeStruct((J, G, 1, C), jnp.float32),
                *results,
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=self.interpret,
            name=name,
        )(inputs.first, inputs.last, inputs.start, inputs.end, inputs.query, *arrays)

    def backward(
        self, tiling: Tiling, inputs: Inputs, outcome: Outcome
    ) -> tuple[Array, tuple[Array, ...]]:
        """See `Kernels`."""
        d_query = self._query_gradients(tiling, inputs, outcome)
        return d_query, self._history_gradients(tiling, inputs, outcome)

    def layer_backward(
        self,
        tiling: Tiling,
        inputs: Inputs,
        unencoded: Unencoded,
        outcome: Outcome,
    ) -> tuple[Array, HistoryEncoder, Array]:
        """See `Kernels`: gradients of encoded tokens do not leave VMEM, where there is room."""
        incoming = attention_tpu.of_attention(tiling, inputs, unencoded, outcome)
        if incoming is None:
            return super().layer_backward(tiling, inputs, unencoded, outcome)
        return (
            self._query_gradients(tiling, inputs, outcome),
            *encoder_tpu.encode_backward(unencoded, incoming, self.interpret),
        )

    def _query_gradients(self, tiling: Tiling, inputs: Inputs, outcome: Outcome) -> Array:
        J, G, E, C = inputs.query.shape
        spec = target_specs(E, C)
        return pl.pallas_call(
            functools.partial(attention_tpu.query_kernel, tile=tiling.history),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(J, G, tiling.tiles_per_row),
                in_specs=[*spec.backward, *key_specs(tiling, inputs)],
                out_specs=spec.wide,
                scratch_shapes=[pltpu.VMEM((E, C), jnp.float32)],
            ),
            out_shape=jax.ShapeDtypeStruct((J, G, E, C), jnp.float32),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=self.interpret,
            name="target_to_history_backward_query",
        )(inputs.first, inputs.last, *Targets.of(inputs, outcome), *inputs.history)

    def _history_gradients(
        self, tiling: Tiling, inputs: Inputs, outcome: Outcome
    ) -> tuple[Array, ...]:
        history = inputs.history
        R, (_, G, E, C) = tiling.rows, inputs.query.shape
        per_row = tiling.target_tiles_per_row
        spec = target_specs(E, C, lambda r, g, i, j, *_: (r * per_row + j, g))
        block = pl.BlockSpec((1, 1, tiling.history, E), lambda r, g, i, j, *_: (r, g, i, 0))
        accumulator = pltpu.VMEM((tiling.history, E), jnp.float32)
        d_history = pl.pallas_call(
            functools.partial(attention_tpu.key_kernel, tile=tiling.history, tiles_per_row=per_row),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(R, G, tiling.tiles_per_row, per_row),
                in_specs=[*spec.backward, *[block] * len(history)],
                out_specs=[block] * len(history),
                scratch_shapes=[accumulator] * len(history),
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in history],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
            ),
            interpret=self.interpret,
            name="target_to_history_backward_key",
        )(inputs.first, inputs.last, *Targets.of(inputs, outcome), *history)
        return tuple(d_history)


def _check_vmem(tiling: Tiling, inputs: Inputs) -> None:
    E, C = inputs.query.shape[2:]
    wide, lanes = (-(-x // _LANES) * _LANES for x in (E, C))
    size = inputs.query.dtype.itemsize
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
