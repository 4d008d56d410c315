"""Where users' events are kept: the protocol of stores.

A store keeps events as they were given, so that another model, which encodes them otherwise, reads
them too.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from stca_jax.serving.events import Events


class Change(NamedTuple):
    """What an append or an update did.

    Attributes:
      sequence: Each event's own number; of an append, -1 for an event that was there before.
      before: The user's revision before; None of a new user.
      after: The user's revision now.
    """

    sequence: Int[np.ndarray, " n"]
    before: int | None
    after: int | None


class HistoryStore(Protocol):
    """Events of users. Every method is atomic and durable once it returns, and thread-safe."""

    def revision(self, user: str) -> int | None:
        """A number that every change of the user's events makes another; None if unknown.

        By it a process sees what others have written since it read. It is drawn at random, so that
        a user who is deleted and appended to again does not get an old one back.
        """
        ...

    def read(self, user: str, limit: int, before: int | None = None) -> Events:
        """The latest events of a user, oldest first by (time, sequence); none of an unknown user.

        Args:
          user: Whose.
          limit: Most events.
          before: Only events strictly before this Unix second.
        """
        ...

    def append(self, user: str, events: Events) -> Change:
        """Adds events, late ones too; an id that the user has already is left as it is.

        Raises:
          UserError: the events have other columns than those of the user before.
        """
        ...

    def update(self, user: str, events: Events) -> Change:
        """Gives events other columns, by their ids: a label that came late. Times stay.

        Raises:
          UserError: the user has no event of an id, or the columns are others.
        """
        ...

    def delete(self, user: str) -> bool:
        """Removes all that is known of a user; returns whether there was anything."""
        ...

    def close(self) -> None:
        """Releases the store."""
        ...


def new_revision() -> int:
    """See `HistoryStore.revision`."""
    return secrets.randbits(62)
