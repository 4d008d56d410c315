"""Layers point one way, and files and functions stay small: read from the source, nothing runs."""

import ast
import pathlib
import re

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
FOLDERS = ("stca_jax", "experiments", "data")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (REPOSITORY / folder).rglob("*.py")
    if "notebooks" not in path.parts  # read from top to bottom, in cells
    and not any(parent.is_symlink() for parent in path.parents)  # data and experiments, again
)
ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text()
# The drawing, from the bottom up; what a layer imports lies in it or below.
(DRAWING,) = re.findall(r"^Imports point down.*\n\n((?:    .*\n)+)", ARCHITECTURE, re.MULTILINE)
LAYERS = [line.split() for line in reversed(DRAWING.splitlines())]
LAYER = {name: k for k, names in enumerate(LAYERS) for name in names}
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 80, 8


def module_of(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "stca_jax" else ("stca_jax", *parts))


MODULES = {module_of(path): path for path in FILES}


def imports(path):
    """Modules of ours that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


def layer(module):
    _, *rest = module.split(".")
    return LAYER[rest[0]] if rest else 0


def test_the_drawing_and_the_layout_have_every_part():
    parts = {module.split(".")[1] for module in MODULES if "." in module}
    assert parts == LAYER.keys()
    (layout,) = re.findall(r"^## Layout\n\n((?:    .*\n)+)", ARCHITECTURE, re.MULTILINE)
    assert parts <= set(re.findall(r"\w+", layout))


def test_imports_point_down():
    upward = [
        f"{module} -> {imported}"
        for module, path in MODULES.items()
        for imported in imports(path)
        if layer(imported) > layer(module)
    ]
    assert upward == []


def test_imports_make_no_ring():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    while leaves := [module for module, below in graph.items() if not below & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}


# What is larger, and why.
EXCEPTIONS = {
    **{
        f"stca_jax/ops/{name}": "a Pallas kernel is given one reference per array"
        for name in (
            "encoder_triton.py::_token_kernel",
            "encoder_triton.py::_weight_kernel",
        )
    },
    "experiments/benchmarks/sequence_modules.py::torch_steps": "PyTorch's side of a comparison",
}


def offenders():
    for path in FILES:
        name = str(path.relative_to(REPOSITORY))
        text = path.read_text()
        if (size := len(text.splitlines())) > MAX_LINES:
            yield name, f"{size} lines"
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            a = node.args
            own = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            count = len([p for p in own if p not in ("self", "cls")])
            lines = node.end_lineno - node.lineno + 1
            if count > MAX_PARAMETERS or lines > MAX_FUNCTION_LINES:
                yield f"{name}::{node.name}", f"{count} parameters, {lines} lines"


OFFENDERS = dict(offenders())


@pytest.mark.parametrize("name", sorted(OFFENDERS.keys() | EXCEPTIONS.keys()))
def test_files_and_functions_are_small(name):
    assert name in EXCEPTIONS, f"{name} has {OFFENDERS[name]}: divide it, or say why not"
    assert name in OFFENDERS, f"{name} is small now: remove its exception"
