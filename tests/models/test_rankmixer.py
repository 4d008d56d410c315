"""Token mixing by hand and the backbone against the oracle."""

import numpy as np
import oracle
import pytest
from flax import nnx
from tiny_ranker import compile_fast, random_params, with_params

from stca_jax.models.rankmixer import RankMixer, RankMixerConfig, mix_tokens


def test_mix_tokens_gives_head_s_of_every_token_to_token_s():
    tokens = np.array([[[1, 2, 3, 4, 5, 6]], [[10, 20, 30, 40, 50, 60]], [[7, 7, 8, 8, 9, 9]]])
    expected = [[[1, 2, 10, 20, 7, 7]], [[3, 4, 30, 40, 8, 8]], [[5, 6, 50, 60, 9, 9]]]
    np.testing.assert_array_equal(mix_tokens(tokens), expected)


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_rank_mixer_matches_oracle(num_blocks):
    config = RankMixerConfig(num_blocks=num_blocks, ffn_ratio=3)
    module = nnx.eval_shape(lambda: RankMixer(config, 3, 6, rngs=nnx.Rngs(0)))
    params = random_params(module)
    tokens = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)

    @compile_fast
    def run(params, tokens):
        return with_params(module, params)(tokens)

    found = run(params, tokens)
    for n in range(4):
        expected = oracle.rank_mixer(params, list(tokens[:, n].astype(float)))
        np.testing.assert_allclose(found[n], expected, rtol=1e-5, atol=1e-5)


def test_rejects_a_width_that_tokens_cannot_share():
    with pytest.raises(ValueError, match="width 7 must be a multiple of its 3 tokens"):
        RankMixer(RankMixerConfig(), 3, 7, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("options", [{"num_blocks": -1}, {"ffn_ratio": 0}])
def test_config_rejects_impossible_sizes(options):
    with pytest.raises(ValueError, match="num_blocks must be >= 0 and ffn_ratio >= 1"):
        RankMixerConfig(**options)
