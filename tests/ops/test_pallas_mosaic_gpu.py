"""Mosaic's GPU kernels: shares of a band, races, and what is refused."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_matches_oracle, make_case, random_ranges, run
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_attention import ORDERS, ragged_case
from test_kernels import HOPPER, KERNELS, SMALL, race

from stca_jax.ops.attention import best_implementation
from stca_jax.ops.pallas_mosaic_gpu import GPUS, MosaicGpuKernels


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_shares_of_a_band(multiprocessors):
    """Two or five programs share five tiles: uneven shares, and shares of nothing."""
    case = make_case([[0, 17, 270, 50]], [[300, 290, 271, 50]], 300, score=True)
    gpu = dataclasses.replace(GPUS["9.0"], multiprocessors=multiprocessors)
    kernels = MosaicGpuKernels(gpu, HOPPER)
    assert_matches_oracle(case, implementation=kernels, order="absorbed", block_sizes=SMALL)


def test_shares_of_the_tokens():
    """Six programs have ten tiles of each chunk of hidden units."""
    start, end = random_ranges(np.random.default_rng(0), 2, 5, 300)
    case = make_case(start, end, 300, D=40, fused=True, skip=True)
    kernels = MosaicGpuKernels(dataclasses.replace(GPUS["9.0"], multiprocessors=9), HOPPER)
    assert_matches_oracle(case, implementation=kernels, order="absorbed", block_sizes=SMALL)


SEES_RACES = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter sees races of a single warp group from JAX 0.12 on: .ci/pythons",
)


@SEES_RACES
@pytest.mark.parametrize(("order", "score"), [("absorbed", False), ("projected", True)])
@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_no_races(capability, order, score, capfd):
    """Products of a Blackwell are its own here, with their memory and barriers."""
    start, end = random_ranges(np.random.default_rng(0), 1, 5, 300)
    case = make_case(start, end, 300, fused=True, score=score)
    gpu = dataclasses.replace(GPUS[capability], multiprocessors=1)
    kernels = MosaicGpuKernels(gpu, HOPPER)
    options = {"implementation": kernels, "order": order, "block_sizes": SMALL}
    assert not race(capfd, lambda: assert_matches_oracle(case, **options))


@SEES_RACES
@pytest.mark.parametrize("forgotten", ["commit_smem", "barrier_wait"])
def test_races_are_seen(forgotten, monkeypatch, capfd):
    """The previous test can fail: programs that do not wait for what they read or wrote."""
    monkeypatch.setattr(plgpu, forgotten, lambda *_: None)
    case = make_case([[0]], [[300]], 300, D=17)
    jax.clear_caches()
    kernels = KERNELS["mosaic_gpu"]
    assert race(capfd, lambda: run(case, implementation=kernels, block_sizes=SMALL))
    jax.clear_caches()


def on_gpu(monkeypatch, capability):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])


@pytest.mark.parametrize("capability", ["7.5", "12.0", "gfx942"])
def test_other_gpus_are_refused(capability, monkeypatch):
    on_gpu(monkeypatch, capability)
    reason = rf"8\.0, 8\.6, .*; this one has {capability}\. Use implementation=\"triton"
    with pytest.raises(ValueError, match=reason):
        run(ragged_case(), jnp.bfloat16, implementation="mosaic_gpu")


def test_gpus_are_told_apart(monkeypatch):
    for capability, gpu in GPUS.items():
        on_gpu(monkeypatch, capability)
        assert MosaicGpuKernels.here().gpu == gpu


def test_an_ampere_needs_a_newer_jax(monkeypatch):
    monkeypatch.delattr(plgpu, "mma", raising=False)
    kernels = MosaicGpuKernels(GPUS["8.0"])
    with pytest.raises(ValueError, match=r"needs JAX 0.12 .*this is \d.*implementation=\"triton"):
        run(ragged_case(), jnp.bfloat16, implementation=kernels)


def test_nobody_gets_it_unasked(monkeypatch):
    """Until it has been seen running on a device."""
    on_gpu(monkeypatch, "9.0")
    assert MosaicGpuKernels().unavailable("gpu") is None
    assert best_implementation() == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fused", [False, True], ids=["attention", "history_layer"])
@pytest.mark.parametrize("score", [False, True], ids=["", "score"])
def test_default_blocks_at_size_on_a_gpu(score, fused, order):
    start, end = random_ranges(np.random.default_rng(0), 2, 20, 20_000)
    case = make_case(start[:, :8], end[:, :8], 20_000, H=4, K=16, D=64, score=score, fused=fused)
    options = {"implementation": "mosaic_gpu", "order": order}
    assert_matches_oracle(case, dtype=jnp.bfloat16, tolerance=0.03, **options)
    jax.tree.map(  # no atomics: the same bits again
        np.testing.assert_array_equal,
        *(run(case, jnp.bfloat16, **options) for _ in range(2)),
    )
