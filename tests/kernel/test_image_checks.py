"""Files of images are compared with their checksums: by real children of a real zygote."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import stat
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from enclos.runtime.images import checks
from enclos.runtime.images.checks import ROOT_IDS, Checks, Damaged, ImageFile
from enclos.runtime.images.filekey import file_key
from enclos.runtime.spawner import ChildDied, Spawner

pytestmark = pytest.mark.kernel

USERA, USERB = (61001, 61001, ()), (61002, 61002, ())
SIZE = 512 << 20  # Sparse: nothing on disk, some tenths of a second to hash.


def file_of(path: Path, data: bytes | None = None, owner: int = 0) -> ImageFile:
    """A file that everybody may read, with its right checksum; without data a large one."""
    if data is None:
        with open(path, "wb") as file:
            file.truncate(SIZE)
        return ImageFile(str(path), digest_of_zeros(), owner)
    path.write_bytes(data)
    return ImageFile(str(path), hashlib.sha256(data).hexdigest(), owner)


@functools.cache
def digest_of_zeros() -> str:
    digest = hashlib.sha256()
    for _ in range(SIZE >> 20):
        digest.update(bytes(1 << 20))
    return digest.hexdigest()


def comparing() -> list[int]:
    """Pids of the processes of this test that compare."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,comm"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    zygotes = {row[0] for row in rows if row[1] == str(os.getpid())}
    return [int(row[0]) for row in rows if row[2] == "enclos-compare" and row[1] in zygotes]


def with_checks(tmp_path: Path, use: Callable[[Checks], Awaitable[None]]) -> None:
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)

    async def run() -> None:
        spawner = Spawner()
        await spawner.start()
        try:
            await use(Checks(spawner, str(tmp_path / "verified")))
        finally:
            await spawner.stop()

    asyncio.run(run())


def quiet(text: str) -> None:
    pass


async def until_compared(number: int) -> list[int]:
    """Wait until so many compare."""
    async with asyncio.timeout(10):
        while len(found := comparing()) != number:
            await asyncio.sleep(0.01)
    return found


def test_a_change_of_one_byte_is_found(tmp_path: Path) -> None:
    """Of a file that was found intact before as well; and not by its time alone."""
    path = tmp_path / "image"
    data = os.urandom(3 << 20)

    async def use(made: Checks) -> None:
        file = file_of(path, data)
        await made.check(file, file.key(), ROOT_IDS, quiet)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(Damaged):
            await made.check(file, file.key(), ROOT_IDS, quiet)
        path.write_bytes(data)
        await made.check(file, file.key(), ROOT_IDS, quiet)

    with_checks(tmp_path, use)


def test_what_was_found_intact_is_not_read_again(tmp_path: Path) -> None:
    """Neither by another agent: the note is below /run. Another checksum, or another file in its place, is read."""
    path = tmp_path / "image"

    async def use(made: Checks) -> None:
        file = file_of(path, b"first")
        await made.check(file, file.key(), ROOT_IDS, quiet)
        nobody = Checks(Spawner(), str(tmp_path / "verified"))  # It has no zygote: whoever wants a child fails.
        await nobody.check(file, file.key(), USERA, quiet)
        other = ImageFile(file.path, hashlib.sha256(b"other").hexdigest())
        with pytest.raises(ChildDied):
            await nobody.check(other, other.key(), ROOT_IDS, quiet)
        (tmp_path / "new").write_bytes(b"first")
        os.rename(tmp_path / "new", path)
        with pytest.raises(ChildDied):
            await nobody.check(file, file.key(), ROOT_IDS, quiet)

    with_checks(tmp_path, use)


def test_many_wait_for_one(tmp_path: Path) -> None:
    """One process reads for all, also when the one who began gives up; it ends with the last."""
    file = file_of(tmp_path / "image")

    async def use(made: Checks) -> None:
        everybody = [USERA, USERB, ROOT_IDS] * 4
        waiting = [asyncio.create_task(made.check(file, file.key(), ids, quiet)) for ids in everybody]
        first = await until_compared(1)
        waiting[0].cancel()
        await asyncio.sleep(0.05)
        assert comparing() == first
        for task in waiting[1:]:
            task.cancel()
        await until_compared(0)
        waiting = [asyncio.create_task(made.check(file, file.key(), USERA, quiet)) for _ in range(12)]
        assert len(await until_compared(1)) == 1
        await asyncio.gather(*waiting)
        assert comparing() == []

    with_checks(tmp_path, use)


