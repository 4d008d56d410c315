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
# # Ten minutes with STCA
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stca-jax/stca_jax/blob/main/experiments/notebooks/ten_minutes_with_stca.ipynb)
#
# Which of these products will the household buy? Everything it bought before may help, thousands of
# events, and it should still be cheap. In this notebook: the one idea, a batch by hand, training on a
# year of real groceries, quality by length of the history, and a look at what the model looks at.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("stca_jax") is None:  # on Colab; CPU, GPU and TPU alike
    package = "stca-jax[complete-journey,report] @ git+https://github.com/stca-jax/stca_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %% tags=["parameters"]
DATA_DIR = None  # where prepared data lie; None is the user's cache directory
WORKDIR = "/tmp/stca/ten_minutes"
MAX_STEPS = 150  # of 646 that one pass over the data takes
LENGTHS = (50, 200, 1_000, 4_000)
TEST_REQUESTS = 1_000
ATTENTION_BATCHES = 6  # of one or two households each

# %%
import dataclasses
import pathlib
import unittest.mock

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from stca_jax.batch import Request, empty_batch, from_requests, validate_batch
from stca_jax.config import apply_overrides
from stca_jax.data.preparation import prepare
from stca_jax.evaluation.evaluator import evaluate_split, metric_rows
from stca_jax.evaluation.references.scoring import evaluate_references
from stca_jax.experiments.configs import complete_journey
from stca_jax.input.dataset import RequestDataset
from stca_jax.input.pipeline import make_input
from stca_jax.input.planning import select_requests
from stca_jax.models import stca
from stca_jax.models.ranker import Ranker, RankerConfig
from stca_jax.models.stca import StcaConfig
from stca_jax.ops.attention import history_layer
from stca_jax.ops.encoder import encode_history
from stca_jax.ops.reference import attention_weights
from stca_jax.schema import Schema
from stca_jax.trainer import train
from stca_jax.training.checkpointing import Checkpointer
from stca_jax.training.state import merge_ranker, split_ranker
from stca_jax.training.table_rows import rows_by_id
from stca_jax.workdir import restore_for_evaluation

print(jax.devices())

# %% [markdown]
# ## One idea: each target reads one range of a row
#
# A *request* is a moment at which a user is shown some items, the *targets*. Its *history* is what the
# user did before. Here is a row by hand: 16 tokens for two users, and 8 slots for the targets of three
# requests. Requests A and B are user 7's, at different times; C is user 3's.

# %%
schema = Schema(
    history=("item",), target=("item",), request=(), vocabularies={"item": 100}, tasks=("click",)
)
batch = empty_batch(schema, num_rows=1, row_length=16, targets_per_row=8, shared_history=True)
batch.history["item"][0, :6] = [5, 7, 5, 9, 8, 5]  # user 7
batch.history_time[0, :6] = [100, 200, 300, 400, 500, 600]
batch.history["item"][0, 6:14] = [20, 21, 20, 24, 25, 20, 27, 21]  # user 3
batch.history_time[0, 6:14] = [100, 200, 300, 400, 500, 600, 700, 800]

requests = ["A", "A", "B", "B", "C", "C", "C"]
batch.target["item"][0, :7] = [5, 8, 7, 3, 20, 24, 60]
batch.history_start[0, :7] = [0, 0, 2, 2, 6, 6, 6]
batch.history_end[0, :7] = [4, 4, 6, 6, 14, 14, 14]
batch.request_time[0, :7] = [450, 450, 650, 650, 850, 850, 850]
batch.user_id[0, :7] = [7, 7, 7, 7, 3, 3, 3]
batch.request_id[0, :7] = [0, 0, 1, 1, 2, 2, 2]
batch.num_request_targets[0, :7] = [2, 2, 2, 2, 3, 3, 3]
batch.label[0, :7, 0] = [1, 0, 0, 1, 1, 0, 0]
batch.target_mask[0, :7] = True
validate_batch(batch, schema)

# %% [markdown]
# A target holds no copy of its history, only where it begins and ends. B's window overlaps A's; the tokens
# stand there once.


