"""What an implementation of the op is: one class that says whether and why it can run where.

For target j with range [s, e), head h and the tokens x~ of the range, encoded by E1 if the weights
have an encoder, an implementation computes

    z_l = q_jh . (x~_l W_K,h) / sqrt(K) + score_lh     a = softmax of z over s <= l < e     (E3)
    o_jh = sum over the range of a_l x~_l W_V,h         log_sum_exp_jh = log sum exp z_l     (E4)

Scores, softmax and sums are float32, whatever the dtype of the arrays (float32 or bfloat16).
`stca_jax.ops.attention` has checked the shapes and divides rows and tokens over the devices of a
mesh: an implementation sees one device's part.
"""

from __future__ import annotations

import abc
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from stca_jax.ops.encoder import HistoryEncoder
from stca_jax.ops.tiles import BlockSizes
from stca_jax.ranges import Ranges

Order = Literal["absorbed", "projected"]


class Weights(NamedTuple):
    """Weights of the op.

    Attributes:
      encoder: History FFN and LayerNorm; None if the tokens are encoded already.
      w_key: W_K of E3 for all heads.
      w_value: W_V of E4 for all heads.
    """

    encoder: HistoryEncoder | None
    w_key: Float[Array, "D H K"]
    w_value: Float[Array, "D H K"]


class TokenWeights(NamedTuple):
    """What turns tokens into keys and values.

    Attributes:
      encoder: History FFN and LayerNorm; None if the tokens are encoded already.
      w_key: W_K of E3; None in the absorbed order, whose keys are the encoded tokens.
      w_value: W_V of E4; None in the absorbed order.
    """

    encoder: HistoryEncoder | None
    w_key: Float[Array, "D G K"] | None
    w_value: Float[Array, "D G K"] | None


class Tokens(NamedTuple):
    """A row's tokens and their scores; what no range covers may hold anything, NaN included.

    Attributes:
      value: Tokens, encoded or not, see `Weights.encoder`.
      score: Additive score of each token and head; None for zero.
    """

    value: Float[Array, "R L D"]
    score: Float[Array, "R L H"] | None


class Implementation(abc.ABC):
    """One way to compute the op on one device."""

    @classmethod
    def here(cls) -> Implementation:
        """An instance for this process's devices."""
        return cls()

    def unavailable(self, platform: str) -> str | None:
        """Why it cannot run, and what to do instead; None if it can.

        `attend` where it cannot run raises this as a ValueError, once it is lowered.

        Args:
          platform: As JAX names it: "cpu", "gpu" or "tpu".
        """
        del platform
        return None

    @abc.abstractmethod
    def attend(
        self,
        query: Float[Array, "R M H K"],
        tokens: Tokens,
        weights: Weights,
        ranges: Ranges,
        order: Order,
        block_sizes: BlockSizes | None,
    ) -> tuple[Float[Array, "R M H K"], Float[Array, "R M H"]]:
        """E3 and E4 over each target's range; at least one target and one token.

        Differentiable in the queries, tokens, scores and weights.

        Args:
          query: Queries after W_Q, not yet scaled.
          tokens: Tokens of the rows, and their scores.
          weights: W_K and W_V in the dtype of the queries.
          ranges: int32, of each target, within [0, L].
          order: Which algebra.
          block_sizes: Tile sizes, if it has tiles; None for its defaults.

        Returns:
          float32 weighted sums o of the values and log-sum-exps; 0 and -inf for an empty range.

        Raises:
          ValueError: see `unavailable`, or the blocks do not fit the device.
        """


class GroupedImplementation(Implementation):
    """An implementation by grouped attention, which both orders of the algebra are.

    G groups of A heads share keys and values of width E.  Projected has G = H groups of one head,
    and E = K; absorbed has one group of A = H heads, and E = D: its keys and values are the encoded
    tokens themselves, and q W_K^T before and W_V after it are of M targets, not of L tokens.
    """

    @abc.abstractmethod
    def attend_grouped(
        self,
        query: Float[Array, "R M G A E"],
        tokens: Tokens,
        weights: TokenWeights,
        ranges: Ranges,
        block_sizes: BlockSizes | None,
    ) -> tuple[Float[Array, "R M G A E"], Float[Array, "R M G A"]]:
        """Grouped attention of each target over its range.

        Args:
          query: Queries over sqrt(K), in the space of the keys and the dtype of the tokens.
          tokens: Tokens of the rows; scores of head h are of group h // A.
          weights: What turns tokens into keys and values.
          ranges: Of each target.
          block_sizes: Tile sizes; None for the defaults.

        Returns:
          float32 weighted sums of the values and log-sum-exps; 0 and -inf for an empty range.

        Raises:
          ValueError: see `Implementation.attend`.
        """

    def attend(
        self,
        query: Float[Array, "R M H K"],
        tokens: Tokens,
        weights: Weights,
        ranges: Ranges,
        order: Order,
        block_sizes: BlockSizes | None,
    ) -> tuple[Float[Array, "R M H K"], Float[Array, "R M H"]]:
        """See `Implementation`."""
        scaled = query.astype(jnp.float32) / jnp.sqrt(jnp.float32(query.shape[-1]))
        if order == "projected":
            grouped, token_weights = scaled[:, :, :, None], TokenWeights(*weights)
        else:
            token_weights = TokenWeights(weights.encoder, None, None)
            grouped = jnp.einsum("rmhk,dhk->rmhd", scaled, weights.w_key)[:, :, None]
        output, log_sum_exp = self.attend_grouped(
            grouped.astype(tokens.value.dtype),
            tokens,
            token_weights,
            ranges,
            block_sizes,
        )
        if order == "projected":
            output = output[:, :, :, 0]
        else:
            output = jnp.einsum("rmhd,dhk->rmhk", output[:, :, 0], weights.w_value)
        return output, log_sum_exp.reshape(query.shape[:3])
