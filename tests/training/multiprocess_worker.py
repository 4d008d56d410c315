"""One process of a job that saves or restores a checkpoint; run by test_multiprocess.py.

Arguments: "save" or "restore", number of processes, process id, port, work directory, dataset.
Prints a JSON line: a digest of the restored or saved state and of the batches that follow.
"""

import hashlib
import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from stca_jax.config import apply_overrides
from stca_jax.experiment import experiment_program
from stca_jax.experiments.configs import tiny
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import make_input
from stca_jax.training import distributed
from stca_jax.training.checkpointing import CheckpointConfig, Checkpointer
from stca_jax.training.sharding import device_batch, input_share


def main(action: str, num_processes: int, process_id: int, port: int, workdir: str, data: str):
    if num_processes > 1:
        distributed.join(f"localhost:{port}", num_processes, process_id)
    sequence = 2 if action == "restore" else 1
    config = apply_overrides(
        tiny.get_config(),
        {
            "mesh.sequence": sequence,
            "model.embedding.replicated_rows": 32,  # divides the item table
            "model.sequence.width": 8,
            "model.sequence.num_layers": 1,
        },
    )
    dataset = RequestDataset(data)
    program = experiment_program(config, dataset.schema, num_steps=10)
    share, num_shares = input_share(program.batch_shardings.history_time.mesh)
    batches = make_input(dataset, config.input, process_index=share, process_count=num_shares)
    checkpointer = Checkpointer(workdir, CheckpointConfig())
    if action == "save":
        state = program.initialize()
        for _ in range(3):
            position = next(batches).state
        checkpointer.save(state, 3, position)
        checkpointer.wait()
    else:
        step, state, position = checkpointer.restore_latest(program.abstract_state)
        assert step == 3
        batches.set_state(position)
    following = [check_rows(next(batches).batch, program, num_shares) for _ in range(2)]
    checkpointer.close()
    batches.close()
    leaves = multihost_utils.process_allgather(jax.tree.leaves(state), tiled=True)
    if process_id == 0:
        json.dump({"state": digest(leaves), "batches": following}, sys.stdout)


def check_rows(local, program, num_shares: int) -> str:
    """Each device is fed its own rows and tokens only; returns a digest of the global batch."""
    batch = device_batch(local, program.batch_shardings)
    mesh = batch.history_time.sharding.mesh
    rows, length = local.history_time.shape
    assert batch.num_rows == rows * num_shares
    for shard in batch.history_time.addressable_shards:
        assert shard.data.shape == (
            batch.num_rows // mesh.shape["data"], length // mesh.shape["sequence"]
        )  # fmt: skip
    held = np.concatenate([s.data for s in batch.request_id.addressable_shards])
    assert set(held.ravel()) == set(local.request_id.ravel())
    return digest(multihost_utils.process_allgather(jax.tree.leaves(batch), tiled=True))


def digest(arrays) -> str:
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:])
