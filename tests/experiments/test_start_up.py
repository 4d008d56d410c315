"""The benchmark of start-up: a run that is stopped and resumed, as it says."""

import pytest
from processes import run


@pytest.mark.slow
def test_times_a_new_run_and_one_that_goes_on():
    config = "--config=experiments/configs/tiny.py"
    status, output = run("stca_jax.experiments.benchmarks.start_up", config, "--runs=1")
    assert status == 0, output
    table = [line.split("|") for line in output.splitlines() if line.startswith("|")]
    new, resumed, compiled = [[cell.strip() for cell in row[1:-1]] for row in table[2:]]
    assert (new[0], new[-1]) == ("new, nothing compiled", "0")
    assert 0 < int(resumed[-1]) < int(compiled[-1])
    for row in (new, resumed, compiled):
        ready, stepped, ended = map(float, row[1:4])
        assert 0 < ready < stepped <= ended