def test_rights_are_the_users(tmp_path: Path) -> None:
    """Whoever may not read the file learns so, also beside one who may and began before."""
    path = tmp_path / "image"
    file = file_of(path)
    os.chown(path, USERA[0], 0)
    path.chmod(0o400)

    async def use(made: Checks) -> None:
        for first, second in ((USERA, USERB), (USERB, USERA)):
            both = [asyncio.create_task(made.check(file, "", ids, quiet)) for ids in (first, second)]
            found = dict(zip((first, second), await asyncio.gather(*both, return_exceptions=True), strict=True))
            assert found[USERA] is None
            # Who comes while the other's goes on has its word: the image is opened with his own rights anyway.
            assert found[USERB] is None or isinstance(found[USERB], PermissionError)
        with pytest.raises(PermissionError):
            await made.check(file, "", USERB, quiet)
        with pytest.raises(FileNotFoundError):
            await made.check(ImageFile(f"{path}.gone", file.sha256), "", USERA, quiet)
        os.mkfifo(tmp_path / "fifo")
        for name, words in (("fifo", "Invalid argument"), (".", "Is a directory")):
            with pytest.raises(OSError, match=words):
                await made.check(ImageFile(f"{tmp_path}/{name}", file.sha256), "", ROOT_IDS, quiet)

    with_checks(tmp_path, use)


def test_its_user_cannot_stop_it(tmp_path: Path) -> None:
    """Others wait for the same answer. Nor has it any capability while it reads."""
    file = file_of(tmp_path / "image")

    async def use(made: Checks) -> None:
        waiting = asyncio.create_task(made.check(file, file.key(), USERA, quiet))
        (pid,) = await until_compared(1)
        text = Path(f"/proc/{pid}/status").read_text()
        state = dict(line.split(":\t", 1) for line in text.splitlines())
        assert state["Uid"].split() == ["0", "0", "0", "61001"]
        assert int(state["CapEff"], 16) == 0
        for signal in ("STOP", "KILL", "TERM"):
            command = ["setpriv", "--reuid=61001", "--regid=61001", "--clear-groups", "kill", f"-{signal}", str(pid)]
            assert subprocess.run(command, capture_output=True).returncode != 0
        await waiting

    with_checks(tmp_path, use)


def test_a_user_has_one_read_at_a_time(tmp_path: Path) -> None:
    """Of his own store; and his reading keeps nobody else waiting."""
    his = [file_of(tmp_path / f"his{number}", owner=61001) for number in range(3)]
    sites = file_of(tmp_path / "site", b"site")

    async def use(made: Checks) -> None:
        waiting = [asyncio.create_task(made.check(file, file.key(), USERA, quiet)) for file in his]
        await until_compared(1)
        await made.check(sites, sites.key(), USERB, quiet)
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)

    with_checks(tmp_path, use)


def test_notes_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user makes no more than so many, and none of another's go for them. A cache has more files than that."""
    monkeypatch.setattr(checks, "NOTES_OF_USER", 3)

    async def use(made: Checks) -> None:
        cached = [file_of(tmp_path / f"part{number}", b"part") for number in range(5)]
        for file in cached:
            await made.check(file, file.key(), USERA, quiet)
        files = [file_of(tmp_path / f"his{number}", b"his", 61001) for number in range(5)]
        for file in files:
            await made.check(file, file.key(), USERA, quiet)
        nobody = Checks(Spawner(), str(tmp_path / "verified"))
        for file in (*cached, *files[2:]):
            await nobody.check(file, file.key(), USERA, quiet)
        with pytest.raises(ChildDied):
            await nobody.check(files[0], files[0].key(), USERA, quiet)
        for folder in (tmp_path / "verified").iterdir():
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_uid == 0
        assert len(list((tmp_path / "verified/61001").iterdir())) == 3

    with_checks(tmp_path, use)


def test_what_slows_a_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: file_of(tmp_path / name, name.encode()) for name in ("slow", "quick")}

    async def use(made: Checks) -> None:
        said: list[str] = []
        for name, seconds in (("quick", 60), ("slow", 0), ("slow", 0)):
            monkeypatch.setattr(checks, "SLOW_SECONDS", seconds)
            await made.check(files[name], files[name].key(), ROOT_IDS, said.append)
        assert said == [checks.SLOW_WORDS]

    with_checks(tmp_path, use)


def test_the_key_is_what_stat_says(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"12")
    file = ImageFile(str(tmp_path / "image"), "")
    assert file.key() == file_key(os.stat(tmp_path / "image")) and "-2-" in file.key()
    assert ImageFile(str(tmp_path / "gone"), "").key() == ""
