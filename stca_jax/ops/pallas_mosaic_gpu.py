"""GPU kernels of the op by Pallas' Mosaic GPU: what follows its deprecated Triton."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.encoder_kernels import Unencoded
from stca_jax.ops.kernels import Inputs, Kernels, Outcome, compute_capability
from stca_jax.ops.tiles import BlockSizes, Tiling

_TILE = 64  # rows of the smallest product of the tensor cores
_WIDEST = 256  # columns of the largest
_WIDEST_ENCODED = 128  # what a program holds of wider tokens does not fit its registers


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the kernels have to know of a GPU.

    Attributes:
      generation: How it multiplies, see `mosaic_gpu.Generation`.
      shared_memory: Bytes of shared memory a program may have.
      multiprocessors: How many there are; each is given two programs.
      rows: Most of a product.
    """

    generation: Literal["Ampere", "Hopper", "Blackwell"]
    shared_memory: int
    multiprocessors: int
    rows: int = _WIDEST


# By compute capability.
GPUS = {
    "8.0": Gpu("Ampere", 166_912, 108),  # A100
    "8.6": Gpu("Ampere", 101_376, 84),  # A40, RTX 3090
    "8.9": Gpu("Ampere", 101_376, 142),  # L40S, RTX 4090
    "9.0": Gpu("Hopper", 232_448, 132),  # H100, H200
    "10.0": Gpu("Blackwell", 232_448, 148, rows=128),  # B200
    "10.3": Gpu("Blackwell", 232_448, 148, rows=128),  # B300
}


