"""Compiles a train step for machines that are not here, and reads what the compiler says of them.

Topologies are TPU slices as Cloud TPU names them (v5e, v5p and v6e; needs `pip install libtpu`)
or GPUs of one node, such as h100:8 (a100, h100, h200 and b200; needs `pip install
jax-cuda13-plugin jax-cuda13-pjrt`).
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from stca_jax.batch import RequestBatch
from stca_jax.errors import UserError
from stca_jax.training.flops import CHIPS, Chip
from stca_jax.training.train_step import Program

# What XLA compiles for: public numbers of NVIDIA's data sheets and CUDA's device query.
_GPU_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {block} shared_memory_per_core: {sm}
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock} l2_cache_size: {l2}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }} device_description_str: "{name}" """
_GPUS: Mapping[str, Mapping[str, Any]] = {
    "a100": dict(major=8, cores=108, clock=1.41, l2=40 * 2**20, block=166912, sm=167936),
    "h100": dict(major=9, cores=132, clock=1.98, l2=50 * 2**20, block=232448, sm=233472),
    "h200": dict(major=9, cores=132, clock=1.98, l2=50 * 2**20, block=232448, sm=233472),
    "b200": dict(major=10, cores=148, clock=1.96, l2=126 * 2**20, block=232448, sm=233472),
}


class Collective(NamedTuple):
    """Collectives of one kind in the compiled program of a device.

    Attributes:
      kind: Such as "all-reduce".
      in_loop: Inside a loop, whose trip count is not known here: numbers are of one trip.
      operations: How many.
      bytes: Of their results.
    """

    kind: str
    in_loop: bool
    operations: int
    bytes: int


def compile_only() -> None:
    """Keeps this process, which compiles for devices that are not here, off those that are.

    To be called before JAX has looked for devices.
    """
    # Libtpu must not look for a TPU.  What it is told of the machine here only keeps it quiet:
    # topologies are given by name.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def topology_devices(topology: str, num_slices: int = 1) -> tuple[Chip, Sequence[jax.Device]]:
    """The chip and the abstract devices of a topology, or of several of them.

    Raises:
      UserError: it is unknown, or its compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+){0,2}", shape):
        raise UserError(
            f"--topology={topology}: give a TPU slice such as v5e:2x4, v5e:16x16, v5p:4x4x4, or "
            f"GPUs of a node such as h100:8; chips are {', '.join(CHIPS)}"
        )
    chip = CHIPS[name]
    try:
        if name not in _GPUS:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, num_slices=num_slices
            )
        else:
            target = _GPU_TARGET.format(
                name=chip.device_kinds[0],
                bandwidth=chip.bandwidth,
                memory=int(chip.memory),
                **_GPUS[name],
            )
            found = topologies.get_topology_desc(
                platform="cuda", target_config=target, topology=f"{num_slices}x1x{shape}"
            )
    except Exception as error:  # each plugin raises kinds of its own
        packages = "jax-cuda13-plugin jax-cuda13-pjrt" if name in _GPUS else "libtpu"
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={topology}: {reason}. Is there such a machine, and is its compiler "
            f"installed (pip install {packages})?"
        ) from error
    return chip, found.devices


class Compiled(NamedTuple):
    """What the compiler said of one device.

    Attributes:
      temporary_bytes: Most memory in use besides arguments and results.
      code_bytes: The program itself.
      available_bytes: What the compiler had for everything; None if that sufficed.
      collectives: By kind.
    """

    temporary_bytes: int
    code_bytes: int
    available_bytes: int | None
    collectives: list[Collective]


_OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)")


def compile_step(program: Program, mesh: Mesh, batch: RequestBatch) -> Compiled:
    """Compiles the train step for the mesh's devices."""
    with jax.set_mesh(mesh):
        jitted: Any = program.train_step.__wrapped__  # type: ignore[attr-defined]
        lowered = jitted.lower(program.abstract_state, batch)
    with tempfile.TemporaryDirectory() as folder:
        # The text that libtpu writes itself: JAX cannot read the programs of v5p and v6e back.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        jax.config.update("jax_enable_compilation_cache", False)  # a cached program writes no text
        available = None
        try:
            memory = lowered.compile(options).memory_analysis()
            temporary, code = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
        except jax.errors.JaxRuntimeError as error:
            found = _OUT_OF_MEMORY.search(str(error))
            if found is None:
                raise
            needed, available = (
                int(float(found[i]) * 1024 ** " KMG".index(found[i + 1])) for i in (1, 3)
            )
            temporary = max(needed - bytes_per_device((program.abstract_state, batch)), 0)
            code = 0
        # Analyses of the program lie beside it, under longer names.
        texts = pathlib.Path(folder).glob(f"*jit_{jitted.__name__}*after_optimizations*.txt")
        text = min(texts, key=lambda path: len(path.name)).read_text()
    return Compiled(temporary, code, available, collectives(text))


_KINDS = "all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf"= (.+?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?"
    r"(%[\w.\-]+(?:, %[\w.\-]+)*)"
)


def collectives(hlo: str) -> list[Collective]:
    """Collectives of a compiled program by kind, counted from its text."""
    found: list[tuple[str, str, int]] = []  # computation, kind, bytes
    calls: dict[str, set[str]] = {}
    looped: set[str] = set()
    computation = ""
    for line in hlo.splitlines():
        if line.endswith("{") and (header := re.match(r"(?:ENTRY )?(%[\w.\-]+) ", line)):
            computation = header[1]
            calls[computation] = set()
        called = {name for names in _CALLED.findall(line) for name in names.split(", ")}
        if called:
            calls.setdefault(computation, set()).update(called)
        if " while(" in line:
            looped |= called
        if match := _COLLECTIVE.search(line):
            sizes = [_array_bytes(*array) for array in _ARRAY.findall(match[1])]
            # The result of an asynchronous start repeats its operands, but for all-reduce.
            is_pair = match[3] and match[2] != "all-reduce"
            found.append((computation, match[2], max(sizes) if is_pair else sum(sizes)))
    pending = list(looped)
    while pending:
        inner = calls.get(pending.pop(), set()) - looped
        looped |= inner
        pending += inner
    counts = Counter((kind, name in looped) for name, kind, _ in found)
    return [
        Collective(
            kind, in_loop, n, sum(b for c, k, b in found if (k, c in looped) == (kind, in_loop))
        )
        for (kind, in_loop), n in sorted(counts.items())
    ]


def _array_bytes(dtype: str, bits: str, dimensions: str) -> int:
    entries = math.prod(int(d) for d in dimensions.split(",") if d)
    return -(-entries * int(bits or 8) // 8)


def bytes_per_device(tree: Any) -> int:
    """Bytes of a device's share of the (abstract) arrays, padding of a TPU's tables included."""
    total = 0
    for array in jax.tree.leaves(tree):
        *rows, width = array.sharding.shard_shape(array.shape) or (1,)
        on_tpu = next(iter(array.sharding.device_set)).platform == "tpu"
        if on_tpu and array.format.layout is not None:
            width = -(-width // 128) * 128  # a TPU pads the rows of tables
        total += math.prod(rows) * width * array.dtype.itemsize
    return total
