"""The distribution: built, installed where there is no checkout, and run from there."""

import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

import stca_jax

REPOSITORY = pathlib.Path(__file__).parents[1]


def run(*command, cwd):
    environment = {**os.environ, "PYTHONPATH": ""}
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def test_citation_is_of_this_version():
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == stca_jax.__version__


def test_notice_names_every_data_set():
    notice = (REPOSITORY / "NOTICE").read_text().replace(" ", "").lower()
    for path in REPOSITORY.glob("data/*/CITATIONS.bib"):
        assert path.parent.name.replace("_", "") in notice


@pytest.mark.slow
def test_built_package_runs_the_tiny_config_outside_of_a_checkout(tmp_path, data_dir):
    dist = tmp_path / "dist"
    run(sys.executable, "-m", "build", "--outdir", dist, REPOSITORY, cwd=tmp_path)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    for needed in ("experiments/configs/tiny.py", "data/movielens/README.md"):
        assert needed in inside
    assert any(name.endswith("licenses/NOTICE") for name in inside)
    with tarfile.open(sdist) as archive:
        assert f"{sdist.name.removesuffix('.tar.gz')}/LICENSE" in archive.getnames()

    # The packages that it needs are those of this environment, but not the checkout beside them.
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text("\n".join(ours))
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-q", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=tmp_path)

    where = run(python, "-c", "import stca_jax; print(stca_jax.__file__)", cwd=tmp_path)
    assert where.startswith(str(site))
    train = (python, "-m", "experiments.train", "--config=experiments/configs/tiny.py")
    output = run(
        *train,
        "--workdir=run",
        f"--data_dir={data_dir}",
        "--config.training.max_steps=2",
        "--config.evaluation.validation_requests=20",
        cwd=tmp_path,
    )
    assert "finished 2 steps" in output
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
