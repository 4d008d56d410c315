"""GPU kernels of the op (Triton): a target tile's band is shared out among many programs.

A batch has few target tiles, and each reads thousands of tokens: one program per tile would leave
most of the GPU idle.  The programs of a tile take equal shares of its band, and XLA merges their
partial softmaxes and adds their gradients of the queries.  No two programs write to the same place,
so there are no atomics and results are reproducible.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from stca_jax.ops import attention_triton, encoder_triton
from stca_jax.ops.attention_kernels import join_shares
from stca_jax.ops.attention_triton import band_specs, share_spec, shares
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.encoder_kernels import Unencoded
from stca_jax.ops.kernels import Inputs, Kernels, Outcome, compute_capability
from stca_jax.ops.tiles import BlockSizes, Tiling, target_bands
from stca_jax.ops.triton_cuts import attending_cut, cuts_for

# Sides of the smallest matrix product of the tensor cores that Triton offers.
_SMALLEST = 16


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a generation of GPUs offers the kernels.

    Attributes:
      shared_memory: Bytes of shared memory a program may have.
      multiprocessors: How many there are; each is given eight warps.
      columns: Most targets x heads of a tile, if tokens are at most 256 wide: what is summed for
        them has to stay in registers.
      attending_columns: Most of them for programs that encode tokens as well, at d = 64; of tokens
        twice as wide, half as many.
    """

    shared_memory: int
    multiprocessors: int
    columns: int
    attending_columns: int


# By compute capability.  With the default block sizes, powers of two as widths spill no register.
GPUS = {
    "8.0": Gpu(166_912, multiprocessors=108, columns=32, attending_columns=16),  # A100
    "9.0": Gpu(232_448, multiprocessors=132, columns=64, attending_columns=64),  # H100, H200
    "10.0": Gpu(232_448, multiprocessors=148, columns=32, attending_columns=32),  # B200
}
_OTHER_GPU = Gpu(101_376, multiprocessors=108, columns=32, attending_columns=16)


