"""The distribution: built, installed where there is no checkout, and run from there."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import tomllib
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


# What a user's own folder may hold: packages of the same names, which only the user imports.
OWN = {
    "data/__init__.py": "OWN = True",
    "experiments/__init__.py": "raise AssertionError('imported by stca_jax')",
    "test_own.py": """
        import data
        import stca_jax.data.base
        import stca_jax.experiments.launch

        def test_both_are_there():
            assert data.OWN
            assert stca_jax.data.base.UserData
        """,
    "typed.py": """
        from stca_jax.data.running import beam_runner
        from stca_jax.experiments.command_help import attribute_descriptions
        from stca_jax.schema import Schema

        reveal_type(Schema.select)
        reveal_type(beam_runner)
        reveal_type(attribute_descriptions)
        """,
    # A type checker need not read the libraries, which takes half a minute.
    "mypy.ini": """
        [mypy]
        ignore_missing_imports = True
        [mypy-absl.*,apache_beam.*,flax.*,grain.*,jax.*,numpy.*,optax.*,tensorflow_datasets.*]
        follow_imports = skip
        follow_imports_for_stubs = True
        """,
    "log.csv": "user,item,time\n"
    + "".join(f"{i % 7},{i % 5},{1_700_000_000 + 60 * i}\n" for i in range(200)),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder of a user's."""
    folder = tmp_path_factory.mktemp("project")
    for name, text in OWN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, made from the sdist."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", dist, REPOSITORY, cwd=dist)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        assert f"{sdist.name.removesuffix('.tar.gz')}/LICENSE" in archive.getnames()
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of this checkout, links and all: an installation writes into it."""
    copy = tmp_path_factory.mktemp("checkout") / "stca_jax"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in filter(None, files.decode().split("\0")):
        if (REPOSITORY / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name, follow_symlinks=False)
    return copy


def install(folder, *what):
    """A Python with the packages of this environment, but not the checkout beside them."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text("\n".join(ours))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps")
    run(*pip, "--ignore-installed", *what, cwd=folder.parent)
    return python


def test_the_wheel_holds_one_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    assert {name.partition("/")[0] for name in inside} == {
        "stca_jax",
        f"stca_jax-{stca_jax.__version__}.dist-info",
    }
    for needed in ("experiments/configs/tiny.py", "data/movielens/README.md", "py.typed"):
        assert f"stca_jax/{needed}" in inside
    assert any(name.endswith("licenses/NOTICE") for name in inside)


@pytest.mark.slow
def test_wheel_works_beside_packages_of_the_same_names(tmp_path, project, wheel):
    python = install(tmp_path / "environment", wheel)
    where = run(python, "-c", "import stca_jax; print(stca_jax.__file__)", cwd=project)
    assert where.startswith(str(tmp_path / "environment"))
    assert "1 passed" in run(python, "-m", "pytest", "test_own.py", cwd=project)
    check_types(python, project)
    check_beam(python, project)
    check_extensions(python, project, tmp_path)
    check_registered_names(python, project, tmp_path)


@pytest.mark.slow
def test_editable_installation_works_beside_packages_of_the_same_names(tmp_path, project, checkout):
    python = install(tmp_path / "environment", "-e", checkout)
    where = run(python, "-c", "import stca_jax.data; print(stca_jax.data.__file__)", cwd=project)
    assert where.startswith(str(checkout))
    assert "1 passed" in run(python, "-m", "pytest", "test_own.py", cwd=project)
    # Type checkers follow no import hook: for them, as setuptools says, it has to be strict.
    strict = ("-C", "editable_mode=strict")
    check_types(install(tmp_path / "strict", *strict, "-e", checkout), project)


def check_beam(python, project):
    """Beam's workers, processes of their own, import the right packages."""
    prepare = (python, "-m", "stca_jax.experiments.prepare", "--dataset=interaction_log")
    columns = ("--user_id=user", "--item_id=item", "--timestamp=time", "--min_count=1")
    beam = ("--runner=DirectRunner", "--direct_running_mode=multi_processing")
    run(
        *prepare,
        *columns,
        "--name=mine",
        "--log=log.csv",
        "--data_dir=prepared",
        *(f"--beam={option}" for option in (*beam, "--direct_num_workers=2")),
        cwd=project,
    )


