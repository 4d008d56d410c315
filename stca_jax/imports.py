"""Code of one's own in a config or on a command line: by import path, or by a registered name.

An installed package registers a name for an import path as an entry point of the group `stca_jax`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

from stca_jax.errors import UserError

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def find_path(text: str) -> str | None:
    """The import path that a text is, or that an installed package registers it for; else None.

    Raises:
      UserError: several packages register it.
    """
    if _PATH.fullmatch(text):
        return text
    paths = registered_names().get(text, ())
    if len(paths) > 1:
        raise UserError(f"{text!r} is registered for {' and '.join(paths)}: name one of them")
    return paths[0] if paths else None


@functools.cache
def registered_names() -> Mapping[str, tuple[str, ...]]:
    """Import paths by the names that installed packages register, in order."""
    found: dict[str, set[str]] = {}
    for point in importlib.metadata.entry_points(group="stca_jax"):
        found.setdefault(point.name, set()).add(point.value.replace(" ", ""))
    return {name: tuple(sorted(paths)) for name, paths in sorted(found.items())}


def import_object(text: str) -> Any:
    """The object that "package.module:name", or a registered name, stands for.

    Args:
      text: As understood by `find_path`. The module is found as by an `import` statement: in the
        working directory of a `python -m` command, among installed packages, or on PYTHONPATH.

    Raises:
      UserError: there is no such module, or nothing of that name in it; says what is near. What the
        module itself raises is passed on as it is.
    """
    path = find_path(text)
    if path is None:
        known = ", ".join(registered_names()) or "none"
        raise UserError(
            f"{text!r} is no import path, written package.module:name, and no installed package "
            f"registers it (registered: {known})"
        )
    module_name, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise UserError(
            f"{path}: there is no module {error.name!r}; install it, or run from the folder that "
            "holds it"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "it has no similar name"
            raise UserError(f"{path}: {module_name} has no {part!r}; {hint}")
        found = getattr(found, part)
    return found


def import_path(cls: type) -> str:
    """The import path of a class.

    Raises:
      UserError: another process could not import it from there.
    """
    path = f"{cls.__module__}:{cls.__qualname__}"
    if cls.__module__ == "__main__" or not _PATH.fullmatch(path) or import_object(path) is not cls:
        raise UserError(
            f"{cls.__qualname__} is defined in {cls.__module__}, from where no other process can "
            "import it; move it into a module of a package, or a file beside the command"
        )
    return path
