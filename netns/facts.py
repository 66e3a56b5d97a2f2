"""What can go wrong in the network, as facts: errno, object, the kernel's own words.

Holds the exceptions that `enclos.netns` raises and nothing else; it words no message for users (that
is `enclos.runtime.errors`), and makes no system call. Used on both sides of the privilege line.
"""

from __future__ import annotations


class NetworkFact(Exception):
    """Base of everything that this package raises on purpose."""


class KernelRefused(NetworkFact, OSError):
    """The kernel said no. `.errno`, `.object` (what it was asked for), `.text` (its extended ack)."""

    def __init__(self, errno: int, subject: str, text: str = "") -> None:
        OSError.__init__(self, errno, text)
        self.object = subject
        self.text = text

    def __str__(self) -> str:
        return f"{self.object}: [errno {self.errno}] {self.text}".rstrip()


class VniInUse(NetworkFact):
    """Another device of this node has the VNI; `.vni`."""

    def __init__(self, vni: int) -> None:
        super().__init__(f"VNI {vni} belongs to another device")
        self.vni = vni


class PortTaken(NetworkFact):
    """A socket that is not ours has the UDP port; `.uid` is its owner, -1 if it could not be found out."""

    def __init__(self, port: int, family: int, uid: int) -> None:
        super().__init__(f"UDP port {port} is bound by a socket of uid {uid}")
        self.port = port
        self.family = family
        self.uid = uid


class NameUnknown(NetworkFact):
    """Neither /etc/hosts nor the resolver has a usable address for `.name`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no address for {name}")
        self.name = name


class UnderlayMissing(NetworkFact):
    """No interface of this node fits; `.object` is what was looked for, `.reason` why it does not do."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(f"{subject}: {reason}")
        self.object = subject
        self.reason = reason


class BlockTooSmall(NetworkFact):
    """The address block has no address for node `.index`."""

    def __init__(self, block: str, index: int) -> None:
        super().__init__(f"{block} has no address for node {index}")
        self.block = block
        self.index = index


class RelayPortTaken(NetworkFact):
    """Something inside the job's namespace listens where the relay has to."""

    def __init__(self, address: str, port: int) -> None:
        super().__init__(f"{address} port {port} is taken inside the job's network")
        self.address = address
        self.port = port


class RulesRefused(NetworkFact):
    """nft would not load the guard's table; `.text` is what it printed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class DeviceMissing(NetworkFact):
    """No RDMA device `.name` in the namespace that was looked in."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no RDMA device {name}")
        self.name = name


class DeviceInUse(NetworkFact):
    """The node itself, or a program on it, uses an RDMA device; `.name`, `.reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
