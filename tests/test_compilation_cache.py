"""What one process compiled the next one finds."""

import pathlib

import jax
import pytest

from stca_jax.compilation_cache import keep_programs


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Sets the cache as a fresh process would, and leaves it as it was."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield lambda: pathlib.Path(jax.config.jax_compilation_cache_dir)
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache(cached, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    keep_programs()
    folder = cached()
    assert folder.parent == tmp_path / "stca_jax" / "compilations"
    keep_programs()
    assert cached() == folder  # the next process finds them


@pytest.mark.parametrize("given", ["", "/elsewhere"])
def test_the_variable_of_jax_goes_first(cached, monkeypatch, given):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    before = cached()
    keep_programs()
    assert cached() == before
