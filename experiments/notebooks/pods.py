# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # TPUs, GPUs and pods
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stca-jax/stca_jax/blob/main/experiments/notebooks/pods.ipynb)
#
# One program for a laptop and a pod: how a batch lies on a mesh of devices, what a step needs on a slice
# that you do not have yet, where its time goes, and a run that goes on on another mesh. Where there is no
# accelerator, eight CPU devices stand in for one host of a pod.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("stca_jax") is None:  # on Colab; CPU, GPU and TPU alike
    package = "stca-jax[train] @ git+https://github.com/stca-jax/stca_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, "libtpu"], check=True)

# %% tags=["parameters"]
DATA_DIR = "/tmp/stca/pods/data"
WORKDIR = "/tmp/stca/pods/run"
TOPOLOGY = "v5e:2x4"
NUM_LAYERS = 2

# %%
import os

# Before JAX is imported; the cell below that begins with %%bash sees them, too.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ |= {"DATA_DIR": DATA_DIR, "TOPOLOGY": TOPOLOGY, "NUM_LAYERS": str(NUM_LAYERS)}
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"

import json
import pathlib
import shutil
import signal
import threading
import time

import jax
import matplotlib.pyplot as plt

from stca_jax.config import apply_overrides
from stca_jax.data.preparation import prepare
from stca_jax.experiments.configs import tiny
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import make_input
from stca_jax.trainer import train
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.training.sharding import MeshConfig, batch_shardings, device_batch, make_mesh

print(jax.device_count(), "devices of", jax.devices()[0].device_kind)

# %% [markdown]
# ## A batch on a mesh
#
# A mesh has three axes. `data` divides the rows of a batch, `sequence` the history tokens of a row, `model`
# the hidden units and heads. Most runs need only the first.

# %%
dataset = RequestDataset(prepare(tiny.get_config().dataset, DATA_DIR))
config = apply_overrides(tiny.get_config(), {"model.sequence.num_layers": NUM_LAYERS})
batch = next(make_input(dataset, config.input, process_index=0, process_count=1)).batch
half = jax.device_count() // 2 or 1
meshes = {
    "rows over all devices": MeshConfig(),
    "each row over two": MeshConfig(data=half, sequence=jax.device_count() // half),
}
for name, mesh_config in meshes.items():
    mesh = make_mesh(mesh_config)
    placed = device_batch(batch, batch_shardings(mesh, batch))
    print(f"{name}: history, {placed.history_time.shape[0]} rows x {placed.row_length} tokens")
    jax.debug.visualize_array_sharding(placed.history_time)

# %% [markdown]
# ## Plan a slice that is not here
#
# The real train step is compiled for the slice's chips, by the compiler that would run there. So what does
# not fit is known before a machine is rented. Here for the tiny config; `paper_133m.py` and
# `--topology=v5e:16x16` take the same command some minutes.

# %% language="bash"
# python -m stca_jax.experiments.plan --config=experiments/configs/tiny.py --data_dir=$DATA_DIR \
#   --config.model.sequence.num_layers=$NUM_LAYERS --topology=$TOPOLOGY 2>&1

# %% [markdown]
# ## Preempted, and on with another mesh
#
# A checkpoint does not know which devices wrote it. This run is stopped by SIGTERM, as a preempted machine
# would be, after its first checkpoint. The second call goes on with the same batches on a mesh of another
# shape, and traces some steps on the way.

# %%
workdir = pathlib.Path(WORKDIR)
shutil.rmtree(workdir, ignore_errors=True)  # a finished run would have nothing left to stop
overrides = {
    "model.sequence.num_layers": NUM_LAYERS,
    "training.max_steps": 40,
    "training.log_every_steps": 2,
    "checkpoint.every_steps": 4,
    "evaluation.validation_requests": 50,
}


def preempt():
    while not (workdir / "checkpoints" / "4").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


threading.Thread(target=preempt, daemon=True).start()
stopped = train(apply_overrides(tiny.get_config(), overrides), dataset, workdir)
print(f"stopped by {stopped.signal.name} at step {stopped.step} of {stopped.num_steps}")
print("checkpoints", Checkpointer(workdir).steps())

# %%
elsewhere = {"mesh.data": half, "mesh.model": jax.device_count() // half}
if jax.device_count() == 1:
    print("there is one device only: the same mesh again")
profiled = {"profile.steps": f"{stopped.step + 3}:{stopped.step + 5}"}
resumed = train(
    apply_overrides(tiny.get_config(), overrides | elsewhere | profiled), dataset, workdir
)
assert resumed.step == resumed.num_steps
print(f"finished {resumed.step} steps")

# %%
lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
lines = [line for line in lines if "train/loss" in line]
_, axes = plt.subplots(figsize=(6, 3.2))
axes.plot([line["step"] for line in lines], [line["train/loss"] for line in lines], "o-")
axes.axvline(stopped.step, color="0.6", ls="--")
axes.text(
    stopped.step, max(line["train/loss"] for line in lines), " goes on on another mesh", va="top"
)
axes.set(xlabel="step", ylabel="training loss")
plt.show()

# %% [markdown]
# ## Where the time goes
#
# The traced steps lie in the run's directory: `tensorboard --logdir=WORKDIR` shows them under *Profile*.
# And every line of the metrics says how long a step waited for its batch.

# %%
print(*sorted(p.relative_to(workdir) for p in workdir.glob("plugins/profile/*/*")), sep="\n")
last = lines[-1]
for phase in ("input", "step", "checkpoint", "validation"):
    print(f"{phase:12} {1e3 * last[f'train/{phase}_seconds']:8.1f} ms per step")

# %% [markdown]
# Several hosts take the same command on each: see `docs/clusters.md` for Cloud TPU, GKE, SLURM and ssh.
