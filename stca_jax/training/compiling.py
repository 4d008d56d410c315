"""How programs are compiled that run only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

State = TypeVar("State")
_SMALL = 1 << 23  # numbers, which are drawn in about a second without any optimization


def jit_once(function: Callable[[], State], out_shardings: Any) -> Callable[[], State]:
    """Compiles what makes a first state: it runs once, and most of that time was compiling.

    On a CPU it is compiled in a third to two thirds of the time, depending on the size of the
    state: without optimization random numbers take four times as long.

    Args:
      function: Makes the state.
      out_shardings: Of the state.
    """
    (device, *_) = jax.tree.leaves(out_shardings)[0].mesh.devices.flat
    options = {}
    if device.platform == "cpu":
        size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(function)))
        options = {"xla_backend_optimization_level": 0 if size < _SMALL else 1}
    return jax.jit(function, out_shardings=out_shardings, compiler_options=options)
