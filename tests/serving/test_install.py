"""The small installation: what serving imports, and what is said where the rest is missing."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from stca_jax import extras

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
OF_JAX = {"scipy"}  # jax itself brings it
SERVED = """
import sys
import stca_jax.serving.__main__, stca_jax.serving.redis_histories
import stca_jax.serving.server.front, stca_jax.serving.server.running
print(*{name.partition(".")[0] for name in sys.modules})
"""


def modules_of(requirements):
    """Top-level modules of distributions."""
    names = {re.match(r"[\w-]+", r)[0].lower().replace("_", "-") for r in requirements}
    return {
        module
        for module, distributions in metadata.packages_distributions().items()
        if {d.lower().replace("_", "-") for d in distributions} & names
    }


def test_serving_imports_nothing_of_training():
    done = subprocess.run([sys.executable, "-c", SERVED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    training = modules_of(set(PROJECT["optional-dependencies"]["train"])) - OF_JAX
    assert {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "absl"} <= training
    assert not imported & training
    assert {"jax", "numpy", "safetensors", "flatbuffers", "starlette", "uvicorn"} <= imported


def test_what_is_missing_is_said_with_the_command(monkeypatch):
    extras.require("train", "json")
    sentence = r'needs no_such_module, not installed: pip install -e "\.\[train\]"'
    with pytest.raises(ModuleNotFoundError, match=sentence):
        extras.require("train", "json", "no_such_module")
    monkeypatch.setattr(sys, "argv", ["-m"])
    with pytest.raises(SystemExit, match=sentence):
        extras.require("train", "json", "no_such_module")
