"""What an experiment's train step needs of each device of a machine, and whether it fits."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

import jax
import numpy as np

from stca_jax.batch import RequestBatch, empty_batch
from stca_jax.errors import UserError
from stca_jax.experiment import ExperimentConfig, experiment_program
from stca_jax.schema import Schema
from stca_jax.training.cross_compile import (
    Collective,
    bytes_per_device,
    compile_step,
    topology_devices,
)
from stca_jax.training.flops import model_flops, step_traffic
from stca_jax.training.sharding import make_mesh
from stca_jax.training.train_step import Program


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
    batch = abstract_batch(config, schema, program)
    compiled = compile_step(program, mesh, batch)
    state = program.abstract_state
    of_device = {
        "dense parameters": bytes_per_device(state.dense),
        "tables": bytes_per_device(state.tables),
        "dense optimizer": bytes_per_device(state.optimizer),
        "table optimizer": bytes_per_device(state.table_optimizer),
        "batch": bytes_per_device(batch),
        "activations": compiled.temporary_bytes,
        "program": compiled.code_bytes,
    }
    tokens, targets, pairs, token_pairs = _amounts(config)
    step_flops = model_flops(config.model, schema, *config.input.row_shape).train_step(
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


def abstract_batch(config: ExperimentConfig, schema: Schema, program: Program) -> RequestBatch:
    """Shapes of a global batch, divided over the devices of the program's mesh."""
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


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"
