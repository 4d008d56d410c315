"""GPU kernels of the op for Hopper, by Pallas' Mosaic GPU: what follows its deprecated Triton."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.kernels import Inputs, Kernels, Outcome, Unencoded, compute_capability
from stca_jax.ops.tiles import BlockSizes, Tiling

_TILE = 64  # rows of the smallest product of the tensor cores
_WIDEST = 256  # columns of the largest
_WIDEST_ENCODED = 128  # what a program holds of wider tokens does not fit its registers
_SHARED_MEMORY = 232_448  # bytes


@dataclasses.dataclass(frozen=True)
class HopperKernels(Kernels):
    """`Kernels` of NVIDIA's H100 and H200, for bfloat16.

    Attributes:
      interpret: False, or parameters of JAX's interpreter, which takes float32 as well.
      encodes: Encode the tokens too, where they can; without it, XLA does.
      multiprocessors: How many the GPU has; each is given two programs.
    """

    interpret: Any = False
    encodes: bool = True
    multiprocessors: int = 132

    @property
    def platform(self) -> str | None:
        """See `Kernels`."""
        return None if self.interpret else "cuda"

    def unavailable(self, platform: str) -> str | None:
        """See `Implementation`; a GPU that is not in this process is taken for a Hopper."""
        reason = super().unavailable(platform)
        if reason or self.interpret or jax.default_backend() != "gpu":
            return reason
        capability = compute_capability()
        if capability == "9.0":
            return None
        return (
            'implementation="mosaic_gpu" needs an H100 or H200, of compute capability 9.0; this '
            f'GPU has {capability}. Use implementation="triton" or "xla"'
        )

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
        encoder = _imported("encoder")
        return encoder.encode(encoder.make_layer(unencoded, self.interpret))

    def encode_backward(
        self, unencoded: Unencoded, d_encoded: Array
    ) -> tuple[HistoryEncoder, Array]:
        """See `Kernels`."""
        encoder = _imported("encoder")
        layer = encoder.make_layer(unencoded, self.interpret)
        incoming = encoder.of_array(layer, d_encoded)
        return encoder.encode_backward(layer, incoming, 2 * self.multiprocessors)

    def forward(self, tiling: Tiling, inputs: Inputs) -> tuple[Array, Array]:
        """See `Kernels`."""
        return _imported("attention").forward(self._kernel(tiling, inputs), inputs)

    def backward(
        self, tiling: Tiling, inputs: Inputs, outcome: Outcome
    ) -> tuple[Array, tuple[Array, ...]]:
        """See `Kernels`."""
        attention, kernel = _imported("attention"), self._kernel(tiling, inputs)
        d_history = attention.history_gradients(kernel, inputs, outcome)
        return attention.query_gradients(kernel, inputs, outcome), d_history

    def layer_backward(
        self, tiling: Tiling, inputs: Inputs, unencoded: Unencoded, outcome: Outcome
    ) -> tuple[Array, HistoryEncoder, Array]:
        """See `Kernels`: gradients of encoded tokens never reach memory."""
        attention, encoder = _imported("attention"), _imported("encoder")
        kernel = self._kernel(tiling, inputs)
        layer = encoder.make_layer(unencoded, self.interpret)
        incoming = attention.of_attention(kernel, layer, inputs, outcome)
        return (
            attention.query_gradients(kernel, inputs, outcome),
            *encoder.encode_backward(layer, incoming, 2 * self.multiprocessors),
        )

    def _kernel(self, tiling: Tiling, inputs: Inputs) -> Any:
        if reason := self.unavailable("gpu"):
            raise ValueError(reason)
        self._check(tiling, inputs)
        J, G = inputs.query.shape[:2]
        shares = min(tiling.tiles_per_row, -(-2 * self.multiprocessors // (J * G)))
        return _imported("attention").kernel_of(tiling, inputs, shares, self.interpret)

    def _check(self, tiling: Tiling, inputs: Inputs) -> None:
        t, (E, C), dtype = tiling.history, inputs.query.shape[2:], inputs.key.dtype
        if not self.interpret and dtype != jnp.bfloat16:
            raise ValueError(
                f'implementation="mosaic_gpu" takes bfloat16, not {jnp.dtype(dtype).name}, which '
                'its tensor cores would round. Use implementation="triton"'
            )
        # Queries and gradients of outputs, sums, and two stages of keys and values.
        needed = 2 * 2 * E * C + 4 * E * C + 2 * 2 * len(inputs.history) * t * E
        if E > _WIDEST or t > _WIDEST or needed > _SHARED_MEMORY:
            raise ValueError(
                f"blocks of {t} tokens x {C} targets and heads, width {E}, need about "
                f"{needed / 2**10:.0f} KiB of shared memory; a program has "
                f"{_SHARED_MEMORY / 2**10:.0f} KiB, and products of at most {_WIDEST} columns. "
                'Pass smaller block_sizes, order="projected" for narrower tokens, or '
                'implementation="triton"'
            )


def _imported(part: str) -> Any:
    """Late: this takes a tenth of a second, and not every build of JAX has it."""
    return importlib.import_module(f"stca_jax.ops.{part}_mosaic_gpu")
