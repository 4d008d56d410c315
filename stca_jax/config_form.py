"""The JSON form of configurations, and how annotations decide what may stand in it.

A dataclass is a dict whose "type" names its class: by its name where the annotation lists it, else,
where the annotation lists a class that it derives from, by import path ("my_package.modules:Mine");
as text, by a registered name too (see `stca_jax.imports`).
Tuples are lists.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from stca_jax.errors import UserError
from stca_jax.imports import find_path, import_object, import_path

SCALARS = (int, float, bool, str, types.NoneType)
_WORDS = {"true": True, "false": False, "none": None}
TAG = "type"  # Names a dataclass in the JSON form; no field may have this name.


class ConfigError(UserError):
    """A configuration, an override or a saved configuration is wrong; the message says where."""


def is_config(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


@functools.cache
def field_hints(cls: Any) -> dict[str, Any]:
    """Returns the annotation of each constructor field; refuses classes that cannot be configs."""
    if not cls.__dataclass_params__.frozen:
        raise ConfigError(f"{cls.__name__}: write @dataclasses.dataclass(frozen=True)")
    try:
        hints = typing.get_type_hints(cls)
    except NameError as e:
        raise ConfigError(f"{cls.__name__}: {e}; import what annotations name in its module") from e
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    for name, option in ((n, option) for n, hint in hints.items() for option in _options(hint)):
        known = option in SCALARS or typing.get_origin(option) in (tuple, Literal)
        if name == TAG or not (known or dataclasses.is_dataclass(option)):
            fix = "another name" if name == TAG else f"one of the types that {__name__} lists"
            raise ConfigError(f"{cls.__name__}.{name} ({_name(option)}): this field needs {fix}")
    return hints


def _options(hint: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the annotation itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _bases(hint: Any) -> list[Any]:
    """Returns the dataclasses among an annotation's options: what other classes may derive from."""
    return [option for option in _options(hint) if dataclasses.is_dataclass(option)]


def _classes(hint: Any) -> dict[str, Any]:
    """Returns those that have instances, by name."""
    return {cls.__name__: cls for cls in _bases(hint) if not inspect.isabstract(cls)}


def _tag(cls: Any, hint: Any) -> str:
    """Returns what names a class under an annotation: its name, or its import path."""
    bases = _bases(hint)
    return import_path(cls) if cls not in bases and issubclass(cls, tuple(bases)) else cls.__name__


def _class_of(tag: Any, hint: Any, path: str) -> Any:
    """Returns the class that a name or an import path chooses; None if the annotation has none."""
    if (cls := _classes(hint).get(tag)) or not _bases(hint):
        return cls
    try:
        if find_path(str(tag)) is None:
            return None
        cls = import_object(tag)
    except UserError as e:
        raise ConfigError(f"{path}: {e}") from e
    is_derived = isinstance(cls, type) and issubclass(cls, tuple(_bases(hint)))
    if not is_derived or inspect.isabstract(cls) or not dataclasses.is_dataclass(cls):
        bases = _bases(hint)
        roots = [b for b in bases if not any(b is not c and issubclass(b, c) for c in bases)]
        raise ConfigError(
            f"{path}: {tag} cannot stand here: write a frozen dataclass that derives from "
            f"{' or '.join(base.__name__ for base in roots)}, with all of its methods"
        )
    return cls


def _tuple_option(hint: Any) -> Any:
    """Returns the tuple among an annotation's options; tuple[Any, ...] if it has none."""
    options = (o for o in _options(hint) if typing.get_origin(o) is tuple)
    return next(options, tuple[Any, ...])


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
    found = value.get(TAG, value) if isinstance(value, dict) else repr(value)
    return ConfigError(f"{path}: expected {_name(hint)}, got {found}")


def nearest(name: str, choices: Mapping[str, str], otherwise: str) -> str:
    """Returns a hint that shows the choices (text to show -> name) whose name is near `name`."""
    close = difflib.get_close_matches(name, dict.fromkeys(choices.values()))
    found = [text for text, choice in choices.items() if choice in close]
    return f"did you mean {' or '.join(found)}?" if found else otherwise


def _unknown(path: str, name: str, cls: Any, data: Any) -> ConfigError:
    """Returns the error for a name that `cls` lacks; looks for it deeper in `data`, too."""
    fields = [*field_hints(cls)]
    choices = {f"{path}.{p}": p.rpartition(".")[2] for p in [*fields, *dict(leaves(data, ""))]}
    near = nearest(name, choices, otherwise=f"its fields: {', '.join(fields)}")
    return ConfigError(f"{path}.{name}: {cls.__name__} has no field {name!r}; {near}")


def encode(value: Any, hint: Any, path: str) -> Any:
    """Returns the JSON form of a value; refuses what a configuration cannot hold."""
    if is_config(value):
        cls: Any = type(value)
        hints = field_hints(cls)
        fields = {n: encode(getattr(value, n), hints[n], f"{path}.{n}") for n in hints}
        return {TAG: _tag(cls, hint), **fields}
    if isinstance(value, tuple):
        item_hints = _item_hints(_tuple_option(hint), len(value), path)
        return [encode(value[i], item_hints[i], f"{path}.{i}") for i in range(len(value))]
    if type(value) in SCALARS:
        return value
    fix = "a tuple" if isinstance(value, list) else "a plain Python value, tuple or dataclass"
    raise ConfigError(f"{path}: {value!r} is of type {type(value).__name__}; use {fix}")


