"""Profiles: TOML or YAML files that hold options of a container, as an environment definition file does.

    base = "cluster"                       # or a list; `base_environment` is the same
    image = "/images/${RELEASE:-2024}.sqsh"
    mounts = ["/scratch", "/data:/data:ro"]
    writable = true
    [env]
    OMP_PROC_BIND = "close"

A key is an option without `--container-`, with `_` or `-`. Lists are joined, and add to those of the base; tables are
merged; all else replaces what the base says. `${VAR}` is the reader's variable, `$$` a dollar.

Reads files as the user who types the command, never as root: the shim runs `enclos profile options`, and what comes
out is checked like any option. Decides nothing about containers.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from enclos.runtime import errors
from enclos.runtime.options import OPTIONS, Option

PATH_VARIABLES = ("ENCLOS_PROFILE_PATH", "EDF_PATH")
DIRECTORIES = ("~/.config/enclos/profiles", "~/.edf", "/etc/enclos/profiles")
SUFFIXES = (".toml", ".yaml", ".yml")
FILE_LIMIT_BYTES = 1 << 20
DEPTH_LIMIT = 16
# What the shim can carry (spank/profile.c).
OPTIONS_LIMIT_BYTES = 60000
NAMES_LIMIT_BYTES = 4000
BASE_KEYS = ("base", "base_environment")
# What others' tools read from the same files.
IGNORED_KEYS = ("annotations",)

_VARIABLE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(slots=True)
class Profile:
    """What one or several files say, as options of srun.

    Attributes:
        path: the file that was named.
        options: value by the option's name (without `--`); "" for flags.
        variables: to be set for the job.
        ignored: keys that mean something to others only.
        files: all files that were read, the named one last.
    """

    path: str
    options: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def load(name: str, environment: Mapping[str, str] | None = None) -> Profile:
    """Read a profile and its bases.

    Raises:
        EnclosError: profile_not_found, profile_bad.
    """
    variables = os.environ if environment is None else environment
    path = find(name, variables)
    profile = Profile(str(path))
    merged: dict[str, Any] = {}
    _read(path, variables, merged, profile, ())
    for key, value in merged.items():
        _take(profile, key, value)
    options = sum(len(os.fsencode(f"{name}={value}\n")) for name, value in profile.options.items())
    variables_bytes = sum(len(f"set {name}={value}\n".encode()) for name, value in profile.variables.items())
    if options + variables_bytes > OPTIONS_LIMIT_BYTES or len(",".join(profile.variables)) > NAMES_LIMIT_BYTES:
        raise errors.profile_bad(str(path), "too long for one step")
    return profile


def find(name: str, environment: Mapping[str, str]) -> Path:
    """The file of a name: itself if it is a path, else the first one on the search path."""
    if "/" in name or name.endswith(SUFFIXES):
        path = Path(name).expanduser()
        if path.is_file():
            return path
        raise errors.profile_not_found(name, "no such file")
    searched = directories(environment)
    for directory in searched:
        for suffix in SUFFIXES:
            if (directory / f"{name}{suffix}").is_file():
                return directory / f"{name}{suffix}"
    raise errors.profile_not_found(name, f"searched {', '.join(map(str, searched))}")


def directories(environment: Mapping[str, str]) -> list[Path]:
    """Where names are looked up, in this order."""
    named = next((environment[variable] for variable in PATH_VARIABLES if environment.get(variable)), "")
    return [Path(part).expanduser() for part in (named.split(":") if named else DIRECTORIES) if part]


def listed(environment: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """(name, file) of all profiles on the search path, each name once."""
    seen: set[str] = set()
    for directory in directories(environment):
        for path in sorted(directory.glob("*")) if directory.is_dir() else []:
            if path.suffix in SUFFIXES and path.is_file() and path.stem not in seen:
                seen.add(path.stem)
                yield path.stem, path


def _read(
    path: Path, variables: Mapping[str, str], merged: dict[str, Any], profile: Profile, below: tuple[Path, ...]
) -> None:
    """Merge the bases of a file, then the file itself."""
    if path.resolve() in below or len(below) > DEPTH_LIMIT:
        raise errors.profile_bad(str(path), "its base leads back to itself, or too deep")
    content = _parse(path)
    for key in BASE_KEYS:
        bases = content.pop(key, [])
        for base in [bases] if isinstance(bases, str) else _strings(str(path), key, bases):
            base_path = find(seen_from(str(path.parent), base), variables)
            _read(base_path, variables, merged, profile, (*below, path.resolve()))
    for key, value in content.items():
        _merge(merged, _normal(str(path), key), _substituted(str(path), value, variables))
    profile.files.append(str(path))


def seen_from(directory: str, name: str) -> str:
    """What a profile is called elsewhere: a relative path is one of that directory; names and other paths stay."""
    is_relative = ("/" in name or name.endswith(SUFFIXES)) and not name.startswith(("/", "~"))
    return os.path.join(directory, name) if is_relative else name


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise errors.profile_bad(str(path), errors.reason(error.errno or 0)) from error
    if len(data) > FILE_LIMIT_BYTES:
        raise errors.profile_bad(str(path), f"larger than {FILE_LIMIT_BYTES} bytes")
    try:
        text = data.decode()
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError) as error:
        raise errors.profile_bad(str(path), " ".join(str(error).split())) from error
    if content is not None and not isinstance(content, dict):
        raise errors.profile_bad(str(path), "not a table of options")
    return content or {}


def _normal(path: str, key: object) -> str:
    """A key as options have it, or one of ours; anything else is an error that names the nearest."""
    name = str(key).replace("_", "-").removeprefix("container-")
    known = {o.name.replace("container-", "") for o in OPTIONS if o.key != "profile"} | {"env", *IGNORED_KEYS}
    if name in known:
        return name
    nearest = difflib.get_close_matches(name, known, 1)
    raise errors.profile_bad(path, f"unknown key '{key}'" + (f", did you mean '{nearest[0]}'?" if nearest else ""))


def _merge(merged: dict[str, Any], key: str, value: object) -> None:
    old = merged.get(key)
    if isinstance(old, dict) and isinstance(value, dict):
        merged[key] = {**old, **value}
    elif isinstance(old, list) and isinstance(value, list):
        merged[key] = [*old, *value]
    else:
        merged[key] = value


def _substituted(path: str, value: object, variables: Mapping[str, str]) -> object:
    """The value with the reader's variables in its strings."""
    if isinstance(value, dict):
        return {str(key): _substituted(path, item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_substituted(path, item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if name is None:
            return "$"
        if name in variables:
            return variables[name]
        if default is None:
            raise errors.profile_bad(path, f"${{{name}}} is not set")
        return default

    return _VARIABLE.sub(replace, value)


def _take(profile: Profile, key: str, value: object) -> None:
    if key in IGNORED_KEYS:
        profile.ignored.append(key)
    elif key == "env" and isinstance(value, dict):
        for name, text in value.items():
            if _NAME.fullmatch(str(name)) is None or isinstance(text, dict | list):
                raise errors.profile_bad(profile.path, f"env: '{name}' is no variable with a value")
            profile.variables[str(name)] = _plain(profile.path, f"env.{name}", text)
    else:
        _take_option(profile, key, value)


def _take_option(profile: Profile, key: str, value: object) -> None:
    row = next(o for o in OPTIONS if o.name.replace("container-", "") == key)
    if row.fixed:
        if not isinstance(value, bool):
            raise errors.profile_bad(profile.path, f"{key}: expected true or false")
        other = _opposite(row)
        chosen, lost = (row, other) if value else (other, row)
        if lost is not None:
            profile.options.pop(lost.name, None)
        if chosen is not None:
            profile.options[chosen.name] = ""
        return
    separator = "," if row.key != "workdir" else ""
    items = _strings(profile.path, key, value) if isinstance(value, list) else [_plain(profile.path, key, value)]
    text = separator.join(items)
    for check in row.checks:
        if check.refuses(text):
            raise errors.profile_bad(profile.path, f"{key} = {text[:64]}: {check.words}")
    profile.options[row.name] = text


def _opposite(row: Option) -> Option | None:
    """The other form of a flag: `no-` and back, readonly and writable."""
    pairs = {"container-writable": "container-readonly", "container-readonly": "container-writable"}
    rest = row.name.removeprefix("no-")
    wanted = pairs.get(row.name) or (rest if rest != row.name else f"no-{rest}")
    return next((o for o in OPTIONS if o.name == wanted), None)


def _strings(path: str, key: str, value: object) -> list[str]:
    if not isinstance(value, list):
        raise errors.profile_bad(path, f"{key}: expected a text or a list of texts")
    return [_plain(path, key, item) for item in value]


def _plain(path: str, key: str, value: object) -> str:
    """A text, number or truth value as text; nothing that could break a line of the shim's."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise errors.profile_bad(path, f"{key}: expected a text")
    text = str(value)
    if "\n" in text or "\0" in text:
        raise errors.profile_bad(path, f"{key}: a value has one line")
    return text
