"""Make the files that follow from settings.py and options.py: `python -m enclos.runtime.settings`.

    --write      rewrite all of them          --check      say which are stale, exit 1
    --c-header   print spank/options.gen.h

The tables of the manual pages are rewritten between their markers; the prose around them
is written by hand. For developers and tests; no daemon imports it.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from enclos.runtime import completion, manual
from enclos.runtime.config import yaml_value
from enclos.runtime.options import INTERFACE_VARIABLES, OOM_VARIABLE, OPTIONS, VISIBLE_VARIABLES, Option
from enclos.runtime.settings import Config, Row, rows, subsections

ROOT = Path(__file__).resolve().parent.parent
MADE = "made by 'python -m enclos.runtime.settings --write' from runtime/{}: change that"
WIDTH = 96


# ---------------------------------------------------------------- spank/options.gen.h


def c_header() -> str:
    """The option table of the Slurm plugin."""
    lines = [
        f"/* {MADE.format('options.py')}. */",
        "#ifndef ENCLOS_OPTIONS_GEN_H",
        "#define ENCLOS_OPTIONS_GEN_H",
        "",
        '#include "options.h"',
        "",
        *_c_checks(),
        f"#define ENCLOS_OPTION_COUNT {len(OPTIONS)}",
        "",
        "static const struct enclos_option_row enclos_option_rows[] = {",
    ]
    for o in OPTIONS:
        lines += [
            "\t{",
            f"\t\t{_c(o.name)}, {_c(o.arginfo)},",
            f"\t\t{_c(o.usage)},",
            f"\t\t{0 if o.fixed else 1}, {_c(o.env)}, {_c(o.pyxis_env)}, {_c(o.key)}, {_c(o.fixed)},",
            f"\t\t{_c_checks_name(o)},",
            "\t},",
        ]
    lines += [
        "};",
        "",
        "/* Variables of the job that the agent has to know; ends with NULL. */",
        "static const char *const enclos_sent_variables[] = {",
    ]
    lines += [f"\t{_c(name)}," for name in (*INTERFACE_VARIABLES, *VISIBLE_VARIABLES, OOM_VARIABLE)]
    lines += ["\tNULL,", "};", "", "#endif", ""]
    return "\n".join(lines)


def _c_checks() -> Iterator[str]:
    for o in OPTIONS:
        if o.checks:
            yield f"static const struct enclos_check {_c_checks_name(o)}[] = {{"
            for check in o.checks:
                texts = f"{_c(f'^({check.pattern})$')}, {_c(check.words)}, {_quoted(check.start)}"
                yield f"\t{{ {texts}, {check.rule.value}, {int(check.each)}, {check.longest} }},"
            yield from ("\t{ NULL, NULL, NULL, ENCLOS_MATCH, 0, 0 },", "};", "")


def _c_checks_name(o: Option) -> str:
    return f"enclos_checks_{o.key.replace('-', '_')}" if o.checks else "NULL"


def _c(text: str) -> str:
    return _quoted(text) if text else "NULL"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\{ord(c):03o}" for c in escaped) + '"'


# ---------------------------------------------------------------- conf/enclos.yaml


def yaml_example() -> str:
    """enclos.yaml with every key explained, all of them commented out."""
    head = [
        f"## {MADE.format('settings.py')}.",
        "##",
        "## Settings of Enclos on a compute node, read from /etc/enclos/enclos.yaml. Each key below shows",
        "## its default; remove the '# ' before a key, and before the sections above it, to change it. An",
        "## empty file works. 'enclos config validate' checks the file, 'enclos config show' prints what",
        "## is in force and where it came from. See enclos.yaml(5).",
    ]
    return "\n".join([*head, *_yaml_section(Config, "", 0)]) + "\n"


def _yaml_section(cls: type[Any], prefix: str, depth: int) -> Iterator[str]:
    indent = "  " * depth
    nested = subsections(cls)
    for row in rows(cls, prefix):
        name = row.key.removeprefix(prefix)
        if "." not in name:
            yield ""
            yield from _comment(row.help, indent)
            yield from _comment(f"Value: {row.kind.describe()}.", indent)
            yield f"# {indent}{name}: {yaml_value(row.default)}"
    for name, sub in nested.items():
        yield ""
        yield from _comment(f"---- {_doc(sub)}", indent)
        yield f"# {indent}{name}:"
        yield from _yaml_section(sub, f"{prefix}{name}.", depth + 1)


def _comment(text: str, indent: str) -> list[str]:
    # "## " keeps prose apart from the lines that become settings when their "# " is removed.
    return textwrap.wrap(text, WIDTH, initial_indent=f"## {indent}", subsequent_indent=f"## {indent}")


def _doc(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip()


# ---------------------------------------------------------------- conf/enclos.schema.json


def json_schema() -> str:
    """The schema for editors; the agent checks by itself."""
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "enclos.yaml",
        "$comment": MADE.format("settings.py"),
        **_schema_section(Config, ""),
    }
    # An empty file is null, and so is a section whose keys are all commented out.
    return json.dumps(document, indent=2) + "\n"


def _schema_section(cls: type[Any], prefix: str) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for row in rows(cls, prefix):
        name = row.key.removeprefix(prefix)
        if "." not in name:
            default = list(row.default) if isinstance(row.default, tuple) else row.default
            properties[name] = {
                "description": row.help,
                "default": default,
                "anyOf": [row.kind.schema(), {"type": "null"}],
            }
    for name, sub in subsections(cls).items():
        properties[name] = _schema_section(sub, f"{prefix}{name}.")
    return {
        "description": _doc(cls),
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": properties,
    }


# ---------------------------------------------------------------- tables of the manual


def roff(text: str) -> str:
    """Escape prose for man(7)."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in text.splitlines())


