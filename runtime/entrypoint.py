"""The image's entrypoint in `enclos run`: what it makes of the environment, as spank/entrypoint.c has it for tasks.

It is started before the program, with a program of ours as its command (spank/environ.c), which leaves its environment
behind. `program` reads a file of the node's, as root; the rest runs as the user, in the container.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from enclos.runtime.entering import Program

# As spank/environ.h has them.
PROGRAM_FD, OUTPUT_FD = 98, 99
CHANGES_LIMIT = 4 << 20
SHOWN_BYTES = 4096
# The shell's own notes, and what Slurm and MPI depend on.
STAYING = ("_", "PWD", "OLDPWD", "SHLVL")
STAYING_PREFIXES = ("SLURM", "SPANK_", "PMI")


def program() -> bytes:
    """spank/environ.c; empty where it is not installed: `make install` puts it beside the package's folder."""
    here = Path(__file__).resolve()
    for candidate in (here.parents[1] / "build/spank/environ", here.parents[3] / "environ"):
        if candidate.is_file():
            return candidate.read_bytes()
    return b""


class First:
    """The entrypoint, to be run before the program."""

    def __init__(self, words: Sequence[str], dump: bytes, variables: Mapping[str, str], log_fd: int) -> None:
        """`log_fd` gets its output, and is closed with the program."""
        self._before = variables
        self._output_fd = os.memfd_create("enclos-environment", os.MFD_CLOEXEC)
        self._log_fd = os.dup(log_fd)
        program_fd = os.memfd_create("enclos-environ", os.MFD_CLOEXEC)
        os.write(program_fd, dump)
        self.program = Program(
            arguments=[*words, f"/proc/self/fd/{PROGRAM_FD}"],
            variables=dict(variables),
            fds=[os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), log_fd, os.dup(log_fd)],
            controls_terminal=False,
            places={PROGRAM_FD: program_fd, OUTPUT_FD: os.dup(self._output_fd)},
        )

    def said(self) -> bool:
        """Whether it came to execute what it was given."""
        return os.fstat(self._output_fd).st_size > 0

    def log(self) -> bytes:
        """The end of its output, where that is a file."""
        size = os.fstat(self._log_fd).st_size
        return os.pread(self._log_fd, SHOWN_BYTES, max(0, size - SHOWN_BYTES))

    def changed(self) -> dict[str, str]:
        """The variables of the program after it."""
        data = os.pread(self._output_fd, CHANGES_LIMIT, 0)
        after = dict(_entries(data))
        kept = {name: value for name, value in self._before.items() if name in after or stays(name)}
        return kept | {name: value for name, value in after.items() if not stays(name)}


def stays(name: str) -> bool:
    """Whether the entrypoint has no say in this variable."""
    return name in STAYING or name.startswith(STAYING_PREFIXES)


def _entries(data: bytes) -> Iterator[tuple[str, str]]:
    for entry in data.split(b"\0"):
        name, equals, value = os.fsdecode(entry).partition("=")
        if equals:
            yield name, value
