"""Compiles an experiment's train step for machines that are not here, and says whether it fits.

python -m experiments.plan --config=experiments/configs/paper_133m.py --topology=v5e:16x16
    [--num_slices=N] [--config.NAME=VALUE ...] [--vocabulary=item=100000000,...] [--json]
    [--data_dir=DIR]

Topologies are TPU slices as Cloud TPU names them (v5e, v5p and v6e; needs `pip install libtpu`)
or GPUs of one node, h100:8 or a100:8 (needs `pip install jax-cuda13-plugin jax-cuda13-pjrt`);
--num_slices=N is for N of them.  No accelerator, no data preparation beyond what the schema needs,
and no memory for the model are needed: nothing is run.

The schema is that of the config's dataset, or of the config file itself if that defines
`get_schema()`; --vocabulary sets sizes of vocabularies by name.

Exit status: 0 it fits, 1 an error, 2 it does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import runpy
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh

from data.preparation import prepare
from experiments import launch
from stca_jax.batch import RequestBatch, empty_batch
from stca_jax.errors import UserError
from stca_jax.experiment import ExperimentConfig, experiment_program
from stca_jax.input.dataset import RequestDataset
from stca_jax.schema import Schema
from stca_jax.training.flops import CHIPS, Chip, model_flops, step_traffic
from stca_jax.training.sharding import make_mesh
from stca_jax.training.train_step import Program

_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:16x16, h100:8, …", required=True)
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices or nodes of that topology.", 1)
_VOCABULARY = flags.DEFINE_list("vocabulary", [], "Sizes of vocabularies, NAME=ROWS.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")

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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What compiling told; bytes and seconds are of one device.

    Attributes:
      topology: As it was asked for.
      mesh: Axis sizes.
      parameters: Numbers of dense and table parameters, in all.
      memory: Bytes by what they are for.
      capacity: Bytes that a device has.
      collectives: By kind.
      flops: Of a step, on all devices.
      seconds: Lower bounds of a step's time: compute at peak FLOP/s, memory at peak bandwidth,
        interconnect for the collectives, one trip of each loop, as if all devices were one slice.
      advice: What would make it fit; empty if it does.
    """

    topology: str
    mesh: dict[str, int]
    parameters: dict[str, int]
    memory: dict[str, int]
    capacity: int
    collectives: list[Collective]
    flops: float
    seconds: dict[str, float]
    advice: list[str]

    @property
    def total(self) -> int:
        """Bytes needed."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a device has them."""
        return self.total <= self.capacity

    def to_json(self) -> str:
        """All of it."""
        collectives = [c._asdict() for c in self.collectives]
        derived = {"collectives": collectives, "total": self.total, "fits": self.fits}
        return json.dumps(dataclasses.asdict(self) | derived, indent=2)

    def to_text(self) -> str:
        """For reading."""
        shown = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        lines = [
            f"{self.topology}: {math.prod(self.mesh.values())} devices, {shown}",
            "parameters    " + ", ".join(f"{n:,} {k}" for k, n in self.parameters.items()),
            "memory of a device",
            *(f"  {name:<20}{_gib(n):>12}" for name, n in self.memory.items()),
            f"  {'total':<20}{_gib(self.total):>12} of {_gib(self.capacity)}",
            "collectives of a step",
            *(
                f"  {c.kind:<20}{c.operations:>4} x, {c.bytes:,} bytes"
                + (" (inside loops, per trip)" if c.in_loop else "")
                for c in self.collectives
            ),
            f"step          {self.flops:.4g} FLOP, at best {max(self.seconds.values()):.3g} s: "
            + ", ".join(f"{name} {s:.3g} s" for name, s in self.seconds.items()),
            "It fits." if self.fits else "It does NOT fit. What would help:",
            *(f"  - {advice}" for advice in self.advice),
        ]
        return "\n".join(lines)


def main() -> int:
    """Prints the plan."""
    # Nothing of this program runs on an accelerator, and libtpu must not look for one.  What it is
    # told of the machine here only keeps it quiet: topologies are given by name.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    config = launch.load_config()
    schema = with_vocabulary(config_schema(launch.config_path(), config), _VOCABULARY.value)
    with launch.working(f"Compiling for {_TOPOLOGY.value}"):
        plan = make_plan(config, schema, _TOPOLOGY.value, _NUM_SLICES.value)
    print(plan.to_json() if _JSON.value else plan.to_text())
    return 0 if plan.fits else 2


def config_schema(path: str, config: ExperimentConfig) -> Schema:
    """The schema that the config file defines, or that of its dataset."""
    get_schema = runpy.run_path(path).get("get_schema")
    if get_schema is not None:
        return get_schema()
    return RequestDataset(prepare(config.dataset, launch.DATA_DIR.value)).schema


def with_vocabulary(schema: Schema, sizes: Sequence[str]) -> Schema:
    """The schema with other sizes of vocabularies, each given as "name=rows".

    Raises:
      UserError: there is no such vocabulary, or the size is no positive integer.
    """
    vocabularies = dict(schema.vocabularies)
    for text in sizes:
        name, _, rows = text.partition("=")
        if name not in vocabularies or not rows.isdigit() or int(rows) < 1:
            raise UserError(
                f"--vocabulary={text}: give NAME=ROWS, with a name of {', '.join(vocabularies)}"
            )
        vocabularies[name] = int(rows)
    return dataclasses.replace(schema, vocabularies=vocabularies)


