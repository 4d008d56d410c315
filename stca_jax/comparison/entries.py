"""What is compared: sequence modules, each with and without what is added around them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from stca_jax import config as config_lib
from stca_jax.errors import UserError
from stca_jax.experiment import ExperimentConfig
from stca_jax.imports import find_path
from stca_jax.models.stca import StcaConfig

Overrides = dict[str, Any]
Variant = Literal["full", "plain"]
VARIANTS: tuple[Variant, ...] = ("full", "plain")

# The class of each module's config, and what tells it from another of the same class.
MODULES: Mapping[str, tuple[str, Overrides]] = {
    "stca": ("StcaConfig", {}),
    "target_attention": ("TargetAttentionConfig", {}),
    "din": ("DinConfig", {}),
    "mixformer": ("MixFormerConfig", {}),
    "twin": ("TopKConfig", {"search": "twin"}),
    "sim": ("TopKConfig", {"search": "sim"}),
    "sdim": ("SdimConfig", {}),
    "transact": ("TransActConfig", {}),
    "sequence_o1": ("SequenceO1Config", {}),
    "longer": ("LongerConfig", {}),
    "ultra_hstu": ("UltraHstuConfig", {"num_layers": 4}),
    "hstu": ("HstuConfig", {"relative_bias": True}),
    "hstu_no_bias": ("HstuConfig", {"relative_bias": False}),
    "transformer": ("TransformerConfig", {}),
    "sasrec": ("SasRecConfig", {}),
}
_SHARED = ("width", "ffn_ratio", "num_layers", "num_heads")
# In rows of a request's own tokens about a third as many targets find room; see the length study.
_TARGETS_OF_OWN_TOKENS = 3


class Entry(NamedTuple):
    """A line of the comparison.

    Attributes:
      name: Of its directory.
      module: A name of `MODULES`, or an import path.
      variant: "full" is the config as it is; "plain" has none of our additions.
      config: What is trained, but for the budget, the seed and what the search chooses.
    """

    name: str
    module: str
    variant: Variant
    config: ExperimentConfig


def make_entries(
    base: ExperimentConfig, modules: Sequence[str], variants: Sequence[str]
) -> list[Entry]:
    """Every module in every variant, the variants of one side by side.

    Raises:
      UserError: an unknown name, or a module that cannot be made of the base's sizes.
    """
    for given, known in ((modules, tuple(MODULES)), (variants, VARIANTS)):
        unknown = [n for n in given if n not in known and find_path(n) is None]
        if unknown or (given is variants and not set(given) <= set(VARIANTS)):
            raise UserError(
                f"there is no {unknown[0] if unknown else given[0]!r} to compare; choose from "
                f"{', '.join(known)}, or name a module of your own as package.module:Config"
            )
    entries = []
    for module, variant in itertools.product(modules, VARIANTS):
        if variant in variants:
            config = _of_variant(_of_module(base, module), variant)
            name = f"{module.rpartition(':')[2]}-{variant}"
            entries.append(Entry(name, module, variant, config))
    return entries


def _of_module(base: ExperimentConfig, module: str) -> ExperimentConfig:
    """The base with another sequence module of the same sizes, in rows that suit it."""
    name, fields = MODULES.get(module, (module, {}))
    sequence = base.model.sequence
    if type(sequence).__name__ != name:
        chosen = config_lib.apply_overrides(base, {"model.sequence": name}).model.sequence
        known = {field.name for field in dataclasses.fields(chosen)}
        shared = {n: getattr(sequence, n) for n in _SHARED if n in known and hasattr(sequence, n)}
        fields = shared | fields
        overrides = {f"model.sequence.{n}": value for n, value in fields.items()}
        base = config_lib.apply_overrides(base, {"model.sequence": name, **overrides})
    elif fields:
        overrides = {f"model.sequence.{n}": value for n, value in fields.items()}
        base = config_lib.apply_overrides(base, overrides)
    if not base.model.needs_exclusive_history or base.input.rows == "request":
        return base
    targets = max(1, base.input.targets_per_row // _TARGETS_OF_OWN_TOKENS)
    own = dataclasses.replace(
        base.input, rows="request", targets_per_row=targets, targets_per_chunk=None
    )
    return dataclasses.replace(base, input=own)


def _of_variant(config: ExperimentConfig, variant: Variant) -> ExperimentConfig:
    """The config, or without match channel, skip and linear paths, and trained first tables."""
    if variant == "full":
        return config
    model = config.model
    embedding = dataclasses.replace(model.embedding, initialization="random", linear_path=False)
    sequence = model.sequence
    if isinstance(sequence, StcaConfig):
        sequence = dataclasses.replace(sequence, skip_paths=False)
    plain = dataclasses.replace(model, match_channel=False, embedding=embedding, sequence=sequence)
    return dataclasses.replace(config, model=plain)


def make_settings(
    config: ExperimentConfig, rate_factors: Sequence[float], search: Mapping[str, Sequence[str]]
) -> list[Overrides]:
    """Settings that are tried for an entry: all combinations; values that it lacks are left out.

    Args:
      config: Of the entry.
      rate_factors: What both learning rates are multiplied by.
      search: Values by the name that --config.NAME takes.
    """
    known = config_lib.flatten(config)
    axes: list[list[Overrides]] = [
        [
            {
                name: getattr(config.optimizer, name.partition(".")[2]) * factor
                for name in ("optimizer.learning_rate", "optimizer.table_learning_rate")
            }
            for factor in rate_factors
        ]
    ]
    axes += [[{n: v} for v in values] for n, values in search.items() if n in known]
    return [
        {name: value for part in parts for name, value in part.items()}
        for parts in itertools.product(*axes)
    ]
