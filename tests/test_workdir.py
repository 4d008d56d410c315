"""The working directory of a run: what may change in it, and what must not."""

import json
import logging

import pytest

from stca_jax.config import apply_overrides
from stca_jax.errors import UserError
from stca_jax.workdir import check_path, check_workdir, load_workdir_config, save_config


@pytest.mark.parametrize(
    ("name", "value", "is_free"),
    [
        ("training.accumulate_steps", 4, True),
        ("model.remat", "all", True),
        ("profile.steps", "3:5", True),
        ("input.num_threads", 3, True),
        ("input.prefetch", 5, True),
        ("mesh.model", 2, True),
        ("checkpoint.keep_last", 7, True),
        ("evaluation.validation_length", 7, True),
        ("training.ema_decay", 0.9, False),
        ("optimizer.learning_rate", 0.5, False),
        ("optimizer.weight_decay", 0.5, False),
        ("input.seed", 7, False),
        ("training.on_divergence", "skip", False),
    ],
)
def test_what_does_not_change_the_learning_may_change(tiny_config, tmp_path, name, value, is_free):
    save_config(tmp_path, tiny_config)
    changed = apply_overrides(tiny_config, {name: value})
    check_workdir(tmp_path, changed)  # there is no checkpoint yet, and nothing to spoil
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    if is_free:
        check_workdir(tmp_path, changed)
    else:
        with pytest.raises(UserError, match=name):
            check_workdir(tmp_path, changed)


def test_config_of_an_older_version_is_read_and_said_so(tiny_config, tmp_path, caplog):
    save_config(tmp_path, tiny_config)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    del data["mesh"]["dcn_data"]
    path.write_text(json.dumps(data))
    with caplog.at_level(logging.INFO, "stca_jax"):
        assert load_workdir_config(tmp_path) == tiny_config
    assert [r.message for r in caplog.records] == [
        f"{path} is of an older version; taken as before: mesh.dcn_data=-1"
    ]
    save_config(tmp_path, tiny_config)
    assert json.loads(path.read_text())["mesh"]["dcn_data"] == -1
    path.write_text(json.dumps(data | {"gone": 1}))
    with pytest.raises(UserError, match="has no field 'gone'"):
        load_workdir_config(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/run", "not a local path"),
        ("", "is empty"),
        ("~no-such-user/run", "no such user; write ./~no-such-user/run"),
        ("s3:/bucket/run", "not a local path"),
        ("/tmp/run[1]", r"because of \[ \]"),
        ("/tmp/a*b", r"because of \*"),
        ("/tmp/what?", r"because of \?"),
        ("/tmp/a\\b", "because of"),
        ("/tmp/\udcff", "not valid Unicode"),
        ("/tmp/" + "long/" * 800, "at most 3696"),
    ],
)
def test_path_that_cannot_hold_checkpoints_is_refused(path, message):
    with pytest.raises(UserError, match=message):
        check_path(path)


def test_other_characters_are_taken(tmp_path):
    for name in ("a {b} %20 #c", "ünï日本", "a\nb", "a:b", "it's", "$HOME"):
        assert check_path(tmp_path / name) == tmp_path / name
