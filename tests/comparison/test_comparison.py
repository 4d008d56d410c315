"""What is compared, what it may spend, and the request whose latency is measured."""

import dataclasses
import re

import pytest

from stca_jax.batch import validate_batch
from stca_jax.comparison.costs import Budget, Costs, long_request
from stca_jax.comparison.entries import MODULES, make_entries, make_settings
from stca_jax.config import apply_overrides, flatten
from stca_jax.errors import UserError
from stca_jax.experiments.configs import tiny
from stca_jax.models.hstu import HstuConfig
from stca_jax.models.ranker import paper_config, similarity_config
from stca_jax.models.target_attention import TargetAttentionConfig


@pytest.fixture(scope="module")
def base():
    return apply_overrides(
        tiny.get_config(), {"model.sequence.skip_paths": True, "input.targets_per_chunk": 64}
    )


def test_every_module_has_the_sizes_of_the_base(base):
    entries = make_entries(base, [*MODULES], ["full", "plain"])
    assert len({entry.name for entry in entries}) == 2 * len(MODULES)
    for entry in entries:
        sequence = entry.config.model.sequence
        assert (sequence.width, sequence.ffn_ratio) == (16, 2)
        if hasattr(sequence, "num_heads"):
            assert sequence.num_heads == 2
        assert entry.config.evaluation == base.evaluation
        exclusive = entry.config.model.needs_exclusive_history
        assert entry.config.input.rows == ("request" if exclusive else "user")
        if not exclusive:
            assert entry.config.input == base.input
    hstu = {e.module: e.config.model.sequence for e in entries if e.module.startswith("hstu")}
    assert hstu == {
        "hstu": HstuConfig(width=16, num_layers=2, num_heads=2),
        "hstu_no_bias": HstuConfig(width=16, num_layers=2, num_heads=2, relative_bias=False),
    }


def test_full_is_the_base_and_plain_has_none_of_our_additions(base):
    full, plain = make_entries(base, ["stca"], ["plain", "full"])
    assert full.config == base
    model = plain.config.model
    assert not model.match_channel
    assert not model.sequence.skip_paths
    assert not model.embedding.linear_path
    assert model.embedding.initialization == "random"
    assert dataclasses.replace(plain.config, model=base.model) == base


@pytest.fixture(scope="module")
def similarity(base):
    return dataclasses.replace(base, model=similarity_config(base.model.sequence))


@pytest.mark.parametrize(
    ("variant", "name", "value"),
    [
        ("no_match_channel", "model.match_channel", False),
        ("no_soft_counts", "model.match_soft_counts", False),
        ("no_time_scales", "model.match_time_scales_days", ()),
        ("no_skip_paths", "model.sequence.skip_paths", False),
        ("linear_path", "model.embedding.linear_path", True),
        ("no_cooccurrence", "model.embedding.initialization", "random"),
    ],
)
def test_an_ablation_changes_one_thing(similarity, variant, name, value):
    full, without = make_entries(similarity, ["stca"], [variant, "full"])
    changed = {
        key: after
        for (key, before), after in zip(
            flatten(full.config).items(), flatten(without.config).values(), strict=True
        )
        if before != after
    }
    assert changed == {name: value}
    assert without.name == f"stca-{variant}"


def test_paper_is_the_published_equations_in_rows_that_they_need(similarity):
    (entry,) = make_entries(similarity, ["stca"], ["paper"])
    assert entry.config.model == paper_config(similarity.model.sequence)
    assert (entry.config.input.rows, similarity.input.rows) == ("request", "user")
    with pytest.raises(UserError, match="variant paper is of module stca, and not of din"):
        make_entries(similarity, ["din"], ["paper"])


def test_a_variant_that_changes_nothing_is_refused(similarity):
    said = (
        "variant no_skip_paths of din is what full is, by model.sequence.skip_paths: leave it out"
    )
    with pytest.raises(UserError, match=re.escape(said)):
        make_entries(similarity, ["din"], ["full", "no_skip_paths"])


def test_a_module_of_ones_own_is_named_by_import_path(base):
    path = "stca_jax.models.target_attention:TargetAttentionConfig"
    (entry,) = make_entries(base, [path], ["full"])
    assert entry.name == "TargetAttentionConfig-full"
    assert entry.config.model.sequence == TargetAttentionConfig(width=16, num_heads=2)


@pytest.mark.parametrize(
    ("modules", "variants", "unknown"),
    [(["stca", "hst"], ["full"], "'hst'"), (["stca"], ["full", "bare"], "'bare'")],
)
def test_unknown_names_are_refused(base, modules, variants, unknown):
    with pytest.raises(UserError, match=f"there is no {unknown} to compare; choose from"):
        make_entries(base, modules, variants)


def test_settings_are_all_combinations_of_what_an_entry_has(base):
    search = {"model.sequence.num_layers": ["1", "2"]}
    stca, attention = make_entries(base, ["stca", "target_attention"], ["full"])
    settings = make_settings(stca.config, [0.5, 2], search)
    assert len(settings) == 4
    rate = base.optimizer.learning_rate
    assert settings[3]["optimizer.learning_rate"] == pytest.approx(2 * rate)
    assert settings[3]["model.sequence.num_layers"] == "2"
    configs = {apply_overrides(stca.config, setting) for setting in settings}
    assert len(configs) == 4
    assert len(make_settings(attention.config, [0.5, 2], search)) == 2


def costs(**changes):
    values = {"parameters": 1, "table_parameters": 1, "tokens_per_step": 100.0,
              "targets_per_step": 40.0, "flops_per_step": 1e6, "seconds_per_step": 0.5,
              "step_bytes": None, "latency": {}}  # fmt: skip
    return Costs(**(values | changes))


def test_budgets_are_equal_in_what_they_count():
    first, other = costs(), costs(targets_per_step=10.0, seconds_per_step=0.1, flops_per_step=5e6)
    assert Budget(steps=30).steps_of(first, first) == 30
    assert Budget(steps=30).steps_of(other, first) == 120
    assert Budget(minutes=1).steps_of(other, first) == 600
    assert Budget(flops=1e9).steps_of(other, first) == 200
    assert Budget(flops=1.0).steps_of(other, first) == 1


@pytest.mark.parametrize("given", [{}, {"steps": 3, "flops": 1.0}, {"minutes": -1.0}])
def test_a_budget_is_one_positive_number(given):
    with pytest.raises(UserError, match="give one positive number: --steps, --minutes or --flops"):
        Budget(**given)


def test_the_request_that_is_timed_is_valid(tiny_dataset):
    batch = long_request(tiny_dataset, 32, 5)
    validate_batch(batch, tiny_dataset.schema)
    assert batch.ranges.lengths.tolist() == [[32] * 5]
