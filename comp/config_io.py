"""Configurations as dictionaries (runs/NAME/config.json), and single fields changed by dotted names on the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from .config import Config, ConfigError, alternatives, field_types, need

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_MISSING = object()

RENAMED = (
    (r"^comp\.data\.tiny:", "comp.tiny.pages:"),
    (r"/comp/assets/tiny/(vision|language)$", r"/comp/tiny/assets/\1"),
)
"""(pattern, replacement) of values in the config.json of runs that were started before their names changed."""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists, ready for JSON."""
    return _plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any]) -> Config:
    """Inverse of `to_dict`; unknown fields, missing fields and wrong types raise ConfigError naming the field."""
    return _build(Config, values, "")


def read_config(path: Path) -> Config:
    """The configuration that a run wrote to `path`, in today's names; newer fields have their defaults."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        return from_dict(_renamed(values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _renamed(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v) for v in value]
    if isinstance(value, str):
        for pattern, replacement in RENAMED:
            value = re.sub(pattern, replacement, value)
    return value


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Dotted names of the fields in which two dictionary forms differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b})
        return [d for k in keys for d in differences(a.get(k, _MISSING), b.get(k, _MISSING), _dotted(where, k))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, _dotted(where, i))]
    return [] if a == b else [where]


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of `config` with `field=value` changes; dots reach into parts, numbers pick from lists, * is every element.

    >>> apply_overrides(config, ["seed=1", "stages.2.optim.lr_vision=1e-4", "stages.*.batch_size=8", "eval.data=[]"])

    Values of lists and of whole parts are YAML (`stages.0.alignment={mode: literal}`), null is None.
    """
    values = to_dict(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        need(bool(equals) and bool(key), f"an override looks like field=value, got {override!r}")
        _set(values, Config, key.split("."), text, "")
    return from_dict(values)


# What follows turns dictionaries into dataclasses by their annotations; `where` is the dotted name for messages.


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _dotted(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _dataclass_in(kind: Any) -> type[DataclassInstance] | None:
    return next((k for k in alternatives(kind) if isinstance(k, type) and dataclasses.is_dataclass(k)), None)


def _check_field(cls: type[DataclassInstance], name: str, where: str) -> None:
    valid = field_types(cls)
    owner = where or "the configuration"
    need(name in valid, f"unknown field {_dotted(where, name)!r}; {owner} has: {', '.join(valid)}")


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` as an instance of `kind`, or ConfigError."""
    kinds = alternatives(kind)
    if value is None and types.NoneType in kinds:
        return None
    cls = _dataclass_in(kind)
    if cls is not None:
        return _build_dataclass(cls, value, where)
    for alternative in kinds:
        converted = _convert(alternative, value, where)
        if converted is not None:
            return converted
    raise ConfigError(f"{where} must be {' or '.join(map(_spelled, kinds))}, got {value!r}")


def _build_dataclass(cls: type[DataclassInstance], value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{where or 'the configuration'} must be a mapping of fields, got {value!r}")
    for name in value:
        _check_field(cls, name, where)
    kinds = field_types(cls)
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in value and _is_required(f)]
    need(not missing, f"{where or 'the configuration'} lacks: {', '.join(missing)}")
    arguments = {name: _build(kinds[name], v, _dotted(where, name)) for name, v in value.items()}
    try:
        return cls(**arguments)
    except ConfigError as error:
        parent, _, part = where.rpartition(".")
        if part and str(error).startswith(f"{part}."):  # it names the field by the part's own name
            raise ConfigError(_dotted(parent, error)) from None
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _spelled(kind: Any) -> str:
    """A type in the words of YAML, for messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} values"
    if origin in (list, tuple):
        return "a list, as [...]"
    if origin is dict:
        return "a mapping, as {...}"
    return "null" if kind is types.NoneType else getattr(kind, "__name__", str(kind))


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`, a scalar or container type; None when it does not fit. No silent casts: 1.5 is no int."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        return value if isinstance(value, str) else None  # which ones, the dataclass checks
    if kind is float:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if kind in (int, bool, str):
        return value if type(value) is kind else None
    if origin is list and isinstance(value, (list, tuple)):
        return [_build(arguments[0], v, _dotted(where, i)) for i, v in enumerate(value)]
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return (
            tuple(_build(k, v, _dotted(where, i)) for i, (k, v) in enumerate(zip(kinds, value)))
            if len(kinds) == len(value)
            else None
        )
    if origin is dict and isinstance(value, dict):
        return value
    return None


def _set(values: Any, kind: Any, path: list[str], text: str, where: str) -> None:
    """Set the value at `path` below `values`, a dictionary made from dataclass `kind`, from its text form."""
    name, rest = path[0], path[1:]
    cls = _dataclass_in(kind)
    if cls is not None:
        need(values is not None, f"{where} is null; give it as a whole first, for example {where}={{}}")
        _check_field(cls, name, where)
        keys: list[Any] = [name]
        kinds = field_types(cls)[name]
    elif isinstance(values, list):
        indices = [str(i) for i in range(len(values))]
        need(name in (*indices, "*"), f"{_dotted(where, name)}: {where} has elements {', '.join(indices) or 'none'} (or *)")
        keys = list(range(len(values))) if name == "*" else [int(name)]
        kinds = typing.get_args(kind)[0]
    elif isinstance(values, dict):
        keys, kinds = [name], Any
    else:
        raise ConfigError(f"{where} is a single value and has no field {name!r}")
    for key in keys:
        here = _dotted(where, key)
        if not rest:
            values[key] = _parse(kinds, text, here)
        else:
            need(not isinstance(values, dict) or key in values, f"{where} has no entry {key!r} yet")
            _set(values[key], kinds, rest, text, here)


def _parse(kind: Any, text: str, where: str) -> Any:
    """The text of an override as plain data; YAML reads 1e-4 as a string, so numbers are tried first."""
    kinds = alternatives(kind)
    if types.NoneType in kinds and text.lower() in ("null", "none"):
        return None
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                pass
    if str in kinds or any(typing.get_origin(k) is Literal for k in kinds):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {text!r} is not valid YAML ({error})") from None
