"""docs/extending.md, followed to the letter in a copy of the project."""

import csv
import re
import shutil

import pytest
from test_readme import REPOSITORY, run_here

PAGE = (REPOSITORY / "docs" / "extending.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def apply(project, diff):
    header, *lines = diff.splitlines(keepends=True)
    file = project / header.removeprefix("--- ").strip()
    old, new = ("".join(x[1:] for x in lines if x[0] in kept) for kept in (" -", " +"))
    text = file.read_text()
    assert text.count(old) == 1, f"{header.strip()} has no such lines, or several: {old}"
    file.write_text(text.replace(old, new))


@pytest.mark.slow
def test_every_extension_works(tmp_path):
    project = tmp_path / "project"
    for package in ("stca_jax", "experiments", "data"):
        shutil.copytree(REPOSITORY / package, project / package)
    for code in blocks("python"):
        file = project / code.splitlines()[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        assert not file.exists()
        file.write_text(code)
    for diff in blocks("diff"):
        apply(project, diff)
    (commands,) = blocks("bash")
    run_here(commands, tmp_path, tmp_path / "data", cwd=project)
    (table,) = (tmp_path / "cafe" / "evaluation").glob("test-*.csv")
    with table.open() as file:
        rows = {(r["model"], r["task"], r["length"]): r for r in csv.DictReader(file)}
    assert float(rows["stca", "buy", "128"]["precision_at_1"]) > 0
    assert float(rows["stca", "click", "128"]["auc"]) > 0.5
