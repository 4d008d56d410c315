"""The Pallas kernels against the oracle: in interpret mode, and on a device where there is one.

What interpreted kernels do not write is NaN.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_matches_oracle, make_case, random_ranges, run
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from test_attention import ORDERS, ragged_case

from stca_jax.ops import encoder_tpu, pallas_triton
from stca_jax.ops.attention import AttentionOptions, target_to_history_attention
from stca_jax.ops.pallas_mosaic_gpu import GPUS as MOSAIC_GPUS
from stca_jax.ops.pallas_mosaic_gpu import MosaicGpuKernels
from stca_jax.ops.pallas_tpu import MosaicKernels
from stca_jax.ops.pallas_triton import GPUS, TritonKernels
from stca_jax.ops.tiles import BlockSizes

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # before JAX 0.12
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

# The smallest tiles of most: 23 tokens are two of them, and no multiple.
SMALL = BlockSizes(history=16, targets=4)
# Threads of its programs race if they can; the smallest tiles of a Hopper are 64 tokens.
HOPPER = InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
KERNELS = {
    "mosaic_tpu": MosaicKernels(interpret=True),
    "triton": TritonKernels(interpret=True),
    "mosaic_gpu": MosaicGpuKernels(
        dataclasses.replace(MOSAIC_GPUS["9.0"], multiprocessors=1), HOPPER
    ),
}
ON_DEVICE = [
    pytest.param("mosaic_tpu", marks=pytest.mark.tpu, id="mosaic_tpu_device"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton_device"),
]
ANY_KERNELS = pytest.mark.parametrize(
    "kernels", [pytest.param(value, id=name) for name, value in KERNELS.items()] + ON_DEVICE
)


@pytest.fixture(autouse=True)
def exact_products():
    """On a GPU, XLA rounds factors of float32 products to 10 bits unless told otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(("order", "skip"), [("absorbed", False), ("projected", True)])
@ANY_KERNELS
def test_ragged_rows_match_oracle(kernels, order, skip):
    case = ragged_case(fused=True, skip=skip, score=True)
    assert_matches_oracle(case, implementation=kernels, order=order, block_sizes=SMALL)


@ANY_KERNELS
def test_bfloat16_matches_oracle(kernels):
    case = ragged_case(score=True)
    assert_matches_oracle(
        case, dtype=jnp.bfloat16, tolerance=0.03, implementation=kernels, order="absorbed",
        block_sizes=SMALL,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("history", "dtype", "tolerance"),
    [(16, jnp.float32, 2e-5), (64, jnp.float32, 2e-5), (16, jnp.bfloat16, 0.03)],
    ids=["16", "64", "16_bfloat16"],
)
@ANY_KERNELS
def test_layer_without_scores(kernels, history, dtype, tolerance):
    """Gradients need not come by way of the keys; tiles are encoded that are no history tiles."""
    start, end = random_ranges(np.random.default_rng(0), 2, 11, 150)
    case = make_case(start, end, 150, D=24, fused=True, skip=history == 16)
    sizes = BlockSizes(history=history, targets=4)
    assert_matches_oracle(
        case, dtype=dtype, tolerance=tolerance, implementation=kernels, order="absorbed",
        block_sizes=sizes,
    )  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_of_encoded_tokens_are_not_stored(monkeypatch, name):
    def refuse(*_):
        raise AssertionError("gradients of keys are stored")

    for method in ("backward", "encode_backward"):
        monkeypatch.setattr(type(KERNELS[name]), method, refuse)
    case = make_case([[0, 5, 9]], [[39, 30, 9]], 39, fused=True)  # no other test has compiled it
    assert_matches_oracle(case, implementation=KERNELS[name], order="absorbed", block_sizes=SMALL)