def make_plan(config: ExperimentConfig, schema: Schema, topology: str, num_slices: int = 1) -> Plan:
    """Compiles the train step and adds things up.

    Args:
      config: The experiment.
      schema: Of its dataset.
      topology: Such as "v5e:2x4"; see `topology_devices`.
      num_slices: How many of them.

    Raises:
      UserError: the topology is unknown, its compiler is not installed, or the mesh does not fit.
    """
    chip, devices = topology_devices(topology, num_slices)
    mesh = make_mesh(config.mesh, devices)
    program = experiment_program(config, schema, num_steps=1_000, mesh=mesh)
    batch = _abstract_batch(config, schema, program)
    compiled = compile_step(program, mesh, batch)
    state = program.abstract_state
    of_device = {
        "dense parameters": _bytes_per_device(state.dense),
        "tables": _bytes_per_device(state.tables),
        "dense optimizer": _bytes_per_device(state.optimizer),
        "table optimizer": _bytes_per_device(state.table_optimizer),
        "batch": _bytes_per_device(batch),
        "activations": compiled.temporary_bytes,
        "program": compiled.code_bytes,
    }
    tokens, targets, pairs, token_pairs = _amounts(config)
    step_flops = model_flops(config.model, schema, config.input.targets_per_row).train_step(
        tokens, targets, pairs, token_pairs
    )
    traffic = step_traffic(
        config.model,
        schema,
        tokens=tokens / mesh.size,
        targets=targets / mesh.size,
        dense_bytes=of_device["dense parameters"],
        optimizer_bytes=of_device["dense optimizer"],
    )
    sent = sum(
        c.bytes * (2 if c.kind == "all-reduce" else 1)  # a ring passes its data round twice
        for c in compiled.collectives
    )
    plan = Plan(
        topology=topology if num_slices == 1 else f"{num_slices} x {topology}",
        mesh=dict(mesh.shape),
        parameters={
            "dense": sum(x.size for x in jax.tree.leaves(state.dense)),
            "in tables": sum(x.size for x in jax.tree.leaves(state.tables)),
        },
        memory=of_device,
        capacity=compiled.available_bytes or int(chip.memory),
        collectives=compiled.collectives,
        flops=step_flops,
        seconds={
            "compute": step_flops / (mesh.size * chip.flops),
            "memory": traffic / chip.bandwidth,
            "interconnect": sent / chip.interconnect,
        },
        advice=[],
    )
    return plan if plan.fits else dataclasses.replace(plan, advice=advise(plan, config))


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
            temporary = max(needed - _bytes_per_device((program.abstract_state, batch)), 0)
            code = 0
        # Analyses of the program lie beside it, under longer names.
        texts = pathlib.Path(folder).glob("*train_step*after_optimizations*.txt")
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


def advise(plan: Plan, config: ExperimentConfig) -> list[str]:
    """What would make a plan fit, by arithmetic: shares of memory that can be divided further."""
    memory = plan.memory
    activations = memory["activations"]
    tables = memory["tables"] + memory["table optimizer"]
    free = plan.capacity - (plan.total - activations)
    room = plan.capacity - (plan.total - activations - tables)  # for tables alone
    advice = []
    if room <= 0:
        advice.append(
            f"dense parameters and optimizer take {_gib(plan.capacity - room)} of a device: "
            "--config.mesh.model=N divides FFNs and heads; or a smaller model"
        )
    elif free <= 0:
        devices = math.prod(plan.mesh.values())
        advice.append(
            f"tables and their optimizer take {_gib(tables)} of a device where {_gib(room)} are "
            f"left: at least {math.ceil(tables * devices / room)} devices would divide them far "
            "enough; or fewer or narrower rows"
        )
    now = config.training.accumulate_steps
    rows_per_device = config.input.rows_per_batch // plan.mesh["data"]
    steps = [k for k in range(now, rows_per_device + 1) if rows_per_device % k == 0]
    enough = [k for k in steps if activations * now / k <= free]
    if enough and enough[0] > now:
        advice.append(
            f"--config.training.accumulate_steps={enough[0]}: about "
            f"{_gib(activations * now // enough[0])} of activations at a time"
        )
    elif free > 0:
        advice.append(
            f"even one row at a time needs about {_gib(activations * now // steps[-1])} of "
            f"activations where {_gib(free)} are free: --config.mesh.sequence=N divides "
            "its history, a shorter --config.input.row_length or fewer targets_per_row cut it"
        )
    if config.model.remat != "all":
        advice.append("--config.model.remat=history, or all, keeps fewer activations")
    if config.model.dtype == "float32":
        advice.append("--config.model.dtype=bfloat16 halves activations")
    return advice


def _abstract_batch(config: ExperimentConfig, schema: Schema, program: Program) -> RequestBatch:
    shapes = jax.eval_shape(
        lambda: empty_batch(
            schema,
            config.input.rows_per_batch,
            config.input.row_length,
            config.input.targets_per_row,
            shared_history=config.input.rows == "user",
        )
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        program.batch_shardings,
    )


def _amounts(config: ExperimentConfig) -> tuple[int, int, float, float]:
    """Of full rows: history tokens, targets, tokens that all targets read, pairs of tokens."""
    rows = config.input.rows_per_batch
    quantiles = (np.arange(1_000) + 0.5) / 1_000
    lengths = config.input.length.lengths(quantiles).astype(float)
    tokens, targets = rows * config.input.row_length, rows * config.input.targets_per_row
    token_pairs = tokens * float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
    return tokens, targets, targets * float(lengths.mean()), token_pairs


def _bytes_per_device(tree: Any) -> int:
    total = 0
    for array in jax.tree.leaves(tree):
        *rows, width = array.sharding.shard_shape(array.shape) or (1,)
        on_tpu = next(iter(array.sharding.device_set)).platform == "tpu"
        if on_tpu and array.format.layout is not None:
            width = -(-width // 128) * 128  # a TPU pads the rows of tables
        total += math.prod(rows) * width * array.dtype.itemsize
    return total


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"


if __name__ == "__main__":
    launch.run(main, takes_config=True)
