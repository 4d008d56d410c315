from __future__ import annotations

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_replaces_stands_once_and_its_test_exists(mutant):
    """The mutants themselves take half an hour, so that nobody would notice soon."""
    text = (mutants.REPOSITORY / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    assert mutant.new != mutant.old
    file, _, name = mutant.test.partition("::")
    tests = (mutants.REPOSITORY / file).read_text()
    assert f"def {name.partition('[')[0]}(" in tests
