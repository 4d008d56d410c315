"""GPU kernels of the op (Triton): a target tile's band is shared out among many programs.

A batch has few target tiles, and each reads thousands of tokens: one program per tile would leave
most of the GPU idle.  The programs of a tile take equal shares of its band, and XLA merges their
partial softmaxes and adds their gradients of the queries.  No two programs write to the same place,
so there are no atomics and results are reproducible.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from stca_jax.ops import encoder_triton
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.encoder_triton import parts_of
from stca_jax.ops.kernels import Inputs, Kernels, dot, mask_scores, score_gradients, softmax_step
from stca_jax.ops.tiled import LOWEST_PEAK, NO_SCORE
from stca_jax.ops.tiles import BlockSizes, Tiling

# Sides of the smallest matrix product of the tensor cores that Triton offers.
_SMALLEST = 16


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a generation of GPUs offers the kernels.

    Attributes:
      shared_memory: Bytes of shared memory a program may have.
      multiprocessors: How many there are; each runs about two programs.
      columns: Most targets x heads of a tile, if tokens are at most 256 wide: what is summed for
        them has to stay in registers.
    """

    shared_memory: int
    multiprocessors: int
    columns: int


# By compute capability.  With the default block sizes, powers of two as widths spill no register.
GPUS = {
    "8.0": Gpu(shared_memory=166_912, multiprocessors=108, columns=32),  # A100
    "9.0": Gpu(shared_memory=232_448, multiprocessors=132, columns=64),  # H100, H200
}
_OTHER_GPU = Gpu(shared_memory=101_376, multiprocessors=108, columns=32)


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
        return cls(GPUS.get(_compute_capability(), _OTHER_GPU))

    @property
    def platform(self) -> str | None:
        """See `Kernels`."""
        return None if self.interpret else "cuda"

    def unavailable(self, platform: str) -> str | None:
        """See `Implementation`; a GPU that is not in this process is taken for a recent one."""
        reason = super().unavailable(platform)
        if reason or self.interpret or jax.default_backend() != "gpu":
            return reason
        capability = _compute_capability()
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
        return self.encodes and encoder_triton.cuts_for(len(encoder.up), dtype) is not None

    def encode(self, encoder: HistoryEncoder, tokens: Array, covered: Array) -> Array:
        """See `Kernels`."""
        return encoder_triton.encode(
            encoder_triton.make_layer(encoder, tokens, covered, self.interpret)
        )

    def encode_backward(
        self, encoder: HistoryEncoder, tokens: Array, covered: Array, d_encoded: Array
    ) -> tuple[HistoryEncoder, Array]:
        """See `Kernels`: two programs per multiprocessor share the weights' gradients."""
        layer = encoder_triton.make_layer(encoder, tokens, covered, self.interpret)
        return encoder_triton.encode_backward(layer, d_encoded, 2 * self.gpu.multiprocessors)

    def forward(self, tiling: Tiling, inputs: Inputs) -> tuple[Array, Array]:
        """See `Kernels`."""
        if reason := self.unavailable("gpu"):
            raise ValueError(reason)
        J, G, E, C = inputs.query.shape
        self._check_shared_memory(tiling, inputs)
        splits = self._splits(tiling, J * G)
        specs = _band_specs(tiling, E, C)
        output, log_sum_exp = self._call(
            functools.partial(_forward_kernel, tile=tiling.history),
            grid=(J, G, splits),
            in_specs=[*specs.ranges, specs.wide, *[specs.key] * len(inputs.history)],
            out_specs=[_share_spec(E, C), _share_spec(1, C)],
            out_shape=[_shares(splits, J, G, E, C), _shares(splits, J, G, 1, C)],
            name="target_to_history_forward",
        )(inputs.first, inputs.last, inputs.start, inputs.end, inputs.query, *inputs.history)
        joined = jax.nn.logsumexp(log_sum_exp, axis=0)
        output = (output * jnp.exp(log_sum_exp - joined)).sum(0)
        return output, jnp.where(joined > LOWEST_PEAK, joined, 0)

    def backward(
        self, tiling: Tiling, inputs: Inputs, d_output: Array, log_sum_exp: Array, delta: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        """See `Kernels`."""
        J, G, E, C = inputs.query.shape
        splits = self._splits(tiling, J * G)
        arguments = (inputs.start, inputs.end, log_sum_exp, delta, inputs.query, d_output,
                     *inputs.history)  # fmt: skip
        arrays = len(inputs.history)
        specs = _band_specs(tiling, E, C)
        d_query = self._call(
            functools.partial(_query_kernel, tile=tiling.history),
            grid=(J, G, splits),
            in_specs=specs.backward(arrays),
            out_specs=_share_spec(E, C),
            out_shape=_shares(splits, J, G, E, C),
            name="target_to_history_backward_query",
        )(inputs.first, inputs.last, *arguments)
        specs = _history_specs(tiling, E, C)
        d_history = self._call(
            _key_kernel,
            grid=(tiling.tiles_per_row, G, tiling.rows),
            in_specs=specs.backward(arrays),
            out_specs=[specs.key] * arrays,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs.history],
            name="target_to_history_backward_key",
        )(*_target_bands(inputs.first, inputs.last, tiling), *arguments)
        return d_query.sum(0), tuple(d_history)

    def _splits(self, tiling: Tiling, programs: int) -> int:
        """How many programs share a band: two per multiprocessor, or one per history tile."""
        return min(tiling.tiles_per_row, -(-2 * self.gpu.multiprocessors // programs))

    def _check_shared_memory(self, tiling: Tiling, inputs: Inputs) -> None:
        E, C = inputs.query.shape[2:]
        t, size = tiling.history, inputs.key.dtype.itemsize
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
        params = plgpu.CompilerParams(num_warps=4 if width <= 128 else 8, num_stages=2)
        return pl.pallas_call(kernel, compiler_params=params, interpret=self.interpret, **options)


def _compute_capability() -> str:
    return str(getattr(jax.local_devices()[0], "compute_capability", "unknown"))


@dataclasses.dataclass(frozen=True)
class _Specs:
    """Blocks of the kernels' inputs.

    Attributes:
      ranges: Of the band's two ends, then of `start` and `end`.
      row: Of a number per target and head: log-sum-exp or delta.
      wide: Of queries, or gradients of outputs.
      key: Of keys or values.
    """

    ranges: list[pl.BlockSpec]
    row: pl.BlockSpec
    wide: pl.BlockSpec
    key: pl.BlockSpec

    def backward(self, arrays: int) -> list[pl.BlockSpec]:
        """Of all inputs of a backward kernel, of them one or two of keys and values."""
        return [*self.ranges, self.row, self.row, self.wide, self.wide, *[self.key] * arrays]


def _band_specs(tiling: Tiling, E: int, C: int) -> _Specs:
    """One target tile and its whole row of history; grid (target tile, group, share)."""

    def key(j: Any, g: Any, s: Any) -> tuple[Any, ...]:
        return lax.div(j, jnp.int32(tiling.target_tiles_per_row)), g, 0, 0

    length = tiling.tiles_per_row * tiling.history
    band = pl.BlockSpec((1,), lambda j, g, s: (j,))
    span = pl.BlockSpec((None, 1, C), lambda j, g, s: (j, 0, 0))
    return _Specs(
        ranges=[band, band, span, span],
        row=pl.BlockSpec((None, None, 1, C), lambda j, g, s: (j, g, 0, 0)),
        wide=pl.BlockSpec((None, None, E, C), lambda j, g, s: (j, g, 0, 0)),
        key=pl.BlockSpec((None, None, length, E), key),
    )


def _history_specs(tiling: Tiling, E: int, C: int) -> _Specs:
    """One history tile and all target tiles of its row; grid (history tile, group, row)."""
    per_row = tiling.target_tiles_per_row
    band = pl.BlockSpec((1, 1), lambda i, g, r: (r, i))
    span = pl.BlockSpec((per_row, 1, C), lambda i, g, r: (r, 0, 0))
    return _Specs(
        ranges=[band, band, span, span],
        row=pl.BlockSpec((per_row, None, 1, C), lambda i, g, r: (r, g, 0, 0)),
        wide=pl.BlockSpec((per_row, None, E, C), lambda i, g, r: (r, g, 0, 0)),
        key=pl.BlockSpec((None, None, tiling.history, E), lambda i, g, r: (r, g, i, 0)),
    )


def _share_spec(*block: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, *block), lambda j, g, s: (s, j, g, 0, 0))


def _shares(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _target_bands(
    first: Int[Array, " J"], last: Int[Array, " J"], tiling: Tiling
) -> tuple[Int[Array, "R tiles"], Int[Array, "R tiles"]]:
    """First and one past the last target tile of the row that need each history tile."""
    tile = jnp.arange(tiling.tiles_per_row)
    needs = (first[:, None] <= tile) & (tile < last[:, None])
    needs = needs.reshape(tiling.rows, tiling.target_tiles_per_row, -1)
    after_last = needs.shape[1] - needs[:, ::-1].argmax(1)
    return (
        needs.argmax(1).astype(jnp.int32),
        jnp.where(needs.any(1), after_last, 0).astype(jnp.int32),
    )


def _share(first: Any, last: Any) -> tuple[Array, Array]:
    """This program's tiles of the band."""
    most = pl.cdiv(jnp.maximum(last - first, 0), pl.num_programs(2))
    begin = first + pl.program_id(2) * most
    return begin, jnp.minimum(begin + most, last)


def _keys_and_values(
    history: Sequence[Any], tokens: Any, parts: list[slice]
) -> tuple[list[Array], list[Array]]:
    """A tile of each of `Inputs.history`, in parts."""
    loaded = [[x[tokens, p] for p in parts] for x in history]
    return loaded[0], loaded[-1]


def _product(a: list[Array], b: list[Array]) -> Any:
    """[t, C] product of keys or values [t, E] with [E, C], both in parts of E."""
    return sum(dot(x, y, 1, 0) for x, y in zip(a, b, strict=True))


def _add_products(summed: list[Array], a: Array, b: list[Array]) -> list[Array]:
    """Adds the [t, E] product of [t, C] with [E, C], in parts of E."""
    return [x + dot(a, y, 1, 1) for x, y in zip(summed, b, strict=True)]


def _forward_kernel(first, last, start, end, query, *refs, tile):
    *history, output, log_sum_exp = refs
    parts = parts_of(query.shape[0])
    queries = [query[p, :] for p in parts]
    ranges = start[...], end[...]
    C = query.shape[1]

    def step(i, carry):
        peak, total, *summed = carry
        tokens = pl.ds(i * tile, tile)
        score = _product([history[0][tokens, p] for p in parts], queries)
        score = mask_scores(score, *ranges, i * tile)
        weight, rescale, peak, total = softmax_step(score, peak, total)
        weight = weight.astype(query.dtype)
        summed = [
            x * rescale + dot(history[-1][tokens, p], weight, 0, 0)
            for x, p in zip(summed, parts, strict=True)
        ]
        return peak, total, *summed

    row = (1, C)
    peak, total, *summed = lax.fori_loop(
        *_share(first[0], last[0]),
        step,
        (
            jnp.full(row, LOWEST_PEAK, jnp.float32),
            jnp.zeros(row, jnp.float32),
            *(jnp.zeros(q.shape, jnp.float32) for q in queries),
        ),
    )
    nonempty = total > 0
    safe_total = jnp.where(nonempty, total, 1)
    for p, x in zip(parts, summed, strict=True):
        output[p, :] = x / safe_total
    log_sum_exp[...] = jnp.where(nonempty, peak + jnp.log(safe_total), NO_SCORE)


def _query_kernel(first, last, start, end, log_sum_exp, delta, query, d_output, *refs, tile):
    *history, d_query = refs
    parts = parts_of(query.shape[0])
    queries = [query[p, :] for p in parts]
    d_outputs = [d_output[p, :] for p in parts]
    ranges, statistics = (start[...], end[...]), (log_sum_exp[...], delta[...])

    def step(i, summed):
        keys, values = _keys_and_values(history, pl.ds(i * tile, tile), parts)
        score = mask_scores(_product(keys, queries), *ranges, i * tile)
        _, d_score = score_gradients(score, _product(values, d_outputs), *statistics)
        d_score = d_score.astype(query.dtype)
        return [x + dot(k, d_score, 0, 0) for x, k in zip(summed, keys, strict=True)]

    zeros = [jnp.zeros(q.shape, jnp.float32) for q in queries]
    summed = lax.fori_loop(*_share(first[0], last[0]), step, zeros)
    for p, x in zip(parts, summed, strict=True):
        d_query[p, :] = x


def _key_kernel(first, last, start, end, log_sum_exp, delta, query, d_output, *refs):
    history, d_history = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    tile = history[0].shape[0]
    parts = parts_of(query.shape[1])
    keys, values = _keys_and_values(history, slice(None), parts)
    position = pl.program_id(0) * tile

    def step(j, sums):
        queries, d_outputs = ([x[j, p, :] for p in parts] for x in (query, d_output))
        score = mask_scores(_product(keys, queries), start[j], end[j], position)
        # Held for the whole loop, float32 values would spill registers, were they the keys as well.
        read = values if query.dtype != jnp.float32 else [history[-1][:, p] for p in parts]
        factors = score_gradients(score, _product(read, d_outputs), log_sum_exp[j], delta[j])
        weight, d_score = (x.astype(query.dtype) for x in factors)
        return [
            _add_products(s, *x)
            for s, x in zip(sums, ((d_score, queries), (weight, d_outputs)), strict=True)
        ]

    zeros = [jnp.zeros(k.shape, jnp.float32) for k in keys]
    sums = lax.fori_loop(first[0, 0], last[0, 0], step, [zeros] * 2)
    if len(history) == 1:  # keys are the values: both gradients are of one array
        sums = [[x + y for x, y in zip(*sums, strict=True)]]
    for d_ref, summed in zip(d_history, sums, strict=True):
        for p, x in zip(parts, summed, strict=True):
            d_ref[:, p] = x.astype(d_ref.dtype)
