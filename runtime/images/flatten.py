"""The merge: adjacent layers of an image to one tar stream, without an unpacked tree.

`Tree` is the file tree that the layers make, names only, with the rules by which umoci unpacks them: what replaces
what, whiteouts, opaque directories, hard links, parents that are symlinks. Layers are read once to build it, and once
more for the data of what survives; what is written is forgotten. A single layer, the usual case, is read just once:
nothing in it replaces anything. Its files are not even remembered, because the output refuses what comes a second time.
If something does after all, `Repeat` or the output says so, and the two passes are made.

Not the lowest layers of an image: then what they delete below themselves is handed on to the overlay. A layer that
cannot be understood without those below (a parent directory or the target of a hard link is only there) raises
`NeedsBase`, and the image is merged as a whole. Pure; runs in the importer, on bytes that a user chose.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from enclos.runtime.images import tar
from enclos.runtime.images.order import Limits
from enclos.runtime.images.tar import Member

OPAQUE = b".wh..wh..opq"
WHITEOUT_PREFIX = b".wh."
OPAQUE_XATTR = {b"user.overlay.opaque": b"y"}
# An overlay shows a directory that it does not merge as it is, whiteouts and all, unless this says that there may be
# some: "Check for non-merge dir that may have whiteouts" in fs/overlayfs/inode.c. Empty stands for an unknown origin.
WHITEOUTS_XATTR = {b"user.overlay.origin": b""}
LAYER_BITS = 40
WHITEOUT = -1
WRITTEN = -2
NAME_LIMIT = 255
PATH_LIMIT = 4095
LINKS_LIMIT = 255
LAST_TIME = 2**32 - 1

Open = Callable[[], tar.Reader]


class Output(Protocol):
    """Where members go; hard links after what they name. `write` has to follow for the data of a file with a size."""

    def put(self, member: Member) -> None: ...

    def write(self, data: bytes) -> None: ...


class BadLayer(ValueError):
    """The layer holds what no image may hold; the message names the member."""


class TooLarge(ValueError):
    """A limit of the site; the message says which."""


class NeedsBase(Exception):
    """These layers cannot be merged without the ones below them."""


class Repeat(Exception):
    """A layer replaces what it brought itself: it cannot be written in one pass."""


class Directory:
    """A directory: its children by name, as Directory, number of a member, or WHITEOUT.

    `entry` is the member with its mode and time, WHITEOUT where only its children were named, or WRITTEN; `touched` the
    last layer that named it or something below it; `filled` says that files were put there that nobody remembers.
    """

    __slots__ = ("children", "entry", "filled", "opaque", "touched")

    def __init__(self, layer: int) -> None:
        self.children: dict[bytes, Directory | int] = {}
        self.entry = WHITEOUT
        self.filled = False
        self.opaque = False
        self.touched = layer


class Tree:
    """The names of some adjacent layers. A member's number is its layer << 40 | its place in the layer."""

    def __init__(self, lowest: bool, files: bool = True) -> None:
        """Make an empty one.

        Args:
            lowest: nothing is below these layers.
            files: remember files. Without, for a single layer, `add` raises Repeat where it would have to know them.
        """
        self._lowest = lowest
        self._files = files
        # Without files: paths to which hard links were made. What comes there afterwards was not there before.
        self._targets: set[bytes] = set()
        self._layer = 0
        self.root = Directory(0)
        self._symlinks: dict[int, bytes] = {}
        # Names that a layer gave to a file of a layer below it, by its directory.
        self._linked_now: set[tuple[int, bytes]] = set()
        self.linked: set[int] = set()
        self.moved: dict[int, bytes] = {}

    def begin(self, layer: int) -> None:
        self._layer = layer
        self._linked_now.clear()

    def add(self, number: int, member: Member) -> bytes:
        """Apply one member; returns the path that it has in the tree, for members that are there afterwards."""
        parts = split(member.name)
        if not parts:
            if member.kind != tar.DIRECTORY:
                raise BadLayer("the root directory is no directory")
            self.root.entry = number
            return b""
        *parents, name = parts
        if name.startswith(WHITEOUT_PREFIX):
            self._whiteout(parents, name)
            return b""
        directory, place = self._directory(parents, create=True)
        assert directory is not None
        path = b"/".join([*place, name])
        if len(path) > PATH_LIMIT:
            raise BadLayer(f"a path longer than {PATH_LIMIT} bytes ({shown(member.name)})")
        if path in self._targets:
            raise Repeat
        self._place(directory, name, number, member)
        if place != parents:
            self.moved[number] = path
        return path

    def _place(self, directory: Directory, name: bytes, number: int, member: Member) -> None:
        before = directory.children.get(name)
        if member.kind == tar.DIRECTORY:
            if not isinstance(before, Directory):
                after = directory.children[name] = Directory(self._layer)
                # What was there hid what the layers below have by that name; the directory would show it again.
                after.opaque = before is not None and not self._lowest
                before = after
            before.entry = number
            before.touched = self._layer
        elif member.kind == tar.LINK:
            self._link(directory, name, member)
        elif member.kind == tar.SYMLINK or (member.kind in (tar.FILE, tar.FIFO) and self._files):
            directory.children[name] = number
            if member.kind == tar.SYMLINK:
                self._symlinks[number] = member.target
        elif member.kind in (tar.FILE, tar.FIFO):
            self._pass(directory, name)
        else:  # A device: it is left out, and what it replaced is gone.
            if directory.filled:
                raise Repeat
            self._delete(directory, name)

    def _pass(self, directory: Directory, name: bytes) -> None:
        """A file that is not remembered; what a whiteout deleted in its place is below."""
        directory.filled = True
        directory.children.pop(name, None)

    def _link(self, directory: Directory, name: bytes, member: Member) -> None:
        # What it replaces goes first, also where the target is in it, or behind it if that is a symlink.
        directory.children.pop(name, None)
        *parents, last = split(member.target, f"the target of the hard link {shown(member.name)}") or [b""]
        holder, _ = self._directory(parents, create=False)
        if holder is directory and last == name:
            raise BadLayer(f"a hard link to itself ({shown(member.name)})")
        target = holder.children.get(last) if holder is not None else None
        if target is None and holder is not None and not self._files:
            self._targets.add(b"/".join([*parents, last]))
            self._pass(directory, name)
            return
        if target is None or target == WHITEOUT:
            if not self._lowest:
                raise NeedsBase
            raise BadLayer(f"a hard link to a file that is not there ({shown(member.name)})")
        if isinstance(target, Directory):
            raise BadLayer(f"a hard link to a directory ({shown(member.name)})")
        directory.children[name] = target
        self.linked.add(target)
        self._linked_now.add((id(directory), name))

    def _directory(self, parts: Sequence[bytes], create: bool) -> tuple[Directory | None, list[bytes]]:
        """Walk to a directory, through symlinks, as umoci does; returns it and its path.

        Args:
            create: make what is missing; else the result may be None.
        """
        here, stack = self.root, [self.root]
        place: list[bytes] = []
        todo = list(reversed(parts))
        links = 0
        if create:
            here.touched = self._layer
        while todo:
            name = todo.pop()
            if name == b"..":
                if len(stack) == 1:
                    raise BadLayer(
                        f"a member that leads out of the image through a symlink ({shown(b'/'.join(parts))})"
                    )
                stack.pop()
                place.pop()
                here = stack[-1]
                continue
            found = here.children.get(name)
            if isinstance(found, int) and found in self._symlinks:
                links += 1
                if links > LINKS_LIMIT:
                    raise BadLayer(f"symlinks that lead in a circle ({shown(b'/'.join(parts))})")
                target = self._symlinks[found]
                if target.startswith(b"/"):
                    here, place, stack = self.root, [], [self.root]
                todo += [part for part in reversed(target.split(b"/")) if part not in (b"", b".")]
                continue
            if not isinstance(found, Directory):
                if not self._lowest:
                    raise NeedsBase
                if found is not None:
                    raise BadLayer(f"a member below a file that is no directory ({shown(b'/'.join(parts))})")
                if not create:
                    return None, place
                found = here.children[name] = Directory(self._layer)
            here = found
            if create:
                here.touched = self._layer
            place.append(name)
            stack.append(here)
        return here, place

    # --- what layers delete -----------------------------------------------------------------------------------

    def _whiteout(self, parents: Sequence[bytes], name: bytes) -> None:
        directory, _ = self._directory(parents, create=False)
        if directory is None:
            return
        if name == OPAQUE:
            if directory is self.root and not self._lowest:
                raise NeedsBase  # An overlay merges the roots of its layers in any case.
            self._purge(directory)
            directory.opaque = not self._lowest
            return
        name = name.removeprefix(WHITEOUT_PREFIX)
        if name in (b"", b".", b".."):
            raise BadLayer(f"a whiteout of nothing ({shown(b'/'.join([*parents, WHITEOUT_PREFIX + name]))})")
        if name.startswith(WHITEOUT_PREFIX):
            return  # Of aufs' own files, which no layer has.
        found = directory.children.get(name)
        if isinstance(found, Directory) and found.touched == self._layer:
            self._purge(found)
            found.opaque = not self._lowest
        elif not self._is_fresh(directory, name, found):
            self._delete(directory, name)

    def _is_fresh(self, directory: Directory, name: bytes, found: Directory | int | None) -> bool:
        """Whether the present layer put it there: its whiteouts are of what is below it, wherever they stand in it."""
        if isinstance(found, Directory):
            return found.touched == self._layer
        if found is None or found == WHITEOUT:
            return False
        return found >> LAYER_BITS == self._layer or (id(directory), name) in self._linked_now

    def _purge(self, directory: Directory) -> None:
        """Delete what layers before the present one put below a directory."""
        stack = [directory]  # Not by recursion: a path has room for more names than Python has for calls.
        while stack:
            here = stack.pop()
            for name, found in list(here.children.items()):
                if not self._is_fresh(here, name, found):
                    del here.children[name]
                elif isinstance(found, Directory):
                    stack.append(found)

    def _delete(self, directory: Directory, name: bytes) -> None:
        if self._lowest:
            directory.children.pop(name, None)
        else:
            directory.children[name] = WHITEOUT

    # --- what is left -----------------------------------------------------------------------------------------

    def forget(self, path: bytes) -> None:
        """What is at a path is written, and is asked for no more; so are directories of which nothing is left."""
        while path:
            path, _, name = path.rpartition(b"/")
            parent = self.find(path)
            assert isinstance(parent, Directory)
            del parent.children[name]
            if parent.children or parent.entry != WRITTEN:
                return

    def find(self, path: bytes) -> Directory | int | None:
        """What is at a path, symlinks not followed."""
        here: Directory | int | None = self.root
        for name in path.split(b"/") if path else ():
            if not isinstance(here, Directory):
                return None
            here = here.children.get(name)
        return here

    def walk(self) -> Iterator[tuple[bytes, Directory | int]]:
        """All paths but the root, parents first."""
        stack: list[tuple[bytes, Directory]] = [(b"", self.root)]
        while stack:
            prefix, directory = stack.pop()
            for name, found in directory.children.items():
                path = prefix + b"/" + name if prefix else name
                if isinstance(found, Directory):
                    stack.append((path, found))
                yield path, found


