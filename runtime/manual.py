"""The commands' manual pages and completion, made from what their --help says: one source, argparse's.

generate.py fills the marked parts of docs/man with these texts and writes conf/completion. For developers and tests; no
daemon imports it. The options of srun and the settings are generate.py's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from enclos.runtime.cli import common
from enclos.runtime.cli.main import GLOBAL_OPTIONS, VERBS

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


# ---------------------------------------------------------------- completion


def bash() -> str:
    """conf/completion/enclos.bash."""
    cases, values = [], set()
    for words, choices, kind in _completions():
        extra = " $(enclos profile ls 2>/dev/null | sed '1d; s/ .*//')" if kind == "profile" else ""
        cases.append(f"\t{_pattern(words)})\n\t\twords=\"{' '.join(choices)}{extra}\"\n\t\t;;")
    for verb in verbs():
        values |= {text for action in verb.parser._actions if action.nargs != 0 for text in action.option_strings}
    return f"""\
# bash completion of enclos(1). {NOTE}

_enclos()
{{
	local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} given="" words="" word

	for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
		[[ $word == -* ]] || given+="${{given:+ }}$word"
	done
	COMPREPLY=()
	case $previous in
	{"|".join(sorted(values))})
		return
		;;
	esac
	case $given in
{chr(10).join(cases)}
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}}

complete -o bashdefault -o default -F _enclos enclos
"""


def _pattern(words: str) -> str:
    """A verb without further verbs goes on with whatever is typed after it."""
    leaves = {verb.words for verb in verbs()}
    return f'"{words}"*' if words in leaves else f'"{words}"'


def _completions() -> Iterator[tuple[str, list[str], str]]:
    """(words typed so far, what may follow, what names may follow), the longest first."""
    found: dict[str, list[str]] = {"": [*VERBS, *GLOBAL_OPTIONS]}
    for verb in verbs():
        parts = verb.words.split()
        for depth in range(1, len(parts)):
            found.setdefault(" ".join(parts[:depth]), []).append(parts[depth])
        options = [text for action in verb.parser._actions for text in action.option_strings if text != "-h"]
        found[verb.words] = options
    for words in sorted(found, key=len, reverse=True):
        names = "profile" if words.startswith("profile ") and words != "profile ls" else ""
        yield words, list(dict.fromkeys(found[words])), names


def zsh() -> str:
    """conf/completion/_enclos."""
    lines = []
    groups: dict[str, list[Verb]] = {}
    for verb in verbs():
        groups.setdefault(verb.words.split()[0], []).append(verb)
    for name, members in groups.items():
        lines.append(f"\t{name})")
        if members[0].words == name:
            lines.append(f"\t\t_arguments {' '.join(_zsh_specs(members[0]))}")
        else:
            rows = " ".join(_zsh_quote(f"{member.words.split()[1]}:{_plain(member.text)}") for member in members)
            lines += ["\t\tif (( CURRENT == 3 )); then", f"\t\t\tlocal -a nested=({rows})"]
            lines += ["\t\t\t_describe 'verb' nested", "\t\telse", "\t\t\tcase $words[3] in"]
            for member in members:
                lines += [f"\t\t\t{member.words.split()[1]}) _arguments {' '.join(_zsh_specs(member))} ;;"]
            lines += ["\t\t\tesac", "\t\tfi"]
        lines.append("\t\t;;")
    rows = " ".join(_zsh_quote(f"{name}:{_plain(text)}") for name, (_, text) in VERBS.items())
    body = "\n".join(lines)
    return f"""\
#compdef enclos
# zsh completion of enclos(1). {NOTE}

_enclos()
{{
	local -a verbs=({rows})

	if (( CURRENT == 2 )); then
		_describe 'verb' verbs
		return
	fi
	case $words[2] in
{body}
	esac
}}

_enclos "$@"
"""


def _zsh_specs(verb: Verb) -> Iterator[str]:
    for action in verb.parser._actions:
        for text in action.option_strings:
            if text != "-h":
                value = "" if action.nargs == 0 else f":{_metavar(action).replace(':', ' ')}:_files"
                yield _zsh_quote(f"{text}[{_plain(_help(action) or text)}]{value}")
    yield "'*:file:_files'"


def _plain(text: str) -> str:
    """Without the characters that mean something to _arguments and _describe."""
    return " ".join(text.translate({ord(c): " " for c in "[]:\\`$"}).split())


def _zsh_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
