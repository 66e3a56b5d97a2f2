"""What the agent orders from an importer, as data: both import this, and it imports nothing that is heavy. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from enclos.runtime.protocol import Message


@dataclass(frozen=True, slots=True)
class Limits:
    """Of what one merge may read: members of all kinds; bytes of files, with holes, and of what describes them."""

    members: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Packing:
    """How squashfs files are written: compressor, its level (0 for its own default), block size in bytes."""

    compression: str
    level: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Order:
    """What the agent orders, as fields of one packet.

    `whole` wants one squashfs file of all layers instead of parts. `own` is the order of a user to his own importer,
    which is root in a namespace where nobody else is: there are no other ids to take. `directory` is where relative
    paths of archives and layouts begin. `room` bounds the bytes of all squashfs files of the image; 0: nothing does.
    """

    image: str
    default_registry: str
    digest: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    slot: int
    store: str
    auth_files: tuple[str, ...]
    netrc_files: tuple[str, ...]
    limits: Limits
    memory: int
    packing: Packing
    whole: bool = False
    own: bool = False
    directory: str = "/"
    room: int = 0

    @classmethod
    def read(cls, message: Message) -> Order:
        return cls(
            message.get("image"),
            message.get("default_registry"),
            message.get("digest"),
            message.number("uid"),
            message.number("gid"),
            tuple(int(text) for text in message.get("groups").split(",") if text),
            message.number("slot"),
            message.get("store"),
            tuple(message.all("auth")),
            tuple(message.all("netrc")),
            Limits(message.number("limit_files"), message.number("limit_bytes")),
            message.number("memory"),
            Packing(message.get("compression"), message.number("level"), message.number("block")),
            message.get("whole") == "1",
            message.get("own") == "1",
            message.get("directory", "/"),
            message.number("room"),
        )

    def fields(self) -> list[tuple[str, str]]:
        return [
            ("image", self.image),
            ("default_registry", self.default_registry),
            ("digest", self.digest),
            ("uid", str(self.uid)),
            ("gid", str(self.gid)),
            ("groups", ",".join(map(str, self.groups))),
            ("slot", str(self.slot)),
            ("store", self.store),
            *(("auth", path) for path in self.auth_files),
            *(("netrc", path) for path in self.netrc_files),
            ("limit_files", str(self.limits.members)),
            ("limit_bytes", str(self.limits.bytes)),
            ("memory", str(self.memory)),
            ("compression", self.packing.compression),
            ("level", str(self.packing.level)),
            ("block", str(self.packing.block_bytes)),
            ("whole", str(int(self.whole))),
            ("own", str(int(self.own))),
            ("directory", self.directory),
            ("room", str(self.room)),
        ]
