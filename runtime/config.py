"""Load enclos.yaml: values, checked row by row, and where each came from.

An absent or empty file gives the defaults. An unknown key or a bad value is an error with
file and line. An environment variable of the daemon or the command line (`ENCLOS_` and the
key in capitals) overrides the file; the environment of a job never reaches this module.

Must not hold: what the settings are (settings.py) and what they lead to (policy.py). Runs
in the agent as root and in the command line as anybody; the file belongs to root.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import yaml
from enclos.runtime import errors
from enclos.runtime.settings import Config, Row, rows, subsections

DEFAULT_PATH = "/etc/enclos/enclos.yaml"
PATH_VARIABLE = "ENCLOS_CONFIG"
VALUE_WIDTH = 60

_Loader = cast(type[yaml.SafeLoader], getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and its provenance.

    `origins` has every key: "default", "FILE:LINE", or "environment (NAME)".
    """

    config: Config
    origins: Mapping[str, str]
    path: str
    exists: bool


@dataclass(slots=True)
class _Values:
    """What was found so far: values and origins by key."""

    path: str
    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def config_path(environ: Mapping[str, str] = os.environ) -> str:
    """The file that daemon and command line read."""
    return environ.get(PATH_VARIABLE) or DEFAULT_PATH


def load(
    path: str | None = None, environ: Mapping[str, str] = os.environ, *, must_exist: bool = False
) -> Loaded:
    """Read the configuration file and the environment.

    Raises:
        EnclosError: config_unreadable, config_syntax, config_unknown_key,
            config_duplicate_key, config_not_a_section, config_bad_value.
    """
    path = path or config_path(environ)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        if must_exist:
            raise errors.config_unreadable(path, error.errno or 0) from error
        return parse(b"", path, environ, exists=False)
    except OSError as error:
        raise errors.config_unreadable(path, error.errno or 0) from error
    return parse(data, path, environ)


def parse(data: bytes, path: str, environ: Mapping[str, str], exists: bool = True) -> Loaded:
    """The same for a file's content; pure."""
    found = _Values(path)
    document = _compose(data, path)
    if document is not None:
        _read_section(document, Config, "", found)
    for row in rows():
        if row.env in environ:
            _set(found, row, _from_environment(row, environ[row.env]), f"environment ({row.env})")
        found.origins.setdefault(row.key, "default")
    config = _build(Config, "", found.values)
    _check_together(config, found)
    return Loaded(config, found.origins, path, exists)


def lookup(config: Config, key: str) -> object:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return cast(object, value)


# ---------------------------------------------------------------- YAML with line numbers


def _compose(data: bytes, path: str) -> yaml.Node | None:
    try:
        return yaml.compose(data.decode("utf-8"), _Loader)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise errors.config_syntax(path, line, "not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise errors.config_syntax(
            path, mark.line + 1 if mark else 0, error.problem or "unreadable"
        ) from error
    except yaml.YAMLError as error:
        raise errors.config_syntax(path, 0, str(error).splitlines()[0]) from error


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _plain(node: yaml.Node) -> object:
    """The Python value of a node of a setting: scalars and lists of scalars, nothing deeper."""
    if isinstance(node, yaml.SequenceNode):
        return (
            [_plain(item) for item in node.value if isinstance(item, yaml.ScalarNode)]
            if all(isinstance(item, yaml.ScalarNode) for item in node.value)
            else node
        )
    if not isinstance(node, yaml.ScalarNode):
        return node
    try:
        return cast(object, yaml.constructor.SafeConstructor().construct_object(node))
    except (yaml.YAMLError, ValueError):
        return node


