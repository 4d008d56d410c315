"""The length study as a user runs it, and the numbers that it makes of its runs."""

import csv
import time

import numpy as np
import pytest
from processes import run, start_forked

from stca_jax.config import apply_overrides
from stca_jax.errors import UserError
from stca_jax.experiments import length_study
from stca_jax.experiments.configs import tiny
from stca_jax.length_study import figures, power_law, results
from stca_jax.length_study.points import choose_points, make_points

LENGTH = {"input.length": "BetaLength", "input.length.minimum": 8, "input.length.maximum": 256,
          "input.length.average": 64, "input.length.alpha": 0.25}  # fmt: skip


@pytest.fixture
def base():
    return apply_overrides(tiny.get_config(), LENGTH)


def times(directory):
    """When each file was written, other than the config, which every call checks and writes."""
    found = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    return {path: time for path, time in found.items() if path.name != "config.json"}


@pytest.mark.exhaustive
def test_killed_study_goes_on_and_repeats_no_run(tmp_path, data_dir):
    workdir = tmp_path / "study"
    arguments = (
        "experiments.length_study",
        "--config=experiments/configs/tiny.py",
        f"--workdir={workdir}",
        f"--data_dir={data_dir}",
        "--seeds=1",
        "--points=fixed-16,fixed-256",
        *(f"--config.{name}={value}" for name, value in LENGTH.items()),
        "--config.training.max_steps=12",
        "--config.evaluation.lengths=16,256",
    )
    first, second = workdir / "fixed-16" / "seed-0", workdir / "fixed-256" / "seed-0"
    job = start_forked(*arguments)
    while not (second / "config.json").exists():
        assert job.is_alive()
        time.sleep(0.01)
    job.kill()
    job.join()
    assert results.is_scored(first)
    assert not results.is_scored(second)
    finished = times(first)
    status, output = run(*arguments)
    assert status == 0, output
    assert times(first) == finished

    with (workdir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["point"], row["split"], row["length"]) for row in rows}
    assert len(found) == len(rows)
    for point in ("fixed-16", "fixed-256"):
        assert {(point, "test", "16"), (point, "test", "256")} < found
        assert (point, "validation", "256") in found
    assert ("logistic", "test", "256") in found
    with (workdir / "summary.csv").open() as file:
        summary = {row["point"]: row for row in csv.DictReader(file)}
    assert float(summary["fixed-256"]["gain_kept"]) == 1
    tokens = {name: int(row["unshared_tokens"]) for name, row in summary.items()}
    assert tokens["fixed-256"] > 2 * tokens["fixed-16"]
    assert (workdir / "length_auc.png").exists()


