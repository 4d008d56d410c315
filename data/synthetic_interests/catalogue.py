"""The tree of topics, categories and items that all users of a configuration share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from stca_jax.data.synthetic_interests.drawing import LogConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorConfig(LogConfig):
    """Size of a dataset.

    Attributes:
      num_topics: Hidden clusters of categories.
      categories_per_topic: Number of categories of each.
      items_per_category: Number of items of each.
    """

    num_topics: int = 32
    categories_per_topic: int = 5
    items_per_category: int = 64

    @property
    def num_categories(self) -> int:
        """Of all topics."""
        return self.num_topics * self.categories_per_topic

    @property
    def num_items(self) -> int:
        """Of all categories."""
        return self.num_categories * self.items_per_category


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The tree of topics, categories and items.

    Attributes:
      categories: Categories of each topic.
      items: Items of each category, most popular first.
      topic_of_category: The inverse of `categories`.
      category_of_item: The inverse of `items`.
    """

    categories: Int[np.ndarray, "topics k"]
    items: Int[np.ndarray, "categories k"]
    topic_of_category: Int[np.ndarray, " categories"]
    category_of_item: Int[np.ndarray, " items"]

    def num_ids(self, field: str) -> int:
        """Size of a field of `fields_of`."""
        return {
            "item": len(self.category_of_item),
            "category": len(self.topic_of_category),
            "topic": len(self.categories),
        }[field]

    def fields_of(
        self, features: Mapping[str, Int[np.ndarray, " n"]]
    ) -> dict[str, Int[np.ndarray, " n"]]:
        """Item, category and topic of a record's events or targets.

        Raises:
          ValueError: the catalogue has other items, or has them in other categories.
        """
        item, category = features["item"], features["category"]
        num_items = len(self.category_of_item)
        if item.max(initial=0) >= num_items or (self.category_of_item[item] != category).any():
            raise ValueError(
                f"the items are not those of this catalogue of {num_items}: make it from the "
                "GeneratorConfig that the record was generated from"
            )
        return {"item": item, "category": category, "topic": self.topic_of_category[category]}


def make_catalogue(config: GeneratorConfig) -> Catalogue:
    """Draws the tree that all users of a configuration share."""
    rng = np.random.default_rng([config.seed, 0])
    categories = rng.permutation(config.num_categories).reshape(config.num_topics, -1)
    items = rng.permutation(config.num_items).reshape(config.num_categories, -1)
    categories, items = categories.astype(np.int32), items.astype(np.int32)
    return Catalogue(categories, items, _row_of(categories), _row_of(items))


def _row_of(table: Int[np.ndarray, "rows k"]) -> Int[np.ndarray, " ids"]:
    """For each id of a table that holds every id once, the row it stands in."""
    row = np.empty(table.size, np.int32)
    row[table] = np.arange(len(table), dtype=np.int32)[:, None]
    return row
