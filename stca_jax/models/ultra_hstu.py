"""ULTRA-HSTU's savings (arXiv 2602.16986): HSTU with a semi-local mask and a truncated stack.

Of n events, event p sees the first `global_length` and the last `local_length` up to itself; a
target sees all of them.  The first `num_layers` - `num_tail_layers` layers do so for all events; in
the others events and targets see no event but the last `tail_length`.  There is no relative bias.
(Where item and action are one token already, as here, the paper's third saving is made.)

Cost: O((local_length + global_length) L d) per layer.  The projections of the last layers are
computed for all events, as rows of many requests have no shorter shape.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from stca_jax.models.hstu import Hstu, HstuConfig, join, nothing, past_of_window
from stca_jax.models.sequence import SequenceCost
from stca_jax.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class UltraHstuConfig(HstuConfig):
    """Shape of the module; at least one layer sees all events.

    Attributes:
      relative_bias: As of HSTU; ULTRA-HSTU has none.
      local_length: K1, events up to itself that an event sees.
      global_length: K2, first events of the window that it sees.
      num_tail_layers: Last layers, of the newest events alone.
      tail_length: How many those are.
    """

    num_layers: int = 4
    relative_bias: bool = False
    local_length: int = 256
    global_length: int = 32
    num_tail_layers: int = 2
    tail_length: int = 512

    def __post_init__(self) -> None:
        """Raises ValueError for impossible shapes."""
        super().__post_init__()
        if self.num_tail_layers >= self.num_layers:
            raise ValueError(
                f"num_tail_layers {self.num_tail_layers} leaves no layer of {self.num_layers} that "
                "sees all events"
            )

    def make(self, *, remat: bool, rngs: nnx.Rngs) -> UltraHstu:
        """The module."""
        return UltraHstu(self, remat=remat, rngs=rngs)

    def cost(self, targets_per_token: int) -> SequenceCost:
        """FLOPs of a long history: every event is taken to have all it may see before it.

        Attention among the events of the tail, which does not grow with the history, is left out.
        """
        whole, tail, d = self.num_layers - self.num_tail_layers, self.num_tail_layers, self.width
        cost = super().cost(targets_per_token)
        seen = self.local_length + self.global_length
        return cost._replace(
            per_token=cost.per_token + whole * 4 * d * seen,
            per_target=cost.per_target + tail * 4 * d * self.tail_length,
            per_pair=whole * 4 * d,
            per_token_pair=0,
        )


class UltraHstu(Hstu):
    """The sequence module."""

    def __init__(self, config: UltraHstuConfig, *, remat: bool = False, rngs: nnx.Rngs):
        super().__init__(config, remat=remat, rngs=rngs)
        self.config = config

    def parts(
        self, layer: int, window: Ranges, targets: Ranges, is_last: bool
    ) -> tuple[Ranges, ...]:
        """The first events of what the layer sees, and the last ones that are not among them."""
        config = self.config
        if layer >= config.num_layers - config.num_tail_layers:
            window, targets = (
                Ranges(jnp.maximum(r.start, r.end - config.tail_length), r.end)
                for r in (window, targets)
            )
        if is_last:
            return (join(nothing(window), targets),)
        past = past_of_window(window)
        split = jnp.minimum(past.start + config.global_length, past.end)
        recent = jnp.maximum(split, past.end - config.local_length)
        return (
            join(Ranges(past.start, split), targets),
            join(Ranges(recent, past.end), nothing(targets)),
        )
