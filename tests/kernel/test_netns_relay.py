"""The relay as the process it is: forked, in the node's namespace, ended by a pidfd."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from enclos.netns import namespace, overlay, relay
from enclos.netns.facts import RelayPortTaken
from enclos.runtime.linux import CLONE_NEWNET, setns
from netns_nodes import run, socket_in

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

LOOPBACK = "127.0.0.1"
MEGABYTE = 1 << 20


class Stage:
    """A node's namespace with a server in it, a job's namespace, a relay between them, and its life line."""

    def __init__(self, address: str = LOOPBACK, files: int = 4096) -> None:
        self.outside, self.inside = overlay.create_private(), overlay.create_private()
        self.server = socket_in(self.outside, address, socket.SOCK_STREAM)
        self.server.bind((address, 0))
        self.server.listen(64)
        self.server.settimeout(5)
        self.target = (address, int(self.server.getsockname()[1]))
        self.stepd = os.fork()
        if self.stepd == 0:
            self.server.close()
            signal.pause()
            os._exit(0)
        self.life_line = os.pidfd_open(self.stepd)
        listeners = relay.listen(self.inside, [self.target])
        self.pid = os.fork()
        if self.pid == 0:
            try:
                # As the zygote's fork, which has nothing else: what pytest holds would count against `files`.
                needed = {0, 1, 2, self.outside, self.life_line, *(listener.fileno() for listener in listeners)}
                for fd in {int(name) for name in os.listdir("/proc/self/fd")} - needed:
                    with contextlib.suppress(OSError):
                        os.close(fd)
                setns(self.outside, CLONE_NEWNET)
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
                relay.serve(listeners, [self.target], self.life_line)
            finally:
                os._exit(99)
        for listener in listeners:
            listener.close()

    def connect(self) -> socket.socket:
        client = socket_in(self.inside, self.target[0], socket.SOCK_STREAM)
        client.settimeout(5)
        client.connect(self.target)
        return client

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A connection through the relay: the task's end and the server's."""
        client = self.connect()
        server, _ = self.server.accept()
        server.settimeout(5)
        return client, server

    def cpu_ticks(self) -> int:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def resident_kb(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

    def sockets(self) -> int:
        names = [os.readlink(f"/proc/{self.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{self.pid}/fd")]
        return sum(name.startswith("socket:") for name in names)

    def idle(self) -> bool:
        """It sleeps: no processor time in a while, and it waits in epoll."""
        before = self.cpu_ticks()
        time.sleep(0.3)
        return self.cpu_ticks() - before <= 1

    def end(self) -> int | None:
        """slurmstepd ends; the relay's exit code, or None if it does not."""
        os.kill(self.stepd, signal.SIGKILL)
        os.waitpid(self.stepd, 0)
        fd = os.pidfd_open(self.pid)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        over = poll.poll(3000)
        os.close(fd)
        if not over:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.server.close()
        for fd in (self.outside, self.inside, self.life_line):
            os.close(fd)
        return status if over else None


@contextlib.contextmanager
def staged(address: str = LOOPBACK, files: int = 4096) -> Iterator[Stage]:
    stage = Stage(address, files)
    try:
        yield stage
    finally:
        assert stage.end() == 0


def wait_until(condition: object, seconds: float = 3.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("address", [LOOPBACK, "::1"])
def test_a_hundred_megabytes_each_way_arrive_bit_by_bit(address: str) -> None:
    block = os.urandom(MEGABYTE)
    with staged(address) as stage:
        client, server = stage.pair()

        def echo() -> None:
            with server:
                while data := server.recv(MEGABYTE):
                    server.sendall(data)

        def feed() -> None:
            for number in range(100):
                client.sendall(number.to_bytes(4, "big") + block[4:])
            client.shutdown(socket.SHUT_WR)

        workers = [threading.Thread(target=work) for work in (echo, feed)]
        for worker in workers:
            worker.start()
        digest, size = hashlib.sha256(), 0
        while data := client.recv(MEGABYTE):
            digest.update(data)
            size += len(data)
        for worker in workers:
            worker.join()
        expected = hashlib.sha256()
        for number in range(100):
            expected.update(number.to_bytes(4, "big") + block[4:])
        assert size == 100 * MEGABYTE and digest.digest() == expected.digest()
        client.close()
        assert wait_until(lambda: stage.sockets() == 1), "sockets of a finished connection are left"


def test_end_of_one_direction_leaves_the_other_open() -> None:
    with staged() as stage:
        for near, far in (stage.pair(), stage.pair()[::-1]):
            near.sendall(b"question")
            near.shutdown(socket.SHUT_WR)
            assert far.recv(100) == b"question" and far.recv(100) == b""
            assert stage.idle(), "spins on a connection that is closed halfway"
            for _ in range(3):
                far.sendall(b"answer")
                assert near.recv(100) == b"answer"
            far.close()
            assert near.recv(100) == b""
            near.close()
        assert wait_until(lambda: stage.sockets() == 1)


def test_a_reader_that_does_not_read_stops_the_writer_and_costs_nothing() -> None:
    with staged() as stage:
        client, server = stage.pair()
        resident = stage.resident_kb()
        client.settimeout(0.5)
        sent = 0
        payload = os.urandom(MEGABYTE)
        with pytest.raises(TimeoutError):
            while sent < 200 * MEGABYTE:
                sent += client.send(payload)
        assert stage.resident_kb() - resident < 2048
        assert stage.idle()
        client.shutdown(socket.SHUT_WR)
        client.close()  # all of it is still to be delivered, though its sender is gone
        assert stage.idle(), "spins on a sender that has hung up"
        received = 0
        while data := server.recv(MEGABYTE):
            received += len(data)
        assert received == sent
        server.close()


def test_both_ends_closed_with_data_on_the_way() -> None:
    """Its socket to the client has hung up for good while what came from it cannot be delivered yet."""
    with staged() as stage:
        client, server = stage.pair()
        client.settimeout(0.5)
        sent = 0
        with pytest.raises(TimeoutError):
            while True:
                sent += client.send(bytes(MEGABYTE))
        client.shutdown(socket.SHUT_WR)
        server.shutdown(socket.SHUT_WR)
        before, received = stage.cpu_ticks(), 0
        while data := server.recv(MEGABYTE // 4):
            received += len(data)
            time.sleep(0.03)
        assert received == sent
        assert stage.cpu_ticks() - before < 15
        client.close()
        server.close()
        assert wait_until(lambda: stage.sockets() == 1)


def test_reset_is_passed_on() -> None:
    with staged() as stage:
        for near, far in (stage.pair(), stage.pair()[::-1]):
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, relay.RESET)
            near.close()
            with pytest.raises(ConnectionResetError):
                far.recv(1)
            far.close()
        assert wait_until(lambda: stage.sockets() == 1)


def test_refused_outside_is_refused_inside() -> None:
    with staged() as stage:
        stage.server.close()
        with stage.connect() as client, pytest.raises(ConnectionResetError):
            client.recv(1)
        assert stage.idle()
        assert wait_until(lambda: stage.sockets() == 1)


def test_more_connections_than_the_limit_wait_their_turn() -> None:
    files = 64
    limit = (files - relay.SPARE_DESCRIPTORS - 1) // 2
    with staged(files=files) as stage:
        clients = [stage.connect() for _ in range(limit + 5)]
        for client in clients:
            client.sendall(b"hello")
        servers = [stage.server.accept()[0] for _ in range(limit)]
        stage.server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            stage.server.accept()
        assert stage.idle(), "spins on connections that it cannot take"
        for client in clients[:5]:
            client.close()
        for server in servers:
            server.close()
        stage.server.settimeout(3)
        for _ in range(5):
            server, _ = stage.server.accept()
            assert server.recv(10) == b"hello"
            server.close()


@pytest.mark.parametrize("spare", [0, 1], ids=["none", "one"])
def test_descriptors_that_run_out_do_not_make_it_spin_or_drop(spare: int) -> None:
    with staged() as stage:
        first = stage.pair()  # it runs, and has set its own limit
        numbers = {int(name) for name in os.listdir(f"/proc/{stage.pid}/fd")}
        lowest = min(set(range(1000)) - numbers)
        resource.prlimit(stage.pid, resource.RLIMIT_NOFILE, (lowest + spare, 4096))
        client = stage.connect()
        assert stage.idle()
        resource.prlimit(stage.pid, resource.RLIMIT_NOFILE, (4096, 4096))
        client.sendall(b"late")
        server, _ = stage.server.accept()
        assert server.recv(10) == b"late"
        assert first[0].fileno() >= 0


def test_idle_relay_sleeps_and_ends_with_slurmstepd_and_open_connections() -> None:
    with staged() as stage:
        client, server = stage.pair()
        assert stage.idle()
        state = Path(f"/proc/{stage.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "S"
    for end in (client, server):
        with contextlib.suppress(ConnectionResetError):
            assert end.recv(1) == b""


def test_only_specific_listeners_of_that_process_are_targets() -> None:
    outside = overlay.create_private()
    mine, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            setns(outside, CLONE_NEWNET)
            kept = []
            for address in (LOOPBACK, "::1", "0.0.0.0", "::", "127.0.0.9"):
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                sock = socket.socket(family, socket.SOCK_STREAM)
                sock.bind((address, 0))
                if address != "127.0.0.9":
                    sock.listen()
                kept.append(sock)
            theirs.send(f"{kept[0].getsockname()[1]} {kept[1].getsockname()[1]}".encode())
            signal.pause()
        finally:
            os._exit(0)
    ports = [int(port) for port in mine.recv(100).split()]
    try:
        with socket_in(outside, LOOPBACK, socket.SOCK_STREAM) as other, namespace.inside(outside):
            other.bind((LOOPBACK, 0))
            other.listen()
            assert relay.step_listeners(child) == [(LOOPBACK, ports[0]), ("::1", ports[1])]
            assert (LOOPBACK, other.getsockname()[1]) in relay.step_listeners(os.getpid())
        assert relay.step_listeners(child) == [], "sockets of another namespace"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(outside)
    with pytest.raises(FileNotFoundError):
        relay.step_listeners(child)


def test_listeners_are_inside_and_a_taken_port_is_named() -> None:
    inside = overlay.create_private()
    own = os.stat("/proc/thread-self/ns/net").st_ino
    with socket_in(inside, LOOPBACK, socket.SOCK_STREAM) as users:
        users.bind((LOOPBACK, 0))
        users.listen()
        port = users.getsockname()[1]
        before = os.listdir("/proc/self/fd")
        with pytest.raises(RelayPortTaken) as caught:
            relay.listen(inside, [("::1", 40000), (LOOPBACK, port)])
        assert (caught.value.address, caught.value.port) == (LOOPBACK, port)
        assert os.listdir("/proc/self/fd") == before
    # A PMIx server on an address of the host: the namespace gets it, on its loopback only.
    for _ in range(2):
        (listener,) = relay.listen(inside, [("192.0.2.9", 40001)])
        assert listener.getsockname() == ("192.0.2.9", 40001)
        assert "192.0.2.9/32" in run(inside, "ip -4 -br addr show lo")
        listener.close()
    assert os.stat("/proc/thread-self/ns/net").st_ino == own
    with pytest.raises(OSError) as refused:
        socket.create_connection(("127.0.0.1", 40001), timeout=1)
    assert refused.value.errno == errno.ECONNREFUSED
    os.close(inside)
