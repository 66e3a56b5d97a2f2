"""The zygote's task `import`: becomes the importer, a fresh interpreter, so that the zygote need not hold all of it.

Imported by the zygote: keep it small.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from enclos.runtime import protocol


def run(channel: socket.socket, request: protocol.Message) -> NoReturn:
    """Become the importer, with the request as its order. It takes 50 ms, and is not on the way of a launch."""
    order_fd = os.memfd_create("enclos-order", 0)
    fields = [(key, value) for key, values in request.values.items() for value in values]
    os.write(order_fd, protocol.encode(fields))
    channel.set_inheritable(True)
    code = f"import sys; sys.path[:] = {sys.path!r}; from enclos.runtime.images.importer import main; main()"
    os.execv(sys.executable, [sys.executable, "-I", "-c", code, str(channel.fileno()), str(order_fd)])
