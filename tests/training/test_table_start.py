"""Tables that start from co-occurrence, whole and divided over devices."""

import numpy as np
import pytest

from stca_jax.config import apply_overrides
from stca_jax.experiment import experiment_program, initial_state
from stca_jax.input.cooccurrence import cooccurrence_rows
from stca_jax.training.table_rows import rows_by_id


@pytest.mark.parametrize("replicated_rows", [0, 4096])
def test_rows_of_seen_ids(replicated_rows, tiny_config, tiny_dataset):
    """Half of an item's square is what it was at random, the whole of a category's is not."""
    of_embedding = "model.embedding."
    config = apply_overrides(
        tiny_config,
        {
            of_embedding + "initialization": "cooccurrence",
            of_embedding + "replicated_rows": str(replicated_rows),
        },
    )
    program = experiment_program(config, tiny_dataset.schema, num_steps=10)
    random, tables = (
        program.initialize().tables,
        initial_state(config, tiny_dataset, program).tables,
    )
    widths = {"item": 8, "category": 16}
    expected = cooccurrence_rows(tiny_dataset, widths, config.seed)

    def by_id(name, table):
        size = tiny_dataset.schema.vocabularies[name]
        return np.asarray(rows_by_id(table, size) if replicated_rows == 0 else table)

    for name, share in (("item", 0.5), ("category", 1.0)):
        known = (expected[name] != 0).any(1)
        before, found = by_id(name, random[name]), by_id(name, tables[name])
        assert known.mean() > 0.5
        np.testing.assert_array_equal(found[~known], before[~known])
        rest = found.shape[1] - widths[name]
        np.testing.assert_allclose(
            found[known, rest:], np.sqrt(share) * expected[name][known], atol=1e-6
        )
        np.testing.assert_allclose(found[known, :rest], before[known, :rest], atol=1e-6)
        assert tables[name].format == random[name].format