def decode(data: Any, hint: Any, path: str) -> Any:
    """Returns the value whose JSON form is `data`, checked against its annotation."""
    if isinstance(data, dict) and (cls := _class_of(data.get(TAG), hint, path)):
        return _construct(data, cls, path)
    for option in _options(hint):
        if typing.get_origin(option) is tuple and isinstance(data, list):
            hints = _item_hints(option, len(data), path)
            return tuple(decode(data[i], hints[i], f"{path}.{i}") for i in range(len(data)))
        if typing.get_origin(option) is Literal:
            if any(type(data) is type(c) and data == c for c in typing.get_args(option)):
                return data
        elif type(data) is option or (option is float and type(data) is int):
            return _number(data, path) if option is float else data
    raise _mismatch(path, data, hint)


def _number(value: float, path: str) -> float:
    """Refuses NaN, which comparisons with bounds let pass one way or the other."""
    if math.isnan(value):
        raise ConfigError(f"{path}: nan is no number; give one, or leave the default")
    return float(value)


def _construct(data: Mapping[str, Any], cls: Any, path: str) -> Any:
    """Returns the dataclass whose JSON form is `data`."""
    hints = field_hints(cls)
    for name in sorted(data.keys() - hints.keys() - {TAG}):
        raise _unknown(path, name, cls, {})
    if missing := [name for name in hints if name not in data]:
        raise ConfigError(f"{path}: {cls.__name__} lacks a value for {', '.join(missing)}")
    fields = {name: decode(data[name], hints[name], f"{path}.{name}") for name in hints}
    try:
        return cls(**fields)
    except ValueError as e:
        raise ConfigError(f"{path}: {e}") from e


def fill(data: Any, hint: Any, path: str, filled: list[str]) -> Any:
    """Returns the JSON form `data` with defaults where fields are missing, and lists them."""
    if isinstance(data, dict) and (cls := _class_of(data.get(TAG), hint, path)):
        hints = field_hints(cls)
        new = {name: v for name, v in _defaults(cls, data[TAG], path).items() if name not in data}
        filled += [f"{path}.{name}={value}".lstrip(".") for name, value in new.items()]
        known = [name for name in hints if name in data]
        return {**data, **new} | {
            name: fill(data[name], hints[name], f"{path}.{name}", filled) for name in known
        }
    if isinstance(data, list):
        items = _item_hints(_tuple_option(hint), len(data), path)
        return [fill(data[i], items[i], f"{path}.{i}", filled) for i in range(len(data))]
    return data


def leaves(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a JSON form."""
    if isinstance(data, dict):
        if path:
            yield path, data[TAG]
        for name in filter(TAG.__ne__, data):
            yield from leaves(data[name], f"{path}.{name}".lstrip("."))
    elif isinstance(data, list) and any(isinstance(item, dict | list) for item in data):
        for i, item in enumerate(data):
            yield from leaves(item, f"{path}.{i}")
    else:
        yield path, tuple(data) if isinstance(data, list) else data


def assign(data: Any, hint: Any, names: Sequence[str], value: Any, path: str) -> Any:
    """Returns the JSON form `data` with `value` set at the path `names` below it."""
    if not names:
        return (
            _parse(value, hint, data, path) if isinstance(value, str) else encode(value, hint, path)
        )
    name, below = names[0], f"{path}.{names[0]}"
    if isinstance(data, dict):
        cls = _class_of(data[TAG], hint, path)
        if name not in field_hints(cls):
            raise _unknown(path, name, cls, data)
        # A required field of a class that was chosen just now has no value yet.
        return data | {
            name: assign(data.get(name), field_hints(cls)[name], names[1:], value, below)
        }
    if isinstance(data, list) and name.isdecimal() and int(name) < len(data):
        hints = _item_hints(_tuple_option(hint), len(data), path)
        i = int(name)
        return [*data[:i], assign(data[i], hints[i], names[1:], value, below), *data[i + 1 :]]
    choose = f"; choose one first: {path}={' or '.join(_classes(hint))}" if _classes(hint) else ""
    raise ConfigError(f"{below}: {path} is {data!r} and has no {name!r}{choose}")


def _parse(text: str, hint: Any, current: Any, path: str) -> Any:
    """Returns the JSON form of a value given as text; `current` is the one it replaces."""
    if cls := _class_of(text, hint, path):
        tag = _tag(cls, hint)
        keep = isinstance(current, dict) and current[TAG] == tag
        return current if keep else _defaults(cls, tag, path)
    # `none` is tried first and str, which any text fits, last.
    for option in sorted(_options(hint), key=lambda o: (o is str) - (o is types.NoneType)):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin is Literal and (found := [choice for choice in args if str(choice) == text]):
            return found[0]
        if origin is tuple:
            items = _split(text)
            hints = _item_hints(option, len(items), path)
            return [_parse(items[i], hints[i], None, f"{path}.{i}") for i in range(len(items))]
        if option in (bool, types.NoneType) and type(_WORDS.get(text.lower(), "")) is option:
            return _WORDS[text.lower()]
        if option in (int, float, str):
            with contextlib.suppress(ValueError):
                return option(text)
    raise _mismatch(path, text, hint)


def _split(text: str) -> list[str]:
    """Returns the items of a tuple given as text: "1, 2", "(1, 2)" or "(1, 2), (3, 4)"."""
    items, depth = [""], 0
    for character in text.strip():
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            items.append("")
        else:
            items[-1] += character
    if len(items) == 1 and text.strip().startswith("("):
        return _split(text.strip().removeprefix("(").removesuffix(")"))
    return [item.strip() for item in items if item.strip()]


def _defaults(cls: Any, tag: str, path: str) -> dict[str, Any]:
    """Returns the JSON form of a dataclass of which only the fields with defaults are set."""
    data: dict[str, Any] = {TAG: tag}
    for field in dataclasses.fields(cls):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if field.init and default is not dataclasses.MISSING:
            data[field.name] = encode(default, field_hints(cls)[field.name], f"{path}.{field.name}")
    return data
