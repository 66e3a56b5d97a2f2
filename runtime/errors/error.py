"""What an error is: its parts, its line, and the words for an errno."""

from __future__ import annotations

import errno
import os
from pathlib import Path

ADMIN = "administrator: "


class EnclosError(Exception):
    """A failure in words for a person.

    Args:
        subject: the option as typed, the network, or the file; may be empty.
        what: what happened.
        cause: a checked cause, or one that starts with "possibly".
        hint: what to do next.
        transient: another attempt, or another user's, may succeed.
    """

    def __init__(self, subject: str, what: str, cause: str = "", hint: str = "", *, transient: bool = False) -> None:
        super().__init__(subject, what, cause, hint)
        self.subject, self.what, self.cause, self.hint = subject, what, cause, hint
        self.transient = transient

    def line(self, node: str = "") -> str:
        """One line without the `enclos: ` prefix, which is added where it is printed."""
        parts = [f"{self.subject}: " if self.subject else "", self.what]
        if self.cause:
            parts.append(f" ({self.cause})")
        if node:
            parts.append(f" on {node}")
        return printable("".join(parts))

    def fields(self) -> list[tuple[str, str]]:
        """The packet that says it to the agent. What it quotes may be of a stranger, and hold what no packet can."""
        parts = [("subject", self.subject), ("what", self.what), ("cause", self.cause), ("hint", self.hint)]
        shown = [(key, printable(text)) for key, text in parts]
        return [("state", "error"), *shown, ("transient", str(int(self.transient)))]

    def __str__(self) -> str:
        return self.line()


class UserError(EnclosError):
    """The user can mend it."""


class AdminError(EnclosError):
    """The administrator has to mend it."""


class UsageError(UserError):
    """Wrong arguments of the `enclos` command; its exit status is 2."""


def printable(text: str) -> str:
    """Escape what could move the cursor, start a new line or forge a log entry."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def reason(number: int) -> str:
    """Words for an errno, "" for 0; those that mislead here are replaced."""
    words = {
        errno.ENOSPC: "no space left, or a limit of namespaces or mounts is reached",
        errno.EIO: "input/output error",
        errno.ELOOP: "too many symbolic links",
    }
    return words.get(number) or (os.strerror(number).lower() if number else "")


def namespace_limit() -> str:
    """The sysctl that forbids namespaces, or "". The kernel only says "No space left on device"."""
    for name in ("user", "mnt", "ipc", "uts", "net"):
        if _sysctl(f"user/max_{name}_namespaces") == "0":
            return f"user.max_{name}_namespaces is 0"
    return ""


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""
