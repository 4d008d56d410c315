"""How the programs of a training are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

State = TypeVar("State")
OPTIONS: dict[str, Any] = {}
"""XLA's, of train steps and predictions; empty, so that they are as fast as they can be."""

_SMALL = 1 << 23  # numbers, which are drawn in about a second without any optimization


def jit(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """Compiles what runs at every step.

    Args:
      function: The step.
      **how: Other arguments of `jax.jit`.
    """
    return jax.jit(function, compiler_options=OPTIONS, **how)


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
