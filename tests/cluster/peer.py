"""What a user's program does on a job network: serve, ask, resolve, fill a socket. Run in containers of the cluster.

Each command prints JSON, a line each. Stands alone: it imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import time

IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2
OVER = b"over"


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def serve(port: str, seconds: str, text: str) -> None:
    """Greet everybody who connects, over both families."""
    with socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        listener.settimeout(float(seconds))
        tell(state="serving", netns=os.readlink("/proc/self/ns/net"))
        with contextlib.suppress(TimeoutError):
            while True:
                client, _ = listener.accept()
                with client:
                    client.sendall(text.encode())


def ask(port: str, *hosts: str) -> None:
    """What a service says, for each address and each name."""
    for host in hosts:
        try:
            with socket.create_connection((host, int(port)), timeout=2) as connection:
                tell(host=host, text=connection.recv(1000).decode(), to=connection.getpeername()[0])
        except OSError as error:
            tell(host=host, error=error.strerror or "timed out")


def resolve(*hosts: str) -> None:
    """The addresses of each name. Family by family: without an nsswitch.conf, glibc stops at the first that answers."""
    for host in hosts:
        found = [socket.getaddrinfo(host, None, family) for family in (socket.AF_INET, socket.AF_INET6)]
        tell(host=host, addresses=sorted({row[4][0] for rows in found for row in rows}))


def network() -> None:
    """The network as a program sees it."""
    found = {}
    for name in sorted(os.listdir("/sys/class/net")):
        with open(f"/sys/class/net/{name}/mtu") as file:
            found[name] = int(file.read())
    tell(node=os.environ.get("SLURMD_NODENAME"), netns=os.readlink("/proc/self/ns/net"), mtu=found)


def reflect(port: str, seconds: str) -> None:
    """Send every datagram back, until OVER or nothing comes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("0.0.0.0", int(port)))
        one.settimeout(float(seconds))
        tell(state="serving")
        with contextlib.suppress(TimeoutError):
            data = b""
            while data != OVER:
                data, source = one.recvfrom(65536)
                one.sendto(data, source)


def sizes(host: str, port: str, *lengths: str) -> None:
    """Send datagrams of these sizes (of the whole IPv4 packet) that may not be fragmented, and await them back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        one.settimeout(5)
        one.connect((host, int(port)))
        _await_reflector(one)
        for length in lengths:
            try:
                one.send(bytes(int(length) - 28))
                tell(length=int(length), back=len(one.recv(65536)) + 28)
            except OSError as error:
                tell(length=int(length), error=error.strerror)
        one.send(OVER)


def _await_reflector(one: socket.socket) -> None:
    """Until a datagram comes back; as long as nobody listens, each is refused (ECONNREFUSED)."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            one.send(b"?")
            one.recv(65536)
            return
        except OSError:
            time.sleep(0.05)


def bind(*ports: str) -> None:
    """Listen on these ports."""
    for port in ports:
        try:
            with socket.create_server(("0.0.0.0", int(port))):
                tell(port=int(port))
        except OSError as error:
            tell(port=int(port), error=error.strerror)


def echo(*addresses: str) -> None:
    """Ping as programs without privileges do (icmp(7): datagram sockets)."""
    for address in addresses:
        six = ":" in address
        family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
        with socket.socket(family, socket.SOCK_DGRAM, protocol) as one:
            one.settimeout(5)
            one.sendto(struct.pack("!BBHHH", 128 if six else 8, 0, 0, 1, 1) + b"enclos", (address, 0))
            answer = one.recv(1024)
        tell(host=address, answered=answer[0] == (129 if six else 0) and answer[8:] == b"enclos")


def stuff(host: str, port: str, seconds: str) -> None:
    """Fill a connection until nothing more fits, and stay."""
    with socket.create_connection((host, int(port))) as connection:
        connection.setblocking(False)
        sent = 0
        quiet = time.monotonic() + 0.3
        while time.monotonic() < quiet:
            with contextlib.suppress(BlockingIOError):
                sent += connection.send(bytes(65536))
                quiet = time.monotonic() + 0.3
        tell(state="full", sent=sent)
        time.sleep(float(seconds))


def swallow(port: str, seconds: str) -> None:
    """Accept a connection and never read."""
    with socket.create_server(("0.0.0.0", int(port))) as listener:
        tell(state="serving")
        connection, _ = listener.accept()
        with connection:
            time.sleep(float(seconds))


def hold(path: str, seconds: str) -> None:
    """Keep a file open."""
    with open(path, "rb"):
        tell(state="held", pid=os.getpid())
        time.sleep(float(seconds))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
