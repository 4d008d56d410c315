"""What the kernels of Hopper GPUs are made of: products of the tensor cores, and their operands.

A program is one warp group.  It multiplies matrices in shared memory, and its sums stay in
registers; the left operand may lie in registers as well.  The interpreter does not know these
products, and multiplies what it reads instead: everything else is one source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

# Rows of the smallest product, and columns of bfloat16 that a row of swizzled memory has.
TILE = 64


class Turned(NamedTuple):
    """The transpose of a matrix in shared memory, which is not moved for it."""

    ref: Any


class Products(NamedTuple):
    """Matrix products, summed in float32.

    Attributes:
      interpret: Whether the kernel is interpreted.
    """

    interpret: bool

    def product(self, *pairs: tuple[Any, Any]) -> Float[Array, "m n"]:
        """Sum of a b: b in shared memory, a there or in registers."""
        if self.interpret:
            return sum(_multiplied(a, b) for a, b in pairs)  # type: ignore[return-value]
        left, right = (_on_device(x) for x in pairs[0])

        def multiply(sums: Any) -> Array:
            for a, b in pairs:
                plgpu.wgmma(sums, _on_device(a), _on_device(b))
            return sums[...]

        return pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))

    def add(self, sums: Float[Array, "m n"], *pairs: tuple[Any, Any]) -> Float[Array, "m n"]:
        """`sums` and the product."""
        if self.interpret:
            return sums + self.product(*pairs)

        def multiply(ref: Any) -> None:
            for a, b in pairs:
                plgpu.wgmma(ref, _on_device(a), _on_device(b))

        return pl.run_state(multiply)(plgpu.ACC.init(sums))


def _on_device(x: Any) -> Any:
    return x.ref.transpose((1, 0)) if isinstance(x, Turned) else x


def _multiplied(a: Any, b: Any) -> Array:
    a, b = (x.ref[...].T if isinstance(x, Turned) else x[...] for x in (a, b))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def along_rows(x: Float[Array, " m"], shape: Sequence[int]) -> Float[Array, "m n"]:
    """The number of each row, in all of its columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def along_columns(x: Float[Array, " n"], shape: Sequence[int]) -> Float[Array, "m n"]:
    """The number of each column, in all of its rows."""
    return lax.broadcast_in_dim(x, shape, (1,))


def layout(dtype: Any, side: int = TILE) -> tuple[Any, ...]:
    """How a matrix that is multiplied lies in shared memory: in tiles of so many columns.

    Both operands of a product lie in tiles of one size.
    """
    if jnp.dtype(dtype).itemsize != 2:
        return ()  # interpreted only
    return (plgpu.TilingTransform((8, side)), plgpu.SwizzleTransform(2 * side))


def matrix(rows: int, columns: int, dtype: Any, side: int = TILE) -> Any:
    """Shared memory of a matrix that is multiplied."""
    return plgpu.SMEM((rows, columns), dtype, transforms=layout(dtype, side))


def block(
    shape: tuple[int | None, ...], index: Callable[..., Any], transforms: tuple[Any, ...] = ()
) -> Any:
    """What a step of a `pipeline` reads; a matrix that is multiplied has a `layout`."""
    return plgpu.BlockSpec(shape, index, transforms=transforms)


def pipeline(
    body: Callable[..., Any], steps: Any, specs: Sequence[Any], carry: Any, *arrays: Any
) -> Any:
    """`body(step, *blocks, carry)` for each step; blocks of the next are fetched meanwhile.

    Args:
      body: Returns the new carry.
      steps: How many, at least 0; a number of the program.
      specs: Blocks of the arrays, by step.
      carry: The first one.
      *arrays: In global memory.
    """

    def step(indices: Any, *refs: Any) -> Any:
        *blocks, carry = refs
        carry = body(indices[0], *blocks, carry)
        plgpu.commit_smem()  # what was read of the blocks comes before they are written to again
        return carry

    run = plgpu.emit_pipeline(
        step, grid=(jnp.int32(steps),), in_specs=list(specs), max_concurrent_steps=2,
        init_carry=carry,
    )  # fmt: skip
    return run(*arrays)


def kernel(
    body: Callable[..., None], name: str, grid: dict[str, int], results: Any,
    scratch: Sequence[Any], interpret: Any,
) -> Callable[..., Any]:  # fmt: skip
    """A kernel whose body is called with its operands, results and scratch, all in order.

    Args:
      body: See above.
      name: In profiles, and in the compiled program.
      grid: Programs along each axis, by the name that `lax.axis_index` takes.
      results: Shapes and dtypes, one or a list.
      scratch: Shared memory and barriers.
      interpret: False, or parameters of the interpreter.
    """
    semantics = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    return plgpu.kernel(
        body, out_type=results, scratch_types=list(scratch), compiler_params=semantics,
        grid=tuple(grid.values()), grid_names=tuple(grid), interpret=interpret or None,
        kernel_name=name,
    )  # fmt: skip


def read(pairs: Sequence[tuple[Any, Any]], barrier: Any) -> None:
    """Copies to shared memory what is in global memory; `barrier` expects as many arrivals."""
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def write(value: Array, ref: Any, target: Any) -> None:
    """Stores a tile in global memory, by way of shared memory."""
    ref[...] = value.astype(ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(ref, target)
    plgpu.wait_smem_to_gmem(0)
