"""Compiles the kernels for GPUs on a machine without one: they fit, and store no scores."""

import contextlib
import functools
import itertools
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_scorer import check_scorer
from compiled_step import D, L, R, compiled_step, in_process_of_its_own, stores_scores
from jax.experimental.pallas import mosaic_gpu as plgpu

from stca_jax.experiments.benchmarks import compiled_bytes
from stca_jax.ops.match import match_statistics
from stca_jax.ops.pallas_mosaic_gpu import GPUS as MOSAIC_GPUS
from stca_jax.ops.pallas_mosaic_gpu import MosaicGpuKernels
from stca_jax.ops.pallas_triton import GPUS, TritonKernels
from stca_jax.ops.soft_match import soft_counts
from stca_jax.ops.tiles import BlockSizes
from stca_jax.ranges import Ranges
from stca_jax.training.cross_compile import topology_devices

pytest.importorskip(
    "jax_plugins.xla_cuda13", reason="pip install -e .[test] has the CUDA plugin on Linux"
)

MODULE = "test_compile_gpu"
CAPABILITIES = {"A100": "8.0", "H100": "9.0", "B200": "10.0"}
PASSES = {64: 11.5, 128: 12.3, 256: 12.0}  # over the tokens, at most, by width
MOSAIC_WIDTHS = {"A100": 192, "H100": 256, "B200": 256}  # about the widest that programs hold
MOSAIC_SPILLS = {"A100": 200, "H100": 64, "B200": 192}  # bytes of a thread, at those widths
MOSAIC_PASSES = {"A100": 11.2, "H100": 11.7, "B200": 12.1}  # each program leaves sums of weights


NO_SPILLS = {
    "xla_gpu_fail_ptx_compilation_on_register_spilling": True,
    # Registers are as users have them, not as this hurried process, see conftest.
    "xla_backend_optimization_level": 3,
}


def devices_of(gpu: str, count: int = 1):
    return topology_devices(f"{gpu.lower()}:{count}")[1]


def check_single(gpu: str, order: str, dtype: str, score: str = "") -> None:
    kernels = TritonKernels(GPUS[CAPABILITIES[gpu]])
    step = compiled_step(
        devices_of(gpu), kernels, order, dtype, score=bool(score), compiler_options=NO_SPILLS
    )  # fmt: skip
    # Absorbed: clean and padded tokens, their gradients.  Projected: keys, values, the gradients
    # of both.  The columns of a score widen each of them, and make keys and values differ.
    arrays = (6 if score else 3) if order == "absorbed" else (8 if score else 5)
    tokens = R * L * D * jnp.dtype(dtype).itemsize
    stored = step.memory_analysis().temp_size_in_bytes
    assert stored < arrays * tokens + 32e6, (stored / tokens, arrays)
    text = step.as_text()
    for kernel in ("forward", "backward_query", "backward_key"):
        assert f"target_to_history_{kernel}/pallas_call" in text
    assert not stores_scores(text)


def check_encoder(gpu: str, *dtypes: str) -> None:
    """Its kernels spill no registers, fit shared memory, and store no hidden units."""
    kernels = TritonKernels(GPUS[CAPABILITIES[gpu]])
    for dtype, width in itertools.product(dtypes, (64, 128, 256)):
        size = compiled_bytes.Size(R, 10_240, 16, width, dtype)
        step = compiled_bytes.encoder_step(
            size, kernels, devices_of(gpu)[0], compiler_options=NO_SPILLS
        )  # fmt: skip
        text = step.as_text()
        for kernel in ("forward", "backward_tokens", "backward_weights"):
            assert f"history_encoder_{kernel}/pallas_call" in text
        assert compiled_bytes.passes(text, size) < 9.2, (width, dtype)


def check_passes(gpu: str, dtype: str, *widths: str) -> None:
    """Of a layer's forward and backward step, which spills no registers."""
    kernels = TritonKernels(GPUS[CAPABILITIES[gpu]])
    for width in map(int, widths):
        size = compiled_bytes.Size(R, 10_240, 16, width, dtype)
        device = devices_of(gpu)[0]
        step = compiled_bytes.layer_step(size, kernels, device, compiler_options=NO_SPILLS)
        assert compiled_bytes.passes(step.as_text(), size) < PASSES[width], width


