"""RankMixer backbone (E9; arXiv 2507.15551): parameter-free token mixing and per-token FFNs.

Arrays have the token axis first, so that a per-token FFN is T plain matrix products: with the token
axis inside, its gradient was measured at more than twice the time.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stca_jax.models.layers import LayerNorm, parameter, recomputed, zeros


@dataclasses.dataclass(frozen=True)
class RankMixerConfig:
    """Shape of the backbone.

    Attributes:
      num_blocks: Blocks of mixing and FFN.
      ffn_ratio: Hidden width of a token's FFN over its width.
    """

    num_blocks: int = 2
    ffn_ratio: int = 2

    def __post_init__(self) -> None:
        """Raises ValueError for sizes below their minimum."""
        if self.num_blocks < 0 or self.ffn_ratio < 1:
            raise ValueError(f"{self}: num_blocks must be >= 0 and ffn_ratio >= 1")


class PerTokenFfn(nnx.Module):
    """A two-layer FFN with weights of its own for each token position."""

    def __init__(self, num_tokens: int, width: int, hidden_width: int, *, rngs: nnx.Rngs):
        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.normal(key, shape) / jnp.sqrt(shape[1])

        self.up = parameter(rngs, (num_tokens, width, hidden_width), (None, "embed", "mlp"), init)
        self.up_bias = parameter(rngs, (num_tokens, hidden_width), (None, "mlp"), zeros)
        self.down = parameter(rngs, (num_tokens, hidden_width, width), (None, "mlp", "embed"), init)
        self.down_bias = parameter(rngs, (num_tokens, width), (None, "embed"), zeros)

    def __call__(self, x: Float[Array, "T N W"]) -> Float[Array, "T N W"]:
        """Applies the t-th FFN to the t-th token of N targets."""
        up, up_bias, down, down_bias = (
            p[...].astype(x.dtype) for p in (self.up, self.up_bias, self.down, self.down_bias)
        )
        hidden = jax.nn.gelu(jnp.einsum("tnw,twf->tnf", x, up) + up_bias[:, None])
        return jnp.einsum("tnf,tfw->tnw", hidden, down) + down_bias[:, None]


def mix_tokens(x: Float[Array, "T N W"]) -> Float[Array, "T N W"]:
    """Multi-head token mixing with as many heads as tokens; no parameters.

    Head s of every token goes to token s: output token s is the concatenation over t of slice s of
    token t.  W must be a multiple of T.
    """
    T, N, W = x.shape
    return x.reshape(T, N, T, W // T).transpose(2, 1, 0, 3).reshape(T, N, W)


class RankMixer(nnx.Module):
    """Blocks of x = LN(mix(x) + x), x = LN(ffn(x) + x), then the mean over tokens."""

    def __init__(
        self,
        config: RankMixerConfig,
        num_tokens: int,
        width: int,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.remat = remat
        if width % num_tokens:
            raise ValueError(
                f"RankMixer width {width} must be a multiple of its {num_tokens} tokens"
            )
        hidden_width = config.ffn_ratio * width
        self.blocks = nnx.List(
            [
                nnx.Dict(
                    mix_norm=LayerNorm(width, rngs=rngs),
                    ffn=PerTokenFfn(num_tokens, width, hidden_width, rngs=rngs),
                    ffn_norm=LayerNorm(width, rngs=rngs),
                )
                for _ in range(config.num_blocks)
            ]
        )

    def __call__(self, tokens: Float[Array, "T *N W"]) -> Float[Array, "*N W"]:
        """Hidden states of E9."""
        T, *shape, W = tokens.shape
        x = tokens.reshape(T, math.prod(shape), W)
        for block in self.blocks:
            x = recomputed(functools.partial(_mix, block), self.remat)(x)
        return x.mean(0).reshape(*shape, W)


def _mix(block: nnx.Dict, x: Float[Array, "T N W"]) -> Float[Array, "T N W"]:
    x = block["mix_norm"](mix_tokens(x) + x)
    return block["ffn_norm"](block["ffn"](x) + x)
