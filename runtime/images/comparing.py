"""The zygote's task `compare`: reads one file of an image, and tells whether it is what its checksum says.

With the rights of the user whose step wants it: on a shared file system root may be nobody. The real ids stay root's,
because others wait for the same answer, and a user may stop what is wholly his. The bytes are hashed, and nothing else.
Imported by the zygote: keep it small.
"""

from __future__ import annotations

import errno
import os
import socket
import stat

from enclos.runtime import linux
from enclos.runtime.asuser import as_user, open_as_user
from enclos.runtime.images.filekey import file_key
from enclos.runtime.protocol import Message, send


def run(channel: socket.socket, request: Message) -> int:
    """`uid`, `gid`, each `group`, `path` and `sha256` (hexadecimal digits).

    Answers `intact` with the `key` that the file had before it was read, `different`, or `unreadable` with `errno`.
    """
    linux.drop_bounding_set(0)
    linux.set_no_new_privileges()
    groups = [int(group) for group in request.all("group")]
    with as_user(request.number("uid"), request.number("gid"), groups):
        try:
            key, found = _read(request.get("path"))
        except OSError as error:
            send(channel, [("state", "unreadable"), ("errno", str(error.errno or errno.EIO))])
            return 0
    intact = found == request.get("sha256")
    send(channel, [("state", "intact" if intact else "different"), ("key", key)])
    return 0


def _read(path: str) -> tuple[str, str]:
    """The file's key, and the SHA-256 of its bytes. Raises OSError."""
    import hashlib  # Not above: the zygote and its other children have no use for it.

    with open(open_as_user(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return file_key(status), hashlib.file_digest(file, "sha256").hexdigest()
