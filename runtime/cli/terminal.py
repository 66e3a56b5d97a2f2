"""What a program in a container gets instead of the terminal of whoever started it, and the bytes between the two.

A program that has one's terminal can type into it, or read from it when it should not. So a pseudo-terminal is made
here, outside, and passed where standard input and output are a terminal; else each descriptor that is one is replaced
by a pipe. Files and pipes are passed as they are. Runs as whoever types the command.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import termios
import tty
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Self

from enclos.runtime import errors, protocol
from enclos.runtime.protocol import Message

CHUNK_BYTES = 65536
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
WINDOW_BYTES = 8


class _Pump:
    """Bytes from one descriptor to another; it reads no more before what it has read is written."""

    def __init__(self, source: int, sink: int, close: Callable[[], None]) -> None:
        self.source, self.sink = source, sink
        self.pending = b""
        self.ended = False
        self._close = close

    def wants(self) -> tuple[int, int]:
        """The descriptor to wait for, and the event."""
        return (self.sink, select.POLLOUT) if self.pending else (self.source, select.POLLIN)

    def step(self) -> None:
        """Read or write once."""
        try:
            if self.pending:
                self.pending = self.pending[os.write(self.sink, self.pending) :]
            else:
                self.pending = os.read(self.source, CHUNK_BYTES)
                if not self.pending:
                    self.end()
        except BlockingIOError:
            return
        except OSError:
            self.end()  # EIO: nobody has the other side of the pseudo-terminal any more.

    def end(self) -> None:
        """No more bytes; whoever waits for the end of them is told."""
        if not self.ended:
            self.ended = True
            self._close()


class Attachment:
    """The three descriptors of a program, and the relay of what is the terminal's; undone when left."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.is_terminal = os.isatty(0) and os.isatty(1)
        self.program_fds: list[int] = []
        self._theirs: list[int] = []
        self._pumps: list[_Pump] = []
        self._master = -1
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        self._watch_signals()
        if self.is_terminal:
            self._make_terminal()
        for fd in range(len(self.program_fds), 3):
            self.program_fds.append(self._replacement(fd))
        return self

    def __exit__(self, *_: object) -> None:
        self.sent()
        self._undo.close()

    def send(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Give the process in the container the program, with its descriptors.

        Raises:
            EnclosError: exec_too_large.
        """
        fields = [("arg", word) for word in command]
        fields += [("env", f"{name}={value}") for name, value in variables.items()]
        fields.append(("terminal", str(int(self.is_terminal))))
        try:
            protocol.send(self._connection, fields, self.program_fds)
        except protocol.ProtocolError as error:
            raise errors.exec_too_large(protocol.MAX_PACKET_BYTES) from error
        except OSError:
            pass  # It has ended: the answer that does not come says so.
        self.sent()

    def sent(self) -> None:
        """The program has its descriptors: ours of that side are closed, so that its end is seen."""
        while self._theirs:
            os.close(self._theirs.pop())

    def relay(self) -> Message | None:
        """Pass bytes and signals on until the program has ended; None when nobody says how it did."""
        answer: Message | None = None
        said = False
        while not said:
            for fd in self._wait():
                if fd == self._connection.fileno():
                    answer, said = self._answer(), True
                elif fd == self._wakeup_fd:
                    self._forward_signals()
        self._drain()
        return answer

    # --- set-up -----------------------------------------------------------------------------------------------

    def _watch_signals(self) -> None:
        self._wakeup_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._undo.callback(os.close, self._wakeup_fd)
        self._undo.callback(os.close, write_fd)
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False))
        for number in (*FORWARDED, signal.SIGWINCH):
            if signal.getsignal(number) != signal.SIG_IGN:  # As nohup wants it.
                self._undo.callback(signal.signal, number, signal.signal(number, _nothing))

    def _make_terminal(self) -> None:
        """One like the caller's, which becomes a line without functions of its own."""
        settings: list[Any] = termios.tcgetattr(0)
        self._master, slave = os.openpty()
        self._undo.callback(os.close, self._master)
        self._theirs.append(slave)
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        self._take_size()
        tty.setraw(0, termios.TCSANOW)
        self._undo.callback(termios.tcsetattr, 0, termios.TCSADRAIN, settings)
        os.set_blocking(self._master, False)
        self._pumps.append(_Pump(0, self._master, _nothing))
        self._pumps.append(_Pump(self._master, 1, _nothing))
        self.program_fds += [slave, slave]
        if os.isatty(2):
            self.program_fds.append(slave)

    def _replacement(self, fd: int) -> int:
        """A pipe for a descriptor that is a terminal; others as they are."""
        if not os.isatty(fd):
            return fd
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        ours, theirs = (write_fd, read_fd) if fd == 0 else (read_fd, write_fd)
        os.set_blocking(ours, False)
        pump = _Pump(fd, ours, lambda: os.close(ours)) if fd == 0 else _Pump(ours, fd, lambda: os.close(ours))
        self._undo.callback(pump.end)
        self._pumps.append(pump)
        self._theirs.append(theirs)
        return theirs

    # --- while it runs ----------------------------------------------------------------------------------------

    def _wait(self) -> list[int]:
        """Move the bytes that can be moved; returns which of the other descriptors have something."""
        wanted: dict[int, int] = {self._connection.fileno(): select.POLLIN, self._wakeup_fd: select.POLLIN}
        pumps = [pump for pump in self._pumps if not pump.ended]
        for pump in pumps:
            fd, event = pump.wants()
            wanted[fd] = wanted.get(fd, 0) | event
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        ready = dict(poll.poll())
        for pump in pumps:
            fd, event = pump.wants()
            if ready.get(fd, 0) & (event | select.POLLHUP | select.POLLERR | select.POLLNVAL):
                pump.step()
        return [fd for fd in (self._connection.fileno(), self._wakeup_fd) if fd in ready]

    def _answer(self) -> Message | None:
        try:
            return protocol.receive(self._connection)
        except (OSError, protocol.ProtocolError):
            return None

    def _forward_signals(self) -> None:
        with suppress(BlockingIOError):
            for number in os.read(self._wakeup_fd, CHUNK_BYTES):
                if number == signal.SIGWINCH:
                    self._take_size()
                elif number in FORWARDED:
                    with suppress(OSError):
                        protocol.send(self._connection, [("signal", str(number))])

    def _take_size(self) -> None:
        """Of the caller's terminal; the kernel tells the program."""
        if self._master >= 0:
            with suppress(OSError):
                size = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(WINDOW_BYTES))
                fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def _drain(self) -> None:
        """What the program wrote last. A process that it left behind may hold the other side: nobody waits for it."""
        for pump in self._pumps:
            if pump.source == 0:
                continue
            while not pump.ended:
                poll = select.poll()
                fd, event = pump.wants()
                poll.register(fd, event)
                if not pump.pending and not poll.poll(0):
                    break
                pump.step()


def _nothing(*_: object) -> None:
    """A signal is read from the descriptor that it wakes."""
