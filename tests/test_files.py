"""Files are whole or not there."""

import json
import pathlib

import pytest

from stca_jax.files import cache_dir, replacing, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "best.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    with pytest.raises(TypeError), replacing(path) as file:
        file.write("text, not bytes")
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_can_be_made_again_lies_in_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert cache_dir() == pathlib.Path("/some/cache/stca_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir() == pathlib.Path("/home/someone/.cache/stca_jax")
