"""A configuration as the Python file that makes it, to be read and edited."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from stca_jax.config_form import is_config

_WIDTH = 100


def python_source(config: Any, docstring: str) -> str:
    """A file with a `get_config` that returns an equal config; values by default are left out.

    Args:
      config: A dataclass of dataclasses, numbers, texts and tuples.
      docstring: Of the file.
    """
    classes: set[type] = set()
    expression = _expression(config, 4, classes)
    imports = "\n".join(
        f"from {cls.__module__} import {cls.__qualname__}"
        for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__))
    )
    return f'''"""{docstring}"""

{imports}


def get_config() -> {type(config).__qualname__}:
    """Returns the experiment."""
    return {expression}
'''


def _expression(value: Any, indent: int, classes: set[type]) -> str:
    """The constructor's call, on one line if it fits."""
    if not is_config(value):
        return json.dumps(value) if isinstance(value, str) else repr(value)
    classes.add(type(value))
    space = " " * (indent + 4)
    arguments = [
        f"{field.name}={_expression(getattr(value, field.name), indent + 4, classes)}"
        for field in dataclasses.fields(value)
        if field.init and not _is_default(field, getattr(value, field.name))
    ]
    name = type(value).__qualname__
    on_one_line = f"{name}({', '.join(arguments)})"
    if "\n" not in on_one_line and indent + len(on_one_line) < _WIDTH - 24:  # and `field=`, `,`
        return on_one_line
    lines = "".join(f"{space}{argument},\n" for argument in arguments)
    return f"{name}(\n{lines}{' ' * indent})"


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return field.default is not dataclasses.MISSING and bool(value == field.default)
