"""What all launchers do alike: help, mistakes, Ctrl-C, progress, and where the results are."""

import dataclasses
import io
import os
import re
import shlex
import signal
import sys
import time

import pytest
from processes import REPOSITORY, run, start_forked

from stca_jax import config as config_lib
from stca_jax.experiments import command_help, launch
from stca_jax.experiments.configs import tiny
from stca_jax.training.loss import Loss

LAUNCHERS = [
    "experiments." + ".".join(path.relative_to(REPOSITORY / "experiments").with_suffix("").parts)
    for path in sorted((REPOSITORY / "experiments").glob("**/*.py"))
    if "launch.run(" in path.read_text() and path.name != "launch.py"
]
TINY = "--config=experiments/configs/tiny.py"


def test_every_program_is_a_launcher():
    """No program has command-line manners of its own."""
    programs = {
        path.stem
        for path in (REPOSITORY / "experiments").glob("**/*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert programs == {name.rpartition(".")[2] for name in LAUNCHERS}
    assert {"train", "prepare", "evaluate", "plan", "report"} <= programs


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help_groups_every_flag(launcher):
    status, output = run(launcher, "--help")
    assert status == 0, output
    source = (REPOSITORY / (launcher.replace(".", "/") + ".py")).read_text()
    shown = re.findall(r"^  --(?:\[no\])?([a-z_]+)", output, re.MULTILINE)
    defined = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", source)
    assert set(defined) | {"data_dir", "debug", "coordinator"} <= set(shown)
    assert len(shown) == len(set(shown))
    headings = re.findall(r"^(\S.*):$", output, re.MULTILINE)
    assert headings[-2:] == ["of all launchers", "several processes"]
    assert max(map(len, output.splitlines())) <= 100


def test_help_shows_every_value_of_a_config_and_what_it_means():
    status, output = run("experiments.train", TINY, "--help")
    assert status == 0, output
    for path in config_lib.flatten(tiny.get_config()):
        assert f"--config.{path}=" in output
    described = " ".join(output.split())
    assert "--config.input.row_length=256 L, tokens of a row." in described
    assert "--config.model.sequence=StcaConfig The sequence module;" in described


@dataclasses.dataclass(frozen=True)
class OwnLoss(Loss):
    """A user's own."""

    name = total_weight = __call__ = None


def test_help_names_own_classes_as_they_are_given_and_lists_their_values():
    values = {"training.auxiliary_losses": f"{__name__}:OwnLoss"}
    config = config_lib.apply_overrides(tiny.get_config(), values)
    shown = " ".join(command_help.describe_config(config, "x").split())
    assert f"--config.training.auxiliary_losses.0={__name__}:OwnLoss A user's own." in shown
    assert "--config.training.auxiliary_losses.0.weight=1.0 What its value is multiplied" in shown


@pytest.mark.parametrize(
    ("launcher", "arguments", "message"),
    [
        ("train", ["--workdi=x"], "there is no flag --workdi; did you mean --workdir?"),
        ("train", [TINY, "--max_step=3"], "did you mean --config.training.max_steps"),
        ("train", [TINY], "--workdir is missing. Directory of the run"),
        ("train", [TINY, "--workdir=x", "y"], "unexpected argument 'y'"),
        ("evaluate", ["--workdir=x", "--split=all"], "one of <train|validation|test>"),
        ("evaluate", ["--workdir=x", "--zzz"], "there is no flag --zzz; --help lists all flags"),
        ("prepare", ["--dataset=movielns"], "did you mean movielens?"),
        ("report", ["--workdir=nowhere", "--output=x.html"], "nowhere holds no run"),
        ("plan", [TINY, "--topolgy=v5e:2x4"], "did you mean --topology?"),
        ("benchmarks.tables", ["--row=1"], "did you mean --rows?"),
    ],
)
def test_mistake_is_one_paragraph(launcher, arguments, message):
    status, output = run(f"experiments.{launcher}", *arguments)
    assert status == 1
    assert output.startswith("error: ")
    assert message in output
    assert output.count("\n") == 1


def required_flags(launcher):
    source = (REPOSITORY / (launcher.replace(".", "/") + ".py")).read_text()
    return re.findall(r'DEFINE_\w+\(\s*"(\w+)",[^)]*required=True', source)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_addresses_of_other_file_systems_are_refused_everywhere(launcher, tmp_path):
    names = [*required_flags(launcher), "data_dir"]
    for name in names:
        given = {n: str(tmp_path / "x") for n in names} | {name: "gs://bucket/x"}
        status, output = run(launcher, *(f"--{n}={value}" for n, value in given.items()))
        assert status == 1
        assert output.startswith(f"error: --{name} 'gs://bucket/x' is not a local path"), output
        assert output.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["s3://b/r", "file:///tmp/r", "hdfs:/r"])
def test_addresses_of_any_kind_are_refused(address):
    status, output = run("experiments.prepare", "--dataset=interaction_log", f"--log={address}")
    assert status == 1
    assert f"--log {address!r} is not a local path" in output


@pytest.mark.parametrize(
    ("launcher", "extra"),
    [("train", []), ("evaluate", []), ("evaluate", ["--watch"]), ("diagnose", []),
     ("report", []), ("length_study", []), ("compare", []), ("export", [])],
)  # fmt: skip
def test_a_work_directory_with_brackets_is_refused_before_it_is_made(launcher, extra, tmp_path):
    workdir = tmp_path / "layers=[64,32]"
    others = {n: f"--{n}={tmp_path / 'x.html'}" for n in required_flags(f"experiments.{launcher}")}
    given = [*(others | {"workdir": f"--workdir={workdir}"}).values(), *extra]
    if launcher in ("train", "length_study", "compare"):
        given.append(TINY)
    status, output = run(f"experiments.{launcher}", *given, "--data_dir=nowhere")
    assert status == 1
    assert f"checkpoints in {str(workdir)!r} could not be read again, because of [ ]" in output
    assert output.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--zzz"], ["--workdir=nowhere"]])
def test_debug_shows_where_a_mistake_was_found(arguments):
    status, output = run("experiments.evaluate", "--debug", *arguments)
    assert status == 1
    assert "Traceback" in output
    assert "UserError: " in output


def test_ctrl_c_says_what_is_left_and_how_to_go_on(tmp_path):
    output = tmp_path / "output"
    output.touch()
    arguments = [f"--workdir={tmp_path / 'a run'}", "--watch"]
    process = start_forked("experiments.evaluate", *arguments, output=str(output))
    deadline = time.monotonic() + 60
    while "waiting for" not in output.read_text():
        assert process.is_alive(), output.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    *_, what, command = output.read_text().splitlines()
    assert what.startswith("interrupted: ")
    assert "all finished rows are kept" in what
    assert shlex.split(command) == ["python", "-m", "experiments.evaluate", *arguments]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_and_nowhere_else(monkeypatch):
    shown = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with launch.working("Compiling"):
            time.sleep(1.5 if stream.isatty() else 0)
        shown[stream.isatty()] = stream.getvalue()
    assert "Compiling: 00:01" in shown[True]
    assert shown[False] == ""