def test_points_are_configs(base):
    points = make_points(base)
    configs = {p.name: apply_overrides(base, p.overrides).input for p in points}
    assert len(configs) == len(points)
    at = np.linspace(0, 1, 2000, endpoint=False)
    means = {name: c.length.lengths(at).mean() for name, c in configs.items()}
    assert means["fixed-256"] == 256
    for alpha in ("0.02", "0.1", "0.25", "1"):
        assert means[f"beta-{alpha}"] == pytest.approx(48, abs=2)  # 1/5 of 256, a multiple of 8
    assert means["uniform"] == pytest.approx(132, abs=2)
    assert {c.window for n, c in configs.items() if n.startswith("window")} == {
        "suffix", "random", "prefix",
    }  # fmt: skip
    chosen = choose_points(points, ["window", "fixed-16"])
    assert [p.name for p in chosen] == [
        "fixed-16", "window-suffix", "window-random", "window-prefix",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no point 'fixed-17'; --points takes length"):
        choose_points(points, ["fixed-17"])


def test_points_scored_otherwise_do_not_mix(base, tmp_path):
    length_study.check_evaluation(tmp_path, base)
    length_study.check_evaluation(tmp_path, base)
    other = apply_overrides(base, {"evaluation.min_history": 7})
    with pytest.raises(UserError, match=r"scored otherwise \(min_history: 0 -> 7\)"):
        length_study.check_evaluation(tmp_path, other)


def test_points_are_scored_in_shared_rows_if_their_tokens_can_be_shared(base):
    points = {p.name: p.overrides for p in make_points(base)}
    rows = {
        name: length_study.scored_config(apply_overrides(base, points[name]), base).input.rows
        for name in ("window-suffix", "request-recency-score", "request-time-delta")
    }
    assert base.input.rows == "user"
    assert list(rows.values()) == ["user", "user", "request"]
    transformer = {"model.sequence": "TransformerConfig", "input.rows": "request"}
    scored = length_study.scored_config(apply_overrides(base, transformer), base)
    assert scored.input.rows == "request"


def rows_of(point, seed, validation, auc_by_length):
    shared = {"point": point, "seed": seed, "gauc_user": 0.6, "log_loss": 0.5, "calibration": 1.0,
              "steps": 10, "train_tokens": 1000, "train_seconds": 2.0}  # fmt: skip
    rows = [{**shared, "split": "validation", "length": 256, "auc": validation}]
    rows += [{**shared, "split": "test", "length": n, "auc": a} for n, a in auc_by_length.items()]
    return rows


def test_gain_is_relative_to_training_and_serving_short(base, tiny_dataset):
    rows = []
    for seed, noise in ((0, 0.0), (1, 0.02)):
        rows += rows_of("fixed-16", seed, 0.6, {16: 0.60 + noise, 64: 0.65, 256: 0.66})
        rows += rows_of("fixed-256", seed, 0.7, {16: 0.55, 64: 0.65, 256: 0.70 + noise})
        rows += rows_of("beta-0.25", seed, 0.8, {16: 0.60, 64: 0.65, 256: 0.69})
        rows += rows_of("beta-1", seed, 0.7, {16: 0.60, 64: 0.65, 256: 0.75})
    rows += rows_of("request-fixed-16", 0, 0.6, {16: 0.50, 64: 0.65, 256: 0.66})
    rows += rows_of("request-fixed-256", 0, 0.7, {16: 0.55, 64: 0.65, 256: 0.90})
    rows += rows_of("request-beta-0.02", 0, 0.7, {16: 0.55, 64: 0.65, 256: 0.80})
    points = make_points(base)
    summary = {r["point"]: r for r in results.summary_rows(points, rows, base, tiny_dataset)}
    assert summary["request-beta-0.02"]["gain_kept"] == pytest.approx(0.3 / 0.4)
    kept = np.array([(0.69 - 0.60) / (0.70 - 0.60), (0.69 - 0.62) / (0.72 - 0.62)])
    assert summary["beta-0.25"]["gain_kept"] == pytest.approx(kept.mean())
    assert summary["beta-0.25"]["gain_kept_sd"] == pytest.approx(kept.std(ddof=1))
    assert summary["fixed-16"]["auc"] == pytest.approx(0.66)

    references = [
        {"model": model, "length": n, "auc": auc}
        for model, auc in (("counting", 0.5), ("logistic", 0.64))
        for n in (16, 64, 256)
    ]
    charts = figures.charts(points, rows, list(summary.values()), references)
    quality = next(chart for chart in charts if chart.name == "length_auc")
    # Of the stochastic ones, what is best on validation, not on test.
    labels = [line.label for line in quality.lines]
    assert labels == ["fixed-16", "fixed-256", "beta-0.25", "counting", "logistic"]
    np.testing.assert_allclose(quality.lines[0].error, [0.02 / 2**0.5, 0, 0], atol=1e-12)
    above = next(chart for chart in charts if chart.name == "length_auc_difference")
    assert [line.label for line in above.lines] == [n for n in labels if n != "counting"]
    np.testing.assert_allclose(above.lines[0].y, [-0.03, 0.01, 0.02], atol=1e-12)


def test_power_law_is_found_with_its_error():
    width, length = np.repeat([32, 64, 128], 9), np.tile(np.repeat([256, 816, 4096], 3), 3)
    exact = 3.0 * width**-0.05 * length**-0.1
    law = power_law.fit_power_law(width, length, exact)
    np.testing.assert_allclose(law, (3, -0.05, 0, -0.1, 0), atol=1e-9)
    rng = np.random.default_rng(0)
    laws = [
        power_law.fit_power_law(width, length, exact * np.exp(rng.normal(0, 0.01, 27)))
        for _ in range(400)
    ]
    for exponent, error in (("width_exponent", "width_error"), ("length_exponent", "length_error")):
        spread = np.std([getattr(law, exponent) for law in laws])
        assert spread == pytest.approx(np.mean([getattr(law, error) for law in laws]), rel=0.15)
    with pytest.raises(ValueError, match="do not determine"):
        power_law.fit_power_law([64] * 9, length[:9], exact[:9])
