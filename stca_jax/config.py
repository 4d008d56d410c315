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

import contextlib
import dataclasses
import difflib
import functools
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from stca_jax.errors import UserError

T = TypeVar("T")

_SCALARS = (int, float, bool, str, types.NoneType)
_WORDS = {"true": True, "false": False, "none": None}
_TAG = "type"  # Names a dataclass in the JSON form; no field may have this name.


class ConfigError(UserError):
    """A configuration, an override or a saved configuration is wrong; the message says where."""


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
        near = _nearest(file.stem, others, otherwise=f"{file.parent} has no file of a similar name")
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
    if not _is_config(config):
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
        data = _assign(data, type(config), path.split("."), value, "config")
    return from_dict(type(config), data)


def validate(config: Any) -> None:
    """Checks every value of a configuration against its annotation.

    Raises:
      ConfigError: names the first wrong value, its path and the expected type.
    """
    from_dict(type(config), to_dict(config))


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the JSON form: dataclasses are dicts whose "type" is the class's name, tuples lists.

    Raises:
      ConfigError: `config` is no dataclass or holds a value that a configuration cannot hold.
    """
    if not _is_config(config):
        raise ConfigError(f"config: expected an instance of a dataclass, got {config!r}")
    return _encode(config, "config")


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Builds a configuration from `to_dict`'s form, exactly: no key may be unknown or missing.

    Raises:
      ConfigError: names the path, the value found there and what was expected.
    """
    return _decode(data, cls, "config")


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
    return _fill(data, cls, "", filled), filled


def flatten(config: Any) -> dict[str, Any]:
    """Returns the leaves by dotted path, as `apply_overrides` takes them.

    A nested dataclass adds its name under its own path. A tuple of plain values is one leaf.
    """
    return dict(_leaves(to_dict(config), ""))


def diff(a: Any, b: Any) -> list[str]:
    """Returns a line "path: value in a -> value in b" for each leaf that differs."""
    left, right = ({path: repr(x) for path, x in flatten(c).items()} for c in (a, b))
    pairs = [(p, left.get(p, "(absent)"), right.get(p, "(absent)")) for p in left | right]
    return [f"{path}: {x} -> {y}" for path, x, y in pairs if x != y]


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Returns the annotation of each constructor field; refuses classes that cannot be configs."""
    if not cls.__dataclass_params__.frozen:
        raise ConfigError(f"{cls.__name__}: write @dataclasses.dataclass(frozen=True)")
    try:
        hints = typing.get_type_hints(cls)
    except NameError as e:
        raise ConfigError(f"{cls.__name__}: {e}; import what annotations name in its module") from e
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    for name, option in ((n, option) for n, hint in hints.items() for option in _options(hint)):
        known = option in _SCALARS or typing.get_origin(option) in (tuple, Literal)
        if name == _TAG or not (known or dataclasses.is_dataclass(option)):
            fix = "another name" if name == _TAG else f"one of the types that {__name__} lists"
            raise ConfigError(f"{cls.__name__}.{name} ({_name(option)}): this field needs {fix}")
    return hints


def _options(hint: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the annotation itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _classes(hint: Any) -> dict[str, Any]:
    """Returns the dataclasses among an annotation's options, by name."""
    return {o.__name__: o for o in _options(hint) if dataclasses.is_dataclass(o)}  # type: ignore


def _item_hints(hint: Any, length: int, path: str) -> Sequence[Any]:
    """Returns the annotation of each of a tuple's `length` items."""
    args = typing.get_args(hint)
    if args[-1] is ...:
        return [args[0]] * length
    if length != len(args):
        raise ConfigError(f"{path}: expected the {len(args)} values of {hint}, got {length}")
    return args


def _name(hint: Any) -> str:
    """Returns what messages call an annotation."""
    if len(_options(hint)) > 1:
        return " | ".join(map(_name, _options(hint)))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if hint is types.NoneType:
        return "none"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _mismatch(path: str, value: Any, hint: Any) -> ConfigError:
    found = value.get(_TAG, value) if isinstance(value, dict) else repr(value)
    return ConfigError(f"{path}: expected {_name(hint)}, got {found}")


def _nearest(name: str, choices: Mapping[str, str], otherwise: str) -> str:
    """Returns a hint that shows the choices (text to show -> name) whose name is near `name`."""
    close = difflib.get_close_matches(name, dict.fromkeys(choices.values()))
    found = [text for text, choice in choices.items() if choice in close]
    return f"did you mean {' or '.join(found)}?" if found else otherwise


def _unknown(path: str, name: str, cls: Any, data: Any) -> ConfigError:
    """Returns the error for a name that `cls` lacks; looks for it deeper in `data`, too."""
    fields = [*_hints(cls)]
    choices = {f"{path}.{p}": p.rpartition(".")[2] for p in [*fields, *dict(_leaves(data, ""))]}
    near = _nearest(name, choices, otherwise=f"its fields: {', '.join(fields)}")
    return ConfigError(f"{path}.{name}: {cls.__name__} has no field {name!r}; {near}")


def _encode(value: Any, path: str) -> Any:
    """Returns the JSON form of a value; refuses what a configuration cannot hold."""
    if _is_config(value):
        cls: Any = type(value)
        fields = {name: _encode(getattr(value, name), f"{path}.{name}") for name in _hints(cls)}
        return {_TAG: cls.__name__, **fields}
    if isinstance(value, tuple):
        return [_encode(item, f"{path}.{i}") for i, item in enumerate(value)]
    if type(value) in _SCALARS:
        return value
    fix = "a tuple" if isinstance(value, list) else "a plain Python value, tuple or dataclass"
    raise ConfigError(f"{path}: {value!r} is of type {type(value).__name__}; use {fix}")