@pytest.mark.parametrize("history", [16, 64])
def test_tiles_of_a_layer_on_tpus(monkeypatch, history):
    """Tiles of 32 tokens, of which some are read by few target tiles, and some by none."""
    monkeypatch.setattr(encoder_tpu, "_TILE", 32)
    start = np.array([0, 20, 3, 40, 45, 60, 100, 70, 101, 7]) + np.arange(4)[:, None]
    end = start + np.array([9, 0, 12, 30, 20, 1, 5, 0, 2, 40])
    case = make_case(start, end, 190, fused=True, skip=True)
    assert_matches_oracle(
        case, implementation=KERNELS["mosaic_tpu"], order="absorbed",
        block_sizes=BlockSizes(history=history, targets=2),
    )  # fmt: skip


def test_layer_that_vmem_has_no_room_for(monkeypatch):
    """But for its two halves, one after the other."""
    monkeypatch.setattr(encoder_tpu, "_VMEM_BYTES", 1_040_000)
    halves, encode_backward = [], MosaicKernels.encode_backward
    monkeypatch.setattr(
        MosaicKernels, "encode_backward",
        lambda *arguments: halves.append(1) or encode_backward(*arguments),
    )  # fmt: skip
    case = make_case([[0, 5, 9]], [[38, 30, 9]], 38, fused=True)  # no other test has compiled it
    kernels = KERNELS["mosaic_tpu"]
    assert_matches_oracle(case, implementation=kernels, order="absorbed", block_sizes=SMALL)
    assert halves


@ANY_KERNELS
def test_widths_and_heads_that_are_no_power_of_two(kernels):
    case = ragged_case(H=3, K=5, D=40, score=True)  # keys of 40 + 9 columns
    assert_matches_oracle(case, implementation=kernels, order="absorbed", block_sizes=SMALL)


@ANY_KERNELS
def test_default_blocks(kernels):
    start, end = random_ranges(np.random.default_rng(0), 1, 70, 150)
    case = make_case(start, end, 150, D=16, score=True)
    assert_matches_oracle(case, implementation=kernels, order="absorbed")


@ANY_KERNELS
def test_huge_logits(kernels):
    """Scores of about +-1e4, where only an online maximum keeps exp finite."""
    case = ragged_case(logit_scale=1e4)
    out, _ = run(case, implementation=kernels, block_sizes=SMALL)
    assert np.abs(out.log_sum_exp[np.isfinite(out.log_sum_exp)]).max() > 1e4
    case = case._replace(d_output=case.d_output * 0)
    assert_matches_oracle(case, tolerance=2e-4, implementation=kernels, block_sizes=SMALL)


@pytest.mark.parametrize("fused", [False, True], ids=["attention", "history_layer"])
@ANY_KERNELS
def test_uncovered_tokens_never_matter(kernels, fused):
    options = {"implementation": kernels, "order": "absorbed", "block_sizes": SMALL}
    dirty, clean = (
        run(ragged_case(fused=fused, score=not fused, garbage=garbage), **options)
        for garbage in (np.nan, 0.0)
    )
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize("fused", [False, True], ids=["attention", "history_layer"])
@ANY_KERNELS
def test_all_ranges_empty(kernels, fused):
    case = make_case(np.full((1, 3), 4), np.full((1, 3), 4), 9, fused=fused, score=not fused)
    out, gradients = run(case, implementation=kernels, order="absorbed", block_sizes=SMALL)
    assert np.all(out.output == 0)
    assert np.all(out.log_sum_exp == -np.inf)
    assert all(np.all(g == 0) for g in jax.tree.leaves(gradients))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.03)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fused", [False, True], ids=["attention", "history_layer"])