# %%
def draw_row(batch, requests):
    colors = {user: f"C{i}" for i, user in enumerate(np.unique(batch.user_id[0, : len(requests)]))}
    _, axes = plt.subplots(figsize=(8, 3))
    for position, item in enumerate(batch.history["item"][0]):
        readers = (batch.history_start[0] <= position) & (position < batch.history_end[0])
        color = colors[batch.user_id[0, readers][0]] if readers.any() else "0.85"
        axes.add_patch(plt.Rectangle((position, 0), 1, 1, facecolor=color, edgecolor="white"))
        axes.text(position + 0.5, 0.5, item or "", ha="center", va="center", color="white")
    for slot, name in enumerate(requests):
        start, end = batch.history_start[0, slot], batch.history_end[0, slot]
        y, color = -0.7 - 0.55 * slot, colors[batch.user_id[0, slot]]
        axes.plot([start, end], [y, y], color=color, lw=2)
        text = f"{name}: item {batch.target['item'][0, slot]}"
        axes.text(end + 0.15, y, text, va="center", fontsize=9)
    axes.set(xlim=(0, batch.row_length + 2), ylim=(-0.7 - 0.55 * len(requests), 1.1))
    axes.axis("off")
    axes.set_title(
        "the tokens of a row, and the range that each target reads", loc="left", fontsize=10
    )
    plt.show()


draw_row(batch, requests)

# %% [markdown]
# Targets of a request share a range: that is request-level batching. A shorter window is a range that
# begins later. And it is exact, because history tokens never look at each other. A target's score does not
# depend on the rest of its row:

# %%
small = RankerConfig(sequence=StcaConfig(width=16, num_layers=1, num_heads=2))
ranker = Ranker(small, schema, rngs=nnx.Rngs(0))
by_itself = Request(
    history={"item": [5, 7, 5, 9]}, history_time=[100, 200, 300, 400], time=450,
    targets={"item": [5]}, labels=[1],
)  # fmt: skip
in_company, alone = ranker(batch)[0, 0], ranker(from_requests(schema, [by_itself]))[0, 0]
print("in company", in_company, " alone", alone)
assert np.allclose(in_company, alone, atol=1e-5)

# %% [markdown]
# ## Train on a year of groceries
#
# 2,469 households, 1.5 million purchases. The task: which of a basket's products, and of as many popular
# other ones, were bought. This is the README's main job, cut off early.

# %%
config = apply_overrides(
    complete_journey.get_config(),
    {
        "input.rows_per_batch": jax.device_count(),
        "training.max_steps": MAX_STEPS,
        "checkpoint.every_steps": MAX_STEPS,
        "evaluation.lengths": LENGTHS,
        "evaluation.max_requests": TEST_REQUESTS,
        "evaluation.validation_requests": 200,
    },
)
dataset = RequestDataset(prepare(config.dataset, DATA_DIR))
print(f"{len(dataset):,} households, {len(dataset.index):,} requests")
result = train(config, dataset, pathlib.Path(WORKDIR))
print(f"trained {result.step} steps")

# %% [markdown]
# Training windows were short: 768 events on average, of 8 to 4,096. Now one model reads every length.
# *Counting* is how often the household bought the product among its last L events: simple, and hard to
# beat. The same targets for both, of households with at least 1,000 purchases.

# %%
step = Checkpointer(pathlib.Path(WORKDIR)).steps()[-1]
program, state = restore_for_evaluation(config, dataset, pathlib.Path(WORKDIR), step)
auc = {}
for length in LENGTHS:
    predictions = evaluate_split(
        program,
        state,
        dataset,
        config.input,
        split="test",
        length=length,
        min_history=config.evaluation.min_history,
        max_requests=TEST_REQUESTS,
    )
    auc[length] = metric_rows(predictions, dataset.schema.tasks)[0]["auc"]

scored = config.input.for_evaluation(
    "test", max(LENGTHS), min_history=config.evaluation.min_history, max_requests=TEST_REQUESTS
)
few = dataclasses.replace(
    config.input, max_requests=200
)  # the other references are fitted, and unused
training, test = (select_requests(dataset.index, c) for c in (few, scored))
references = evaluate_references(dataset, training, test, LENGTHS)
counting = {row["length"]: row["auc"] for row in references if row["model"] == "counting"}

