"""Ranking with long user histories in JAX: STCA, request-level batches, length extrapolation."""

__version__ = "0.1.0"
