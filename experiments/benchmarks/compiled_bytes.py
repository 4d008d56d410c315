"""The bytes that a layer's step moves, from its compiled program; devices need not be here."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stca_jax.ops.attention import AttentionOptions, history_layer
from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.encoder_kernels import Unencoded
from stca_jax.ops.kernels import Kernels, encode_tokens
from stca_jax.ranges import Ranges


class Moved(NamedTuple):
    """What one instruction of a compiled program moves.

    Attributes:
      name: Of the instruction, and the kernel or the JAX operation that it is.
      bytes: Of its operands and results.
    """

    name: str
    bytes: int


_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
_CALLED = re.compile(r"(?:to_apply|calls)=(%[\w.\-]+)")


def moved(hlo: str) -> list[Moved]:
    """Operands and results of every instruction that a compiled program runs, from its text.

    Raises:
      ValueError: the program has a loop or a branch, whose trips the text does not give.
    """
    bodies: dict[str, list[str]] = {}
    computation = entry = ""
    for line in hlo.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?(%[\w.\-]+) ", line)):
            computation = header[2]
            entry = computation if header[1] else entry
            bodies[computation] = []
        elif computation:
            bodies[computation].append(line)
    return list(_moved(entry, bodies))


def passes(hlo: str, size: Size) -> float:
    """Bytes that all instructions of a compiled program move, over those of the tokens."""
    return sum(m.bytes for m in moved(hlo)) / size.bytes


def _moved(computation: str, bodies: dict[str, list[str]]) -> Iterator[Moved]:
    sizes: dict[str, int] = {}
    for line in bodies[computation]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, kind, rest = match.groups()
        sizes[name] = sum(_array_bytes(*array) for array in _ARRAY.findall(shape))
        if kind in ("while", "conditional"):
            raise ValueError(f"{name} is a {kind}: what it moves depends on how often it runs")
        if kind == "call":
            yield from _moved(_CALLED.findall(line)[0], bodies)
        elif kind.endswith("-done"):  # of an asynchronous copy, whose start names its arrays twice
            yield Moved(name, 2 * sizes[name])
        elif kind not in _FREE and not kind.endswith("-start"):
            operands = re.findall(r"%[\w.\-]+", rest.split(")", 1)[0])
            operation = re.search(r'op_name="([^"]*)"', line)
            label = f"{name} {operation[1] if operation else ''}"
            yield Moved(label, sizes[name] + sum(sizes[operand] for operand in operands))


def _array_bytes(dtype: str, bits: str, dimensions: str) -> int:
    entries = math.prod(int(d) for d in dimensions.split(",") if d)
    return -(-entries * int(bits or 8) // 8)


class Size(NamedTuple):
    """Rows whose targets read all of them.

    Attributes:
      rows: R.
      length: L.
      targets: M.
      width: d.
      dtype: Compute dtype.
    """

    rows: int
    length: int
    targets: int
    width: int
    dtype: str

    @property
    def heads(self) -> int:
        """16 wide, and 32 from d = 256 on."""
        return self.width // (16 if self.width < 256 else 32)

    @property
    def bytes(self) -> int:
        """Of the tokens."""
        return self.rows * self.length * self.width * jnp.dtype(self.dtype).itemsize


def encoder_step(size: Size, kernels: Kernels, device: jax.Device, **options: Any) -> Any:
    """Compiles the history FFN and its LayerNorm, forward and backward."""
    R, L, _, d, dtype = size

    def step(encoder: Any, tokens: Any, covered: Any, d_encoded: Any) -> Any:
        def encode(encoder: Any, tokens: Any) -> Any:
            return encode_tokens(kernels, Unencoded(encoder, tokens, covered))

        encoded, gradients = jax.vjp(encode, encoder, tokens)
        return encoded, gradients(d_encoded)

    tokens = jax.ShapeDtypeStruct((R, L, d), dtype)
    covered = jax.ShapeDtypeStruct((R, L, 1), jnp.bool_)
    return _compiled(device, options, step, weights(d), tokens, covered, tokens)


def layer_step(size: Size, kernels: Kernels, device: jax.Device, **options: Any) -> Any:
    """Compiles a layer's history path in the absorbed order, forward and backward."""
    layer, inputs, output, ranges = _layer(size, kernels)

    def step(ranges: Any, cotangents: Any, *inputs: Any) -> Any:
        out, gradients = jax.vjp(functools.partial(layer, ranges), *inputs)
        return out, gradients(cotangents)

    return _compiled(device, options, step, ranges, output, *inputs)


def layer_forward(size: Size, kernels: Kernels, device: jax.Device, **options: Any) -> Any:
    """The same, forward alone, as a score or an evaluation is computed."""
    layer, inputs, _, ranges = _layer(size, kernels)
    return _compiled(device, options, layer, ranges, *inputs)


def _layer(size: Size, kernels: Kernels) -> tuple[Any, tuple[Any, ...], Any, Ranges]:
    """A layer's history path as a function of ranges and inputs; abstract inputs and output."""
    R, L, M, d, dtype = size
    attention = AttentionOptions("absorbed", kernels)

    def layer(ranges: Any, query: Any, tokens: Any, encoder: Any, w_key: Any, w_value: Any) -> Any:
        given = (query, tokens, encoder, w_key, w_value, ranges)
        return tuple(history_layer(*given, options=attention))

    heads, span = (size.heads, d // size.heads), jax.ShapeDtypeStruct((R, M), jnp.int32)
    query = jax.ShapeDtypeStruct((R, M, *heads), dtype)
    log_sum_exp = jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
    projection = jax.ShapeDtypeStruct((d, *heads), dtype)
    tokens = jax.ShapeDtypeStruct((R, L, d), dtype)
    inputs = (query, tokens, weights(d), projection, projection)
    return layer, inputs, (query, log_sum_exp), Ranges(span, span)


def weights(d: int) -> HistoryEncoder:
    """Abstract float32 weights of the usual ratio, r = 2."""

    def weight(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return HistoryEncoder(
        weight(d, 2 * d), weight(d, 2 * d), weight(2 * d, d), weight(d), weight(d)
    )


def _compiled(device: jax.Device, options: Any, step: Any, *arguments: Any) -> Any:
    mesh = Mesh(np.array([device]), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: x.update(sharding=everywhere), arguments)
    # Mosaic takes what a GPU can do from the default device.
    with jax.set_mesh(mesh), jax.default_device(device):
        return jax.jit(step).lower(*placed).compile(**options)