def _read_section(node: yaml.Node, cls: type[Any], prefix: str, found: _Values) -> None:
    """Take all keys of one section; `prefix` is its key with a dot, or empty."""
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        return  # a section whose keys are all commented out
    if not isinstance(node, yaml.MappingNode):
        raise errors.config_not_a_section(found.path, _line(node), prefix.rstrip("."))
    nested = subsections(cls)
    own = {row.key: row for row in rows(cls, prefix) if "." not in row.key.removeprefix(prefix)}
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        key = prefix + name
        if name in seen:
            raise errors.config_duplicate_key(found.path, _line(key_node), key, seen[name])
        seen[name] = _line(key_node)
        if name in nested:
            _read_section(value_node, nested[name], key + ".", found)
        elif key in own:
            _set(found, own[key], _plain(value_node), f"{found.path}:{_line(key_node)}")
        else:
            raise errors.config_unknown_key(found.path, _line(key_node), key, nearest(key))


def nearest(key: str) -> str:
    """The known key that looks most like this one, or ""."""
    import difflib  # only for an error: not worth its memory in the agent

    known: dict[str, None] = {}
    for row in rows():
        parts = row.key.split(".")
        known.update({".".join(parts[:n]): None for n in range(1, len(parts) + 1)})
    # The right name in the wrong section, or with the section forgotten, else one that looks alike.
    last = key.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    close = same if len(same) == 1 else difflib.get_close_matches(key, known, 1, 0.6)
    return close[0] if close else ""


# ---------------------------------------------------------------- values


def _from_environment(row: Row, text: str) -> object:
    if row.kind.plain_text:
        return text
    try:
        return cast(object, yaml.load(text, _Loader))
    except yaml.YAMLError:
        return text


def _set(found: _Values, row: Row, value: object, origin: str) -> None:
    """Check a value against its row and keep it. A key without a value keeps its default."""
    if value is None:
        return
    try:
        found.values[row.key] = row.kind.check(value)
    except ValueError as error:
        raise errors.config_bad_value(_place(origin), row.key, shown(value), str(error)) from error
    found.origins[row.key] = origin


def _place(origin: str) -> str:
    return (
        origin.removeprefix("environment (").removesuffix(")") if origin.startswith("environment") else origin
    )


def shown(value: object, width: int = VALUE_WIDTH) -> str:
    """A value as a person would write it in the file, shortened."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, str):
        text = f'"{value}"'
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(shown(item, width) for item in value)}]"
    elif isinstance(value, yaml.Node):
        text = str(value.value) if isinstance(value, yaml.ScalarNode) else "(nested)"
    else:
        text = str(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def yaml_value(value: object) -> str:
    """A value as YAML, in full; strings that are more than a word in quotes."""
    if isinstance(value, str) and value.isalnum():
        return value
    if isinstance(value, tuple) and all(isinstance(item, str) and item.isalnum() for item in value):
        return f"[{', '.join(value)}]"
    return shown(value, sys.maxsize)


def _build(cls: type[Any], prefix: str, values: Mapping[str, object]) -> Any:  # noqa: ANN401  # an instance of cls
    nested = subsections(cls)
    arguments: dict[str, object] = {}
    for f in fields(cls):
        if f.name in nested:
            arguments[f.name] = _build(nested[f.name], f"{prefix}{f.name}.", values)
        elif prefix + f.name in values:
            arguments[f.name] = values[prefix + f.name]
    return cls(**arguments)


def _check_together(config: Config, found: _Values) -> None:
    """Rules that need more than one setting."""
    if config.step.default_network not in config.step.networks:
        key = (
            "step.networks" if found.origins["step.default_network"] == "default" else "step.default_network"
        )
        raise errors.config_bad_value(
            _place(found.origins[key]),
            key,
            shown(lookup(config, key)),
            "step.networks has to include step.default_network",
        )
    if config.named.scope == "global" and not config.named.directory:
        raise errors.config_bad_value(
            _place(found.origins["named.scope"]),
            "named.scope",
            shown(config.named.scope),
            "'global' needs named.directory: memory would stay taken that counts as no job's",
        )
    if config.named.directory and config.named.size.endswith("%"):
        raise errors.config_bad_value(
            _place(found.origins["named.size"]),
            "named.size",
            shown(config.named.size),
            "with named.directory it has to be a number of bytes",
        )
