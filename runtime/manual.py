"""The commands' manual pages, made from what their --help says: one source, argparse's. Completion: completion.py.

generate.py fills the marked parts of docs/man with these texts. For developers and tests; no daemon imports it. The
options of srun and the settings are generate.py's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from enclos.runtime.cli import common
from enclos.runtime.cli.main import VERBS

# A verb with more options than this (render takes srun's) says [OPTION...] in the synopsis, and its page has them.
SHOWN_OPTIONS = 6
NOTE = "Made by 'python -m enclos.runtime.settings --write' from the verbs' --help: change those."


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing that the command can do.

    Attributes:
        words: as typed, such as "config show".
        text: what --help says about it.
        parser: its arguments.
    """

    words: str
    text: str
    parser: argparse.ArgumentParser

    def options(self) -> list[argparse.Action]:
        """All options but --help and those of srun."""
        found = [action for action in self.parser._actions if action.option_strings and action.dest != "help"]
        return [action for action in found if not _is_sruns(action)]

    def takes_sruns(self) -> bool:
        return any(_is_sruns(action) for action in self.parser._actions)

    def positionals(self) -> list[argparse.Action]:
        return [
            action
            for action in self.parser._actions
            if not action.option_strings and not isinstance(action, argparse._SubParsersAction)
        ]


def _is_sruns(action: argparse.Action) -> bool:
    return any(text.startswith(("--container-", "--no-container-")) for text in action.option_strings)


def verbs() -> list[Verb]:
    """All verbs, those with verbs of their own taken apart."""
    found: list[Verb] = []
    for name, (module, text) in VERBS.items():
        parser = common.capture(import_module(f"enclos.runtime.cli.{module}").run)
        found += _leaves(name, parser, parser.description or text)
    return found


def _leaves(words: str, parser: argparse.ArgumentParser, text: str) -> Iterator[Verb]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield Verb(words, text, parser)
        return
    helps = {choice.dest: choice.help for choice in nested[0]._choices_actions}
    for name, child in nested[0].choices.items():
        yield from _leaves(f"{words} {name}", child, _sentence(child.description or helps.get(name) or ""))


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", ":")) else ".")


# ---------------------------------------------------------------- man


def synopsis(roff: Callable[[str], str]) -> str:
    """The lines under SYNOPSIS in enclos(1)."""
    lines = []
    for verb in verbs():
        parts = [f"\\fBenclos {roff(verb.words)}\\fR"]
        options = verb.options()
        many = len(options) > SHOWN_OPTIONS
        parts += ["[\\fIOPTION\\fR...]"] if many or verb.takes_sruns() else []
        parts += [] if many else [f"[{_man_option(action, roff)}]" for action in options]
        parts += [_man_positional(action, roff) for action in verb.positionals()]
        lines.append(" ".join(parts))
    return "\n.br\n".join(lines)


def man_verbs(roff: Callable[[str], str]) -> str:
    """The VERBS of enclos(1), each with its options."""
    lines: list[str] = []
    for verb in verbs():
        lines += [".TP", f"\\fB{roff(verb.words)}\\fR", roff(_sentence(verb.text))]
        if verb.takes_sruns():
            lines.append("It takes the options of \\fBenclos\\-srun\\fR(1).")
        takes = [*verb.positionals(), *verb.options()]
        described = [action for action in takes if action.help and action.dest != "json"]
        if described:
            lines.append(".RS")
            for action in described:
                head = _man_option(action, roff) if action.option_strings else _man_positional(action, roff)
                lines += [".TP", head, roff(_sentence(_help(action)))]
            lines.append(".RE")
    return "\n".join(lines)


def man_daemon(roff: Callable[[str], str]) -> str:
    """The OPTIONS of enclosd(8)."""
    from enclos.runtime import daemon

    lines: list[str] = []
    for action in daemon._arguments()._actions:
        if action.dest != "help":
            lines += [".TP", _man_option(action, roff), roff(_sentence(_help(action)))]
    return "\n".join(lines)


def _help(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%").replace("show program's version number and exit", "print the version")


def _man_option(action: argparse.Action, roff: Callable[[str], str]) -> str:
    name = ", ".join(f"\\fB{roff(text)}\\fR" for text in action.option_strings)
    return name if action.nargs == 0 else f"{name} \\fI{roff(_metavar(action))}\\fR"


def _man_positional(action: argparse.Action, roff: Callable[[str], str]) -> str:
    text = f"\\fI{roff(_metavar(action))}\\fR"
    if action.nargs in ("*", "+", argparse.REMAINDER, "A..."):
        text += "..."
    return f"[{text}]" if action.nargs in ("?", "*", argparse.REMAINDER) else text


def _metavar(action: argparse.Action) -> str:
    if action.metavar is None and action.choices:
        return "|".join(map(str, action.choices))
    named = action.metavar if isinstance(action.metavar, str) else None
    return named or action.dest.upper()