def man_options() -> str:
    """The options of srun, for enclos-srun(1)."""
    lines: list[str] = []
    for o in OPTIONS:
        argument = f"=\\fI{roff(o.arginfo)}\\fR" if o.arginfo else ""
        lines += [".TP", f"\\fB\\-\\-{roff(o.name)}\\fR{argument}"]
        text = o.usage.removeprefix("[enclos] ")
        lines.append(roff(f"{text[0].upper()}{text[1:]}.{' ' + o.detail if o.detail else ''}"))
    return "\n".join(lines)


def man_environment() -> str:
    """The environment twins of the options."""
    lines: list[str] = []
    for o in OPTIONS:
        if o.env:
            names = f"{o.env}, {o.pyxis_env}" if o.pyxis_env else o.env
            lines += [".TP", f"\\fB{roff(names)}\\fR", roff(f"As --{o.name}{'; 1 or 0' if o.fixed else ''}.")]
    return "\n".join(lines)


def man_settings() -> str:
    """All keys, for enclos.yaml(5)."""
    lines: list[str] = []
    for row in rows():
        lines += [".TP", f"\\fB{roff(row.key)}\\fR: {roff(_value_words(row))}", roff(row.help)]
    return "\n".join(lines)


def _value_words(row: Row) -> str:
    return f"{row.kind.describe()} (default {yaml_value(row.default)})"


def man_globals() -> str:
    """Options of `enclos` itself."""
    from enclos.runtime.cli.main import GLOBAL_OPTIONS

    lines: list[str] = []
    for name, text in GLOBAL_OPTIONS.items():
        lines += [".TP", f"\\fB{roff(name)}\\fR", roff(f"{text[0].upper()}{text[1:]}.")]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "synopsis": lambda: manual.synopsis(roff),
    "verbs": lambda: manual.man_verbs(roff),
    "globals": man_globals,
    "daemon": lambda: manual.man_daemon(roff),
    "options": man_options,
    "environment": man_environment,
    "settings": man_settings,
}


def fill_tables(text: str) -> str:
    """Rewrite what stands between `.\\" begin NAME` and `.\\" end NAME`."""
    lines: list[str] = []
    inside = ""
    for line in text.splitlines():
        if line.startswith('.\\" end '):
            inside = ""
        if not inside:
            lines.append(line)
        if line.startswith('.\\" begin '):
            inside = line.split()[2]
            lines += TABLES[inside]().splitlines()
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- files


def files(root: Path = ROOT) -> dict[Path, str]:
    """All generated files with what they should hold."""
    made = {
        root / "spank/options.gen.h": c_header(),
        root / "conf/enclos.yaml": yaml_example(),
        root / "conf/enclos.schema.json": json_schema(),
        root / "conf/completion/enclos.bash": completion.bash(),
        root / "conf/completion/enclos-srun.bash": completion.bash_slurm(),
        root / "conf/completion/_enclos": completion.zsh(),
    }
    for page in sorted((root / "docs/man").glob("*.[158]")):
        made[page] = fill_tables(page.read_text())
    return made


def stale(root: Path = ROOT) -> list[Path]:
    """Files that differ from what they should hold."""
    return [path for path, text in files(root).items() if not path.exists() or path.read_text() != text]


def main(arguments: list[str]) -> int:
    """Entry of `python -m enclos.runtime.settings`."""
    parser = argparse.ArgumentParser(
        prog="python -m enclos.runtime.settings", description="Make the files that follow from the rows."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="rewrite all generated files")
    what.add_argument("--check", action="store_true", help="name the files that are stale")
    what.add_argument("--c-header", action="store_true", help="print the option table for C")
    given = parser.parse_args(arguments)
    if given.c_header:
        print(c_header(), end="")
        return 0
    old = stale()
    for path in old:
        print(path.relative_to(ROOT))
        if given.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files()[path])
    return 1 if old and given.check else 0
