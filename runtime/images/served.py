"""A user's image that squashfuse serves: the process ends with the last container that has files of it.

Runs in the agent.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Self


class ServedImage:
    """One squashfuse. Containers on the same files share it; whoever made this has one share.

    `process` is its pid and start time, which name it for an agent after this one.
    """

    def __init__(self, pidfd: int, process: tuple[int, int]) -> None:
        """Takes over the descriptor."""
        self.process = process
        self._pidfd = pidfd
        self._shares = 1

    def share(self) -> Self:
        self._shares += 1
        return self

    def release(self) -> None:
        """Give up a share; the last one ends the process."""
        self._shares -= 1
        if self._shares:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.close(self._pidfd)
