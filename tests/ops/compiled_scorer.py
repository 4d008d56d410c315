"""Compiles what an export holds for devices that this machine does not have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.sharding import SingleDeviceSharding
from strategies import SCHEMA

from stca_jax.export.programs import ServedRanker, abstract_ranker, lower_all
from stca_jax.models.ranker import RankerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.ops.paged import PAGE

USERS, TARGETS, EVENTS, PAGES, HEADS = 4, 1_024, 10_240, 200, 4


def check_scorer(device: Any, *, many: bool = True) -> None:
    """One call for several users, without the scores of whole histories; appends in place.

    Args:
      device: To compile for.
      many: Compile for many candidates as well, which takes most of the time.
    """
    config = RankerConfig(StcaConfig(width=64, num_heads=HEADS, num_layers=2))
    served = ServedRanker(abstract_ranker(config, SCHEMA))
    programs = lower_all(served, max_history=EVENTS, uncached=False)
    sharding = SingleDeviceSharding(device)

    def array(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def inputs(users: int, targets: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (
            array(users, dtype=np.int32),
            array(users, targets, sum(served.target.widths)),
            array(users, sum(served.request.widths)),
            array(users, targets, len(served.match_fields), 2 + len(served.decay_seconds)),
        )

    weights = {n: array(*w.shape, dtype=w.dtype) for n, w in served.abstract_weights.items()}
    where = (array(USERS, EVENTS // PAGE, dtype=np.int32), array(USERS, dtype=np.int32))

    def compiled(kind: str, name: str, *arguments: Any, donated: tuple[int, ...] = ()) -> Any:
        arrays = served.caches[kind][0].arrays
        pool = {
            n: array(x.layers, PAGES, *x.shape, dtype=jnp.dtype(x.dtype)) for n, x in arrays.items()
        }
        call = jax_export.deserialize(bytearray(programs[f"{kind}/{name}"])).call
        step = jax.jit(call, donate_argnums=donated).lower(weights, pool, *arguments).compile()
        size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in pool.values())
        return step.memory_analysis(), size

    if many:
        scores = USERS * TARGETS * HEADS * EVENTS * 4
        memory, _ = compiled("keys_values", "score_tiles", where, inputs(USERS, TARGETS))
        assert memory.temp_size_in_bytes < 0.6 * scores, (memory, scores)
    compiled("tokens", "score_few", where, inputs(USERS, 16))
    width = sum(served.history.widths)
    places = array(3, 16, dtype=np.int32), array(dtype=np.int32)
    memory, pool = compiled("keys_values", "append", array(16, width), *places, donated=(1,))
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool / 10
