"""One container in the making, seen from the agent: serves what its builder asks for, and holds what comes out.

The agent writes the user namespace's maps and opens the namespaces by the builder's pid, checked by its pidfd. It
mounts nothing itself and never waits for the builder without a deadline (building.py sets it).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from enclos.runtime import errors, linux
from enclos.runtime.builder import Plan, store_plan
from enclos.runtime.images.served import ServedImage
from enclos.runtime.images.store import MountedImage, MountedImages
from enclos.runtime.protocol import Message, ProtocolError
from enclos.runtime.spawner import Child, ChildDied, Spawner
from enclos.runtime.steps import start_time

NAMESPACES = ("user", "mnt", "ipc", "uts")

# Descriptors by name.
Lent = Mapping[str, int]


class Container:
    """The namespaces of a node-step, and the builder until it has finished."""

    def __init__(self, spawner: Spawner, images: MountedImages) -> None:
        self._spawner = spawner
        self._images = images
        self._child: Child | None = None
        self._held: list[MountedImage] = []
        self._server: Child | None = None
        self.served: ServedImage | None = None
        # What others share (images, their maps) is only taken from a builder that still is root.
        self._mapped = False
        self.namespaces: dict[str, int] = {}
        self.environment: list[str] = []
        self.entrypoint: list[str] = []
        self.command: list[str] = []
        self.workdir = ""
        self.devices: list[str] = []
        self.device_environment: list[str] = []
        self.gpus: list[int] = []
        self.image_key = ""
        self.warnings: list[str] = []
        self.timings: list[tuple[str, float]] = []
        self.marks: list[tuple[str, float]] = []

    async def build(self, plan: Plan, network: Callable[[], Awaitable[list[int]]], lent: Mapping[str, Lent]) -> None:
        """Run the early plan: afterwards the namespaces exist, and the builder waits for the late plan.

        Args:
            network: gives the network namespace that the builder enters, and perhaps its /etc/hosts as a memfd;
                the descriptors stay the caller's.
            lent: what else it may ask for: by its name, descriptors that stay the caller's.

        Raises:
            EnclosError: what the builder found wrong.
            ChildDied: the builder was killed.
        """
        plan_fd = store_plan(plan)
        try:
            self._child = self._spawner.spawn("build", fds=[plan_fd])
        finally:
            os.close(plan_fd)
        while True:
            with await self._child.receive() as message:
                self.marks.append((message.get("what") or message.get("state"), time.perf_counter()))
                if self._mapped and message.get("state") not in ("ready", "error"):
                    raise ProtocolError("a builder that is its user's wants something of the node")
                match message.get("state"), message.get("what"):
                    case "need", "net":
                        self._child.send([("state", "given")], await network())
                    case "need", what if what in lent:
                        # With a container that runs, what it asks for next would be another's.
                        self._mapped = what == "container"
                        names = [("name", name) for name in lent[what]]
                        self._child.send([("state", "given"), *names], list(lent[what].values()))
                    case "need", "image":
                        await self._serve_image(plan, message)
                    case "need", "server":
                        await self._serve_file(plan, message)
                    case "need", "attached":
                        self._child.send([("state", "given")], [self._mounted().mount_fd])
                    case "need", "map":
                        self._mapped = True
                        self._write_maps(message)
                        self._child.send([("state", "given")])
                    case "give", "image":
                        self._images.attach(self._mounted(), message.take_fds()[0])
                    case "give", "idmap":
                        self._images.keep_idmap(plan.uid, plan.gid, message.take_fds()[0])
                    case "ready", _:
                        self._open_namespaces()
                        self._take_results(message)
                        return
                    case _:
                        raise failure(message)

    async def finish(self, plan: Plan, descriptors: Mapping[str, int]) -> None:
        """Run the late plan and let the builder end; raises like `build`. The descriptors stay the caller's."""
        if self._child is None:
            raise ChildDied
        if not plan.operations:
            # The builder ends when its channel does; nobody has to wait for it.
            self._child.close()
            self._child = None
            return
        plan_fd = store_plan(plan)
        try:
            names = [("name", name) for name in descriptors]
            self._child.send([("state", "late"), *names], [plan_fd, *descriptors.values()])
        finally:
            os.close(plan_fd)
        with await self._child.receive() as message:
            if message.get("state") != "done":
                raise failure(message)
            self._take_results(message)
        self._child.close()
        self._child = None

    def abandon(self) -> None:
        """Kill the builder and drop everything that it made."""
        if self._child is not None:
            self._child.kill()
            self._child.close()
            self._child = None
        self.close()

    def close(self) -> None:
        """Give up the namespaces and the image: both end with their last user."""
        for fd in self.namespaces.values():
            os.close(fd)
        self.namespaces.clear()
        while self._held:
            self._images.release(self._held.pop())
        if self._server is not None:
            self._server.kill()
            self._server.close()
            self._server = None
        if self.served is not None:
            self.served.release()
            self.served = None

    async def _serve_image(self, plan: Plan, message: Message) -> None:
        """Lend the builder the node's mount of its image, or have it make that mount."""
        assert self._child is not None
        image = await self._images.acquire(message.get("key"), message.get("path"))
        self._held.append(image)
        lent = {"idmap": self._images.idmap(plan.uid, plan.gid), "mounted": image.mount_fd}
        lent = {name: fd for name, fd in lent.items() if fd >= 0}
        self._child.send([("state", "given"), *(("name", name) for name in lent)], list(lent.values()))

    async def _serve_file(self, plan: Plan, message: Message) -> None:
        """Start squashfuse for the builder's image, whose file nobody but its user's processes may parse."""
        assert self._child is not None
        if self._server is not None or self.served is not None:
            raise ProtocolError("the builder has a server already")
        idmap_fd = self._images.idmap(plan.uid, plan.gid)
        fields = [(name, str(number)) for name, number in (("uid", plan.uid), ("gid", plan.gid))]
        fields += [("group", str(group)) for group in plan.groups]
        fields += [("offset", message.get("offset")), ("hide", self._images.directory)]
        self._server = self._spawner.spawn("serve", fields, [*message.fds, *([idmap_fd] if idmap_fd >= 0 else [])])
        with await self._server.receive() as answer:
            if answer.get("state") != "serving":
                raise failure(answer)
            with contextlib.suppress(FileNotFoundError):
                process = self._server.pid, start_time(self._server.pid)
                self.served = ServedImage(os.dup(self._server.pidfd), process)
            mount_fd, complaints_fd, *made = answer.fds
            self._child.send([("state", "given")], [mount_fd, complaints_fd])
            for fd in made:
                self._images.keep_idmap(plan.uid, plan.gid, os.dup(fd))
        if self.served is not None:
            self._server.close()
            self._server = None

    def _mounted(self) -> MountedImage:
        """The image, or the part of one, that the builder has asked for last."""
        if not self._held:
            raise ProtocolError("the builder has not asked for an image")
        return self._held[-1]

    def _write_maps(self, message: Message) -> None:
        """Only root may map several groups. `setgroups` first: else a user could drop a group that denies him files.

        The pid is the builder's for sure: it waits for the answer, and its pidfd says that it has not ended
        after /proc/PID was opened.
        """
        with self._builder_directory() as directory_fd:
            for name, content in (
                ("setgroups", "deny"),
                ("uid_map", message.get("uid_map")),
                ("gid_map", message.get("gid_map")),
            ):
                fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory_fd)
                try:
                    os.write(fd, content.encode())
                except OSError as error:
                    if self._child is not None and self._child.has_ended():
                        raise ChildDied from error
                    raise errors.build_failed(f"write {name}", error.errno or 0) from error
                finally:
                    os.close(fd)

    def _open_namespaces(self) -> None:
        with self._builder_directory() as directory_fd:
            for name in NAMESPACES:
                self.namespaces[name] = os.open(f"ns/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory_fd)

    @contextlib.contextmanager
    def _builder_directory(self) -> Iterator[int]:
        """A descriptor of the builder's /proc/PID; raises ChildDied, also for what is missing in it by then."""
        assert self._child is not None
        try:
            directory_fd = os.open(f"/proc/{self._child.pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                signal.pidfd_send_signal(self._child.pidfd, 0)
                yield directory_fd
            finally:
                os.close(directory_fd)
        except (ProcessLookupError, FileNotFoundError) as error:
            raise ChildDied from error

    def _take_results(self, message: Message) -> None:
        self.environment += message.all("env")
        self.entrypoint += message.all("entrypoint")
        self.command += message.all("command")
        self.workdir = message.get("workdir", self.workdir)
        self.devices += message.all("device")
        self.device_environment += message.all("device_env")
        self.gpus += [int(number) for number in message.all("gpu")]
        self.image_key = message.get("image_key") or self.image_key
        self.warnings += message.all("warning")
        for text in message.all("timing"):
            name, _, ms = text.partition(" ")
            self.timings.append((name, float(ms)))


def failure(message: Message) -> Exception:
    """The error that a builder reported, as it was raised there."""
    if message.get("state") != "error":
        return ProtocolError(f"unexpected state {message.get('state')!r} of a builder")
    parts = (message.get(part) for part in ("subject", "what", "cause", "hint"))
    return errors.EnclosError(*parts)


def clone_directories(paths: Sequence[str]) -> dict[str, int]:
    """Detached copies of those directories of the host that exist; the caller closes them.

    A symlink is not followed, and what is no directory is left out: below a world-writable directory a user
    could have put something else in the place of his own.
    """
    clones: dict[str, int] = {}
    attributes = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
    for path in paths:
        try:
            directory_fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            clones[path] = linux.clone_tree("", directory_fd, recursive=False)
            linux.set_attributes(clones[path], attributes, propagation=linux.MS_SLAVE)
        except OSError as error:
            for fd in clones.values():
                os.close(fd)
            raise errors.build_failed(f"clone {path}", error.errno or 0) from error
        finally:
            os.close(directory_fd)
    return clones
