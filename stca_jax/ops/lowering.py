"""Calls that one platform alone can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir


def lowered_for(platform: str, message: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)`; lowering it for another platform raises ValueError with the message.

    Tracing must not raise: it does not know the platform, which may be absent from this machine.
    """
    shapes = jax.eval_shape(call, *arguments)

    def refuse(*_: Any) -> Any:
        return jax.tree.map(
            lambda x: _unavailable.bind(jnp.zeros(x.shape, x.dtype), message=message), shapes
        )

    return lax.platform_dependent(*arguments, **{platform: call}, default=refuse)


def _refuse(*_: Any, message: str) -> Any:
    raise ValueError(message)


_unavailable = Primitive("unavailable")
_unavailable.def_abstract_eval(lambda x, *, message: x)
_unavailable.def_impl(_refuse)
mlir.register_lowering(_unavailable, _refuse)
