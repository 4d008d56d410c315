"""What an export holds, what it refuses, and models that are served uncached."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import MAX_HISTORY, STEP, evaluated, export_run, make_run

from stca_jax.errors import UserError
from stca_jax.export.folder import check_cacheable, export_checkpoint
from stca_jax.export.programs import PLATFORMS
from stca_jax.export.replay import replay
from stca_jax.models.din import DinConfig
from stca_jax.models.embedding import EmbeddingConfig
from stca_jax.models.ranker import RankerConfig, paper_config
from stca_jax.models.stca import StcaConfig
from stca_jax.models.transformer import TransformerConfig
from stca_jax.serving import Scorer, ServingModel

SMALL = StcaConfig(width=8, num_heads=2)


def test_the_folder_says_what_it_is(export, everything_run):
    values = json.loads((export / "model.json").read_text())
    assert values["max_history"] == MAX_HISTORY
    assert values["step"] == STEP
    assert values["parameters"] == "averaged"
    assert values["dataset"]["fingerprint"] == everything_run.dataset.fingerprint
    files = {str(p.relative_to(export)) for p in export.rglob("*") if p.is_file()}
    assert files == {"model.json", *values["files"]}
    assert "features/features.json" in files
    assert values["golden_differences"]["keys_values"] < 1e-5
    assert values["inputs"]["soft_fields"] == ["category"]
    assert not [p for p in export.parent.iterdir() if p.name.startswith(".")]


def test_tables_are_by_id_and_weights_are_the_average(export, everything_run):
    model = ServingModel.load(export)
    state, schema = everything_run.state, everything_run.dataset.schema
    average = state.optimizer.average["head"]["weight"]
    np.testing.assert_array_equal(model.weights["head/weight"], average)
    assert np.abs(np.asarray(average) - np.asarray(state.dense["head"]["weight"])).max() > 1e-3
    for name, size in schema.vocabularies.items():
        table = np.load(export / "tables" / f"{name}.npy")
        assert len(table) == size
        # Of a divided table, id k is card k // 3,072 of pile k % 3,072.
        assert np.asarray(state.tables[name]).shape[0] in (size, 3_072)
        np.testing.assert_array_equal(table, np.asarray(state.tables[name])[:size])


def test_programs_are_for_every_platform_and_compile_for_sizes_not_seen(export):
    for path in sorted((export / "programs" / "keys_values").glob("*.stablehlo")):
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
        assert exported.platforms == PLATFORMS
        assert any(not isinstance(n, int) for a in exported.in_avals for n in a.shape)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (RankerConfig(TransformerConfig(width=8)), "TransformerConfig lets history tokens inter"),
        (RankerConfig(DinConfig(width=8)), "DinConfig has no way to keep"),
        (paper_config(SMALL), r"time_delta makes tokens depend on the request.*recency_score=true"),
        (RankerConfig(SMALL, EmbeddingConfig(recency_index=True)), "recency_index makes"),
    ],
)
def test_models_whose_events_cannot_be_cached_are_refused(everything_run, model, message):
    config = dataclasses.replace(everything_run.config, model=model)
    with pytest.raises(UserError, match=message + ".*--uncached"):
        check_cacheable(config)


def test_an_output_that_exists_is_refused(export, everything_run):
    run = everything_run
    with pytest.raises(UserError, match="exists: name a new folder"):
        export_checkpoint(run.config, run.dataset, run.workdir, STEP, export)


def test_what_fails_leaves_no_folder(everything_run, tmp_path, monkeypatch):
    monkeypatch.setattr("stca_jax.export.folder.lower_all", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(everything_run, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["transformer", "paper"])
def test_uncached_models_score_as_evaluated(long_users, tmp_path, name, monkeypatch):
    monkeypatch.setattr("stca_jax.export.programs.ROW_TARGETS", (30, 2_048))
    model = {
        "transformer": RankerConfig(
            TransformerConfig(width=8, num_heads=2), match_soft_counts=True
        ),
        "paper": paper_config(SMALL),
    }[name]
    run = make_run(long_users, tmp_path / "run", model, ema_decay=0.0)
    folder = export_run(run, tmp_path / "model", uncached=True)
    scorer = Scorer(ServingModel.load(folder), encoded=True)
    expected = evaluated(run)
    for replayed in replay(long_users, expected):
        scorer.append(replayed.request.user, replayed.new)
        found = scorer.logits(replayed.request)
        np.testing.assert_allclose(found, expected[replayed.request_id], atol=1e-5)
