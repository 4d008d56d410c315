"""Launchers: each is run as `python -m experiments.NAME`."""

from stca_jax.extras import require

require("train", "absl", "flax", "grain", "optax", "orbax", "tensorflow_datasets", "tqdm")
