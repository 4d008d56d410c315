"""What Mosaic's GPU kernels are made of: products of the tensor cores, and their operands.

A program is one warp group.  It multiplies matrices in shared memory, and what it computes
otherwise is in registers.  Generations of GPUs differ in how they multiply and move tiles; kernels
are written once, in terms of a `Generation`.  The interpreter of older versions of JAX does not
know the products, so interpreted kernels multiply what they read instead.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

_newest: Any = plgpu  # has more than the oldest JAX that this package runs on

# Rows of the smallest product, and columns of bfloat16 that a row of swizzled memory has.
TILE = 64


class Turned(NamedTuple):
    """The transpose of a matrix in shared memory, which is not moved for it."""

    ref: Any


@dataclasses.dataclass(frozen=True)
class Generation(abc.ABC):
    """How GPUs of one generation multiply, read and write.

    Attributes:
      interpret: False, or parameters of JAX's interpreter.
    """

    interpret: Any

    def product(self, *pairs: tuple[Any, Any]) -> Float[Array, "m n"]:
        """Sum of a b in float32: b in shared memory, a there or in registers."""
        if not self.multiplies:
            return sum(_multiplied(a, b) for a, b in pairs)  # type: ignore[return-value]
        return self._sum(None, pairs)

    def add(self, sums: Float[Array, "m n"], *pairs: tuple[Any, Any]) -> Float[Array, "m n"]:
        """`sums` and the product."""
        return self._sum(sums, pairs) if self.multiplies else sums + self.product(*pairs)

    @property
    def multiplies(self) -> bool:
        """Whether its products run; the interpreter does not know all of them."""
        return not self.interpret

    @abc.abstractmethod
    def _sum(self, sums: Array | None, pairs: Sequence[tuple[Any, Any]]) -> Array:
        """The product, and `sums` if there are any."""

    def _copies(self, pairs: Sequence[tuple[Any, Any]]) -> list[Any]:
        """Shared memory for the left operands that are in registers."""
        held = [a for a, _ in pairs if isinstance(a, jax.Array)]
        return [self.matrix(a.shape[0], a.shape[1], a.dtype) for a in held]

    def _in_shared_memory(
        self, pairs: Sequence[tuple[Any, Any]], copies: Sequence[Any]
    ) -> list[tuple[Any, Any]]:
        """Left operands that are in registers are copied."""
        free, operands = list(copies), []
        for a, b in pairs:
            if isinstance(a, jax.Array):
                free[0][...] = a
                a = free.pop(0)
            operands.append((_on_device(a), _on_device(b)))
        if copies:
            self.commit()
        return operands

    def side(self, columns: int) -> int:
        """Columns of a tile of shared memory, for matrices of at least so many."""
        return min(columns, TILE)

    def layout(self, dtype: Any, columns: int = TILE) -> tuple[Any, ...]:
        """How a matrix of at least so many columns, that is multiplied, lies in shared memory.

        Both operands of a product lie in tiles of one size.
        """
        if jnp.dtype(dtype).itemsize != 2:
            return ()  # interpreted only
        side = self.side(columns)
        return (plgpu.TilingTransform((8, side)), plgpu.SwizzleTransform(2 * side))

    def matrix(self, rows: int, columns: int, dtype: Any, least: int = TILE) -> Any:
        """Shared memory of a matrix that is multiplied; `least` as for `layout`."""
        return plgpu.SMEM((rows, columns), dtype, transforms=self.layout(dtype, least))

    def block(
        self, shape: tuple[int | None, ...], index: Callable[..., Any], transforms: Any = ()
    ) -> Any:
        """What a step of a `pipeline` reads; a matrix that is multiplied has a `layout`."""
        return plgpu.BlockSpec(shape, index, transforms=transforms)

    def pipeline(
        self, body: Callable[..., Any], steps: Any, specs: Sequence[Any], carry: Any, *arrays: Any
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
            self.commit()  # what was read of the blocks comes before they are written to again
            return carry

        run = plgpu.emit_pipeline(
            step, grid=(jnp.int32(steps),), in_specs=list(specs), max_concurrent_steps=2,
            init_carry=carry,
        )  # fmt: skip
        return run(*arrays)

    def numbers(self, ref: Any, axis: int) -> Float[Array, " n"]:
        """What a `read` vector holds: a number of each row (axis 0) or column (1) of a tile."""
        del axis
        return ref[...]

    def read(self, sources: Sequence[Any], targets: Sequence[Any], barrier: Any) -> Sequence[Any]:
        """What is in global memory, copied to shared memory, where it is of use.

        Args:
          sources: In global memory.
          targets: Of the same shapes, in shared memory.
          barrier: It expects as many arrivals.

        Returns:
          References to matrices in shared memory, and to vectors for `numbers`.
        """
        for source, target in zip(sources, targets, strict=True):
            plgpu.copy_gmem_to_smem(source, target, barrier)
        plgpu.barrier_wait(barrier)
        return targets

    def write(self, *tiles: tuple[Array, Any, Any], wait: bool = True) -> None:
        """Stores arrays in global memory, by way of shared memory.

        Args:
          *tiles: Each with the shared memory, and where to.
          wait: Until they are stored; before their shared memory is written to, and at the end
            of a program, there has to be one.
        """
        for value, ref, _ in tiles:
            ref[...] = value.astype(ref.dtype)
        self.commit()
        for _, ref, target in tiles:
            plgpu.copy_smem_to_gmem(ref, target)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until all that was written is stored."""
        plgpu.wait_smem_to_gmem(0)

    def commit(self) -> None:
        """What was read of shared memory, or written to it, comes before what follows."""
        plgpu.commit_smem()


