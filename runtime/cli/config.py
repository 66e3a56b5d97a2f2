"""`enclos config`: the settings in force and where each came from; checks of a file.

Runs as whoever types the command; reads the file itself, so it works without an agent. What
the agent uses is what the file held when it started: `show` is about the file as it is now.
"""

from __future__ import annotations

from enclos.runtime import config
from enclos.runtime.cli import common
from enclos.runtime.settings import rows


def run(arguments: list[str]) -> int:
    """Show or validate."""
    parser = common.Parser(
        prog="enclos config", description="Show the settings in force, or validate a file."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="show|validate")
    show = verbs.add_parser(
        "show",
        help="print each setting, its value and where it came from",
        description="Print each setting, its value and where it came from: default, FILE:LINE, or an environment "
        "variable. The agent reads the file when it starts.",
    )
    show.add_argument("--file", help=f"instead of ${config.PATH_VARIABLE} or {config.DEFAULT_PATH}")
    common.add_json(show)
    validate = verbs.add_parser(
        "validate", help="check a file; exit status 1 and file and line if it is wrong"
    )
    validate.add_argument(
        "file", nargs="?", help=f"instead of ${config.PATH_VARIABLE} or {config.DEFAULT_PATH}"
    )
    given = parser.parse_args(arguments)
    return show_settings(given.file, given.json) if given.verb == "show" else validate_file(given.file)


def show_settings(path: str | None, as_json: bool) -> int:
    """Print every key with its value and origin."""
    loaded = config.load(path)
    if as_json:
        settings = {
            row.key: {"value": config.lookup(loaded.config, row.key), "origin": loaded.origins[row.key]}
            for row in rows()
        }
        common.print_json({"file": loaded.path, "exists": loaded.exists, "settings": settings})
        return 0
    lines = [
        (row.key, config.yaml_value(config.lookup(loaded.config, row.key)), loaded.origins[row.key])
        for row in rows()
    ]
    print(f"# {loaded.path}{'' if loaded.exists else ' does not exist: defaults'}")
    print(common.table(("KEY", "VALUE", "FROM"), lines))
    return 0


def validate_file(path: str | None) -> int:
    """Check one file; a file that was named has to exist."""
    loaded = config.load(path, must_exist=path is not None)
    print(
        f"{loaded.path}: ok" if loaded.exists else f"{loaded.path}: does not exist, the defaults are in force"
    )
    return 0