@dataclasses.dataclass(frozen=True)
class MosaicGpuKernels(Kernels):
    """`Kernels` of NVIDIA GPUs from Ampere (A100) on, for bfloat16.

    Attributes:
      gpu: The GPU whose instructions and limits hold.
      interpret: False, or parameters of JAX's interpreter, which takes float32 as well.
      encodes: Encode the tokens too, where they can; without it, XLA does.
    """

    gpu: Gpu = GPUS["9.0"]
    interpret: Any = False
    encodes: bool = True

    @classmethod
    def here(cls) -> MosaicGpuKernels:
        """For this process's GPU; without one, for an H100, to be compiled elsewhere."""
        if jax.default_backend() != "gpu":
            return cls()
        return cls(GPUS.get(compute_capability(), GPUS["9.0"]))

    @property
    def platform(self) -> str | None:
        """See `Kernels`."""
        return None if self.interpret else "cuda"

    def unavailable(self, platform: str) -> str | None:
        """See `Implementation`; a GPU that is not in this process is taken for a known one."""
        reason = super().unavailable(platform)
        if reason or self.interpret:
            return reason
        is_here = jax.default_backend() == "gpu"
        if is_here and (capability := compute_capability()) not in GPUS:
            return (
                'implementation="mosaic_gpu" needs a GPU of compute capability '
                f"{', '.join(GPUS)}; this one has {capability}. "
                'Use implementation="triton" or "xla"'
            )
        if self.gpu.generation == "Ampere" and not _has_register_products():
            return (
                'implementation="mosaic_gpu" needs JAX 0.12 or later for the products of an '
                f'{self.gpu.generation}; this is {jax.__version__}. Use implementation="triton"'
            )
        return None

    def default_block_sizes(self, heads_per_group: int, width: int, dtype: Any) -> BlockSizes:
        """See `Kernels`: the smallest tiles of the tensor cores."""
        del width, dtype
        return BlockSizes(history=_TILE, targets=max(1, _TILE // heads_per_group))

    def padded_sizes(self, width: int, columns: int, history: int) -> tuple[int, int, int]:
        """See `Kernels`: whole tiles of the tensor cores."""
        width, columns, history = (-(-x // _TILE) * _TILE for x in (width, columns, history))
        return width, columns, history

    def can_encode(self, encoder: HistoryEncoder, dtype: Any) -> bool:
        """See `Kernels`."""
        known = ("bfloat16", "float32") if self.interpret else ("bfloat16",)
        is_known = jnp.dtype(dtype).name in known
        return self.encodes and is_known and len(encoder.up) <= _WIDEST_ENCODED

    def encode(self, unencoded: Unencoded) -> Array:
        """See `Kernels`."""
        encoder = _imported("encoder_mosaic_gpu")
        return encoder.encode(encoder.make_layer(unencoded, self._generation))

    def encode_backward(
        self, unencoded: Unencoded, d_encoded: Array
    ) -> tuple[HistoryEncoder, Array]:
        """See `Kernels`."""
        encoder = _imported("encoder_mosaic_gpu")
        layer = encoder.make_layer(unencoded, self._generation)
        incoming = encoder.of_array(layer, d_encoded)
        return encoder.encode_backward(layer, incoming, 2 * self.gpu.multiprocessors)

    def forward(self, tiling: Tiling, inputs: Inputs) -> tuple[Array, Array]:
        """See `Kernels`."""
        return _imported("attention_mosaic_gpu").forward(self._kernel(tiling, inputs), inputs)

    def backward(
        self, tiling: Tiling, inputs: Inputs, outcome: Outcome
    ) -> tuple[Array, tuple[Array, ...]]:
        """See `Kernels`."""
        attention, kernel = _imported("attention_mosaic_gpu"), self._kernel(tiling, inputs)
        d_history = attention.history_gradients(kernel, inputs, outcome)
        return attention.query_gradients(kernel, inputs, outcome), d_history

    def layer_forward(
        self, tiling: Tiling, inputs: Inputs, unencoded: Unencoded, keep: bool
    ) -> tuple[Array, Array, Array | None]:
        """See `Kernels`: with one target tile to a row, tokens are encoded where they are read."""
        if tiling.target_tiles_per_row > 1 or not self._fits_layer(tiling, inputs):
            return super().layer_forward(tiling, inputs, unencoded, keep)
        kernel = self._kernel(tiling, inputs)
        layer = _imported("encoder_mosaic_gpu").make_layer(unencoded, self._generation)
        return _imported("attention_mosaic_gpu").layer_forward(kernel, layer, inputs, keep)

    def layer_backward(
        self, tiling: Tiling, inputs: Inputs, unencoded: Unencoded, outcome: Outcome
    ) -> tuple[Array, HistoryEncoder, Array]:
        """See `Kernels`: gradients of encoded tokens never reach memory."""
        attention, encoder = _imported("attention_mosaic_gpu"), _imported("encoder_mosaic_gpu")
        kernel = self._kernel(tiling, inputs)
        layer = encoder.make_layer(unencoded, self._generation)
        incoming = attention.of_attention(kernel, layer, inputs, outcome)
        return (
            attention.query_gradients(kernel, inputs, outcome),
            *encoder.encode_backward(layer, incoming, 2 * self.gpu.multiprocessors),
        )

    @functools.cached_property
    def _generation(self) -> Any:
        return getattr(_imported("mosaic_gpu"), self.gpu.generation)(self.interpret)

    def _kernel(self, tiling: Tiling, inputs: Inputs) -> Any:
        if reason := self.unavailable("gpu"):
            raise ValueError(reason)
        self._check(tiling, inputs)
        J, G = inputs.query.shape[:2]
        shares = min(tiling.tiles_per_row, -(-2 * self.gpu.multiprocessors // (J * G)))
        return _imported("attention_mosaic_gpu").kernel_of(tiling, inputs, shares, self._generation)

    def _fits_layer(self, tiling: Tiling, inputs: Inputs) -> bool:
        """Whether a program has room for weights and sums, beside those of attention."""
        E, C = inputs.query.shape[2:]
        weights, tokens, copies = 2 * 3 * E * _TILE, 3 * _TILE * E, _TILE * (_TILE + C)
        needed = 2 * (weights + tokens + copies + E * C) + 4 * E * C
        fits = E * C <= _TILE * _TILE and needed <= self.gpu.shared_memory
        return fits and tiling.history == _TILE

    def _check(self, tiling: Tiling, inputs: Inputs) -> None:
        t, (E, C), dtype = tiling.history, inputs.query.shape[2:], inputs.query.dtype
        if not self.interpret and dtype != jnp.bfloat16:
            raise ValueError(
                f'implementation="mosaic_gpu" takes bfloat16, not {jnp.dtype(dtype).name}, which '
                'its tensor cores would round. Use implementation="triton"'
            )
        # Queries and gradients of outputs, sums, and two stages of keys and values.
        needed = 2 * 2 * E * C + 4 * E * C + 2 * 2 * inputs.arrays * t * E
        gpu = self.gpu
        if E > _WIDEST or max(t, C) > gpu.rows or needed > gpu.shared_memory:
            raise ValueError(
                f"blocks of {t} tokens x {C} targets and heads, width {E}, need about "
                f"{needed / 2**10:.0f} KiB of shared memory; a program has "
                f"{gpu.shared_memory / 2**10:.0f} KiB, and products of at most {_WIDEST} columns "
                f"and {gpu.rows} rows. "
                'Pass smaller block_sizes, order="projected" for narrower tokens, or '
                'implementation="triton"'
            )


def _has_register_products() -> bool:
    return hasattr(importlib.import_module("jax.experimental.pallas.mosaic_gpu"), "mma")


def _imported(part: str) -> Any:
    """Late: this takes a tenth of a second, and not every build of JAX has it."""
    return importlib.import_module(f"stca_jax.ops.{part}")
