"""The store on disk: a record that comes back as it was written, and images that count only when they are whole."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from enclos.runtime.images import convert, fetch, parts
from enclos.runtime.images.cache import Cache
from enclos.runtime.images.layout import UNFINISHED, ImageRecord, Part, Store, hex_of
from enclos.runtime.images.sandbox import Rights

DIGEST = "sha256:" + "ab" * 32
KEY = "cd" * 32


def whole(store: Store) -> ImageRecord:
    fd = store.part_file()
    os.write(fd, b"hsqs")
    store.keep_part(fd, KEY)
    os.close(fd)
    record = ImageRecord(DIGEST, (Part(KEY, 4, "ef" * 32),), '{"Env": ["A=ü"]}', ("public registry/a",))
    store.add(record)
    return record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "store"))
    made.make()
    return made


def test_a_record_comes_back(store: Store) -> None:
    record = whole(store)
    assert store.find(DIGEST) == record
    assert Path(store.part_path(KEY)).read_bytes() == b"hsqs"


def test_an_unnamed_part_leaves_nothing(store: Store) -> None:
    os.close(store.part_file())
    assert os.listdir(f"{store.directory}/parts") == []


def test_an_image_without_all_of_its_parts_is_none(store: Store) -> None:
    whole(store)
    os.truncate(store.part_path(KEY), 3)
    assert store.find(DIGEST) is None
    os.unlink(store.part_path(KEY))
    assert store.find(DIGEST) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', '{"format": 2, "digest": "x"}', "\x00"])
def test_a_damaged_record_is_none(store: Store, text: str) -> None:
    whole(store)
    Path(store.record_path(DIGEST)).write_text(text)
    assert store.find(DIGEST) is None


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../etc", "md5:" + "ab" * 32, "sha256:" + "AB" * 32])
def test_only_a_digest_becomes_a_file_name(digest: str) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        hex_of(digest)


def test_parts_where_unfinished_files_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that refuses O_TMPFILE, as NFS does."""
    opened = os.open

    def refuse(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    store = Store(str(tmp_path))
    store.make()
    kept, dropped = store.part_file(), store.part_file()
    names = os.listdir(tmp_path / "parts")
    assert len(names) == 2 and all(name.endswith(UNFINISHED) for name in names)
    os.write(kept, b"hsqs")
    store.keep_part(kept, "ab" * 32)
    store.drop_part(dropped)
    assert os.listdir(tmp_path / "parts") == [f"{'ab' * 32}.sqsh"]
    assert (tmp_path / f"parts/{'ab' * 32}.sqsh").read_bytes() == b"hsqs"
    again = store.part_file()
    store.keep_part(again, "ab" * 32)
    killed = store.part_file()
    cache = Cache(str(tmp_path), 1 << 30)
    cache.remove_unnamed()  # While an import is under way.
    assert [name.endswith(UNFINISHED) for name in os.listdir(tmp_path / "parts")] == [True]
    cache.open()
    assert os.listdir(tmp_path / "parts") == []
    for fd in (kept, dropped, again, killed):
        os.close(fd)


def test_room_is_made_for_what_comes(tmp_path: Path) -> None:
    """The limit counts, and the disk where it has less; what is in use stays."""
    cache = Cache(str(tmp_path / "cache"), 100 << 20)
    cache.open()

    def add(number: int) -> ImageRecord:
        key = f"{number:064x}"
        with open(cache.store.part_path(key), "wb") as file:
            file.write(bytes(1 << 20))
        record = ImageRecord(f"sha256:{key}", (Part(key, 1 << 20, key),))
        cache.store.add(record)
        os.utime(cache.store.record_path(record.digest), (number, number))
        return record

    records = [add(number) for number in range(1, 5)]
    cache.hold(records[0])
    cache.make_room((), 90 << 20)
    assert len(cache.records()) == 4
    cache.make_room((), 97 << 20)
    assert {record.digest for record in cache.records()} == {records[0].digest, records[3].digest}
    cache.make_room((), cache.free_bytes() + (1 << 30))
    assert [record.digest for record in cache.records()] == [records[0].digest]


def test_a_node_with_hundreds_of_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """All converters of an import and skopeo share the processes that a sandbox's user may have."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(256)))
    threads = convert.compressors(131072) + 4  # Its own two, zstd, one to spare.
    started = fetch._start(["sh", "-c", "echo $GOMAXPROCS"], subprocess.PIPE).communicate()[0]
    assert threads * parts.CONVERTERS + 8 * int(started) < Rights(0, True, 0, 0).processes
