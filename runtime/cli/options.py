"""The options of srun on another command line: `enclos run` takes them as srun, slurmstepd and the plugin would.

The precedence is the plugin's (spank/options.c, profile.c): the command line, then a profile, then ENCLOS_CONTAINER_*,
then PYXIS_CONTAINER_*. Runs as whoever types the command; what comes out is checked again by the agent.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence

from enclos.runtime import errors
from enclos.runtime.options import OPTIONS, Option

YES = ("1", "true", "yes", "on", "y")
NO = ("0", "false", "no", "off", "n", "")


def add(parser: argparse.ArgumentParser) -> None:
    """All of them; each collects its values under its key."""
    for option in OPTIONS:
        name, text = f"--{option.name}", option.usage.removeprefix("[enclos] ").replace("%", "%%")
        if option.arginfo:
            parser.add_argument(name, metavar=option.arginfo, action="append", dest=option.name, help=text)
        else:
            parser.add_argument(name, action="append_const", const=option.fixed, dest=option.name, help=text)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options, and what begins with the first word that is none: the command's own options are its own."""
    with_value = {f"--{option.name}" for option in OPTIONS if option.arginfo}
    index = 0
    while index < len(arguments):
        word = arguments[index]
        if word == "--":
            return list(arguments[:index]), list(arguments[index + 1 :])
        if not word.startswith("-") or word == "-":
            break
        index += 2 if word in with_value else 1
    return list(arguments[:index]), list(arguments[index:])


def choose(given: argparse.Namespace, environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What counts.

    Returns:
        Values by option's name, and the variables that a profile sets.

    Raises:
        EnclosError: an option, variable or profile is wrong.
    """
    own = dict(_from_command_line(given))
    from_variables = dict(_from_environment(environment))
    name = own.get("container-profile", from_variables.get("container-profile", ""))
    from_profile, variables = _from_profile(name) if name else ({}, {})
    chosen: dict[str, str] = {}
    for level in (own, from_profile, from_variables):
        taken = {group(one) for one in chosen}
        chosen |= {one: value for one, value in level.items() if group(one) not in taken}
    chosen.pop("container-profile", None)
    return chosen, variables


def fields(chosen: Mapping[str, str]) -> list[tuple[str, str]]:
    """As the plugin sends them (docs/protocol.md)."""
    rows = {option.name: option for option in OPTIONS}
    return [(f"option.{rows[name].key}", rows[name].fixed or value) for name, value in chosen.items()]


def group(name: str) -> str:
    """Options that exclude each other: the two forms of a flag, and readonly against writable."""
    rest = name.removeprefix("no-")
    return "container-writable" if rest == "container-readonly" else rest


def _from_command_line(given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    seen: dict[str, str] = {}
    for option in OPTIONS:
        values = list(dict.fromkeys(getattr(given, option.name) or []))
        if not values:
            continue
        if len(values) > 1:
            raise errors.given_twice(option.key)
        if (other := seen.setdefault(group(option.name), option.name)) != option.name:
            raise errors.usage("run", f"both --{other} and --{option.name} were specified")
        _check(f"--{option.name}", option, values[0])
        yield option.name, values[0]


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for option in OPTIONS:
        variable = next((name for name in (option.env, option.pyxis_env) if name and name in environment), "")
        if not variable:
            continue
        value = environment[variable]
        if option.arginfo:
            _check(variable, option, value)
            yield option.name, value
        elif value.lower() in YES:
            yield option.name, option.fixed
        elif value.lower() not in NO:
            raise errors.usage("run", f"{variable}={value[:64]}: neither yes nor no")
        elif value and (opposite := _opposite(option)) is not None:
            yield opposite.name, opposite.fixed


def _opposite(option: Option) -> Option | None:
    return next((one for one in OPTIONS if one.key == option.key and one.name != option.name), None)


def _from_profile(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Imported only now: it reads TOML and YAML."""
    from enclos.runtime import profile

    found = profile.load(name)
    return found.options, found.variables


def _check(subject: str, option: Option, value: str) -> None:
    """As srun does."""
    for check in option.checks:
        if check.refuses(value):
            raise errors.usage("run", f"{subject}={value[:64]}: {check.words}")
