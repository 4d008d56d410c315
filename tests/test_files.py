"""Files are whole or not there."""

import json

import pytest

from stca_jax.files import replacing, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "best.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    with pytest.raises(TypeError), replacing(path) as file:
        file.write("text, not bytes")
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
