"""`enclos profile`: profiles as srun would take them.

Runs as whoever types the command. `options` is what the Slurm plugin calls; the others are for people.
"""

from __future__ import annotations

import os

from enclos.runtime import profile
from enclos.runtime.cli import common


def parser() -> common.Parser:
    """The arguments."""
    made = common.Parser(prog="enclos profile", description="Show, list or check profiles of containers.")
    verbs = made.add_subparsers(dest="verb", required=True, metavar="validate|show|ls|options")
    for verb, text in (
        ("validate", "check a profile and its bases; exit status 1 and the reason if srun would refuse it"),
        ("show", "print the options and variables that a profile stands for"),
        ("options", "the same, one a line, for programs: OPTION=VALUE, and 'set NAME=VALUE' for variables"),
    ):
        one = verbs.add_parser(verb, help=text, description=text)
        one.add_argument("name", metavar="NAME|FILE", help="a name on the search path, or a file")
        if verb == "show":
            common.add_json(one)
    listing = verbs.add_parser("ls", help="list the profiles on the search path")
    common.add_json(listing)
    return made


def run(arguments: list[str]) -> int:
    """Do what the verb says."""
    given = parser().parse_args(arguments)
    if given.verb == "ls":
        return list_profiles(given.json)
    found = profile.load(given.name)
    if given.verb == "options":
        lines = [f"{name}={value}" for name, value in found.options.items()]
        print("\n".join([*lines, *(f"set {name}={value}" for name, value in found.variables.items())]))
    elif given.verb == "validate":
        for key in found.ignored:
            print(f"{found.path}: {key} means nothing here, ignoring")
        print(f"{found.path}: ok")
    else:
        show(found, given.json)
    return 0


def show(found: profile.Profile, as_json: bool) -> None:
    """The options as one would type them, the variables, and the files they came from."""
    if as_json:
        common.print_json({"files": found.files, "options": found.options, "env": found.variables})
        return
    print(f"# {', '.join(found.files)}")
    for name, value in found.options.items():
        print(f"--{name}={value}" if value else f"--{name}")
    for name, value in found.variables.items():
        print(f"{name}={value}")


def list_profiles(as_json: bool) -> int:
    """Name and file of each."""
    found = list(profile.listed(os.environ))
    if as_json:
        common.print_json([{"name": name, "file": str(path)} for name, path in found])
    elif found:
        print(common.table(("NAME", "FILE"), [(name, str(path)) for name, path in found]))
    return 0
