"""Errors: enclos.yaml and the command line."""

from __future__ import annotations

import errno

from enclos.runtime.errors.error import AdminError, EnclosError, UsageError, reason


def _place(path: str, line: int) -> str:
    return f"{path}:{line}" if line else path


def config_unreadable(path: str, number: int) -> EnclosError:
    """The file is there but cannot be read, or one that was named is not there."""
    hint = "give the path of a file" if number == errno.ENOENT else "check owner and mode of the file"
    return AdminError(path, "cannot read the configuration", reason(number), hint)


def config_syntax(path: str, line: int, detail: str) -> EnclosError:
    """Not YAML."""
    return AdminError(
        _place(path, line),
        f"not valid YAML: {detail}",
        hint='in this line or before: indent with spaces; quote values with a brace, colon or #, as "{node}-ib"',
    )


def config_unknown_key(path: str, line: int, key: str, nearest: str) -> EnclosError:
    """A key that no row has."""
    return AdminError(
        _place(path, line),
        f"unknown key '{key}'",
        hint=f"did you mean '{nearest}'?" if nearest else "enclos.yaml(5) lists all keys",
    )


def config_duplicate_key(path: str, line: int, key: str, first: int) -> EnclosError:
    """The same key twice."""
    return AdminError(_place(path, line), f"key '{key}' again", f"first in line {first}", "remove one of them")


def config_bad_value(place: str, key: str, value: str, expected: str) -> EnclosError:
    """A value of the wrong kind; place is file:line or the environment variable."""
    return AdminError(place, f"{key}: bad value {value}: {expected}", hint="enclos.yaml(5) explains each key")


def config_not_a_section(path: str, line: int, key: str) -> EnclosError:
    """A section that is not a mapping."""
    return AdminError(
        _place(path, line),
        f"{key or 'the file'}: expected keys with values",
        hint="enclos.yaml(5) shows an example",
    )


def output_failed(detail: str) -> EnclosError:
    """The command cannot write what it found."""
    return EnclosError("standard output", f"cannot be written ({detail})", hint="what it leads to is full or broken")


def usage(verb: str, detail: str) -> EnclosError:
    """Bad arguments of the command; `verb` is empty before one was found."""
    command = f"enclos {verb}".rstrip()
    return UsageError(verb, detail, hint=f"'{command} --help' lists all arguments")
