"""Records on disk of what the agent has to undo or adopt, written before it is done. Does not know what it records.

One JSON file per record in a directory of /run: a reboot forgets the kernel's objects and the records alike. Runs in
the agent and in `enclos gc`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from enclos.runtime import errors

log = logging.getLogger("enclosd")


class Journal:
    """Records by name; a name is `KIND.IDS` and must make a file name."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, 0o700, exist_ok=True)
        for name in os.listdir(directory):
            if name.endswith(".new"):
                self.remove(name)

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write or replace a record; a reader sees the old or the new one, never half of it.

        Without fsync: after a power cut the directory is empty, and so is the kernel.

        Raises:
            EnclosError: journal_failed; a record that was there before is as it was.
        """
        path = os.path.join(self._directory, name)
        try:
            with open(f"{path}.new", "w") as file:
                # Not json.dump: it leaves about a hundred cyclic objects behind at each call.
                file.write(json.dumps(record))
            os.rename(f"{path}.new", path)
        except OSError as error:
            self.remove(f"{name}.new")
            raise errors.journal_failed(self._directory, error.errno or 0) from error

    def remove(self, name: str) -> None:
        """Forget a record; a missing one is fine."""
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(os.path.join(self._directory, name))

    def read(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """All records of a kind, with their names. An unreadable one is removed, with a warning."""
        for name in sorted(os.listdir(self._directory)):
            if not name.startswith(f"{kind}.") or name.endswith(".new"):
                continue
            try:
                with open(os.path.join(self._directory, name)) as file:
                    record = json.load(file)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except (ValueError, OSError) as error:
                log.warning("journal record %s is damaged (%s), ignoring", name, error)
                self.remove(name)
                continue
            yield name, record
