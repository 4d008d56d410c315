"""Scores are those of the evaluation, whatever was appended, evicted, restarted or reloaded."""

import numpy as np
import pytest
from replay import replay

from stca_jax.serving import Scorer, ServingModel

ENOUGH = 64 << 20


def scorer(export, cache="keys_values", **options):
    options = {"max_bytes": ENOUGH, "encoded": True, **options}
    return Scorer(ServingModel.load(export, cache=cache), **options)


def differences(scorer, run, expected, steps=None):
    """Of each logit; events are appended as they happen, some one by one."""
    found = []
    for k, replayed in enumerate(replay(run.dataset, expected)):
        user, new = replayed.request.user, replayed.new
        single = min(len(new), 3)
        scorer.append(user, new.select(np.arange(len(new)) < len(new) - single))
        for i in range(len(new) - single, len(new)):
            scorer.append(user, new.select(np.arange(len(new)) == i))
        logits = scorer.logits(replayed.request)
        found.append(np.abs(logits - expected[replayed.request_id]).max())
        if steps and k in steps:
            steps[k]()
    assert len(found) == len(expected) > 50
    return np.array(found)


@pytest.mark.parametrize("cache", ["keys_values", "tokens"])
def test_replayed_requests_score_as_evaluated(export, everything_run, expected, cache):
    served = scorer(export, cache)
    events = everything_run.dataset.index.history_end
    assert events.max() > 1_000  # full windows of 600 are overwritten, in two pages
    assert differences(served, everything_run, expected).max() < 1e-5
    assert served.counts.hits > served.counts.misses
