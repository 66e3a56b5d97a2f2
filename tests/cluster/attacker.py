"""What an attacker types: a user with a shell on a node, as himself. Copied to the cluster and run there by users.

Each command tries something that must not work and prints what came of it as JSON, a line each; nothing here decides
what is right. Stands alone: it imports nothing of the project, and runs with any Python 3 that a node has.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

LIBC = ctypes.CDLL(None, use_errno=True)
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
SYS_PIDFD_OPEN, SYS_PIDFD_GETFD = 434, 438
USER_SOCKET = "/run/enclos/user.sock"
PORT = 4789


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def attempt(what: Callable[[], object]) -> str:
    """The name of the error, or "ok"."""
    try:
        what()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return "ok"


def call(number: int, *arguments: int) -> int:
    result = int(LIBC.syscall(ctypes.c_long(number), *[ctypes.c_long(value) for value in arguments]))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def trace(request: int, pid: int) -> None:
    if LIBC.ptrace(request, pid, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "")


def steal(pid: int) -> None:
    pidfd = call(SYS_PIDFD_OPEN, pid, 0)
    call(SYS_PIDFD_GETFD, pidfd, 3, 0)


def read_memory(pid: int) -> None:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        file.read(1)


def look_into(pid: int) -> dict[str, str]:
    """Everything that would show a process, or give power over it."""
    folder = f"/proc/{pid}"
    return {
        "attach": attempt(lambda: trace(PTRACE_ATTACH, pid)),
        "seize": attempt(lambda: trace(PTRACE_SEIZE, pid)),
        "getfd": attempt(lambda: steal(pid)),
        "mem": attempt(lambda: read_memory(pid)),
        "environ": attempt(lambda: open(f"{folder}/environ", "rb").close()),
        "maps": attempt(lambda: open(f"{folder}/maps", "rb").read(1)),
        "fd": attempt(lambda: os.listdir(f"{folder}/fd")),
        "root": attempt(lambda: os.readlink(f"{folder}/root")),
        "cwd": attempt(lambda: os.readlink(f"{folder}/cwd")),
        "exe": attempt(lambda: os.readlink(f"{folder}/exe")),
        "mnt": attempt(lambda: os.readlink(f"{folder}/ns/mnt")),
        "user": attempt(lambda: os.readlink(f"{folder}/ns/user")),
    }


def processes(name: str) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/comm") as file:
                if file.read().strip() == name:
                    yield int(entry)


def hunt(name: str, seconds: str) -> None:
    """Stop every process of that name as soon as the kernel allows it, and look into it."""
    end = time.monotonic() + float(seconds)
    stopped: set[int] = set()
    tell(state="hunting")
    while time.monotonic() < end:
        found = set(processes(name)) - stopped
        # Those of others, and ours while they are root's still, are tried again and again.
        for pid in [*found] * 50:
            if pid not in stopped and attempt(lambda pid=pid: os.kill(pid, signal.SIGSTOP)) == "ok":  # type: ignore[misc]
                stopped.add(pid)
                tell(pid=pid, found=look_into(pid))


def slay(name: str, seconds: str) -> None:
    """Kill every process of that name as soon as the kernel allows it."""
    end = time.monotonic() + float(seconds)
    tell(state="hunting")
    while time.monotonic() < end:
        for pid in processes(name):
            while attempt(lambda pid=pid: os.kill(pid, signal.SIGKILL)) == "EPERM" and time.monotonic() < end:  # type: ignore[misc]
                pass


def inspect(*names: str) -> None:
    """Look into running processes by name, and try to signal them."""
    for name in names:
        for pid in processes(name):
            facts = look_into(pid)
            facts |= {"signal": attempt(lambda pid=pid: os.kill(pid, signal.SIGSTOP))}  # type: ignore[misc]
            tell(name=name, found=facts)


def bind() -> None:
    """Bind the tunnels' port in every way that might slip past its holder."""
    families = [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET, node_address())]
    families += [(socket.AF_INET6, "::"), (socket.AF_INET6, "::1"), (socket.AF_INET6, "::ffff:127.0.0.1")]
    for family, address in families:
        for options in ([], [socket.SO_REUSEADDR], [socket.SO_REUSEPORT], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]):
            for device in (b"", b"lo", b"eth0"):
                with socket.socket(family, socket.SOCK_DGRAM) as one:
                    for option in options:
                        one.setsockopt(socket.SOL_SOCKET, option, 1)
                    if device:
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
                    bound = attempt(lambda one=one, address=address: one.bind((address, PORT)))  # type: ignore[misc]
                    tell(address=address, device=device.decode(), result=bound)


