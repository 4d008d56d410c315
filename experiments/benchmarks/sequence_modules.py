"""E1-E7 as plain functions, with the history path exchangeable, and the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from stca_jax.ops.encoder import HistoryEncoder, encode_history
from stca_jax.ranges import Ranges

# (query, tokens, encoder, w_key, w_value, ranges) -> [R, M, H, K]
HistoryPath = Callable[..., Array]


class Layer(NamedTuple):
    """Weights of one layer."""

    history: HistoryEncoder
    query: HistoryEncoder
    fusion: Float[Array, "I D"]
    w_query: Float[Array, "D H K"]
    w_key: Float[Array, "D H K"]
    w_value: Float[Array, "D H K"]
    w_output: Float[Array, "D D"]


def init_layers(num_layers: int, width: int, num_heads: int, ratio: int, dtype: Any) -> list[Layer]:
    """Random weights of the sequence module without E7."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    def encoder() -> HistoryEncoder:
        hidden = ratio * width
        return HistoryEncoder(weight(width, hidden), weight(width, hidden), weight(hidden, width),
                              jnp.ones(width), jnp.zeros(width))  # fmt: skip

    heads = (width, num_heads, width // num_heads)
    return [
        Layer(encoder(), encoder(), weight((i + 1) * width, width), weight(*heads), weight(*heads),
              weight(*heads), weight(width, width))
        for i in range(num_layers)
    ]  # fmt: skip


def sequence_module(
    layers: list[Layer],
    tokens: Float[Array, "R L D"],
    targets: Float[Array, "R M D"],
    ranges: Ranges,
    history_path: HistoryPath,
) -> Float[Array, "R M I"]:
    """E1-E6 and the concatenation of E7."""
    gathered: list[Array] = []
    for layer in layers:
        fused = jnp.concatenate([*gathered, targets], -1) @ layer.fusion
        query = jnp.einsum("rmd,dhk->rmhk", encode_history(layer.query, fused), layer.w_query)
        output = history_path(query, tokens, layer.history, layer.w_key, layer.w_value,
                              ranges)  # fmt: skip
        gathered.append(output.reshape(targets.shape) @ layer.w_output)
    return jnp.concatenate([*gathered, targets], -1)


def model_flops(length: int, num_targets: int, num_layers: int, width: int, num_heads: int,
                ratio: int) -> float:  # fmt: skip
    """FLOPs of forward and backward for one request, without recomputation.

    The history FFN, 6 r L d^2, and the cheaper order of the attention; three times the forward.
    """
    ffn = 6 * ratio * length * width**2
    absorbed = 4 * length * width * num_heads * num_targets
    projected = 4 * length * width**2 + 4 * length * width * num_targets
    targets = num_targets * (8 + 6 * ratio) * width**2
    return 3.0 * num_layers * (ffn + min(absorbed, projected) + targets)


def model_exponentials(
    length: int, num_targets: int, num_layers: int, width: int, num_heads: int, ratio: int
) -> float:
    """Exponentials of the forward pass for one request: of every score and every gate."""
    return float(num_layers * length * (num_targets * num_heads + ratio * width))


def model_bytes(length: int, num_layers: int, width: int, itemsize: int) -> float:
    """Bytes of three passes over the tokens per layer: read, read again, gradient."""
    return 3.0 * num_layers * length * width * itemsize


def torch_steps(
    requests: int, length: int, num_targets: int, num_layers: int, width: int, num_heads: int,
    ratio: int, *, dtype: str, num_threads: int,
) -> dict[str, Callable[[], None]]:  # fmt: skip
    """Forward and backward of requests in PyTorch, by name; empty if it is not installed.

    They run on the same kind of device as JAX; empty if PyTorch cannot.
    """
    try:
        import torch
    except ImportError:
        return {}
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and jax.default_backend() != "cpu":
        return {}
    functional = torch.nn.functional
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    torch.set_default_device("cuda" if on_gpu else "cpu")
    torch.set_default_dtype(getattr(torch, dtype))
    history = torch.randn(requests, length, width, requires_grad=True)
    targets = torch.randn(requests, num_targets, width, requires_grad=True)
    transformer = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(
            width, num_heads, ratio * width, dropout=0.0, batch_first=True
        ),
        num_layers,
        enable_nested_tensor=False,
    )

    class SwiGLUNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = (torch.nn.Linear(width, ratio * width, False) for _ in range(2))
            self.out, self.norm = (
                torch.nn.Linear(ratio * width, width, False),
                torch.nn.LayerNorm(width),
            )

        def forward(self, x: Any) -> Any:
            return self.norm(self.out(self.up(x) * functional.silu(self.gate(x))))

    class StcaLayer(torch.nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.fusion = torch.nn.Linear((index + 1) * width, width, False)
            self.query_encoder, self.history_encoder = SwiGLUNorm(), SwiGLUNorm()
            self.query, self.key, self.value, self.output = (
                torch.nn.Linear(width, width, False) for _ in range(4)
            )

        def forward(self, gathered: Any) -> Any:
            def heads(x: Any) -> Any:
                return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

            x = self.history_encoder(history)
            attended = functional.scaled_dot_product_attention(
                heads(self.query(self.query_encoder(self.fusion(gathered)))),
                heads(self.key(x)),
                heads(self.value(x)),
            )
            return self.output(attended.transpose(1, 2).flatten(2))

    stca_layers = torch.nn.ModuleList(StcaLayer(i) for i in range(num_layers))

    def stca() -> Any:
        gathered = targets
        for layer in stca_layers:
            gathered = torch.cat([layer(gathered), gathered], -1)
        return gathered

    def appended() -> Any:
        return transformer(torch.cat([history, targets], 1))[:, length:]

    def step(module: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            module().square().sum().backward()
            if on_gpu:
                torch.cuda.synchronize()

        return run

    steps = {"PyTorch STCA, SDPA": stca, "PyTorch TransformerEncoder, targets appended": appended}
    if on_gpu:
        steps["PyTorch STCA, SDPA, torch.compile"] = torch.compile(stca)
    return {name: step(module) for name, module in steps.items()}


def request_step(
    layers: list[Layer], tokens: Array, targets: Array, ranges: Ranges,
    history_path: HistoryPath,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:  # fmt: skip
    """Gradients in weights, tokens and targets, and the arguments to call them with."""

    def loss(layers: list[Layer], tokens: Array, targets: Array, ranges: Ranges) -> Array:
        return jnp.square(sequence_module(layers, tokens, targets, ranges, history_path)).sum()

    return jax.grad(loss, argnums=(0, 1, 2)), (layers, tokens, targets, ranges)