@contextlib.contextmanager
def assembled():
    """What the assembler says of the kernels of Mosaic, which are compiled by one of their own."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    said, stdout = [], os.dup(1)
    with tempfile.TemporaryFile() as text:
        os.dup2(text.fileno(), 1)
        try:
            yield said
        finally:
            os.dup2(stdout, 1)
        text.seek(0)
        said += text.read().decode().splitlines()


def spilled(said: list[str]) -> list[int]:
    """Bytes of a thread, by kernel."""
    return [int(line.split()[4]) for line in said if "spill stores" in line and "frame" in line]


def check_mosaic(gpu: str) -> None:
    """They fit, spill no registers, and store neither scores nor hidden units."""
    kernels = MosaicGpuKernels(MOSAIC_GPUS[CAPABILITIES[gpu]])
    device = devices_of(gpu)[0]
    size = compiled_bytes.Size(R, 10_240, 16, 64, "bfloat16")
    with assembled() as narrow:
        layer = compiled_bytes.layer_step(size, kernels, device).as_text()
        encoder = compiled_bytes.encoder_step(size, kernels, device).as_text()
        score = compiled_bytes.layer_forward(size, kernels, device).as_text()
    with assembled() as wide:
        for order, extra in (("absorbed", False), ("projected", False), ("absorbed", True)):
            # Scores widen the tokens: by as much less they may be wide.
            width = MOSAIC_WIDTHS[gpu] - 32 * extra
            step = compiled_step([device], kernels, order, "bfloat16", score=extra, width=width)
            assert not stores_scores(step.as_text())
    assert compiled_bytes.passes(layer, size) < MOSAIC_PASSES[gpu]
    assert compiled_bytes.passes(encoder, size) < 9.7
    assert compiled_bytes.passes(score, size) < 2.5
    names = {line.split("'")[1] for line in narrow + wide if "entry function" in line}
    assert {name.removesuffix("_mosaic_gpu_kernel") for name in names} == {
        *(f"target_to_history_{x}" for x in ("forward", "backward_query", "backward_key")),
        *(f"history_encoder_{x}" for x in ("forward", "backward_tokens", "backward_weights")),
        "history_layer_forward",
    }
    assert max(spilled(narrow)) == 0
    assert max(spilled(wide)) < MOSAIC_SPILLS[gpu]
    assert len(spilled(narrow)) + len(spilled(wide)) >= len(names)


def check_mosaic_limits(gpu: str) -> None:
    step = functools.partial(compiled_step, devices_of(gpu), MosaicGpuKernels())
    with pytest.raises(ValueError, match=r"takes bfloat16, not float32.* Use implementation"):
        step("absorbed", "float32")
    with pytest.raises(ValueError, match=r"tokens x 64 .* width 320, .*KiB.*order=\"projected\""):
        step("absorbed", "bfloat16", score=True)
    with pytest.raises(ValueError, match=r"blocks of 512 tokens .* Pass smaller block_sizes"):
        step("absorbed", "bfloat16", sizes=BlockSizes(history=512, targets=8))


def check_all(gpu: str) -> None:
    for order, dtype in itertools.product(("absorbed", "projected"), ("bfloat16", "float32")):
        check_single(gpu, order, dtype)
    check_single(gpu, "absorbed", "bfloat16", "score")


def check_shared_memory(gpu: str, dtype: str, tokens: str, targets: str) -> None:
    """The largest blocks that the estimate lets pass do fit, and larger ones are refused."""
    kernels = TritonKernels(GPUS[CAPABILITIES[gpu]])
    blocks = [BlockSizes(history=factor * int(tokens), targets=int(targets)) for factor in (1, 2)]
    compiled_step(devices_of(gpu), kernels, "absorbed", dtype, sizes=blocks[0])
    with pytest.raises(ValueError, match=r"KiB of shared memory; a program has \d+ KiB. Pass"):
        compiled_step(devices_of(gpu), kernels, "absorbed", dtype, sizes=blocks[1])


def check_sharded(gpu: str) -> None:
    """By the default implementation, which follows the mesh's devices, not this machine's."""
    step = compiled_step(
        devices_of(gpu, 8), None, "absorbed", "bfloat16", length=10_240, sharded=True,
        fused=True,
    )  # fmt: skip
    text = step.as_text()
    assert "target_to_history_forward/pallas_call" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text


def check_match(gpu: str) -> None:
    """No loop: each of its steps would wait for the host.  No array of targets times tokens."""
    targets = 1024
    mesh = jax.sharding.Mesh(np.array(devices_of(gpu)), ("data",))

    def ids(*shape):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    per_target = {name: ids(R, targets) for name in ("item", "category")}
    per_token = {name: ids(R, L) for name in per_target}
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(match_statistics, decay_seconds=60.0))
        ranges = Ranges(ids(R, targets), ids(R, targets))
        lowered = step.lower(per_target, per_token, ids(R, L), ids(R, targets), ranges)
        compiled = lowered.compile()
    assert " while(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * R * targets * L


def check_soft_counts(gpu: str) -> None:
    """By the kernels, on 2 x 4 devices: no scores are stored, and nothing is gathered."""
    mesh = jax.sharding.Mesh(np.array(devices_of(gpu, 8)).reshape(2, 4), ("data", "sequence"))

    def array(dtype, *shape, axes=("data",)):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(target, history, sharpness, start, end):
        return soft_counts(target, history, sharpness, Ranges(start, end)).sum()

    length, targets, fields = 10_240, 1_024, 3
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(
            array(jnp.float32, R, targets, fields, 16),
            array(jnp.float32, R, length, fields, 16, axes=("data", "sequence")),
            array(jnp.float32, fields, axes=()),
            array(jnp.int32, R, targets),
            array(jnp.int32, R, targets),
        ).compile()  # fmt: skip
    text = compiled.as_text()
    assert "target_to_history_forward/pallas_call" in text
    assert "all-gather" not in text
    scores = 4 * (R // 2) * fields * targets * (length // 4)  # bytes of a device
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * scores


def check_export(gpu: str) -> None:
    check_scorer(devices_of(gpu)[0])


def test_bfloat16_on_one_h100():
    in_process_of_its_own(MODULE, "check_single", "H100", "absorbed", "bfloat16")


@pytest.mark.parametrize("gpu", CAPABILITIES)
def test_kernels_of_mosaic(gpu):
    if gpu == "A100" and not hasattr(plgpu, "mma"):
        pytest.skip("this JAX has no products of registers: .ci/pythons")
    in_process_of_its_own(MODULE, "check_mosaic", gpu)


def test_limits_of_the_kernels_of_mosaic():
    in_process_of_its_own(MODULE, "check_mosaic_limits", "H100")


def test_encoder_in_bfloat16_on_an_h100():
    in_process_of_its_own(MODULE, "check_encoder", "H100", "bfloat16")


@pytest.mark.slow
def test_encoder_in_bfloat16_on_an_a100():
    in_process_of_its_own(MODULE, "check_encoder", "A100", "bfloat16")


@pytest.mark.exhaustive
@pytest.mark.parametrize("gpu", CAPABILITIES)
def test_encoder_in_float32(gpu):
    in_process_of_its_own(MODULE, "check_encoder", gpu, "float32")


def check_score(gpu: str) -> None:
    """A layer forward, which stores no encoded tokens, and spills no registers."""
    kernels = TritonKernels(GPUS[CAPABILITIES[gpu]])
    for dtype, width, targets in (
        ("bfloat16", 64, 4), ("bfloat16", 128, 2), ("float32", 64, 4), ("float32", 256, 2),
    ):  # fmt: skip
        if width > 64 and gpu == "A100":  # its programs do not encode such tokens and attend
            continue
        size = compiled_bytes.Size(R, 10_240, targets, width, dtype)
        step = compiled_bytes.layer_forward(
            size, kernels, devices_of(gpu)[0], compiler_options=NO_SPILLS
        )  # fmt: skip
        assert "history_layer_forward/pallas_call" in step.as_text()
        assert compiled_bytes.passes(step.as_text(), size) < 2
        assert step.memory_analysis().temp_size_in_bytes < 0.5 * size.bytes


@pytest.mark.parametrize("gpu", ["H100", pytest.param("A100", marks=pytest.mark.slow)])
def test_scores_encode_where_they_read(gpu):
    in_process_of_its_own(MODULE, "check_score", gpu)


def test_passes_over_the_tokens():
    in_process_of_its_own(MODULE, "check_passes", "H100", "bfloat16", "64", "256")


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", CAPABILITIES)
def test_passes_at_all_widths(gpu, dtype):
    in_process_of_its_own(MODULE, "check_passes", gpu, dtype, "64", "128", "256")


def test_too_large_blocks_name_the_limit():
    in_process_of_its_own(MODULE, "check_shared_memory", "H100", "bfloat16", "64", "8")


@pytest.mark.exhaustive
@pytest.mark.parametrize("gpu", CAPABILITIES)
def test_one_gpu(gpu):
    in_process_of_its_own(MODULE, "check_all", gpu)


@pytest.mark.slow
def test_shared_memory_of_an_a100():
    in_process_of_its_own(MODULE, "check_shared_memory", "A100", "float32", "32", "4")


@pytest.mark.slow
def test_two_by_four_gpus():
    in_process_of_its_own(MODULE, "check_sharded", "H100")


@pytest.mark.slow
def test_match_statistics():
    in_process_of_its_own(MODULE, "check_match", "H100")


@pytest.mark.slow
def test_soft_counts():
    in_process_of_its_own(MODULE, "check_soft_counts", "H100")


@pytest.mark.slow
def test_exported_scorer():
    in_process_of_its_own(MODULE, "check_export", "H100")