def hold(seconds: str) -> None:
    """Bind the tunnels' port, if it is free, and keep it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        tell(result=attempt(lambda: one.bind(("0.0.0.0", PORT))))
        time.sleep(float(seconds))


def node_address() -> str:
    return str(socket.gethostbyname(os.uname().nodename))


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0,
                       socket.inet_aton(source), socket.inet_aton(target))  # fmt: skip
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def udp(source: int, target: int, payload: bytes) -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(payload), 0) + payload


def tunnelled(vni: int, mac: str, source: str, target: str, port: int, text: str) -> bytes:
    """A VXLAN packet's payload: a UDP datagram for somebody inside that network."""
    frame = bytes.fromhex(mac.replace(":", "")) + b"\x02\0\0\0\0\x99" + b"\x08\0"
    frame += ipv4(source, target, socket.IPPROTO_UDP, udp(1, port, text.encode()))
    return struct.pack("!II", 0x08000000, vni << 8) + frame


def inject(vni: str, mac: str, source: str, target: str, port: str, text: str, *towards: str) -> None:
    """Send crafted packets to the tunnels' port of some addresses, each in several ways."""
    for address in towards:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for way in ("plain", "connected", "fragmented", "bound"):
            packet = tunnelled(int(vni), mac, source, target, int(port), text + "-" + way + "-" + address)
            packet += bytes(4000) if way == "fragmented" else b""
            tell(to=address, way=way, result=attempt(lambda: _send(family, address, packet, way)))  # noqa: B023


def _send(family: int, address: str, packet: bytes, way: str) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        if way == "bound":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        if way == "connected":
            one.connect((address, PORT))
            one.send(packet)
        else:
            one.sendto(packet, (address, PORT))


def forge(source_node: str, towards: str, *arguments: str) -> None:
    """As root of a machine without a guard: the same packet with a peer's address as its source."""
    vni, mac, source, target, port, text = arguments
    payload = tunnelled(int(vni), mac, source, target, int(port), text)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(ipv4(source_node, towards, socket.IPPROTO_UDP, udp(50000, PORT, payload)), (towards, 0))
    tell(result="sent")


def listen(port: str, seconds: str) -> None:
    """Print every datagram that arrives at a UDP port, until one says `stop`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("0.0.0.0", int(port)))
        one.settimeout(float(seconds))
        tell(state="listening")
        with contextlib.suppress(TimeoutError):
            while (text := one.recv(65536).decode()) != "stop":
                tell(got=text)
    tell(state="over")


def serve(seconds: str) -> None:
    """A service on the node's loopback that trusts whoever connects; says its port, then how many came."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(float(seconds))
        tell(port=listener.getsockname()[1])
        came = 0
        with contextlib.suppress(TimeoutError):
            while True:
                listener.accept()[0].close()
                came += 1
        tell(came=came)


def connect(*targets: str) -> None:
    """Try TCP connections (ADDRESS/PORT)."""
    for text in targets:
        address, _, port = text.rpartition("/")
        tell(to=text, result=attempt(lambda: _connect(address, int(port))))  # noqa: B023


def _connect(address: str, port: int) -> None:
    try:
        with socket.create_connection((address, port), timeout=1.5):
            pass
    except TimeoutError as error:
        raise OSError(errno.ETIMEDOUT, "") from error


def listeners() -> None:
    """The TCP ports that listen in this network namespace."""
    found = []
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as file:
            rows = [row.split() for row in file.read().splitlines()[1:]]
        found += [int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"]
    tell(ports=sorted(found))


def echo(address: str) -> None:
    """Ping as programs without privileges do (icmp(7): datagram sockets)."""
    six = ":" in address
    protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    with socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM, protocol) as one:
        one.settimeout(5)
        one.sendto(struct.pack("!BBHHH", 128 if six else 8, 0, 0, 1, 1) + b"enclos", (address, 0))
        answer = one.recv(1024)
    tell(answer=answer[0] == (129 if six else 0) and answer[8:] == b"enclos")


