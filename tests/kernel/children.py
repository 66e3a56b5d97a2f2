"""Run a function in a forked child, which may change its namespaces and credentials, and get its result."""

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

DEADLINE_SECONDS = 30


class ChildFailed(AssertionError):
    """The child's exception, as text."""


def in_child(function: Callable[..., T], *arguments: Any) -> T:  # noqa: ANN401
    """The function's result. An exception in the child fails the test with the child's traceback."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        _report(write_fd, function, arguments)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as stream:
        data = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not data:
        raise ChildFailed(f"child ended with {status}")
    result, error = pickle.loads(data)
    if error is not None:
        raise ChildFailed(error)
    return result  # type: ignore[no-any-return]


def _report(write_fd: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> NoReturn:
    signal.alarm(DEADLINE_SECONDS)
    outcome: tuple[Any, str | None]
    try:
        outcome = (function(*arguments), None)
    except BaseException:
        outcome = (None, traceback.format_exc())
    with os.fdopen(write_fd, "wb") as stream:
        stream.write(pickle.dumps(outcome))
    os._exit(0)


def errno_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> int:  # noqa: ANN401
    """0 if it works, else its errno."""
    try:
        function(*arguments, **keywords)
    except OSError as error:
        return error.errno or -1
    return 0


def proc_status(field: str) -> str:
    """A line of this process's /proc/self/status, without its name."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return line.partition(":")[2].strip()
    raise KeyError(field)
