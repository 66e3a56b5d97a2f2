"""The texts of a container's /etc/passwd, group and hosts: the image's or node's lines, and our own. Pure.

Our lines come first, because the C library takes the first that fits: the step's uid has the site's name
even where the image has another user with that number. The image's other lines stay, for its services.
Texts are bytes: images hold any encoding.
"""

from collections.abc import Sequence

FORBIDDEN_BYTES = b":\n\0"
LOCALHOST_LINES = ("127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback")


def passwd(text: bytes, user: str, uid: int, gid: int, home: str, shell: str) -> bytes:
    """The image's passwd with the user's entry; an entry of the image with that name is replaced.

    Raises:
        ValueError: a user name that no passwd file can hold. An unusable home becomes "/" and an
            unusable shell "/bin/sh": they may be a user's environment.
    """
    fields = [_name(user), b"x", b"%d" % uid, b"%d" % gid, b"", _field(home, b"/"), _field(shell, b"/bin/sh")]
    return _joined([b":".join(fields)], text, {fields[0]})


def group(text: bytes, entries: Sequence[tuple[str, int]], user: str = "") -> bytes:
    """The image's group file with these (name, gid); `user` becomes a member of each.

    Entries of the image with one of the names are replaced.
    """
    member = _name(user) if user else b""
    ours = {_name(name): b"%d" % gid for name, gid in entries}
    return _joined([b":".join((name, b"x", gid, member)) for name, gid in ours.items()], text, set(ours))


def hosts(text: bytes, lines: Sequence[str]) -> bytes:
    """localhost, `lines` ("ADDRESS NAME..."), then the node's lines for names that those do not have.

    A name of the overlay network must not lead to the underlay as well: the C library may return both.
    """
    ours = [*LOCALHOST_LINES, *lines]
    taken = {name for line in ours for name in line.encode().split()[1:]}
    rest: list[bytes] = []
    for line in text.splitlines():
        address, *names = line.split(b"#", 1)[0].split() or [b""]
        free = [name for name in names if name not in taken]
        if free:
            rest.append(b" ".join((address, *free)))
    return b"\n".join([*(line.encode() for line in ours), *rest]) + b"\n"


def _joined(ours: list[bytes], text: bytes, replaced: set[bytes]) -> bytes:
    theirs = [line for line in text.splitlines() if line and line.split(b":", 1)[0] not in replaced]
    return b"\n".join([*ours, *theirs]) + b"\n"


def _name(text: str) -> bytes:
    name = text.encode(errors="surrogateescape")
    # "+" and "-" begin the entries that ask another source (nsswitch's compat).
    if not name or name[:1] in b"+-" or any(byte in FORBIDDEN_BYTES for byte in name):
        raise ValueError(f"no name for passwd or group: {text!r}")
    return name


def _field(text: str, instead: bytes) -> bytes:
    field = text.encode(errors="surrogateescape")
    return instead if not field or any(byte in FORBIDDEN_BYTES for byte in field) else field
