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
# # Serve a ranker
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stca-jax/stca_jax/blob/main/experiments/notebooks/serve_a_ranker.ipynb)
#
# From training to answers over HTTP: train a small model, export it into one folder, start a server, and
# watch a user's ranking change with an event that has just happened.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("stca_jax") is None:  # on Colab; CPU, GPU and TPU alike
    package = "stca-jax[train,serving] @ git+https://github.com/stca-jax/stca_jax"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", package, "matplotlib"], check=True
    )

# %% tags=["parameters"]
DATA_DIR = None  # where prepared data lie; None is the user's cache directory
FOLDER = "/tmp/stca/serve"
MAX_STEPS = 150
CANDIDATES = 12

# %%
import json
import pathlib
import shutil
import time
import urllib.request

import matplotlib.pyplot as plt
import numpy as np

from stca_jax.config import apply_overrides
from stca_jax.data.preparation import prepare
from stca_jax.experiments.configs import tiny
from stca_jax.export.folder import export_checkpoint
from stca_jax.input.dataset import RequestDataset
from stca_jax.serving import Events, Scorer, ServingModel
from stca_jax.trainer import train

folder = pathlib.Path(FOLDER)
shutil.rmtree(folder, ignore_errors=True)

# %% [markdown]
# ## Train
#
# Generated data: users with a few interests among categories of items; the model learns to match a candidate
# with what the user did before.

# %%
config = apply_overrides(tiny.get_config(), {"training.max_steps": MAX_STEPS})
dataset = RequestDataset(prepare(config.dataset, DATA_DIR))
result = train(config, dataset, folder / "run")
print(f"trained {result.step} steps")

# %% [markdown]
# ## Export
#
# One folder: programs for CPUs, GPUs and TPUs, weights, tables, what encodes raw values, and golden requests with
# the evaluation's logits. The same from a shell: `python -m experiments.export --workdir=RUN --output=DIR`.

# %%
values = export_checkpoint(config, dataset, folder / "run", result.step, folder / "model")
for path in sorted(p for p in (folder / "model").rglob("*") if p.is_file()):
    print(f"{path.stat().st_size:9,}  {path.relative_to(folder / 'model')}")
for cache, difference in values["golden_differences"].items():
    print(f"golden requests, {cache}: logits within {difference:.0e} of the evaluation's")

# %% [markdown]
# ## Score in this process
#
# A `Scorer` is a model, a cache of encoded events and a store. It has checked the golden requests before it
# answers. A user's events are encoded once; what comes later is appended.

# %%
user = dataset.record(0)
scorer = Scorer(ServingModel.load(folder / "model"), encoded=True)
origin = scorer.model.info.time_origin
history = {name: np.asarray(user.history[name]) for name in dataset.schema.history}
scorer.append("u7", Events(np.asarray(user.event_time, np.int64) + origin, history))
now = int(user.event_time.max()) + origin + 60
later = now + 3_600  # when the candidates are asked for

rng = np.random.default_rng(0)
_, places = np.unique(user.target["item"], return_index=True)
places = rng.permutation(places)[:CANDIDATES]
candidates = {name: np.asarray(user.target[name])[places] for name in dataset.schema.target}
scorer.score("u7", candidates, time=later)  # compiles
began = time.perf_counter()
probabilities = scorer.score("u7", candidates, time=later)["click"]
print(f"{len(places)} candidates, {len(user.event_time)} events: "
      f"{1e3 * (time.perf_counter() - began):.1f} ms")  # fmt: skip
for k in np.argsort(-probabilities):
    print(f"item {candidates['item'][k]:4}  {probabilities[k]:.3f}")

# %% [markdown]
# ## Serve over HTTP
#
# The same folder, in a process of its own, with histories in SQLite. `--workers=4` would be four of them behind
# one port.

# %%
server = subprocess.Popen(
    [sys.executable, "-m", "stca_jax.serving", f"--model={folder / 'model'}", "--port=0",
     f"--histories={folder / 'users.sqlite'}", "--encoded", "--warm_up=16", "--deadline=60"],
    stderr=subprocess.PIPE, text=True,
)  # fmt: skip
port = None
for line in server.stderr:
    said = json.loads(line) if line.startswith("{") else {}
    port = said.get("port", port)
    if said.get("message") == "ready":
        break
assert server.poll() is None, "the server did not start"
print(f"ready at port {port}")


def ask(method, path, body=None):
    """One request: JSON there, JSON back."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", method=method, data=json.dumps(body).encode()
    )
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def scores():
    """Probabilities of the candidates, for the user as known now."""
    targets = {name: column.tolist() for name, column in candidates.items()}
    body = {"targets": targets, "time": later}
    return np.array(ask("POST", "/v1/users/u7/score", body)["probabilities"]["click"])


events = {
    "time": (np.asarray(user.event_time, np.int64) + origin).tolist(),
    "features": {name: column.tolist() for name, column in history.items()},
    "ids": [f"event {k}" for k in range(len(user.event_time))],
}
print(ask("POST", "/v1/users/u7/events", events))
before = scores()
print("as in this process, to", f"{np.abs(before - probabilities).max():.0e}")

# %% [markdown]
# ## An event, and what it changes
#
# The user now takes the candidate that was ranked last, three times. Each event is stored, encoded and written into
# its slot of the cache; nothing else is computed again. Sent twice, an event counts once.

# %%
last = int(np.argmin(before))
steps = [before]
for k in range(3):
    event = {
        "time": [now + k],
        "features": {name: [int(candidates[name][last])] for name in history},
        "ids": [f"new {k}"],
    }
    print(ask("POST", "/v1/users/u7/events", event), ask("POST", "/v1/users/u7/events", event))
    steps.append(scores())
rank = [int((s > s[last]).sum()) + 1 for s in steps]
print(f"item {candidates['item'][last]}: rank {rank[0]} of {len(before)}, then {rank[1:]}")

# %%
_, axes = plt.subplots(figsize=(6, 3.4))
for k in range(len(before)):
    style = {"color": "#D55E00", "lw": 2.4} if k == last else {"color": "0.7", "lw": 1}
    axes.plot([s[k] for s in steps], marker="o", ms=4, **style)
axes.text(3.1, steps[-1][last], f"item {candidates['item'][last]}")
axes.set(xlabel="events since", ylabel="probability", xticks=range(4), xlim=(-0.1, 3.7))
plt.show()

# %% [markdown]
# ## Forget
#
# A deleted user is gone from the store, its log, memory and the device. SIGTERM answers what has come and ends.

# %%
print(ask("DELETE", "/v1/users/u7"))
server.terminate()
server.communicate()
print("ended with", server.returncode)