def check_types(python, project):
    """A type checker sees the annotations of all packages."""
    shown = run(python, "-m", "mypy", "typed.py", cwd=project)
    assert "def (self: stca_jax.schema.Schema, features: typing.Collection[str]" in shown
    assert "def (options: typing.Sequence[str])" in shown
    assert "def (cls: type) -> dict[str, str]" in shown


def check_extensions(python, project, tmp_path):
    """docs/extending.md, followed to the letter: a package of a user's beside the installed one."""
    page = (REPOSITORY / "docs" / "extending.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        file = project / code.splitlines()[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    (commands,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = commands.replace("/tmp/stca", str(tmp_path))
    commands = re.sub(
        r"python (-m stca_jax\S+)", rf"{python} \1 --data_dir={tmp_path}/data", commands
    )
    run("bash", "-euo", "pipefail", "-c", commands, cwd=project)
    (table,) = (tmp_path / "cafe" / "evaluation").glob("test-*.csv")
    with table.open() as file:
        rows = {(r["model"], r["task"], r["length"]): r for r in csv.DictReader(file)}
    assert float(rows["stca", "buy", "128"]["precision_at_1"]) > 0
    assert float(rows["stca", "click", "128"]["auc"]) > 0.5
    lines = (tmp_path / "cafe" / "metrics.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("train/loss/logit_penalty", 0) > 0 for line in lines)


def check_registered_names(python, project, tmp_path):
    """The package of docs/extending.md as a wheel: its names work where its folder is not."""
    page = (REPOSITORY / "docs" / "extending.md").read_text()
    (settings,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(project / "my_ranking", source / "my_ranking")
    (source / "pyproject.toml").write_text(settings)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps")
    run(*pip, source, cwd=elsewhere)
    code = """
        import pathlib
        from stca_jax import config
        from stca_jax.data.preparation import make_builder
        from stca_jax.evaluation.metrics import own_metrics
        from stca_jax.experiments.configs import tiny

        values = {"model.sequence": "mean_pooling", "model.sequence.width": "16",
                  "training.auxiliary_losses": "logit_penalty"}
        found = config.apply_overrides(tiny.get_config(), values)
        print(found.model.sequence, found.training.auxiliary_losses)
        print(type(make_builder("cafe", pathlib.Path("data"))), own_metrics(["precision_at_1"]))
        """
    shown = run(python, "-c", textwrap.dedent(code), cwd=elsewhere)
    for name in ("MeanPoolingConfig(width=16", "LogitPenalty(", "Cafe'> {'precision_at_1': <"):
        assert name in shown


@pytest.mark.exhaustive  # installs JAX twice
def test_an_installation_for_serving_is_small(tmp_path):
    said = run(sys.executable, "-m", "experiments.benchmarks.install_size", cwd=REPOSITORY)
    jax, beyond = re.search(r"jax (\d+) MB; \[serving\] (\d+) MB beyond it", said).groups()
    assert int(jax) > 200
    assert int(beyond) <= 120


def test_messages_name_extras_that_there_are():
    """As `pip install -e ".[logs]"`, the one way that docs and messages tell."""
    known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    files = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "mkdocs.yml"]
    for folder in ("stca_jax", "experiments", "data"):
        files += [*(REPOSITORY / folder).rglob("*.py"), *(REPOSITORY / folder).rglob("README.md")]
    found = 0
    for file in files:
        for quoted, extras in re.findall(
            r"pip install -e (\S*\.\[([\w,-]+)\]\S*)", file.read_text()
        ):
            found += 1
            assert quoted.startswith('".['), f"{file}: {quoted}"
            assert set(extras.split(",")) <= known["optional-dependencies"].keys(), file
    assert found > 10
