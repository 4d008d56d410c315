"""What a dataset contains: which features at which level, and how many ids each vocabulary has.

A builder writes its `Schema` into the dataset's metadata; the input pipeline reads columns by it
and the model sizes its embedding tables by it.  It is the only thing the two have in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

SECONDS_PER_DAY = 86_400  # all times are in seconds


@dataclasses.dataclass(frozen=True)
class Schema:
    """Names of a dataset's features by level, and its vocabularies.

    A feature is categorical if `vocabularies` has its name (int32 ids in `[0, size)`, unseen values
    already hashed into out-of-vocabulary rows) and numeric otherwise (float32).  A name used at
    several levels shares one vocabulary and one embedding table: the target's `item` is compared
    with, and embedded like, the history's `item`.

    Attributes:
      history: Features of one event of the log, besides its time.
      target: Features of one candidate.
      request: Features of the user or of the request, shared by its targets.
      vocabularies: Number of ids of each categorical feature.
      tasks: One binary label per task.
      item: The categorical feature that identifies the candidate; in `history` and `target`.
    """

    history: tuple[str, ...]
    target: tuple[str, ...]
    request: tuple[str, ...]
    vocabularies: Mapping[str, int]
    tasks: tuple[str, ...]
    item: str = "item"

    def __post_init__(self) -> None:
        """Raises ValueError if names repeat, the item is missing, or a vocabulary is unused."""
        for level in ("history", "target", "request", "tasks"):
            names = getattr(self, level)
            if len(set(names)) != len(names):
                raise ValueError(f"schema.{level} repeats a name: {names}")
        if not self.tasks:
            raise ValueError("schema.tasks is empty: a dataset needs at least one label")
        for level in ("history", "target"):
            if self.item not in getattr(self, level):
                raise ValueError(
                    f"schema.{level} {getattr(self, level)} lacks the item feature {self.item!r}"
                )
        if self.item not in self.vocabularies:
            raise ValueError(f"the item feature {self.item!r} must be categorical: give its size")
        known = {*self.history, *self.target, *self.request}
        for name, size in self.vocabularies.items():
            if name not in known:
                raise ValueError(f"vocabulary {name!r} belongs to no feature of {sorted(known)}")
            if size < 1:
                raise ValueError(f"vocabulary {name!r} has size {size}; it needs at least one id")

    def is_categorical(self, name: str) -> bool:
        """Whether `name` holds ids rather than numbers."""
        return name in self.vocabularies

    @property
    def match_fields(self) -> tuple[str, ...]:
        """Categorical features of both history and target: what can match, the item first."""
        shared = [n for n in self.target if n in self.history and self.is_categorical(n)]
        return (self.item, *(n for n in shared if n != self.item))

    def select(self, features: Collection[str]) -> Schema:
        """The schema of the item and those features, at every level that has them.

        Raises:
          ValueError: there is no feature of that name.
        """
        known = dict.fromkeys((*self.history, *self.target, *self.request))
        unknown = [name for name in features if name not in known]
        if unknown:
            raise ValueError(f"there is no feature {unknown[0]!r}, but {', '.join(known)}")
        kept = {self.item, *features}

        def those_of(level: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name for name in level if name in kept)

        return dataclasses.replace(
            self,
            history=those_of(self.history),
            target=those_of(self.target),
            request=those_of(self.request),
            vocabularies={name: n for name, n in self.vocabularies.items() if name in kept},
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form, the inverse of `from_dict`."""
        return dataclasses.asdict(self) | {"vocabularies": dict(self.vocabularies)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schema:
        """Rebuilds a schema from `to_dict`'s form (lists are accepted for tuples)."""
        lists = {k: tuple(values[k]) for k in ("history", "target", "request", "tasks")}
        return cls(**lists, vocabularies=dict(values["vocabularies"]), item=values["item"])
