"""What one test of `enclos check` found. Pure."""

from __future__ import annotations

from dataclasses import dataclass

OK, MEND, NOTE, SKIPPED = "ok", "mend", "note", "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `enclos check`.

    Attributes:
        subject: what was tested, a few words.
        status: OK; MEND: containers will fail until it is mended; NOTE: worth knowing;
            SKIPPED: could not be tested here, `text` says why.
        text: what was found.
        hint: what to do, for MEND and NOTE.
    """

    subject: str
    status: str
    text: str = ""
    hint: str = ""


def ok(subject: str, text: str = "") -> Finding:
    """Nothing to do."""
    return Finding(subject, OK, text)


def mend(subject: str, text: str, hint: str) -> Finding:
    """Has to be mended before containers work."""
    return Finding(subject, MEND, text, hint)


def note(subject: str, text: str, hint: str = "") -> Finding:
    """Worth knowing, no reason to fail."""
    return Finding(subject, NOTE, text, hint)


def skipped(subject: str, reason: str) -> Finding:
    """Could not be tested."""
    return Finding(subject, SKIPPED, reason)