class Hopper(Generation):
    """H100 and H200: a product's sums are in registers, and its left operand may be."""

    def _sum(self, sums: Array | None, pairs: Sequence[tuple[Any, Any]]) -> Array:
        def multiply(ref: Any) -> None:
            for a, b in pairs:
                plgpu.wgmma(ref, _on_device(a), _on_device(b))

        def multiplied(ref: Any) -> Array:
            multiply(ref)
            return ref[...]

        if sums is None:
            return pl.run_scoped(multiplied, plgpu.ACC(_shape(pairs), jnp.float32))
        return pl.run_state(multiply)(plgpu.ACC.init(sums))


class Blackwell(Generation):
    """B200 and B300: products are summed in a memory of their own."""

    @property
    def multiplies(self) -> bool:
        """See `Generation`; the interpreter of JAX 0.12 knows its products."""
        return super().multiplies or hasattr(plgpu, "InterpretGPUParams")

    def side(self, columns: int) -> int:
        """See `Generation`: a product of 64 rows takes its columns in two halves."""
        return min(columns, TILE) // 2

    def _sum(self, sums: Array | None, pairs: Sequence[tuple[Any, Any]]) -> Array:
        shape = _shape(pairs)
        layout = plgpu.Layout.WGMMA if shape[0] == TILE else plgpu.Layout.TCGEN05

        def multiply(memory: Any, barrier: Any, *copies: Any) -> Array:
            if sums is not None:
                plgpu.async_store_tmem(memory, plgpu.layout_cast(sums, layout))
                plgpu.commit_tmem()
            for k, (a, b) in enumerate(self._in_shared_memory(pairs, copies)):
                plgpu.tcgen05_mma(memory, a, b, accumulate=k > 0 or sums is not None)
            plgpu.tcgen05_commit_arrive(barrier)
            plgpu.barrier_wait(barrier)
            values = plgpu.layout_cast(plgpu.async_load_tmem(memory), layout)
            plgpu.wait_load_tmem()
            return values

        return pl.run_scoped(
            multiply,
            plgpu.TMEM(shape, jnp.float32),
            plgpu.Barrier(orders_tensor_core=True),
            *self._copies(pairs),
        )


