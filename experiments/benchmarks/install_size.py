"""What an installation for serving alone takes on disk, beyond JAX.

    python -m experiments.benchmarks.install_size [--extra=serving]

Installs jax into one new virtual environment, and this checkout with the extra into another, with
pip and without bytecode, and prints what each takes, and the largest packages of the difference.
"""

from __future__ import annotations

import pathlib
import platform
import subprocess
import tempfile
import venv

from absl import flags

from stca_jax.evaluation.tables import format_table
from stca_jax.experiments import launch

_EXTRA = flags.DEFINE_string("extra", "serving", "Extra that is installed.")
_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_SHOWN = 12  # packages


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        jax = installed_sizes(pathlib.Path(folder) / "jax", "jax")
        serving = installed_sizes(
            pathlib.Path(folder) / "serving", f"{_REPOSITORY}[{_EXTRA.value}]"
        )
    beyond = {name: size - jax.get(name, 0) for name, size in serving.items()}
    largest = sorted(beyond, key=beyond.__getitem__, reverse=True)[:_SHOWN]
    rows = [{"installed": name, "MB": round(beyond[name] / 1e6, 1)} for name in largest]
    print(format_table(rows))
    print(
        f"Python {platform.python_version()}: jax {sum(jax.values()) / 1e6:.0f} MB; "
        f"[{_EXTRA.value}] {sum(beyond.values()) / 1e6:.0f} MB beyond it"
    )


def installed_sizes(environment: pathlib.Path, requirement: str) -> dict[str, int]:
    """Bytes of each top-level entry of site-packages, without pip itself."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    constraints = _REPOSITORY / "constraints.txt"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-compile", "-c", constraints, requirement],
        check=True,
    )
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "setuptools", "pip"], check=True)
    (packages,) = (environment / "lib").glob("python3*/site-packages")
    return {
        entry.name: sum(f.lstat().st_size for f in [entry, *entry.rglob("*")] if f.is_file())
        for entry in packages.iterdir()
    }


if __name__ == "__main__":
    launch.run(main)
