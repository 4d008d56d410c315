"""Compiles the op for TPUs on a machine without one: kernels fit, and scores are never stored."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("libtpu", reason="pip install -e .[test] has libtpu on Linux")

TOPOLOGIES = {"v5e": "v5e:2x4", "v6e": "v6e:2x4", "v5p": "v5p:2x2x2"}
R, L, M, H, D = 8, 10_240, 16, 8, 256
SCORE_SHAPES = (f"{M},{H},{L}", f"{H},{M},{L}", f"{M},{L},{H}", f"1,{L},{M * H}", f"{H},{L},{M}")


def in_process_of_its_own(name: str, *arguments: str) -> None:
    """libtpu is told at import time that there is no device."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    call = f"test_compile_tpu.{name}({', '.join(map(repr, arguments))})"
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import test_compile_tpu; {call}"],
        env=environment, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def compiled_step(generation: str, sharded: bool, order: str, fused: bool, dtype, sizes=None,
                  compiler_options=None):  # fmt: skip
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from stca_jax.ops.attention import history_layer, target_to_history_attention
    from stca_jax.ops.encoder import HistoryEncoder

    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[generation]
    ).devices
    shape = (2, 4) if sharded else (1, 1)
    mesh = Mesh(
        np.array(devices[: shape[0] * shape[1]]).reshape(shape), ("data", "sequence"),
        axis_types=(AxisType.Auto,) * 2,
    )  # fmt: skip

    def array(dims, dtype, *spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*spec)))

    options = {"order": order, "implementation": "mosaic_tpu", "block_sizes": sizes}

    def loss(query, tokens, encoder, w_key, w_value, start, end):
        if fused:
            out = history_layer(query, tokens, encoder, w_key, w_value, start, end, **options)
        else:
            out = target_to_history_attention(query, tokens, w_key, w_value, start, end, **options)
        return out.output.astype(jnp.float32).sum() + jnp.tanh(out.log_sum_exp).sum()

    heads = (D, H, D // H)
    encoder = HistoryEncoder(
        array((D, 2 * D), dtype), array((D, 2 * D), dtype), array((2 * D, D), dtype),
        array((D,), jnp.float32), array((D,), jnp.float32),
    )  # fmt: skip
    arguments = (
        array((R, M, H, D // H), dtype, "data"), array((R, L, D), dtype, "data", "sequence"),
        encoder, array(heads, dtype), array(heads, dtype),
        array((R, M), jnp.int32, "data"), array((R, M), jnp.int32, "data"),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4) if fused else (0, 1, 3, 4)))
        return step.trace(*arguments).lower(lowering_platforms=("tpu",)).compile(compiler_options)


def compiled_text(generation: str, step) -> str | None:
    """The compiled HLO; None for v6e and v5p, whose HLO jaxlib 0.10.2 cannot parse."""
    return step.as_text() if generation == "v5e" else None


def check_single(generation: str, order: str, dtype: str) -> None:
    step = compiled_step(generation, False, order, False, jnp.dtype(dtype))
    # Absorbed: clean tokens and their gradients.  Projected: keys, values and the gradients of
    # both, each head padded from 32 to 128 lanes.
    arrays = 3 if order == "absorbed" else 4 * (128 // (D // H))
    tokens = R * L * D * jnp.dtype(dtype).itemsize
    stored = step.memory_analysis().temp_size_in_bytes
    assert stored < arrays * tokens + 32e6, (stored, arrays * tokens)
    text = compiled_text(generation, step)
    if text is not None:
        assert text.count("tpu_custom_call") >= 3  # forward, gradients of queries, of keys
        assert not any(f"[{R},{dims}]" in text for dims in SCORE_SHAPES)


def check_sharded(generation: str) -> None:
    step = compiled_step(generation, True, "absorbed", True, jnp.dtype("bfloat16"))
    # A device holds 4 rows of 2,560 tokens; scores of its rows alone would be 42 MB.
    hidden = 4 * 2560 * 2 * D * 4
    stored = step.memory_analysis().temp_size_in_bytes
    assert stored < 10 * hidden, stored
    text = compiled_text(generation, step)
    if text is not None:
        assert "tpu_custom_call" in text
        assert "all-gather" not in text
        assert "all-to-all" not in text


def check_vmem_error() -> None:
    from stca_jax.ops.tiles import BlockSizes

    with pytest.raises(ValueError, match="MiB of VMEM; the kernel has"):
        compiled_step("v5e", False, "absorbed", False, jnp.dtype("float32"),
                      BlockSizes(history=8192, targets=32))  # fmt: skip


def test_bfloat16_on_one_v5e():
    in_process_of_its_own("check_single", "v5e", "absorbed", "bfloat16")


def test_too_large_blocks_name_the_limit():
    in_process_of_its_own("check_vmem_error")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("order", ["absorbed", "projected"])
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_one_chip(generation, order, dtype):
    in_process_of_its_own("check_single", generation, order, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_two_by_four_chips(generation):
    in_process_of_its_own("check_sharded", generation)
