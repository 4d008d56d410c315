"""What only a newer Python's JAX can tell, where there is such a Python."""

import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="this Python has the newest JAX itself")
def test_kernels_under_the_newest_jax(tmp_path):
    """Its interpreter sees races that this one's does not, and its compilers are others."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["STCA_PYTHONS"] = str(tmp_path)
    ops = REPOSITORY / "tests" / "ops"
    files = [ops / "test_pallas_mosaic_gpu.py", ops / "test_compile_gpu.py"]
    for version in ("3.14", "3.13", "3.12"):
        run = subprocess.run(
            [REPOSITORY / ".ci" / "pythons", "-q", "-rs", *files, "-k", "mosaic"],
            cwd=REPOSITORY, env=environment | {"STCA_PYTHON_VERSIONS": version},
            capture_output=True, text=True,
        )  # fmt: skip
        if "not on PATH" not in run.stderr:
            break
    else:
        pytest.skip("no Python 3.12, 3.13 or 3.14 on PATH, nor of pyenv")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "sees races" not in run.stdout  # none of them was skipped for an old interpreter
    assert f"Python {version}: passed" in run.stdout
