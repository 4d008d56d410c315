"""The benchmark of a config's step."""

from processes import run


def test_times_a_step_and_what_it_takes_without_the_match_channel():
    status, output = run(
        "stca_jax.experiments.benchmarks.model_step",
        "--config=experiments/configs/tiny.py",
        "--config.model.match_soft_counts=True",
        "--seconds=0.1",
    )
    assert status == 0, output
    table = [line.split("|") for line in output.splitlines() if line.startswith("|")]
    names, *columns = zip(*([c.strip() for c in row[1:-1]] for row in table[2:]), strict=True)
    assert names == ("as configured", "without soft counts", "without the match channel")
    best, median, gflop, share = (list(map(float, column)) for column in columns)
    assert all(0 < b <= m for b, m in zip(best, median, strict=True))
    assert gflop[0] > gflop[1] > gflop[2] > 0
    assert all(0 < s < 1 for s in share)