def test_default_blocks_at_size_on_a_gpu(fused, order, dtype, tolerance):
    start, end = random_ranges(np.random.default_rng(0), 2, 20, 20_000)
    case = make_case(start[:, :8], end[:, :8], 20_000, H=4, K=16, D=64, score=True, fused=fused)
    options = {"implementation": "triton", "order": order}
    assert_matches_oracle(case, dtype=dtype, tolerance=tolerance, **options)
    jax.tree.map(  # no atomics: the same bits again
        np.testing.assert_array_equal, run(case, dtype, **options), run(case, dtype, **options)
    )


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_shares_of_a_band(multiprocessors):
    """Two or six programs share seven tiles: uneven shares, and shares of nothing."""
    gpu = dataclasses.replace(GPUS["8.0"], multiprocessors=multiprocessors)
    case = make_case([[0, 17, 100, 50]], [[103, 90, 101, 50]], 103, score=True)
    kernels = TritonKernels(gpu, interpret=True)
    assert_matches_oracle(case, implementation=kernels, order="absorbed", block_sizes=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@ANY_KERNELS
def test_random_ranges(kernels, seed):
    rng = np.random.default_rng(seed)
    R, M, L = rng.integers(1, 3), rng.integers(1, 40), rng.integers(1, 120)
    start, end = random_ranges(rng, R, M, L)
    case = make_case(start, end, L, H=3, score=bool(seed % 2), seed=seed)
    assert_matches_oracle(case, implementation=kernels, order=ORDERS[seed % 2], block_sizes=SMALL)


@pytest.mark.slow
@ANY_KERNELS
def test_a_thousand_targets(kernels):
    start, end = random_ranges(np.random.default_rng(0), 1, 1000, 300)
    case = make_case(start, end, 300)
    assert_matches_oracle(case, implementation=kernels, order="absorbed", tolerance=1e-4)


@pytest.fixture
def strict_interpreter(monkeypatch):
    """Interprets two programs at a time, prints races and fills what is not written with NaN."""
    # The interpreter that can do this is the TPU's, and asks for its compiler parameters.
    monkeypatch.setattr(
        pallas_triton.plgpu, "CompilerParams",
        lambda **_: pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
    )  # fmt: skip
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
    )


def race(capfd, call) -> bool:
    """Whether the interpreter sees one."""
    try:
        call()
        said = capfd.readouterr().out
    except jax.errors.JaxRuntimeError as error:  # since JAX 0.12
        said = str(error)
    return "RACE DETECTED" in said


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [MosaicKernels, TritonKernels])
def test_no_races(kernels, strict_interpreter, capfd):
    # The strict interpreter does not know Triton's masked loads, by which tokens are encoded.
    case = ragged_case(score=True, fused=kernels is MosaicKernels)
    options = {"implementation": kernels(interpret=strict_interpreter), "order": "projected"}
    assert not race(capfd, lambda: assert_matches_oracle(case, block_sizes=SMALL, **options))


@pytest.mark.slow
def test_no_races_in_a_layer_on_tpus(strict_interpreter, capfd):
    kernels, case = MosaicKernels(interpret=strict_interpreter), ragged_case(fused=True)
    assert_matches_oracle(case, implementation=kernels, order="absorbed", block_sizes=SMALL)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
def test_races_are_seen(monkeypatch, strict_interpreter, capfd):
    """The previous test can fail: shares of a band that are all written to one place."""
    monkeypatch.setattr(
        pallas_triton, "share_spec",
        lambda *block: pl.BlockSpec((None,) * 3 + block, lambda j, g, s: (0, j, g, 0, 0)),
    )  # fmt: skip
    case = make_case([[0, 5, 9]], [[40, 30, 9]], 40)
    kernels = TritonKernels(interpret=strict_interpreter)
    assert race(capfd, lambda: run(case, implementation=kernels, block_sizes=SMALL))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("implementation", "platform"),
    [("mosaic_tpu", "tpu"), ("triton", "cuda"), ("mosaic_gpu", "cuda")],
)
def test_other_platforms_are_refused(implementation, platform, jit):
    case = ragged_case()
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.problem)

    def attend(query):
        return target_to_history_attention(
            query, p.tokens, p.w_key, p.w_value, case.ranges,
            options=AttentionOptions(implementation=implementation),
        )  # fmt: skip

    with pytest.raises(ValueError, match=rf"on platform '{platform}' only.*implementation=\"xla\""):
        (jax.jit(attend) if jit else attend)(p.query)
