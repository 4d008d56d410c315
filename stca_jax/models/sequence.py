"""What every sequence module receives and returns, so that one launch can compare them.

A module is one file: a config that derives from `SequenceConfig`, and what its `make` returns.  A
run chooses it by its config's name, or by the import path of one that is not of this package.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from stca_jax.ranges import Ranges


class SequenceInput(NamedTuple):
    """Tokens of a packed row and the targets that read it.

    Attributes:
      tokens: History tokens; zero where no range covers them.
      targets: Target tokens x_t.
      history_time: Event times in seconds.
      request_time: Request times in seconds.
      ranges: Tokens that each target reads.
    """

    tokens: Float[Array, "R L D"]
    targets: Float[Array, "R M D"]
    history_time: Int[Array, "R L"]
    request_time: Int[Array, "R M"]
    ranges: Ranges


class SequenceOutput(NamedTuple):
    """What a target learned from its history.

    Attributes:
      summary: z of E7.
      counts: How much of the history matched; C is zero for a module without a count channel.
    """

    summary: Float[Array, "R M D"]
    counts: Float[Array, "R M C"]


# A history as targets see it: from target tokens [R, M, D] to what they gather from it.
HistoryReader = Callable[[Float[Array, "R M D"]], SequenceOutput]


class SequenceCost(NamedTuple):
    """FLOPs of matrix products, forward, by what they are proportional to; of a module or a model.

    Attributes:
      per_token: For each history token.
      per_target: For each target.
      per_pair: For each target and token of its range.
      per_token_pair: For each token of a request's history and each token before it, itself
        included: zero unless history tokens interact.
      num_layers: How often the tokens are read from memory.
    """

    per_token: int
    per_target: int
    per_pair: int
    per_token_pair: int = 0
    num_layers: int = 1

    def train_step(
        self, tokens: float, targets: float, pairs: float, token_pairs: float = 0.0
    ) -> float:
        """FLOPs of a forward and a backward pass, which costs twice as much.

        Args:
          tokens: History tokens of the batch that some range covers.
          targets: Valid targets.
          pairs: Sum over targets of the length n of their range.
          token_pairs: Sum over requests of n (n + 1) / 2.
        """
        forward = self.per_token * tokens + self.per_target * targets + self.per_pair * pairs
        return 3 * (forward + self.per_token_pair * token_pairs)


@dataclasses.dataclass(frozen=True)
class SequenceConfig(abc.ABC):
    """What the configs of all sequence modules have.

    Attributes:
      width: d, the width of tokens.
      ffn_ratio: r, the hidden width of FFNs over d; of the fusion of features into tokens, too.
    """

    width: int = 64
    ffn_ratio: int = 2

    def __post_init__(self) -> None:
        """Raises ValueError for sizes below 1."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1")

    @property
    def num_counts(self) -> int:
        """Size of `SequenceOutput.counts`."""
        return 0

    @property
    def needs_exclusive_history(self) -> bool:
        """Whether all targets that read a token must be of one request: input.rows="request"."""
        return False

    @property
    def can_cache_history(self) -> bool:
        """Whether the module has the `encode` and `read` of `Stca`: events are encoded once."""
        return False

    @abc.abstractmethod
    def make(self, *, remat: bool, rngs: nnx.Rngs) -> nnx.Module:
        """The module: called with a `SequenceInput`, it returns a `SequenceOutput`.

        Args:
          remat: Compute layers again in the backward pass instead of keeping their activations.
          rngs: Of the initial parameters.
        """

    @abc.abstractmethod
    def cost(self, targets_per_token: int) -> SequenceCost:
        """What the module computes.

        Args:
          targets_per_token: Targets that read a token, see `stca_jax.ops.tiles`.
        """


def head_width(width: int, num_heads: int) -> int:
    """Width of an attention head.

    Raises:
      ValueError: the heads do not divide the width.
    """
    if width % num_heads:
        raise ValueError(
            f"num_heads {num_heads} does not divide width {width}; heads split the width evenly"
        )
    return width // num_heads
