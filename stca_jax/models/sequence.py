"""What every sequence module receives and returns, so that one launch can compare them."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class SequenceInput(NamedTuple):
    """Tokens of a packed row and the targets that read it.

    Attributes:
      tokens: History tokens; zero where no range covers them.
      targets: Target tokens x_t.
      history_time: Event times in seconds.
      request_time: Request times in seconds.
      history_start: First token of each target's range.
      history_end: One past its last token.
    """

    tokens: Float[Array, "R L D"]
    targets: Float[Array, "R M D"]
    history_time: Int[Array, "R L"]
    request_time: Int[Array, "R M"]
    history_start: Int[Array, "R M"]
    history_end: Int[Array, "R M"]


class SequenceOutput(NamedTuple):
    """What a target learned from its history.

    Attributes:
      summary: z of E7.
      counts: How much of the history matched; C is zero for a module without a count channel.
    """

    summary: Float[Array, "R M D"]
    counts: Float[Array, "R M C"]
