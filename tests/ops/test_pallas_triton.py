"""Which GPU the Triton kernels are made for, and what is refused."""

import types

import jax
import pytest
from attention_oracle import make_case, run
from test_attention import ragged_case

from stca_jax.ops.attention import best_implementation
from stca_jax.ops.pallas_triton import GPUS, TritonKernels
from stca_jax.ops.tiles import BlockSizes


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that this process has a GPU of the given compute capability."""

    def pretend(compute_capability: str) -> None:
        device = types.SimpleNamespace(compute_capability=compute_capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    return pretend


def test_limits_are_those_of_this_gpu(gpu):
    gpu("9.0")
    assert TritonKernels.here().gpu == GPUS["9.0"]
    gpu("12.0")  # unknown: no more than what every GPU since Ampere has
    assert TritonKernels.here().gpu.shared_memory == 99 * 1024


def test_older_gpus_are_refused(gpu):
    gpu("7.5")
    with pytest.raises(ValueError, match=r"8\.0 or more; this one has 7\.5\. Use implementation"):
        run(ragged_case(), implementation="triton")


def test_best_implementation_follows_the_device(gpu):
    assert best_implementation() == "xla"
    for capability, expected in {"9.0": "triton", "12.0": "triton", "7.5": "xla"}.items():
        gpu(capability)
        assert best_implementation() == expected
    gpu("gfx90a")  # another maker's
    assert best_implementation() == "xla"


@pytest.mark.parametrize("fused", [False, True], ids=["attention", "history_layer"])
def test_too_large_blocks_name_the_limit(fused):
    case = make_case([[0]], [[1000]], 1000, D=64, fused=fused)
    with pytest.raises(ValueError, match=r"need about \d+ KiB .* a program has 163 KiB\. Pass"):
        run(
            case, implementation=TritonKernels(interpret=True), order="absorbed",
            block_sizes=BlockSizes(history=1000),
        )  # fmt: skip
