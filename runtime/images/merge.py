"""The merge: adjacent layers of an image to the members of one squashfs file, without an unpacked tree.

Layers are read once for the names (flatten.py), and once more for the data of what survives; what is written is
forgotten. A single layer, the usual case, is read just once (once.py): nothing in it replaces anything. If something
does after all, `Repeat` or the output says so, and the two passes are made.

Not the lowest layers of an image: then what they delete below themselves is handed on to the overlay. A layer that
cannot be understood without those below (a parent directory or the target of a hard link is only there) raises
`NeedsBase`, and the image is merged as a whole. Pure; runs in the importer, on bytes that a user chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from enclos.runtime.images import once, tar
from enclos.runtime.images.flatten import LAYER_BITS, WHITEOUT, WRITTEN, Directory, Tree, names_of_linked
from enclos.runtime.images.order import Limits
from enclos.runtime.images.rules import (
    OPAQUE_XATTR,
    WHITEOUTS_XATTR,
    Output,
    TooLarge,
    kept_mode,
    kept_time,
    kept_xattrs,
    put_file,
    split,
)
from enclos.runtime.images.tar import Member

Open = Callable[[], tar.Reader]
# Estimates, in bytes, of what an entry takes beside its name: in a squashfs file until it is written (squash.c), and in
# the tree of several layers, whose names are Python's. Measured for a million of each; rounded up.
ENTRY_BYTES = 60
DATA_BYTES = 110  # More of a file that has any: where it is, and its end, which the library compares with others'.
TREE_ENTRY_BYTES = 240


class Merge:
    """Some adjacent layers, lowest first."""

    def __init__(self, layers: Sequence[Open], lowest: bool, limits: Limits, need: Callable[[int], None]) -> None:
        """`need` is told how many bytes of memory are expected to be needed, with each member; it may wait."""
        self._layers = layers
        self._lowest = lowest
        self._limits = limits
        self._members = 0
        self._bytes = 0
        self._need = need
        self._needed = 0

    def write(self, out: Output) -> None:
        """Write the merged members.

        Raises:
            BadArchive, BadLayer, TooLarge: the layers cannot be used; NeedsBase: not without those below;
            Repeat, and what the output raises where something is there already: call `write_twice` with another one.
        """
        if len(self._layers) == 1:
            reader = self._layers[0]()
            once.write(self._counted(reader, out.count, ENTRY_BYTES), reader, self._lowest, out)
        else:
            self.write_twice(out)

    def write_twice(self, out: Output) -> None:
        """One pass for the names, one for the data of what is left of them."""
        self._members = self._bytes = 0
        tree = Tree(self._lowest)
        for layer, open_layer in enumerate(self._layers):
            tree.begin(layer)
            members = self._counted(open_layer(), lambda: self._members + tree.implied, TREE_ENTRY_BYTES + ENTRY_BYTES)
            for number, member in enumerate(members, layer << LAYER_BITS):
                tree.add(number, member)
        self._members = self._bytes = 0
        names = names_of_linked(tree)
        for layer, open_layer in enumerate(self._layers):
            reader = open_layer()
            for number, member in enumerate(self._counted(reader, lambda: 0, 0), layer << LAYER_BITS):
                self._write_survivor(tree, names, reader, number, member, out)
        self._write_rest(tree, out)

    def _counted(self, reader: tar.Reader, count: Callable[[], int], entry_bytes: int) -> Iterator[Member]:
        """Members within the limits.

        Args:
            count: how many there are with the directories that only paths name.
            entry_bytes: of memory that each is expected to need beside its name; 0: they have been counted before.
        """
        for member in reader:
            self._members += 1
            self._bytes += max(member.size, member.stored) + member.described
            if max(self._members, count()) > self._limits.members:
                raise TooLarge(f"more than {self._limits.members} files")
            if self._bytes > self._limits.bytes:
                raise TooLarge(f"more than {self._limits.bytes} bytes unpacked")
            if entry_bytes:
                self._needed += entry_bytes + len(member.name) + len(member.target) + DATA_BYTES * (member.size > 0)
                self._need(self._needed)
            yield member

    def _write_survivor(
        self,
        tree: Tree,
        names: dict[int, list[bytes]],
        reader: tar.Reader,
        number: int,
        member: Member,
        out: Output,
    ) -> None:
        if member.kind not in (tar.FILE, tar.SYMLINK, tar.FIFO, tar.DIRECTORY):
            return
        if number in tree.linked:
            paths = names.get(number, [])
        else:
            path = tree.moved.get(number)
            path = b"/".join(split(member.name)) if path is None else path
            found = tree.find(path)
            entry = found.entry if isinstance(found, Directory) else found
            paths = [path] if entry == number else []
        if not paths:
            return
        if member.kind == tar.DIRECTORY:
            found = tree.find(paths[0])
            assert isinstance(found, Directory)
            out.put(_directory(paths[0], found, member))
            found.entry = WRITTEN
            if not found.children:
                tree.forget(paths[0])
            return
        put_file(reader, paths[0], member, out)
        for other in paths[1:]:
            out.put(Member(other, tar.LINK, target=paths[0]))
        if number not in tree.linked:
            tree.forget(paths[0])

    def _write_rest(self, tree: Tree, out: Output) -> None:
        """Whiteouts, and directories that nobody described."""
        if tree.root.entry == WHITEOUT:
            out.put(_directory(b".", tree.root, None))
        for path, found in tree.walk():
            if isinstance(found, Directory):
                if found.entry == WHITEOUT:
                    out.put(_directory(path, found, None))
            elif found == WHITEOUT:
                out.put(Member(path, tar.CHARACTER, mode=0))


def _directory(path: bytes, found: Directory, member: Member | None) -> Member:
    xattrs = OPAQUE_XATTR if found.opaque else {}
    if WHITEOUT in found.children.values():
        xattrs = xattrs | WHITEOUTS_XATTR
    if member is None:
        return Member(path or b".", tar.DIRECTORY, mode=0o755, xattrs=xattrs)
    xattrs = kept_xattrs(member) | xattrs
    return Member(path or b".", tar.DIRECTORY, 0, kept_mode(member), kept_time(member), b"", xattrs)
