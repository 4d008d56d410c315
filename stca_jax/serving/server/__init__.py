"""HTTP in front of a `Scorer`: `python -m stca_jax.serving` runs it."""