class Ampere(Generation):
    """A100 and its kin: products of registers, and copies that no barrier counts.

    Its products are of JAX 0.12 and later, and unknown to the interpreter, as its copies are.
    """

    def side(self, columns: int) -> int:
        """See `Generation`: so many columns of the left operand are multiplied at a time."""
        return min(columns, TILE // 4)

    def _sum(self, sums: Array | None, pairs: Sequence[tuple[Any, Any]]) -> Array:
        def add(*copies: Any) -> Array:
            total = jnp.zeros(_shape(pairs), jnp.float32) if sums is None else sums
            total = _newest.layout_cast(total, _newest.Layout.WGMMA)
            for left, right in self._in_shared_memory(pairs, copies):
                step = self.side(left.shape[1])
                for k in range(0, left.shape[1], step):
                    part = pl.ds(k, step)
                    a = _newest.layout_cast(left[:, part], _newest.Layout.MMA_LHS(left.dtype))
                    b = _newest.layout_cast(right[part], _newest.Layout.MMA_RHS(right.dtype))
                    total = _newest.mma(total, a, b)
            return total

        return pl.run_scoped(add, *self._copies(pairs))

    def pipeline(
        self, body: Callable[..., Any], steps: Any, specs: Sequence[Any], carry: Any, *arrays: Any
    ) -> Any:
        """See `Generation`: vectors stay in global memory."""
        given = list(zip(specs, arrays, strict=True))

        def step(n: Any, *refs: Any) -> Any:
            *matrices, carry = refs
            blocks = [matrices.pop(0) if s.transforms else _taken(s, n, x) for s, x in given]
            return body(n, *blocks, carry)

        fetched = [(s, x) for s, x in given if s.transforms]
        return super().pipeline(
            step, steps, [s for s, _ in fetched], carry, *[x for _, x in fetched]
        )

    def numbers(self, ref: Any, axis: int) -> Float[Array, " n"]:
        """See `Generation`."""
        layout = _newest.Layout.WGMMA.reduce(1 - axis)
        return _newest.load(ref, layout=layout, optimized=False)

    def read(self, sources: Sequence[Any], targets: Sequence[Any], barrier: Any) -> Sequence[Any]:
        """See `Generation`: vectors are read where they are."""
        found = [s if len(t.shape) == 1 else t for s, t in zip(sources, targets, strict=True)]
        for source, target in zip(sources, found, strict=True):
            if source is not target:
                mode = _newest.OOBFillMode.PROMISE_IN_BOUNDS
                _newest.copy_gmem_to_smem(source, target, oob_mode=mode)
        _newest.wait_gmem_to_smem(0)
        return found

    def write(self, *tiles: tuple[Array, Any, Any], wait: bool = True) -> None:
        """See `Generation`."""
        for value, ref, target in tiles:
            if value.ndim == 1:
                target[...] = value
            else:
                ref[...] = value.astype(ref.dtype)
                rows = _newest.Layout.SMEM_GMEM_COPY(value.shape, ref.dtype, 2 * self.side(TILE))
                target[...] = _newest.load(ref, layout=rows)

    def wait(self) -> None:
        """See `Generation`: there is nothing to wait for."""

    def commit(self) -> None:
        """See `Generation`: a program's reads and writes are in order."""


def _taken(spec: Any, step: Any, array: Any) -> Any:
    """The block of a step, in global memory."""
    index = zip(spec.index_map(step), spec.block_shape, strict=True)
    return array.at[tuple(i if n is None else pl.ds(i * n, n) for i, n in index)]


def _shape(pairs: Sequence[tuple[Any, Any]]) -> tuple[int, int]:
    """Of the product."""
    left, right = (_on_device(x) for x in pairs[0])
    return left.shape[0], right.shape[1]


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


def kernel(
    body: Callable[..., None], name: str, grid: dict[str, int], results: Any,
    scratch: Sequence[Any], gpu: Generation,
) -> Callable[..., Any]:  # fmt: skip
    """A kernel whose body is called with its operands, results and scratch, all in order.

    Args:
      body: See above.
      name: In profiles, and in the compiled program.
      grid: Programs along each axis, by the name that `lax.axis_index` takes.
      results: Shapes and dtypes, one or a list.
      scratch: Shared memory and barriers.
      gpu: What runs it.
    """
    semantics = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    return plgpu.kernel(
        body, out_type=results, scratch_types=list(scratch), compiler_params=semantics,
        grid=tuple(grid.values()), grid_names=tuple(grid), interpret=gpu.interpret or None,
        kernel_name=name,
    )  # fmt: skip
