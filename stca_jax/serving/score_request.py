"""What a scorer is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreRequest:
    """One request.

    Attributes:
      user: Whose history; a user without events has an empty one.
      targets: Features of m candidates by name, m values each. Where the export has an item table,
        the item suffices.
      request: Features of the request by name. Where the export has a user table and a clock, what
        these know may be left out.
      time: Unix second of the request; None is now, or after the user's latest event. Events at or
        after it are not read.
    """

    user: str
    targets: Mapping[str, Sequence[Any] | np.ndarray]
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    time: int | None = None
