"""What an implementation of the op is: one class that says whether and why it can run where."""

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

        Args:
          query: Queries after W_Q, not yet scaled.
          tokens: Tokens of the rows.
          weights: In the dtype of the queries.
          ranges: Of each target.
          order: Which algebra.
          block_sizes: Tile sizes, if it has tiles; None for its defaults.

        Returns:
          float32 weighted sums of the values and log-sum-exps; 0 and -inf for an empty range.
        """


class GroupedImplementation(Implementation):
    """An implementation by grouped attention, which both orders of the algebra are.

    G groups of A heads share keys and values of width E.  Projected has G = H groups of one head;
    absorbed has one group of H heads, whose keys and values are the encoded tokens themselves.
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
          query: Scaled queries, in the space of the keys.
          tokens: Tokens of the rows.
          weights: What turns tokens into keys and values.
          ranges: Of each target.
          block_sizes: Tile sizes; None for the defaults.

        Returns:
          float32 weighted sums of the values and log-sum-exps; 0 and -inf for an empty range.
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
