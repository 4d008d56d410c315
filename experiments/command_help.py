"""What --help prints: flags in groups, and every value of a config with what it means."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from absl import flags

from stca_jax.imports import import_path

_WIDTH = 100
_INDENT = 30


def attribute_descriptions(cls: type) -> dict[str, str]:
    """The Attributes sections of the docstrings of a class and of its bases, by attribute."""
    described: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE)
        described |= {name: " ".join(text.split()) for name, text in entries}
    return described


def describe_flags(groups: Mapping[str, Collection[str]]) -> str:
    """All flags under the headings of their groups.

    Args:
      groups: Names of flags by heading.
    """
    lines: list[str] = []
    for heading, names in groups.items():
        lines += ["", f"{heading}:"]
        for name in names:
            lines += _flag(flags.FLAGS[name])
    return "\n".join(lines)


def describe_config(config: Any, path: str) -> str:
    """Every value of a config as the command line takes it, under the dataclass that holds it.

    Args:
      config: A dataclass.
      path: The file that it is from.
    """
    lines = ["", f"values of {path}:", *_values(config, "config")]
    return "\n".join(lines)


def _flag(flag: flags.Flag) -> Iterator[str]:
    """One flag, its values, its meaning and its default."""
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={_kind(flag)}"
    default = ""
    if flag.boolean:
        default = " (on by default)" if flag.default else ""
    elif flag.default not in (None, "", []):
        default = f" (default: {_argument(flag.default)})"
    # absl adds words of its own: "<a|b>: ", and "; repeat this option …".
    text, repeated, _ = str(flag.help).partition(";\n    repeat this option")
    text = re.sub(r"^<[^>]*>: ", "", text)
    yield from _entry(name, f"{text}{' Repeat it for several.' if repeated else ''}{default}")


def _kind(flag: flags.Flag) -> str:
    if values := getattr(flag.parser, "enum_values", None):
        return "|".join(values)
    return {"int": "N", "float": "NUMBER"}.get(flag.flag_type(), "…")


def _values(config: Any, path: str) -> Iterator[str]:
    """The plain values of a dataclass, then those of the dataclasses in it."""
    described = attribute_descriptions(type(config))
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    parts = {}
    for name, value in fields.items():
        if dataclasses.is_dataclass(value):
            parts[name] = value
            continue
        yield from _entry(f"--{path}.{name}={_argument(value)}", described.get(name, ""))
        if isinstance(value, tuple):
            parts |= {f"{name}.{i}": x for i, x in enumerate(value) if dataclasses.is_dataclass(x)}
    for name, value in parts.items():
        yield ""
        text = described.get(name) or _summary(type(value))
        yield from _entry(f"--{path}.{name}={_argument(value)}", text, indent=0)
        yield from _values(value, f"{path}.{name}")


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _argument(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(_argument, value))
    if dataclasses.is_dataclass(value):  # by its name, or its path if it is a user's own
        cls = type(value)
        return cls.__name__ if cls.__module__.startswith("stca_jax.") else import_path(cls)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _entry(name: str, text: str, indent: int = 2) -> Iterator[str]:
    """A name and a text, side by side where the name is short."""
    first = " " * indent + name
    lines = textwrap.wrap(text, _WIDTH - _INDENT)
    if lines and len(first) <= _INDENT - 2:
        first += " " * (_INDENT - len(first)) + lines.pop(0)
    yield first
    yield from (" " * _INDENT + line for line in lines)
