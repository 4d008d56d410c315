"""Experiment configuration: nested, typed, frozen dataclasses, and nothing else.

A config file is Python that defines `get_config()` and returns such a dataclass. A field holds an
`int`, `float`, `bool`, `str`, a `Literal[...]` choice, another dataclass, a `tuple[...]` of these,
or a union of these (`float | None`, `StcaConfig | DinConfig`). Every field can be set on the
command line:

    train.py --config=configs/base.py --config.model.num_layers=4 --config.eval.lengths=512,2048 \
        --config.model.sequence=DinConfig --config.model.sequence.units=64 --config.wandb=none

A launcher separates these flags from its own:

    config_path, overrides, argv = config.parse_config_args(sys.argv)
    app.run(lambda _: train(config.load_config(config_path, overrides)), argv=argv)

There is one strict path into a configuration. Python values, overrides and saved files all become
the JSON form of `to_dict`, and `from_dict` checks that against the annotations. So the overrides
of one call act together: a `__post_init__` sees only the final values.
"""

import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stca_jax.config_form import (
    ConfigError,
    assign,
    decode,
    encode,
    fill,
    is_config,
    leaves,
    nearest,
)

T = TypeVar("T")


def load_config(path: str | None, overrides: Mapping[str, Any] | None = None) -> Any:
    """Runs a config file's `get_config()`, applies the overrides and checks the result.

    Args:
      path: Python file that defines `get_config()`. None, which `parse_config_args` gives when the
        command line names no file, is an error.
      overrides: as for `apply_overrides`.

    Returns:
      The dataclass that `get_config()` returned, with the overrides applied.

    Raises:
      ConfigError: no such file, no `get_config`, a result that is no valid configuration, or a
        wrong override. What the file itself raises is passed on as it is.
    """
    if path is None:
        raise ConfigError("no configuration was given: name its file with --config=FILE.py")
    file = Path(path)
    if not file.is_file():
        others = {str(f): f.stem for f in sorted(file.parent.glob("*.py"))}
        near = nearest(file.stem, others, otherwise=f"{file.parent} has no file of a similar name")
        raise ConfigError(f"--config={path}: no such file; {near}")
    # Registered by name, since annotations written as strings are looked up in sys.modules. Not
    # imported: a cached .pyc is stale when a sweep rewrites the file twice within a second.
    module = types.ModuleType(f"config file {file.resolve()}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), module.__dict__)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"--config={path}: define get_config(), which returns the configuration")
    config = module.get_config()
    if not is_config(config):
        raise ConfigError(f"--config={path}: get_config() returned {config!r}, not a dataclass")
    return apply_overrides(config, overrides or {})


def parse_config_args(argv: Sequence[str]) -> tuple[str | None, dict[str, str], list[str]]:
    """Separates the `--config` flags from the other arguments of a command line.

    `--config=FILE` names the file and `--config.a.b=VALUE` overrides a field; a space may stand for
    `=`. An override followed by another `--flag`, or by nothing, means `true`. The last value of a
    repeated override holds. Arguments after a bare `--` are left alone.

    Args:
      argv: the command line, program name included.

    Returns:
      The config file (None if not given), the overrides by dotted path, and the other arguments.

    Raises:
      ConfigError: `--config` names no file or two files.
    """
    path: str | None = None
    overrides: dict[str, str] = {}
    rest: list[str] = []
    pending = list(argv)
    while pending and pending[0] != "--":
        flag = re.fullmatch(r"--config(?:\.([^=]*))?(?:=(.*))?", pending[0], re.DOTALL)
        if flag is None:
            rest.append(pending.pop(0))
            continue
        pending.pop(0)
        name, value = flag.groups()
        if value is None and pending and not pending[0].startswith("--"):
            value = pending.pop(0)
        if name is not None:
            overrides[name] = "true" if value is None else value
        elif not value or path is not None:
            raise ConfigError(f"give one file, --config=FILE.py; got {path!r} and {value!r}")
        else:
            path = value
    return path, overrides, rest + pending


def apply_overrides(config: T, overrides: Mapping[str, Any]) -> T:
    """Returns a checked copy of a configuration with some fields set, all of them at once.

    Text is read as the field's annotation says: `1_000`, `1e-3`, `true` or `false`, `none`, `1,2,3`
    for a tuple. A dataclass's name selects it with its default values, or changes nothing where
    that class already stands. `a.0.b` is a field of a tuple's first element.

    Args:
      config: a frozen dataclass.
      overrides: text (or a Python value, taken as it is) by dotted path: {"model.num_layers": "4"}.

    Raises:
      ConfigError: an unknown path, a value of another type, or a failing `__post_init__`.
    """
    validate(config)
    data = to_dict(config)
    # Shallow paths first: a class must be chosen before its fields are set.
    for path, value in sorted(overrides.items(), key=lambda item: item[0].count(".")):
        data = assign(data, type(config), path.split("."), value, "config")
    return from_dict(type(config), data)


def validate(config: Any) -> None:
    """Checks every value of a configuration against its annotation; NaN is none of any.

    Raises:
      ConfigError: names the first wrong value, its path and the expected type.
    """
    from_dict(type(config), to_dict(config))


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the JSON form: dataclasses are dicts whose "type" is the class's name, tuples lists.

    Raises:
      ConfigError: `config` is no dataclass or holds a value that a configuration cannot hold.
    """
    if not is_config(config):
        raise ConfigError(f"config: expected an instance of a dataclass, got {config!r}")
    return encode(config, type(config), "config")


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Builds a configuration from `to_dict`'s form, exactly: no key may be unknown or missing.

    Raises:
      ConfigError: names the path, the value found there and what was expected.
    """
    return decode(data, cls, "config")


def fill_missing(cls: Any, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Gives `to_dict`'s form, as an older version saved it, the fields that came since.

    They take their defaults, so the default of a new field must be what was done before it.

    Args:
      cls: the dataclass whose form it is.
      data: may lack fields, and hold unknown ones, which `from_dict` refuses.

    Returns:
      The form with the missing fields that have a default, and those fields as "path=value".
    """
    filled: list[str] = []
    return fill(data, cls, "", filled), filled


def flatten(config: Any) -> dict[str, Any]:
    """Returns the leaves by dotted path, as `apply_overrides` takes them.

    A nested dataclass adds its name under its own path. A tuple of plain values is one leaf.
    """
    return dict(leaves(to_dict(config), ""))


def diff(a: Any, b: Any) -> list[str]:
    """Returns a line "path: value in a -> value in b" for each leaf that differs."""
    left, right = ({path: repr(x) for path, x in flatten(c).items()} for c in (a, b))
    pairs = [(p, left.get(p, "(absent)"), right.get(p, "(absent)")) for p in left | right]
    return [f"{path}: {x} -> {y}" for path, x, y in pairs if x != y]