@dataclasses.dataclass(frozen=True)
class TritonKernels(Kernels):
    """`Kernels` of NVIDIA GPUs from Ampere (A100) on.

    Attributes:
      gpu: The GPU whose limits and block sizes hold; what fits an A100 fits an H100.
      interpret: Run on the CPU, by JAX's interpreter of Pallas.
      encodes: Encode the tokens too, where they can; without it, XLA does.
    """

    gpu: Gpu = GPUS["8.0"]
    interpret: bool = False
    encodes: bool = True

    @classmethod
    def here(cls) -> TritonKernels:
        """For this process's GPU; without one, for an A100, to be compiled elsewhere."""
        if jax.default_backend() != "gpu":
            return cls()
        return cls(GPUS.get(compute_capability(), _OTHER_GPU))

    @property
    def platform(self) -> str | None:
        """See `Kernels`."""
        return None if self.interpret else "cuda"

    def unavailable(self, platform: str) -> str | None:
        """See `Implementation`; a GPU that is not in this process is taken for a recent one."""
        reason = super().unavailable(platform)
        if reason or self.interpret or jax.default_backend() != "gpu":
            return reason
        capability = compute_capability()
        major = capability.split(".")[0]  # other makers' are no numbers
        if major.isdigit() and int(major) >= 8:
            return None
        return (
            'implementation="triton" needs an NVIDIA GPU of compute capability 8.0 or more; this '
            f'one has {capability}. Use implementation="xla"'
        )

    def default_block_sizes(self, heads_per_group: int, width: int, dtype: Any) -> BlockSizes:
        """See `Kernels`."""
        power = pl.next_power_of_2(width)
        if jnp.dtype(dtype).itemsize > 2:
            tokens, columns = 2048 // power, 16
        elif width == power <= 256:
            tokens, columns = 8192 // power, self.gpu.columns
        else:
            tokens, columns = 4096 // power, 32 if power <= 512 else 16
        return BlockSizes(
            history=min(max(tokens, _SMALLEST), 64), targets=max(1, columns // heads_per_group)
        )

    def padded_sizes(self, width: int, columns: int, history: int) -> tuple[int, int, int]:
        """See `Kernels`: Triton loads powers of two."""
        return (
            -(-width // _SMALLEST) * _SMALLEST,  # in parts, see `parts_of`
            max(_SMALLEST, pl.next_power_of_2(columns)),
            max(_SMALLEST, pl.next_power_of_2(history)),
        )

    def can_encode(self, encoder: HistoryEncoder, dtype: Any) -> bool:
        """See `Kernels`."""
        return self.encodes and cuts_for(len(encoder.up), dtype) is not None

    def encode(self, unencoded: Unencoded) -> Array:
        """See `Kernels`."""
        return encoder_triton.encode(encoder_triton.make_layer(unencoded, self.interpret))

    def encode_backward(
        self, unencoded: Unencoded, d_encoded: Array
    ) -> tuple[HistoryEncoder, Array]:
        """See `Kernels`: one program of 8 warps per multiprocessor for the weights' gradients."""
        layer = encoder_triton.make_layer(unencoded, self.interpret)
        incoming = encoder_triton.of_array(layer, d_encoded)
        return encoder_triton.encode_backward(layer, incoming, self.gpu.multiprocessors)

    def forward(self, tiling: Tiling, inputs: Inputs) -> tuple[Array, Array]:
        """See `Kernels`."""
        if reason := self.unavailable("gpu"):
            raise ValueError(reason)
        J, G, E, C = inputs.query.shape
        self._check_shared_memory(tiling.history, inputs)
        splits = self._splits(tiling.tiles_per_row, _warps(E), inputs)
        specs = band_specs(tiling, E, C)
        output, log_sum_exp = self._call(
            functools.partial(attention_triton.forward_kernel, tile=tiling.history),
            grid=(J, G, splits),
            in_specs=[*specs.ranges, specs.wide, *[specs.key] * len(inputs.history)],
            out_specs=[share_spec(E, C), share_spec(1, C)],
            out_shape=[shares(splits, J, G, E, C), shares(splits, J, G, 1, C)],
            name="target_to_history_forward",
        )(inputs.first, inputs.last, inputs.start, inputs.end, inputs.query, *inputs.history)
        return join_shares(output, log_sum_exp)

    def layer_forward(
        self, tiling: Tiling, inputs: Inputs, unencoded: Unencoded, keep: bool
    ) -> tuple[Array, Array, Array | None]:
        """See `Kernels`: with one target tile to a row, tokens are encoded where they are read."""
        encoder, tokens, covered = unencoded
        cut = attending_cut(
            len(encoder.up), inputs.query.shape[-1], tokens.dtype, self.gpu.attending_columns
        )
        if tiling.target_tiles_per_row > 1 or cut is None:
            return super().layer_forward(tiling, inputs, unencoded, keep)
        if reason := self.unavailable("gpu"):
            raise ValueError(reason)
        layer = encoder_triton.make_layer(unencoded, self.interpret)
        tile = layer.tile(cut)
        self._check_shared_memory(max(tile, tiling.history), inputs)  # for the backward pass too
        splits = self._splits(covered.shape[1] // tile, cut.warps, inputs)
        output, log_sum_exp, *kept = attention_triton.layer_forward(
            inputs, tiling, layer, cut, splits, keep
        )
        return *join_shares(output, log_sum_exp), kept[0] if keep else None

    def backward(
        self, tiling: Tiling, inputs: Inputs, outcome: Outcome
    ) -> tuple[Array, tuple[Array, ...]]:
        """See `Kernels`."""
        statistics = (outcome.log_sum_exp, outcome.delta, inputs.query, outcome.d_output)
        _, G, E, C = inputs.query.shape
        specs = attention_triton.history_specs(tiling, E, C)
        bands = target_bands(inputs.first, inputs.last, tiling, tiling.history)
        d_history = self._call(
            attention_triton.key_kernel,
            grid=(tiling.tiles_per_row, G, tiling.rows),
            in_specs=specs.backward(len(inputs.history)),
            out_specs=[specs.key] * len(inputs.history),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs.history],
            name="target_to_history_backward_key",
        )(*bands, inputs.start, inputs.end, *statistics, *inputs.history)
        return self._query_gradients(tiling, inputs, statistics), tuple(d_history)

    def layer_backward(
        self,
        tiling: Tiling,
        inputs: Inputs,
        unencoded: Unencoded,
        outcome: Outcome,
    ) -> tuple[Array, HistoryEncoder, Array]:
        """See `Kernels`: gradients of encoded tokens never reach memory."""
        statistics = (outcome.log_sum_exp, outcome.delta, inputs.query, outcome.d_output)
        layer = encoder_triton.make_layer(unencoded, self.interpret)
        self._check_shared_memory(layer.tile(layer.cuts.layer), inputs)
        incoming = attention_triton.of_attention(inputs, tiling, layer, statistics)
        return (
            self._query_gradients(tiling, inputs, statistics),
            *encoder_triton.encode_backward(layer, incoming, self.gpu.multiprocessors),
        )

    def _query_gradients(
        self, tiling: Tiling, inputs: Inputs, statistics: tuple[Array, ...]
    ) -> Array:
        J, G, E, C = inputs.query.shape
        splits = self._splits(tiling.tiles_per_row, _warps(E), inputs)
        d_query = self._call(
            functools.partial(attention_triton.query_kernel, tile=tiling.history),
            grid=(J, G, splits),
            in_specs=band_specs(tiling, E, C).backward(len(inputs.history)),
            out_specs=share_spec(E, C),
            out_shape=shares(splits, J, G, E, C),
            name="target_to_history_backward_query",
        )(inputs.first, inputs.last, inputs.start, inputs.end, *statistics, *inputs.history)
        return d_query.sum(0)

    def _splits(self, tiles: int, warps: int, inputs: Inputs) -> int:
        """How many programs share a band: 8 warps per multiprocessor, or one per history tile."""
        J, G = inputs.query.shape[:2]
        programs = self.gpu.multiprocessors * 8 // warps
        return min(tiles, -(-programs // (J * G)))

    def _check_shared_memory(self, t: int, inputs: Inputs) -> None:
        """For tiles of t tokens."""
        E, C = inputs.query.shape[2:]
        size = inputs.query.dtype.itemsize
        # Hopper's asynchronous products, which need 64 tokens, keep two tiles of each array.
        stages = 2 if t >= 64 and size == 2 else 1
        needed = size * (2 * E * C + stages * 2 * t * E + 3 * t * C) + 16 * C
        if needed > self.gpu.shared_memory:
            raise ValueError(
                f"blocks of {t} tokens x {C} targets and heads, width {E}, need about "
                f"{needed / 2**10:.0f} KiB of shared memory; a program has "
                f"{self.gpu.shared_memory / 2**10:.0f} KiB. Pass smaller block_sizes, or "
                'order="projected" for narrower tokens'
            )

    def _call(self, kernel: Callable[..., None], **options: Any) -> Callable[..., Any]:
        width = options["in_specs"][-1].block_shape[-1]
        params = plgpu.CompilerParams(num_warps=_warps(width), num_stages=2)
        return pl.pallas_call(kernel, compiler_params=params, interpret=self.interpret, **options)


def _warps(width: int) -> int:
    """Of a program for keys of that width."""
    return 4 if width <= 128 else 8
