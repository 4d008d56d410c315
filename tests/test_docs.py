"""The pages of docs/: they build, their commands run, and they name what there is."""

import html.parser
import re
import subprocess
import sys
import urllib.parse

import pytest
from test_readme import README, REPOSITORY, run_here

DOCS = REPOSITORY / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
# Run elsewhere: test_docs_extending runs the first. The others are launch recipes of machines that
# are not here, and benchmarks of minutes to hours; their commands' flags are checked below.
NOT_RUN = {"extending", "clusters", "performance", "length", "rivals"}


def code_blocks(page):
    """Language and code of the page's blocks that can be run."""
    return re.findall(r"```(bash|python)\n(.*?)```", PAGES[page], re.DOTALL)


def is_of_readme(command):
    """Whether the README has every line of it, and its tests run them."""
    lines = [line.strip() for line in re.split(r"\n|&&", command) if line.strip()]
    return all(line in README for line in lines)


def commands_in(text):
    """Module and flags of every `python -m`, over continued lines."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return re.findall(r"python -m ((?:experiments|data)\.[a-z_.]+)([^\n`|;&]*)", joined)


def runnable_pages():
    for page in PAGES.keys() - NOT_RUN:
        if any(not is_of_readme(code) for _, code in code_blocks(page)):
            yield pytest.param(page, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("page", sorted(runnable_pages(), key=lambda p: p.values[0]))
def test_code_of_page_runs(page, tmp_path, data_dir):
    for language, code in code_blocks(page):
        if language == "python":
            exec(compile(code.replace("/tmp/stca", str(tmp_path)), page, "exec"), {})
        elif not is_of_readme(code):
            run_here(code, tmp_path, data_dir)


class Links(html.parser.HTMLParser):
    """Addresses and ids of a page."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.addresses += [attributes[n] for n in ("href", "src") if attributes.get(n)]


def test_site_builds_and_every_link_leads_somewhere(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "hidden_width" in (tmp_path / "config" / "index.html").read_text()
    pages = {path: Links(path.read_text()) for path in tmp_path.rglob("*.html")}
    for path, page in pages.items():
        if path.name == "404.html":  # served at any address, and so with absolute ones
            continue
        for address in page.addresses:
            url = urllib.parse.urlsplit(address)
            if url.scheme or not (url.path or url.fragment):
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve()
            target = path if not url.path else target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path}: {address}"
            if url.fragment and target in pages:
                assert url.fragment in pages[target].ids, f"{path}: {address}"
    # A page leads to the repository's files, and these lead back.
    clusters = pages[tmp_path / "clusters" / "index.html"].addresses
    test = "repository/tests/experiments/test_multiprocess.py"
    assert f"../{test}/" in clusters
    assert "def start_job" in re.sub(r"<[^>]*>", "", (tmp_path / test / "index.html").read_text())
    assert "../docs/performance.md" not in clusters
    readme = pages[tmp_path / "repository" / "index.html"].addresses
    assert "../performance/" in readme


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_flags_that_exist(page):
    launcher = (REPOSITORY / "experiments" / "launch.py").read_text()
    log_options = (REPOSITORY / "data" / "interaction_log" / "log_config.py").read_text()
    for module, arguments in commands_in(PAGES[page]):
        file = REPOSITORY / (module.replace(".", "/") + ".py")
        source = launcher + file.read_text()
        known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) | {"config", "help"}
        if module == "experiments.prepare":
            known |= set(re.findall(r"^    (\w+):", log_options, re.MULTILINE)) | {"log"}
        for flag in re.findall(r"--(\w+)", arguments):
            assert {flag, flag.removeprefix("no")} & known, f"{module} has no --{flag}"


def test_flags_page_has_every_flag():
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGES["flags"], re.M | re.S))
    for name, section in sections.items():
        file = {"All": "launch"}.get(name, name)
        source = (REPOSITORY / "experiments" / f"{file}.py").read_text()
        for flag in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source):
            assert re.search(rf"--(no)?{flag}\b", section), f"{name}: --{flag}"


def test_architecture_says_what_to_touch():
    """Three files at most for each change, which hold what is said to be there."""
    rows = re.findall(r"^\| (?:the|a) .*\|$", PAGES["architecture"], re.MULTILINE)
    assert len(rows) == 3
    for row in rows:
        names = re.findall(r"`([\w./]+)`", row)
        files = {name for name in names if name.endswith(".py")}
        assert 1 <= len(files) <= 3
        source = "".join((REPOSITORY / "stca_jax" / name).read_text() for name in files)
        for name in names:
            if "." not in name:
                assert re.search(rf"^(class|def) {name}\b", source, re.MULTILINE), name


def test_metrics_page_has_every_column():
    from stca_jax.evaluation.metrics import METRICS

    for name in METRICS:
        assert f"`{name}`" in PAGES["metrics"]


def test_resume_page_has_every_field_that_may_change():
    from stca_jax.experiment import FREE_TO_CHANGE

    (listed,) = re.findall(r"^(`checkpoint.*(?:\n`.*)*)", PAGES["resume"], re.MULTILINE)
    assert set(re.findall(r"`([\w.]+?)\*?`", listed)) == set(FREE_TO_CHANGE)
