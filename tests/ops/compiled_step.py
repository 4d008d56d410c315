"""Compiles a step of the op for devices that this machine does not have."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import own_process
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stca_jax.ops.attention import AttentionOptions, history_layer, target_to_history_attention
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ranges import Ranges

# No multiple of a tile.
R, L, M, H, D = 8, 10_000, 16, 8, 256


def in_process_of_its_own(module: str, name: str, *arguments: str) -> None:
    """Calls a function of a test file; a process compiles for one kind of device only.

    The first argument names the kind.
    """
    own_process.call(
        module, name, *arguments,
        kind=arguments[0], TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        JAX_ENABLE_COMPILATION_CACHE="false",  # it loads what it finds onto the device
    )  # fmt: skip


def compiled_step(
    devices: Sequence[Any], implementation: Any, order: str, dtype: Any, *,
    length: int = L, sharded: bool = False, fused: bool = False, score: bool = False,
    sizes: Any = None, width: int = D, compiler_options: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    """Forward and backward of the op, on the first device or, sharded, on 2 x 4 of them."""
    shape = (2, 4) if sharded else (1, 1)
    mesh = Mesh(
        np.array(devices[: shape[0] * shape[1]]).reshape(shape), ("data", "sequence"),
        axis_types=(AxisType.Auto,) * 2,
    )  # fmt: skip

    def array(dims, dtype, *spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def loss(query, tokens, encoder, w_key, w_value, history_score, start, end):
        options: Any = {
            "options": AttentionOptions(order, implementation, sizes),
            "history_score": history_score if score else None,
        }  # fmt: skip
        ranges = Ranges(start, end)
        if fused:
            out = history_layer(query, tokens, encoder, w_key, w_value, ranges, **options)
        else:
            out = target_to_history_attention(query, tokens, w_key, w_value, ranges, **options)
        return out.output.astype(jnp.float32).sum() + jnp.tanh(out.log_sum_exp).sum()

    heads = (width, H, width // H)
    up = array((width, 2 * width), dtype)
    norm = [array((width,), jnp.float32)] * 2
    encoder = HistoryEncoder(up, up, array((2 * width, width), dtype), *norm)
    arguments = (
        array((R, M, H, width // H), dtype, "data"),
        array((R, length, width), dtype, "data", "sequence"),
        encoder, array(heads, dtype), array(heads, dtype),
        array((R, length, H), jnp.float32, "data", "sequence"),
        array((R, M), jnp.int32, "data"), array((R, M), jnp.int32, "data"),
    )  # fmt: skip
    differentiated = [0, 1, 3, 4] + [2] * fused + [5] * score
    # Mosaic takes what a GPU can do from the default device.
    default = devices[0] if devices[0].platform == "gpu" else None
    with jax.set_mesh(mesh), jax.default_device(default):
        step = jax.jit(jax.grad(loss, argnums=differentiated))
        return step.lower(*arguments).compile(compiler_options)


def stores_scores(text: str) -> bool:
    """Whether the compiled HLO has an array as large as all scores; no other is of that size."""
    lengths = {-(-L // tile) * tile for tile in (1, 16, 32, 64, 512)}
    shapes = re.findall(r"\[([\d,]+)\]", text)
    sizes = {math.prod(map(int, shape.split(","))) for shape in shapes}
    return not sizes.isdisjoint(R * M * H * length for length in lengths)
