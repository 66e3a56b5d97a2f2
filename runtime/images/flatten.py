"""What several layers make of each other: `Tree`, the file tree of adjacent layers, names only.

It has the rules by which umoci unpacks them: what replaces what, whiteouts, opaque directories, hard links, parents
that are symlinks. Pure; runs in the importer, on bytes that a user chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from enclos.runtime.images import tar
from enclos.runtime.images.rules import (
    NAME_LIMIT,
    OPAQUE,
    PATH_LIMIT,
    WHITEOUT_PREFIX,
    BadLayer,
    NeedsBase,
    shown,
    split,
    symlink_target,
)
from enclos.runtime.images.tar import Member

LAYER_BITS = 40
WHITEOUT = -1
WRITTEN = -2
LINKS_LIMIT = 255


class Directory:
    """A directory: its children by name, as Directory, number of a member, or WHITEOUT.

    `entry` is the member with its mode and time, WHITEOUT where only its children were named, or WRITTEN; `touched` the
    last layer that named it or something below it.
    """

    __slots__ = ("children", "entry", "opaque", "touched")

    def __init__(self, layer: int) -> None:
        self.children = _NOTHING
        self.entry = WHITEOUT
        self.opaque = False
        self.touched = layer

    def put(self, name: bytes, what: Directory | int) -> None:
        if self.children is _NOTHING:
            self.children = {}
        self.children[name] = what


# Of all directories without children: a third of their memory.
_NOTHING: dict[bytes, Directory | int] = {}


class Tree:
    """The names of some adjacent layers. A member's number is its layer << 40 | its place in the layer."""

    def __init__(self, lowest: bool) -> None:
        """Make an empty one; `lowest`: nothing is below these layers."""
        self._lowest = lowest
        self._layer = 0
        self.implied = 0  # Directories that only paths name.
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
        self._place(directory, name, number, member)
        if place != parents:
            self.moved[number] = path
        return path

    def _place(self, directory: Directory, name: bytes, number: int, member: Member) -> None:
        before = directory.children.get(name)
        if member.kind == tar.DIRECTORY:
            if not isinstance(before, Directory):
                after = Directory(self._layer)
                directory.put(name, after)
                # What was there hid what the layers below have by that name; the directory would show it again.
                after.opaque = before is not None and not self._lowest
                before = after
            before.entry = number
            before.touched = self._layer
        elif member.kind == tar.LINK:
            self._link(directory, name, member)
        elif member.kind in (tar.FILE, tar.FIFO, tar.SYMLINK):
            directory.put(name, number)
            if member.kind == tar.SYMLINK:
                self._symlinks[number] = symlink_target(member)
        else:  # A device: it is left out, and what it replaced is gone.
            self._delete(directory, name)

    def _link(self, directory: Directory, name: bytes, member: Member) -> None:
        # What it replaces goes first, also where the target is in it, or behind it if that is a symlink.
        directory.children.pop(name, None)
        *parents, last = split(member.target, f"the target of the hard link {shown(member.name)}") or [b""]
        holder, _ = self._directory(parents, create=False)
        if holder is directory and last == name:
            raise BadLayer(f"a hard link to itself ({shown(member.name)})")
        target = holder.children.get(last) if holder is not None else None
        if target is None or target == WHITEOUT:
            if not self._lowest:
                raise NeedsBase
            raise BadLayer(f"a hard link to a file that is not there ({shown(member.name)})")
        if isinstance(target, Directory):
            raise BadLayer(f"a hard link to a directory ({shown(member.name)})")
        directory.put(name, target)
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
                if len(name) > NAME_LIMIT:
                    raise BadLayer(f"a symlink to a name longer than {NAME_LIMIT} bytes ({shown(b'/'.join(parts))})")
                found = Directory(self._layer)
                here.put(name, found)
                self.implied += 1
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
            directory.put(name, WHITEOUT)

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


def names_of_linked(tree: Tree) -> dict[int, list[bytes]]:
    """All names of what has more than one, by its number."""
    names: dict[int, list[bytes]] = {}
    if tree.linked:
        for path, found in tree.walk():
            if isinstance(found, int) and found in tree.linked:
                names.setdefault(found, []).append(path)
    return names