_, axes = plt.subplots(figsize=(6, 3.6))
axes.semilogx(auc.keys(), auc.values(), "o-", label=f"STCA after {step} steps")
axes.semilogx(counting.keys(), counting.values(), "s--", color="0.5", label="counting")
axes.axvline(768, color="0.8", zorder=0)
axes.text(768, min(counting.values()), "average training window ", color="0.5", ha="right")
axes.set(xlabel="events of the history that the model reads", ylabel="test AUC")
axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS], minor=False)
axes.minorticks_off()
axes.grid(axis="y", alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# The longer the history, the better, far beyond the average window of the training: that is
# length-extrapolative training. A whole pass, which takes minutes, passes the logistic reference, too.
#
# ## What does a target look at?
#
# The attention weights of the first layer, for products offered to households with at least 1,000
# purchases. A weight of 1 is an even share: as much as every other event of the history.


# %%
def attention(ranker, batch):
    """Weights of the first layer, averaged over heads: [rows, targets, tokens]."""
    weights = []

    def watched(query, tokens, encoder, w_key, w_value, ranges, *, history_score, options):
        encoded = encode_history(encoder, tokens)
        weights.append(attention_weights(query, encoded, w_key, ranges, history_score)[0])
        return history_layer(
            query, tokens, encoder, w_key, w_value, ranges,
            history_score=history_score, options=options,
        )  # fmt: skip

    with unittest.mock.patch.object(stca, "history_layer", watched):
        ranker(batch)
    return np.asarray(weights[0].mean(-1))


graph, *_ = split_ranker(
    nnx.eval_shape(lambda: Ranker(config.model, dataset.schema, rngs=nnx.Rngs(0)))
)
tables = {n: rows_by_id(t, dataset.schema.vocabularies[n]) for n, t in state.tables.items()}
ranker = merge_ranker(graph, state.dense, tables)

shown = config.input.for_evaluation("test", 4_096, min_history=1_000, max_requests=200)
shown = dataclasses.replace(shown, rows_per_batch=1, targets_per_row=64, targets_per_chunk=64)
batches = make_input(dataset, shown, process_index=0, process_count=1)
kinds = {"the same product": "item", "the same type of product": "type", "all others": None}
ages, shares = ({kind: [] for kind in kinds} for _ in range(2))
reach = {length: [] for length in (100, 1_000)}  # how old the last events are, in days
for element, _ in zip(batches, range(ATTENTION_BATCHES), strict=False):
    batch = element.batch
    weights = attention(ranker, batch)
    for slot in np.flatnonzero(batch.target_mask[0]):
        window = slice(batch.history_start[0, slot], batch.history_end[0, slot])
        age = (batch.request_time[0, slot] - batch.history_time[0, window]) / 86_400
        share = weights[0, slot, window] * len(age)
        left = np.ones(len(age), bool)
        for kind, name in kinds.items():
            same = left
            if name:
                same = left & (batch.history[name][0, window] == batch.target[name][0, slot])
            ages[kind].append(age[same])
            shares[kind].append(share[same])
            left = left & ~same
        for length, days in reach.items():
            days.append(age[-length])
batches.close()

# %%
_, axes = plt.subplots(figsize=(7, 4.2))
edges = np.geomspace(1, 365, 11)
for kind, color in zip(kinds, ("C3", "C0", "0.5"), strict=True):
    age, share = np.concatenate(ages[kind]), np.concatenate(shares[kind])
    if kind != "all others":
        axes.scatter(age, share, s=5, color=color, alpha=0.15, linewidths=0)
    bins = np.digitize(age, edges)
    filled = [b for b in range(1, len(edges)) if (bins == b).sum() >= 10]
    axes.plot(
        [np.sqrt(edges[b - 1] * edges[b]) for b in filled],
        [share[bins == b].mean() for b in filled],
        "o-", color=color, label=kind,
    )  # fmt: skip
for length, days in reach.items():
    axes.axvline(np.median(days), color="0.75", ls=":", zorder=0)
    axes.text(
        np.median(days), 0.98, f"the last {length:,} events", rotation=90, ha="right", va="top",
        color="0.4", fontsize=8, transform=axes.get_xaxis_transform(),
    )  # fmt: skip
axes.set(xscale="log", yscale="log", xlim=(1, 365))
axes.set_xticks([1, 7, 30, 90, 365], ["1 day", "week", "month", "quarter", "year"])
axes.minorticks_off()
axes.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
axes.set(xlabel="age of the purchase", ylabel="attention, 1 is an even share", ylim=(0.3, 60))
axes.legend(
    loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, title="purchases of"
)
axes.set_title("Attention does not fade", loc="left")
plt.show()

same = np.concatenate(ages["the same product"])
for length, days in reach.items():
    seen = (same <= np.median(days)).mean()
    print(f"of the earlier purchases of a product, the last {length:,} events hold {seen:.0%}")

# %% [markdown]
# An earlier purchase of the very product gets many times its share, whether it was last week or last
# year. Recency is not what matters here, identity is; and most of those purchases lie outside of a short
# window. That is why reading 4,000 events pays, and why they have to be cheap.
#
# Next: [your own log](your_own_log.ipynb), or [TPUs, GPUs and pods](pods.ipynb).
