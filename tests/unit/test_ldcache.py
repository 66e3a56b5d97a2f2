"""The linker's cache: ours is read by the real ldconfig, and libraries are found by the real linker's order."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from enclos.runtime import ldcache
from enclos.runtime.ldcache import Cache, Entry, Malformed
from hypothesis import given
from hypothesis import strategies as st

HOST = Path("/etc/ld.so.cache")
LDCONFIG = shutil.which("ldconfig", path="/usr/sbin:/sbin") or ""
needs_ldconfig = pytest.mark.skipif(not LDCONFIG or not HOST.exists(), reason="needs ldconfig and the host's cache")


def printed(path: Path) -> list[str]:
    done = subprocess.run([LDCONFIG, "-p", "-C", str(path)], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "=>" in line]


@needs_ldconfig
def test_a_cache_survives_being_read_and_written(tmp_path: Path) -> None:
    cache = ldcache.parse(HOST.read_bytes())
    assert len(cache.entries) > 10
    shuffled = list(cache.entries)
    random.Random(7).shuffle(shuffled)
    names = [entry.name for entry in ldcache.join(Cache(), shuffled).entries]
    assert names == [entry.name for entry in cache.entries], "not glibc's order"
    (tmp_path / "cache").write_bytes(ldcache.write(ldcache.join(cache, [])))
    assert printed(tmp_path / "cache") == printed(HOST)


@needs_ldconfig
@pytest.mark.parametrize("form", ["new", "old", "compat"])
def test_all_forms_that_ldconfig_writes(tmp_path: Path, form: str) -> None:
    path = tmp_path / "cache"
    subprocess.run([LDCONFIG, "-c", form, "-C", str(path), "-X"], check=True, capture_output=True)
    if form == "old":
        with pytest.raises(Malformed):
            ldcache.parse(path.read_bytes())
        return
    before = printed(path)
    path.write_bytes(ldcache.write(ldcache.parse(path.read_bytes())))
    assert printed(path) == before


def library(folder: Path, soname: str, answer: int) -> Path:
    source = folder / "x.c"
    source.write_text(f"int answer(void) {{ return {answer}; }}\n")
    made = folder / f"{soname}.77"
    subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", made, source], check=True)
    return made


def entry(path: Path) -> Entry:
    fd = os.open(path, os.O_RDONLY)
    try:
        return ldcache.read_entry(lambda offset, size: os.pread(fd, size, offset), os.fsencode(path))
    finally:
        os.close(fd)


PROGRAM = "int answer(void); int main(void) { return answer(); }\n"


@needs_ldconfig
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to mount a cache")
def test_the_real_linker_finds_what_was_added(tmp_path: Path) -> None:
    """In a mount namespace with our cache in place of the host's; the folder is in no other list."""
    made = library(tmp_path, "libenclosprobe.so.1", 42)
    assert entry(made).name == b"libenclosprobe.so.1"
    (tmp_path / "main.c").write_text(PROGRAM)
    subprocess.run(["cc", "-o", tmp_path / "main", tmp_path / "main.c", made], check=True)
    cache = ldcache.join(ldcache.parse(HOST.read_bytes()), [entry(made)])
    (tmp_path / "cache").write_bytes(ldcache.write(cache))
    script = f"mount --bind {tmp_path}/cache {HOST} && exec {tmp_path}/main"
    assert subprocess.run(["unshare", "-m", "sh", "-c", script], check=False).returncode == 42
    assert subprocess.run([tmp_path / "main"], check=False, capture_output=True).returncode == 127


def test_what_is_added_counts_first() -> None:
    old = Cache((Entry(b"libb.so.2", b"/b", 3), Entry(b"liba.so.1", b"/old", 3)))
    joined = ldcache.join(old, [Entry(b"liba.so.1", b"/new", 3)])
    assert [e.path for e in joined.entries] == [b"/b", b"/new", b"/old"]


def test_hwcaps_are_kept() -> None:
    cache = Cache(
        (Entry(b"liba.so", b"/v3/liba.so", 3, 0, ldcache.HWCAP_IS_EXTENSION | 1),), (b"x86-64-v2", b"x86-64-v3")
    )
    assert ldcache.parse(ldcache.write(cache)) == cache


@given(st.binary(max_size=4096))
def test_junk_is_malformed(data: bytes) -> None:
    for junk in (data, ldcache.MAGIC + data, ldcache.OLD_MAGIC + data):
        try:
            ldcache.parse(junk)
        except Malformed:
            continue


@given(st.binary(min_size=60, max_size=512))
def test_a_library_of_junk_is_malformed(data: bytes) -> None:
    for junk in (data, b"\x7fELF\x02\x01" + data, b"\x7fELF\x02\x01" + bytes(12) + b"\x3e\0" + data):
        with pytest.raises(Malformed):
            ldcache.read_entry(lambda offset, size, junk=junk: junk[offset : offset + size], b"/x")  # type: ignore[misc]


def test_a_program_is_no_library() -> None:
    with pytest.raises(Malformed):
        entry(Path("/bin/sh"))
