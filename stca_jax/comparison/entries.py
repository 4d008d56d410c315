"""What is compared: sequence modules, each with and without what is added around them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stca_jax import config as config_lib
from stca_jax.errors import UserError
from stca_jax.experiment import ExperimentConfig
from stca_jax.imports import find_path
from stca_jax.models.ranker import paper_config
from stca_jax.models.stca import StcaConfig

Overrides = dict[str, Any]

# What a variant takes away from our additions.
_WITHOUT: Mapping[str, Overrides] = {
    "no_match_channel": {"model.match_channel": False},
    "no_soft_counts": {"model.match_soft_counts": False},
    "no_time_scales": {"model.match_time_scales_days": ()},
    "no_skip_paths": {"model.sequence.skip_paths": False},
    "no_cooccurrence": {"model.embedding.initialization": "random"},
}
# "paper" has the published equations, whatever the config has.
VARIANTS: Mapping[str, Overrides] = {
    "full": {},
    "plain": {
        "model.embedding.linear_path": False,
        **{name: value for part in _WITHOUT.values() for name, value in part.items()},
    },
    "paper": {},
    **_WITHOUT,
    "linear_path": {"model.embedding.linear_path": True},
}

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
      variant: A name of `VARIANTS`: "full" is the config as it is, "plain" has none of our
        additions.
      config: What is trained, but for the budget, the seed and what the search chooses.
    """

    name: str
    module: str
    variant: str
    config: ExperimentConfig


def make_entries(
    base: ExperimentConfig, modules: Sequence[str], variants: Sequence[str]
) -> list[Entry]:
    """Every module in every variant, the variants of one side by side.

    Raises:
      UserError: an unknown name, a module that cannot be made of the base's sizes, or a variant
        that changes nothing of the module and the base.
    """
    for given, known in ((modules, MODULES), (variants, VARIANTS)):
        unknown = [n for n in given if n not in known and (given is variants or not find_path(n))]
        if unknown:
            own = (
                ""
                if given is variants
                else ", or name a module of your own as package.module:Config"
            )
            raise UserError(
                f"there is no {unknown[0]!r} to compare; choose from {', '.join(known)}{own}"
            )
    entries = []
    for module, variant in itertools.product(modules, VARIANTS):
        if variant in variants:
            config = _in_own_rows(_of_variant(_of_module(base, module), variant, module))
            name = f"{module.rpartition(':')[2]}-{variant}"
            entries.append(Entry(name, module, variant, config))
    return entries


def _of_module(base: ExperimentConfig, module: str) -> ExperimentConfig:
    """The base with another sequence module of the same sizes."""
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
    return base


def _in_own_rows(config: ExperimentConfig) -> ExperimentConfig:
    """The config, in rows of a request's own tokens if its model needs them."""
    if not config.model.needs_exclusive_history or config.input.rows == "request":
        return config
    targets = max(1, config.input.targets_per_row // _TARGETS_OF_OWN_TOKENS)
    own = dataclasses.replace(
        config.input, rows="request", targets_per_row=targets, targets_per_chunk=None
    )
    return dataclasses.replace(config, input=own)


def _of_variant(config: ExperimentConfig, variant: str, module: str) -> ExperimentConfig:
    """The config in a variant; what "plain" takes away and the module lacks is left out."""
    if variant == "paper":
        if not isinstance(config.model.sequence, StcaConfig):
            raise UserError(f"variant paper is of module stca, and not of {module}: leave one out")
        return dataclasses.replace(config, model=paper_config(config.model.sequence))
    known = config_lib.flatten(config)
    overrides = {name: value for name, value in VARIANTS[variant].items() if name in known}
    changed = config_lib.apply_overrides(config, overrides)
    if changed == config and variant not in ("full", "plain"):
        raise UserError(
            f"variant {variant} of {module} is what full is, by "
            f"{', '.join(VARIANTS[variant])}: leave it out"
        )
    return changed


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