def split(name: bytes, what: str = "") -> list[bytes]:
    """The components of a member's name; BadLayer where they lead anywhere but down.

    The root alone may be called `/`: `umoci insert` calls it so.
    """
    parts = name.split(b"/")
    if b"" in parts or b"." in parts:
        parts = [part for part in parts if part and part != b"."]
    if name.startswith(b"/") and parts:
        wrong = "has an absolute path"
    elif b"\0" in name:
        wrong = "has a NUL in its name"
    elif b".." in parts:
        wrong = "has '..' in its path"
    elif len(name) > NAME_LIMIT and max(map(len, parts), default=0) > NAME_LIMIT:
        wrong = f"has a name longer than {NAME_LIMIT} bytes"
    else:
        return parts
    raise BadLayer(f"{what or f'the member {shown(name)}'} {wrong}")


def shown(name: bytes) -> str:
    text = name.decode("utf-8", "backslashreplace")
    return text if len(text) <= 100 else f"{text[:100]}…"


class Merge:
    """Some adjacent layers, lowest first, and how they become one tar stream."""

    def __init__(self, layers: Sequence[Open], lowest: bool, limits: Limits) -> None:
        self._layers = layers
        self._lowest = lowest
        self._limits = limits
        self._members = 0
        self._bytes = 0
        self.written = 0

    def write(self, out: Output) -> None:
        """Write the merged members, without an end of archive.

        Raises:
            BadArchive, BadLayer, TooLarge: the layers cannot be used; NeedsBase: not without those below;
            Repeat: call `write_twice` with another output.
        """
        if len(self._layers) == 1:
            self._write_once(out)
        else:
            self.write_twice(out)

    def write_twice(self, out: Output) -> None:
        """One pass for the names, one for the data of what is left of them."""
        self._members = self._bytes = 0
        tree = Tree(self._lowest)
        for layer, open_layer in enumerate(self._layers):
            tree.begin(layer)
            for number, member in enumerate(self._counted(open_layer()), layer << LAYER_BITS):
                tree.add(number, member)
        self._members = self._bytes = 0
        names = _names_of_linked(tree)
        for layer, open_layer in enumerate(self._layers):
            reader = open_layer()
            for number, member in enumerate(self._counted(reader), layer << LAYER_BITS):
                self._write_survivor(tree, names, reader, number, member, out)
        self._write_rest(tree, out, {})

    def _counted(self, reader: tar.Reader) -> Iterator[Member]:
        for member in reader:
            self._members += 1
            self._bytes += max(member.size, member.stored) + member.described
            if self._members > self._limits.members:
                raise TooLarge(f"more than {self._limits.members} files")
            if self._bytes > self._limits.bytes:
                raise TooLarge(f"more than {self._limits.bytes} bytes unpacked")
            yield member

    def _write_once(self, out: Output) -> None:
        tree = Tree(self._lowest, files=False)
        reader = self._layers[0]()
        directories: dict[int, Member] = {}
        for number, member in enumerate(self._counted(reader)):
            before = tree.find(b"/".join(split(member.name)))
            if not (before in (None, WHITEOUT) or (isinstance(before, Directory) and member.kind == tar.DIRECTORY)):
                raise Repeat
            described = isinstance(before, Directory) and before.entry != WHITEOUT
            path = tree.add(number, member)
            if number in tree.moved:
                raise Repeat  # What it replaces was not looked at.
            if member.kind == tar.DIRECTORY and not self._lowest:
                directories[number] = member  # Written last: a marker behind it may make it opaque.
            elif member.kind == tar.DIRECTORY:
                if described:
                    raise Repeat
                found = tree.find(path)
                if isinstance(found, Directory) and found.entry == number:
                    out.put(_directory(path, found, member))
                    found.entry = WRITTEN
            elif path and member.kind == tar.LINK:
                target = b"/".join(split(member.target))
                if not isinstance(tree.find(target.rpartition(b"/")[0]), Directory):
                    raise Repeat  # Its parents are symlinks.
                out.put(Member(path, tar.LINK, target=target))
            elif path and member.kind in (tar.FILE, tar.SYMLINK, tar.FIFO):
                self._write_member(reader, path, member, out)
        self._write_rest(tree, out, directories)

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
        self._write_member(reader, paths[0], member, out)
        for other in paths[1:]:
            out.put(Member(other, tar.LINK, target=paths[0]))
        if number not in tree.linked:
            tree.forget(paths[0])

    def _write_member(self, reader: tar.Reader, path: bytes, member: Member, out: Output) -> None:
        size = member.size if member.kind == tar.FILE else 0
        xattrs = _xattrs(member) if member.kind == tar.FILE else {}
        mode = stat.S_IMODE(member.mode) & 0o1777
        target = member.target if member.kind == tar.SYMLINK else b""
        out.put(Member(path, member.kind, size, mode, _time(member), target, xattrs))
        if size:
            reader.copy(member, out.write)
            self.written += size

    def _write_rest(self, tree: Tree, out: Output, directories: dict[int, Member]) -> None:
        """Whiteouts, and directories that no second pass writes: all of one pass, else those that nobody described."""
        root = directories.get(tree.root.entry)
        if root is not None:
            out.put(_directory(b".", tree.root, root))
        elif tree.root.entry == WHITEOUT:
            out.put(Member(b".", tar.DIRECTORY, mode=0o755))
        for path, found in tree.walk():
            if isinstance(found, Directory):
                member = directories.get(found.entry)
                if member is not None or found.entry == WHITEOUT:
                    out.put(_directory(path, found, member))
            elif found == WHITEOUT:
                out.put(Member(path, tar.CHARACTER, mode=0))


def _names_of_linked(tree: Tree) -> dict[int, list[bytes]]:
    names: dict[int, list[bytes]] = {}
    if tree.linked:
        for path, found in tree.walk():
            if isinstance(found, int) and found in tree.linked:
                names.setdefault(found, []).append(path)
    return names


def _directory(path: bytes, found: Directory, member: Member | None) -> Member:
    xattrs = OPAQUE_XATTR if found.opaque else {}
    if WHITEOUT in found.children.values():
        xattrs = xattrs | WHITEOUTS_XATTR
    if member is None:
        return Member(path or b".", tar.DIRECTORY, mode=0o755, xattrs=xattrs)
    mode = stat.S_IMODE(member.mode) & 0o1777
    return Member(path or b".", tar.DIRECTORY, 0, mode, _time(member), b"", _xattrs(member) | xattrs)


def _xattrs(member: Member) -> dict[bytes, bytes]:
    """Only a user's own: the others are rights (file capabilities, ACLs of foreign ids) or an overlay's orders."""
    return {
        key: value
        for key, value in member.xattrs.items()
        if key.startswith(b"user.") and not key.startswith(b"user.overlay.")
    }


def _time(member: Member) -> int:
    return min(max(member.mtime, 0), LAST_TIME)