def groups(path: str) -> None:
    """Get rid of a group that denies a file, and read the file."""
    tell(setgroups=attempt(lambda: os.setgroups([])), read=attempt(lambda: open(path).close()))
    tell(unshare=attempt(lambda: _nested()), setgroups=attempt(lambda: os.setgroups([])))
    tell(read=attempt(lambda: open(path).close()))


def _nested() -> None:
    uid, gid = os.getuid(), os.getgid()
    if LIBC.unshare(0x10000000) < 0:
        raise OSError(ctypes.get_errno(), "")
    with contextlib.suppress(OSError), open("/proc/self/setgroups", "w") as file:
        file.write("allow")
    for name, text in (("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def network_power() -> None:
    """Power over the network namespace, as the user and as root of a user namespace of his own."""
    for nested in (False, True):
        if nested:
            _nested()
        tell(
            packet=attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300).close()),
            raw=attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close()),
            sysctl=attempt(lambda: os.close(os.open("/proc/sys/net/ipv4/ip_forward", os.O_WRONLY))),
        )


def enter(pid: str, *rows: str) -> None:
    """Enter a container's user and mount namespaces from outside, with all the power of their owner, and run rows."""
    fds = {name: os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in ("user", "mnt", "net")}
    for name, kind in (("user", 0x10000000), ("net", 0x40000000), ("mnt", 0x00020000)):
        result = 0 if LIBC.setns(fds[name], kind) == 0 else ctypes.get_errno()
        tell(enter=name, result=errno.errorcode.get(result, "ok"))
    for row in rows:
        pid_of_child = os.fork()
        if pid_of_child == 0:
            os.execv("/bin/sh", ["sh", "-c", f"exec 2>&1; {row}"])
        _, status = os.waitpid(pid_of_child, 0)
        tell(row=row, status=os.waitstatus_to_exitcode(status))


def swap(one: str, other: str, seconds: str) -> None:
    """Exchange two names as fast as possible."""
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        LIBC.renameat2(-100, one.encode(), -100, other.encode(), 2)


def flood(count: str, seconds: str) -> None:
    """Open many connections to the users' socket and say nothing."""
    held = []
    for _ in range(int(count)):
        one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one.setblocking(False)
        with contextlib.suppress(OSError):
            one.connect(USER_SOCKET)
            held.append(one)
    tell(held=len(held))
    time.sleep(float(seconds))


def pester(seconds: str) -> None:
    """Ask as fast as the socket takes it, on as many connections as there may be."""
    held = []
    for _ in range(32):
        one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(OSError):
            one.connect(USER_SOCKET)
            one.setblocking(False)
            held.append(one)
    tell(held=len(held))
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        for one in held:
            with contextlib.suppress(OSError):
                one.send(b"version=1\0verb=ps\0")
            with contextlib.suppress(OSError):
                one.recv(1 << 17)


def linger(seconds: str) -> None:
    """Send a TCP socket whose close takes as long as one likes (SO_LINGER, data that nobody reads)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.send(bytes(65536))
        one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one.connect(USER_SOCKET)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [client.fileno()]))]
        tell(sent=attempt(lambda: one.sendmsg([b"version=1\0verb=status\0"], rights)))
        client.close()
        time.sleep(float(seconds))
        server.close()


def junk() -> None:
    """Packets that break every rule of the users' socket, and what came back."""
    ask = b"version=1\0verb=ps\0"
    packets = [
        b"x", b"\0", b"\0" * 100, b"=\0", b"version\0", ask[:-1], b"version=\xff\0verb=ps\0", b"verb=ps\0",
        b"version=" + b"9" * 4000 + b"\0verb=ps\0", b"version=1\0oldest=x\0verb=ps\0", b"version=1\0verb=\xff\xfe\0",
        b"version=1\0verb=prepare\0job=1\0uid=0\0", b"version=1\0verb=end\0job=1\0", b"version=1\0verb=gc\0",
        b"version=0\0verb=ps\0", b"a=b\0" * 1000, bytes(200000), ask + b"k=v\0" * 40000, b"id=1\0uid=0\0" + ask * 300,
    ]  # fmt: skip
    for packet in packets:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as one:
            one.settimeout(5)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            one.connect(USER_SOCKET)
            sent = attempt(lambda: one.send(packet))  # noqa: B023
            try:
                answer = one.recv(1 << 17)
            except OSError as error:
                answer = errno.errorcode[error.errno or 0].encode()
            tell(size=len(packet), sent=sent, answer=answer.replace(b"\0", b" ").decode(errors="replace"))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