def _decode(data: Any, hint: Any, path: str) -> Any:
    """Returns the value whose JSON form is `data`, checked against its annotation."""
    if isinstance(data, dict) and (cls := _classes(hint).get(str(data.get(_TAG)))):
        return _construct(data, cls, path)
    for option in _options(hint):
        if typing.get_origin(option) is tuple and isinstance(data, list):
            hints = _item_hints(option, len(data), path)
            return tuple(_decode(data[i], hints[i], f"{path}.{i}") for i in range(len(data)))
        if typing.get_origin(option) is Literal:
            if any(type(data) is type(c) and data == c for c in typing.get_args(option)):
                return data
        elif type(data) is option or (option is float and type(data) is int):
            return option(data) if option is float else data
    raise _mismatch(path, data, hint)


def _construct(data: Mapping[str, Any], cls: Any, path: str) -> Any:
    """Returns the dataclass whose JSON form is `data`."""
    hints = _hints(cls)
    for name in sorted(data.keys() - hints.keys() - {_TAG}):
        raise _unknown(path, name, cls, {})
    if missing := [name for name in hints if name not in data]:
        raise ConfigError(f"{path}: {cls.__name__} lacks a value for {', '.join(missing)}")
    fields = {name: _decode(data[name], hints[name], f"{path}.{name}") for name in hints}
    try:
        return cls(**fields)
    except ValueError as e:
        raise ConfigError(f"{path}: {e}") from e


def _fill(data: Any, hint: Any, path: str, filled: list[str]) -> Any:
    """Returns the JSON form `data` with defaults where fields are missing, and lists them."""
    if isinstance(data, dict) and (cls := _classes(hint).get(str(data.get(_TAG)))):
        hints = _hints(cls)
        new = {name: v for name, v in _defaults(cls, path).items() if name not in data}
        filled += [f"{path}.{name}={value}".lstrip(".") for name, value in new.items()]
        known = [name for name in hints if name in data]
        return {**data, **new} | {
            name: _fill(data[name], hints[name], f"{path}.{name}", filled) for name in known
        }
    option = next((o for o in _options(hint) if typing.get_origin(o) is tuple), None)
    if isinstance(data, list) and option is not None:
        items = _item_hints(option, len(data), path)
        return [_fill(data[i], items[i], f"{path}.{i}", filled) for i in range(len(data))]
    return data


def _leaves(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a JSON form."""
    if isinstance(data, dict):
        if path:
            yield path, data[_TAG]
        for name in filter(_TAG.__ne__, data):
            yield from _leaves(data[name], f"{path}.{name}".lstrip("."))
    elif isinstance(data, list) and any(isinstance(item, dict | list) for item in data):
        for i, item in enumerate(data):
            yield from _leaves(item, f"{path}.{i}")
    else:
        yield path, tuple(data) if isinstance(data, list) else data


def _assign(data: Any, hint: Any, names: Sequence[str], value: Any, path: str) -> Any:
    """Returns the JSON form `data` with `value` set at the path `names` below it."""
    if not names:
        return _parse(value, hint, data, path) if isinstance(value, str) else _encode(value, path)
    name, below = names[0], f"{path}.{names[0]}"
    if isinstance(data, dict):
        cls = _classes(hint)[data[_TAG]]
        if name not in _hints(cls):
            raise _unknown(path, name, cls, data)
        # A required field of a class that was chosen just now has no value yet.
        return data | {name: _assign(data.get(name), _hints(cls)[name], names[1:], value, below)}
    if isinstance(data, list) and name.isdecimal() and int(name) < len(data):
        option = next(o for o in _options(hint) if typing.get_origin(o) is tuple)
        hints = _item_hints(option, len(data), path)
        i = int(name)
        return [*data[:i], _assign(data[i], hints[i], names[1:], value, below), *data[i + 1 :]]
    choose = f"; choose one first: {path}={' or '.join(_classes(hint))}" if _classes(hint) else ""
    raise ConfigError(f"{below}: {path} is {data!r} and has no {name!r}{choose}")


def _parse(text: str, hint: Any, current: Any, path: str) -> Any:
    """Returns the JSON form of a value given as text; `current` is the one it replaces."""
    if cls := _classes(hint).get(text):
        keep = isinstance(current, dict) and current[_TAG] == text
        return current if keep else _defaults(cls, path)
    # `none` is tried first and str, which any text fits, last.
    for option in sorted(_options(hint), key=lambda o: (o is str) - (o is types.NoneType)):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin is Literal and (found := [choice for choice in args if str(choice) == text]):
            return found[0]
        if origin is tuple:
            items = [item.strip() for item in text.strip("()").split(",") if item.strip()]
            hints = _item_hints(option, len(items), path)
            return [_parse(items[i], hints[i], None, f"{path}.{i}") for i in range(len(items))]
        if option in (bool, types.NoneType) and type(_WORDS.get(text.lower(), "")) is option:
            return _WORDS[text.lower()]
        if option in (int, float, str):
            with contextlib.suppress(ValueError):
                return option(text)
    raise _mismatch(path, text, hint)


def _defaults(cls: Any, path: str) -> dict[str, Any]:
    """Returns the JSON form of a dataclass of which only the fields with defaults are set."""
    data: dict[str, Any] = {_TAG: cls.__name__}
    for field in dataclasses.fields(cls):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if field.init and default is not dataclasses.MISSING:
            data[field.name] = _encode(default, f"{path}.{field.name}")
    return data
