"""Objects by import path: how code of one's own is named in a config or on a command line."""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any

from stca_jax.errors import UserError

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_import_path(text: str) -> bool:
    """Whether a text reads "package.module:name"."""
    return _PATH.fullmatch(text) is not None


def import_object(path: str) -> Any:
    """The object that "package.module:name" names.

    Args:
      path: As checked by `is_import_path`. The module is found as by an `import` statement: in the
        working directory of a `python -m` command, among installed packages, or on PYTHONPATH.

    Raises:
      UserError: there is no such module, or nothing of that name in it; says what is near. What the
        module itself raises is passed on as it is.
    """
    if not is_import_path(path):
        raise UserError(f"{path!r} is no import path; write it as package.module:name")
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
    if cls.__module__ == "__main__" or not is_import_path(path) or import_object(path) is not cls:
        raise UserError(
            f"{cls.__qualname__} is defined in {cls.__module__}, from where no other process can "
            "import it; move it into a module of a package, or a file beside the command"
        )
    return path
