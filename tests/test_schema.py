"""What a schema refuses, and its JSON form."""

import dataclasses
import json

import pytest
from strategies import SCHEMA

from stca_jax.schema import Schema


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": ("item", "category", "item")}, r"schema\.history repeats a name"),
        ({"target": ("item", "item")}, r"schema\.target repeats a name"),
        ({"request": ("segment", "segment")}, r"schema\.request repeats a name"),
        ({"tasks": ("click", "click")}, r"schema\.tasks repeats a name"),
        ({"tasks": ()}, r"schema\.tasks is empty"),
        ({"history": ("category", "price")}, r"schema\.history .* lacks the item feature 'item'"),
        ({"target": ("position",)}, r"schema\.target .* lacks the item feature 'item'"),
        ({"vocabularies": {"category": 3}}, r"item feature 'item' must be categorical"),
        ({"vocabularies": {"item": 7, "colour": 2}}, r"vocabulary 'colour' belongs to no feature"),
        ({"vocabularies": {"item": 0}}, r"vocabulary 'item' has size 0"),
        ({"item": "product"}, r"lacks the item feature 'product'"),
    ],
)
def test_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SCHEMA, **changes)


def test_features_with_a_vocabulary_are_categorical():
    names = {*SCHEMA.history, *SCHEMA.target, *SCHEMA.request}
    assert {n for n in names if SCHEMA.is_categorical(n)} == {"item", "category", "segment"}


def test_match_fields_are_shared_ids_with_the_item_first():
    schema = Schema(
        history=("brand", "price", "item", "colour"),
        target=("price", "colour", "brand", "item"),
        request=(),
        vocabularies={"brand": 2, "colour": 2, "item": 2},
        tasks=("click",),
    )
    assert schema.match_fields == ("item", "colour", "brand")


def test_select_keeps_the_item_and_the_order():
    assert SCHEMA.select(["segment", "price"]) == dataclasses.replace(
        SCHEMA,
        history=tuple(n for n in SCHEMA.history if n != "category"),
        target=tuple(n for n in SCHEMA.target if n not in ("category", "position")),
        request=("segment",),
        vocabularies={n: SCHEMA.vocabularies[n] for n in ("item", "segment")},
    )
    assert SCHEMA.select(()).match_fields == ("item",)
    with pytest.raises(ValueError, match="there is no feature 'colour', but "):
        SCHEMA.select(["colour"])


def test_survives_json():
    assert Schema.from_dict(json.loads(json.dumps(SCHEMA.to_dict()))) == SCHEMA
