"""What is said where a part of the installation is missing."""

import sys

import pytest

from stca_jax import extras


def test_what_is_missing_is_said_with_the_command(monkeypatch):
    extras.require("train", "json")
    sentence = r'needs no_such_module, not installed: pip install -e "\.\[train\]"'
    with pytest.raises(ModuleNotFoundError, match=sentence):
        extras.require("train", "json", "no_such_module")
    monkeypatch.setattr(sys, "argv", ["-m"])
    with pytest.raises(SystemExit, match=sentence):
        extras.require("train", "json", "no_such_module")
