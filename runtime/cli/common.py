"""What the verbs share: arguments with short errors, tables, JSON, and the printing of an error.

Runs as whoever types the command. Must not hold anything about containers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from enclos.runtime import errors


class Captured(Exception):
    """The parser of a verb, instead of its run; see `capture`."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and a hint instead of the whole help."""

    capturing = False

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        if Parser.capturing:
            raise Captured(self)
        return super().parse_args(args)

    def error(self, message: str) -> NoReturn:
        raise errors.usage(self.prog.removeprefix("enclos").strip(), message)


def capture(run: Callable[[list[str]], int]) -> Parser:
    """The arguments that a verb takes, for manual and completion: it runs no further than to making its parser."""
    Parser.capturing = True
    try:
        run([])
    except Captured as captured:
        return captured.parser
    finally:
        Parser.capturing = False
    raise TypeError(f"{run.__module__} parses no arguments")


def environment() -> dict[str, str]:
    """The variables that this process was started with: Python adds LC_CTYPE where the locale is C (PEP 538)."""
    with open("/proc/self/environ", "rb") as file:
        entries = [os.fsdecode(entry).partition("=") for entry in file.read().split(b"\0")]
    return {name: value for name, equals, value in entries if equals}


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that every verb with a readable output has."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def print_json(value: object) -> None:
    """One JSON text, indented, with a newline."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the last one is not padded."""
    cells = [[errors.printable(cell) for cell in line] for line in [head, *lines]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def say(text: str) -> None:
    """One line for a person, on standard error: what `--json` prints stays whole."""
    print(errors.printable(text), file=sys.stderr, flush=True)


def report(error: errors.EnclosError, node: str = "") -> None:
    """Print an error the way every part of Enclos does."""
    print(f"enclos: {error.line(node)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {errors.printable(error.hint)}", file=sys.stderr)
