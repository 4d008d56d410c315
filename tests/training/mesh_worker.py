"""Trains a few steps on several meshes of forced CPU devices; prints {mesh: [losses, parameters]}.

On one device all tables are whole, with dense gradients; on the others the item table is divided.

Run by test_sharding.py in a process of its own, since the number of devices is fixed at start.
"""

import json
import sys
import unittest.mock

import jax
import numpy as np

from stca_jax.batch import empty_batch
from stca_jax.config import apply_overrides
from stca_jax.experiments.configs import tiny
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import make_input
from stca_jax.training import sharding
from stca_jax.training.sharding import MeshConfig, device_batch, make_mesh
from stca_jax.training.table_rows import rows_by_id
from stca_jax.training.train_step import Program

STEPS = 20


def main(directory: str) -> None:
    config = apply_overrides(
        tiny.get_config(), {"model.sequence.width": 24, "model.match_soft_counts": True}
    )
    dataset = RequestDataset(directory)
    batches = make_input(dataset, config.input)
    elements = [next(batches) for _ in range(STEPS)]
    batches.close()
    shapes = empty_batch(
        dataset.schema, 8, config.input.row_length, config.input.targets_per_row,
        shared_history=True,
    )  # fmt: skip
    results = {}
    for sizes, heads, slices in (
        ((1, 1, 1), 2, 1),
        ((8, 1, 1), 2, 1),
        ((4, 2, 1), 2, 1),
        ((4, 1, 2), 2, 2),  # of two slices, one device of each in turns
        ((2, 2, 2), 2, 1),
        ((1, 8, 1), 2, 1),
        ((1, 1, 1), 8, 1),
        ((1, 1, 8), 8, 1),  # heads are divided along `model`
    ):
        with unittest.mock.patch.object(sharding, "slice_index", lambda d, n=slices: d.id % n):
            mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        replicated = 10_000 if sizes == (1, 1, 1) else 32  # 320 items, 32 categories
        model = apply_overrides(
            config.model, {"sequence.num_heads": heads, "embedding.replicated_rows": replicated}
        )
        results[f"{sizes} heads={heads}"] = run(model, dataset, config, mesh, shapes, elements)
    json.dump(results, sys.stdout)


def run(model, dataset, config, mesh, shapes, elements) -> dict[str, list[float]]:
    program = Program(
        model, dataset.schema, config.optimizer, config.training, mesh, shapes, STEPS, seed=0
    )
    state = program.initialize()
    losses = []
    for element in elements:
        batch = device_batch(element.batch, program.batch_shardings)
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics.loss))
    rows_of_first_device = batch.history_time.addressable_shards[0].data
    sizes = dataset.schema.vocabularies
    tables = {
        name: table if len(table) == sizes[name] else rows_by_id(table, sizes[name])
        for name, table in state.tables.items()
    }
    leaves = jax.tree.leaves(jax.device_get((state.dense, tables)))
    return {
        "losses": losses,
        "parameters": np.concatenate([leaf.ravel() for leaf in leaves]).tolist(),
        "shard": list(rows_of_first_device.shape),
    }


if __name__ == "__main__":
    main(sys.argv[1])
