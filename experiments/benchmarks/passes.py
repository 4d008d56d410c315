"""How often a layer's step passes over the tokens: bytes that it moves, over those of the tokens.

    python -m stca_jax.experiments.benchmarks.passes --topology=h100:1 --width=64,256

Compiles for a device that need not be here, and adds up the bytes of the operands and results of
every instruction of the compiled program. Nothing runs: what caches save, and what a kernel reads
twice, is not seen. A step cannot do with fewer than three: tokens read, read again, gradients
written; a score with fewer than one. `history FFN` is E1 alone, `layer` E1, E3 and E4, each forward
and backward; `score` is the layer forward.
"""

from __future__ import annotations

import dataclasses

from absl import flags

from stca_jax.experiments import launch
from stca_jax.experiments.benchmarks.compiled_bytes import (
    Size,
    encoder_step,
    layer_forward,
    layer_step,
    moved,
    passes,
)
from stca_jax.ops.pallas_mosaic_gpu import GPUS as MOSAIC_GPUS
from stca_jax.ops.pallas_mosaic_gpu import MosaicGpuKernels
from stca_jax.ops.pallas_tpu import MosaicKernels
from stca_jax.ops.pallas_triton import GPUS, TritonKernels
from stca_jax.training.cross_compile import compile_only, topology_devices

_TOPOLOGY = flags.DEFINE_string(
    "topology", "h100:1", "Such as a100:1, b200:1 or v5e:2x2: see plan."
)
_WIDTHS = flags.DEFINE_list("width", ["64", "256"], "d; heads are 16 wide, or 32 from d = 256 on.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Compute dtype.")
_ROWS = flags.DEFINE_integer("rows", 8, "R.")
_LENGTH = flags.DEFINE_integer("length", 10_240, "L.")
_TARGETS = flags.DEFINE_integer("targets", 16, "M.")
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", "triton", ["triton", "mosaic_gpu"], "Kernels of a GPU."
)
_DETAILS = flags.DEFINE_bool("details", False, "Print every instruction.")

_STEPS = {"history FFN": encoder_step, "layer": layer_step, "score": layer_forward}


def main() -> None:
    """Compiles, counts and prints."""
    compile_only()
    _, (device, *_) = topology_devices(_TOPOLOGY.value)
    kernels: MosaicKernels | TritonKernels | MosaicGpuKernels = MosaicKernels()
    if device.platform != "tpu":
        gpu = device.compute_capability
        triton, mosaic = TritonKernels(GPUS[gpu]), MosaicGpuKernels(MOSAIC_GPUS[gpu])
        kernels = triton if _IMPLEMENTATION.value == "triton" else mosaic
    print(f"{'d':>5s} {'passes':12s} {'in XLA':>8s} {'kernels':>8s}   temporary MB")
    for width in map(int, _WIDTHS.value):
        size = Size(_ROWS.value, _LENGTH.value, _TARGETS.value, width, _DTYPE.value)
        for name, step in _STEPS.items():
            compiled = [
                step(size, dataclasses.replace(kernels, encodes=e), device) for e in (False, True)
            ]
            texts = [c.as_text() for c in compiled]
            counts = " ".join(f"{passes(text, size):8.1f}" for text in texts)
            stored = [c.memory_analysis().temp_size_in_bytes / 1e6 for c in compiled]
            print(f"{width:5d} {name:12s} {counts}   {stored[0]:.0f}, {stored[1]:.0f}", flush=True)
            if _DETAILS.value:
                for m in sorted(moved(texts[1]), key=lambda m: -m.bytes):
                    print(f"{m.bytes / size.bytes:27.2f} {m.name}")


if __name__ == "__main__":
    launch.run(main)
