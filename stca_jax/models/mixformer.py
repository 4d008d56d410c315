"""MixFormer's cross attention (arXiv 2602.14110): a head of the target has its slice of history.

The target token, mapped to N heads x_i of width D = d / N, passes through blocks of

    p = mix(RMSNorm(x)) + x                            slices of all heads exchanged, no parameters
    q_i = SwiGLU_i(RMSNorm(p_i)) + p_i                 a head's own FFN
    h = SwiGLU(RMSNorm(s)) + s                         of every history token s, an FFN per block
    z_i = softmax(q_i (h_i W_K^i)^T / sqrt(D)) h_i W_V^i + q_i        h_i: slice i of h
    x_i = SwiGLU_i(RMSNorm(z_i)) + z_i

and z is the concatenation of its heads.  In the paper the heads also hold the other features of
user and candidate, and the blocks are the whole ranker; here those features meet in the backbone,
as for every module.  History tokens never interact, so requests share rows exactly.  Cost: L,
shared by a request's targets.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stca_jax.models.layers import Linear, RmsNorm, SwiGLU, parameter, recomputed
from stca_jax.models.rankmixer import mix_tokens
from stca_jax.models.sequence import (
    SequenceConfig,
    SequenceCost,
    SequenceInput,
    SequenceOutput,
    head_width,
)
from stca_jax.ops.attention import AttentionOptions, target_to_history_attention
from stca_jax.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class MixFormerConfig(SequenceConfig):
    """Shape of the module.

    Attributes:
      num_layers: Blocks.
      num_heads: N; its square must divide `width`.
    """

    num_layers: int = 2
    num_heads: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError for impossible shapes."""
        super().__post_init__()
        if self.width % self.num_heads**2:
            raise ValueError(
                f"the square of num_heads {self.num_heads} does not divide width {self.width}; "
                "heads exchange equal slices"
            )

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> MixFormer:
        """The module."""
        return MixFormer(self, remat=remat, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs; keys and values as they are computed, by one matrix that is zero between heads."""
        N, d, ffn = self.num_layers, self.width, 6 * self.ffn_ratio
        of_heads = 2 * ffn * d * head_width(d, self.num_heads)
        return SequenceCost(
            per_token=N * (ffn + 4) * d * d,
            per_target=2 * d * d + N * of_heads,
            per_pair=N * 4 * d,
            num_layers=N,
        )


class PerHeadSwiGLU(nnx.Module):
    """x_i + SwiGLU_i(RMSNorm(x_i)), heads first."""

    def __init__(self, num_heads: int, width: int, hidden_width: int, *, rngs: nnx.Rngs):
        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.normal(key, shape) / jnp.sqrt(shape[1])

        wide, axes = (num_heads, width, hidden_width), (None, "embed", "mlp")
        self.norm = RmsNorm(width, rngs=rngs)
        self.up = parameter(rngs, wide, axes, init)
        self.gate = parameter(rngs, wide, axes, init)
        self.out = parameter(rngs, (num_heads, hidden_width, width), (None, "mlp", "embed"), init)

    def __call__(self, x: Float[Array, "H N K"]) -> Float[Array, "H N K"]:
        """Keeps shape and dtype."""
        up, gate, out = (w[...].astype(x.dtype) for w in (self.up, self.gate, self.out))
        normed = self.norm(x)
        return x + ((normed @ up) * jax.nn.swish(normed @ gate)) @ out


class Block(nnx.Module):
    """One block."""

    def __init__(self, config: MixFormerConfig, *, rngs: nnx.Rngs):
        d, H, ratio = config.width, config.num_heads, config.ffn_ratio
        K = head_width(d, H)

        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.normal(key, shape) / jnp.sqrt(shape[1])

        self.mix_norm = RmsNorm(K, rngs=rngs)
        self.query_ffn = PerHeadSwiGLU(H, K, ratio * K, rngs=rngs)
        self.history_norm = RmsNorm(d, rngs=rngs)
        self.history_ffn = SwiGLU(d, ratio * d, d, rngs=rngs)
        self.key = parameter(rngs, (H, K, K), (None, "embed", "embed_out"), init)
        self.value = parameter(rngs, (H, K, K), (None, "embed", "embed_out"), init)
        self.output_ffn = PerHeadSwiGLU(H, K, ratio * K, rngs=rngs)

    def __call__(
        self, x: Float[Array, "H R*M K"], tokens: Float[Array, "R L D"], ranges: Ranges
    ) -> Float[Array, "H R*M K"]:
        """The heads' next state."""
        query = self.query_ffn(mix_tokens(self.mix_norm(x)) + x)
        history = tokens + self.history_ffn(self.history_norm(tokens))
        R, M = ranges.start.shape
        attended = target_to_history_attention(
            query.transpose(1, 0, 2).reshape(R, M, *x.shape[::2]),
            history,
            _block_diagonal(self.key[...]),
            _block_diagonal(self.value[...]),
            ranges,
            options=AttentionOptions("projected"),
        )
        gathered = attended.output.reshape(R * M, *x.shape[::2]).transpose(1, 0, 2)
        return self.output_ffn(gathered + query)


def _block_diagonal(weight: Float[Array, "H K K"]) -> Float[Array, "H*K H K"]:
    """Maps slice i of a token to head i."""
    H, K, _ = weight.shape
    return (weight[:, :, None] * jnp.eye(H)[:, None, :, None]).reshape(H * K, H, K)


class MixFormer(nnx.Module):
    """The sequence module."""

    def __init__(self, config: MixFormerConfig, *, remat: bool = False, rngs: nnx.Rngs):
        self.remat = remat
        self.num_heads = config.num_heads
        self.input = Linear(config.width, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])

    def __call__(self, inputs: SequenceInput) -> SequenceOutput:
        """Reads the history for every target of every row."""
        R, M, D = inputs.targets.shape
        heads = self.input(inputs.targets).reshape(R * M, self.num_heads, -1)
        x = heads.transpose(1, 0, 2)
        for block in self.blocks:
            x = recomputed(block, self.remat)(x, inputs.tokens, inputs.ranges)
        summary = x.transpose(1, 0, 2).reshape(R, M, D)
        return SequenceOutput(summary, summary[..., :0])
