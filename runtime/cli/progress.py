"""How far a pull is: a bar on a terminal, plain lines in a log. The only importer of rich, and only for a terminal.

Both on standard error, so that `--json` has standard output for itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Protocol

from enclos.runtime.cli.common import say
from enclos.runtime.errors import printable
from enclos.runtime.images.filestore import FileStore

LOOK_SECONDS = 0.25


class Show(Protocol):
    """Called with what is being done now; `total` is told once it is known, `end` says what came of it."""

    def __call__(self, text: str) -> None: ...

    def total(self, digest: str, size: int) -> None: ...

    def end(self, text: str) -> None: ...


@contextlib.contextmanager
def shown(name: str, store: FileStore) -> Iterator[Show]:
    """Show the progress of one pull while it lasts."""
    if not sys.stderr.isatty():
        yield Lines(name)
        return
    bar = Bar(name, store)
    try:
        yield bar
    finally:
        bar.stop()


class Lines:
    """One line for each thing that happens."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, text: str) -> None:
        say(f"{self._name}: {text}")

    def total(self, digest: str, size: int) -> None:
        say(f"{self._name}: {digest}, {size / 1e6:.1f} MB to fetch at most")

    def end(self, text: str) -> None:
        say(text)


class Bar:
    """A bar of what has been fetched: the sizes of the files in the store's work directory, looked at now and then."""

    def __init__(self, name: str, store: FileStore) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._name = printable(name)
        self._store = store
        self._blobs = ""
        self._stopped = threading.Event()
        self._task = self._progress.add_task(self._name, total=None)
        self._progress.start()
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looking.start()

    def __call__(self, text: str) -> None:
        self._progress.update(self._task, description=f"{self._name}: {printable(text)}")

    def total(self, digest: str, size: int) -> None:
        self._blobs = f"{self._store.work.work_path(digest)}/blobs/sha256"
        self._progress.update(self._task, total=size)

    def end(self, text: str) -> None:
        self.stop()
        say(text)

    def stop(self) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            self._looking.join()
            self._progress.stop()

    def _look(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            if self._blobs:
                self._progress.update(self._task, completed=_size_of(self._blobs))


def _size_of(directory: str) -> int:
    """The bytes in a directory's files; skopeo's unfinished ones lie one level higher, and count when they are done."""
    try:
        with os.scandir(directory) as entries:
            return sum(entry.stat().st_size for entry in entries)
    except OSError:
        return 0
