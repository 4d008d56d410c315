"""Ops under a mesh: rows over the axis "data", history tokens of a row over the axis "sequence".

Each device reads its own slice of each row, and sees ranges clipped to it.  Only per-target results
cross devices; tokens, keys and values never do.  The mesh is the one set by `jax.set_mesh`; without
one, or where the caller's `shard_map` has taken the axes, an op runs as on one device.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from stca_jax.ranges import Ranges

DATA = "data"
SEQUENCE = "sequence"


_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def assume_platform(name: str) -> Iterator[None]:
    """Traces what is run on another platform than this process's: `platform()` answers its name."""
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


def platform() -> str:
    """Platform of the mesh's devices, or else of this process's, as JAX names it."""
    if assumed := _assumed.get():
        return assumed
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def on_mesh(
    local: Callable[..., Any],
    merge: Callable[[Any, str], Any],
    weights: Any,
    per_target: Any,
    per_token: Any,
    ranges: Ranges,
) -> Any:
    """Runs `local(weights, per_target, per_token, ranges)` on every device's part of the rows.

    Args:
      local: The op on one device; returns arrays [R, M, ...].
      merge: Combines the results of the devices of the given axis, each over its own tokens.
      weights: Arrays that every device needs in full.
      per_target: Arrays [R, M, ...].
      per_token: Arrays [R, L, ...].
      ranges: Of each target.

    Returns:
      What `local` returns, merged.

    Raises:
      ValueError: the rows or the row length do not divide by the size of their mesh axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if name in (DATA, SEQUENCE) and kind != AxisType.Manual
    }
    if math.prod(free.values()) == 1:
        return local(weights, per_target, per_token, ranges)
    length = jax.tree.leaves(per_token)[0].shape[1]
    for axis, name, size in ((DATA, "rows", ranges.start.shape[0]), (SEQUENCE, "length", length)):
        if size % free.get(axis, 1):
            raise ValueError(
                f"{name} {size} does not divide over mesh axis {axis!r} of size {free[axis]}; "
                "use a multiple"
            )
    data = DATA if DATA in free else None
    sequence = SEQUENCE if SEQUENCE in free else None

    def on_device(weights: Any, per_target: Any, per_token: Any, ranges: Ranges) -> Any:
        if sequence is None:
            return local(weights, per_target, per_token, ranges)
        tokens_here = length // free[SEQUENCE]
        offset = lax.axis_index(sequence) * tokens_here
        ranges = type(ranges)(*(jnp.clip(x - offset, 0, tokens_here) for x in ranges))
        return merge(local(weights, per_target, per_token, ranges), sequence)

    rows, tokens = PartitionSpec(data), PartitionSpec(data, sequence)
    return jax.shard_map(
        on_device,
        in_specs=(PartitionSpec(), rows, tokens, rows),
        out_specs=rows,
        axis_names=set(free),
        check_vma=False,  # loops and kernels start from constants, which vary over no axis
    )(weights, per_target, per_token, ranges)


def merge_softmax(
    parts: tuple[Float[Array, "R M H K"], Float[Array, "R M H"]], axis: str
) -> tuple[Float[Array, "R M H K"], Float[Array, "R M H"]]:
    """Joins softmaxes over disjoint sets of tokens: outputs weigh exp(log-sum-exp)."""
    output, log_sum_exp = parts
    peak = lax.pmax(lax.stop_gradient(log_sum_exp), axis)
    nonempty = peak > -jnp.inf
    here = log_sum_exp > -jnp.inf
    shifted = jnp.where(here, log_sum_exp, 0) - jnp.where(nonempty, peak, 0)
    weight = jnp.where(here, jnp.exp(jnp.where(here, shifted, 0)), 0)
    total, summed = lax.psum((weight, weight[..., None] * output), axis)
    safe_total = jnp.where(nonempty, total, 1)
    joined = jnp.where(nonempty, jnp.where(nonempty, peak, 0) + jnp.log(safe_total), -jnp.inf)
    return summed / safe_total[..., None], joined
