"""The filter, by a small interpreter of the instructions it uses and against the C headers' numbers."""

import re
import stat
import struct
from pathlib import Path

import pytest
from enclos.runtime import seccomp
from enclos.runtime.seccomp import AARCH64, ALLOW, ARM, ERRNO, I386, KILL_PROCESS, X86_64, Abi

DONE = ERRNO
X86_HEADERS = Path("/usr/include/x86_64-linux-gnu/asm")
GENERIC_HEADER = Path("/usr/include/asm-generic/unistd.h")

FAKED = {
    "setuid",
    "setgid",
    "setreuid",
    "setregid",
    "setgroups",
    "setresuid",
    "setresgid",
    "setfsuid",
    "setfsgid",
}
FAKED |= {"chown", "fchown", "lchown", "fchownat"}


def decide(program: bytes, audit: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """Run the filter on one system call, as the kernel does (only the instructions that it may have)."""
    data = struct.pack(
        "=iIQ6Q",
        *struct.unpack("=i", struct.pack("=I", number)),
        audit,
        0,
        *arguments,
        *[0] * (6 - len(arguments)),
    )
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator = position = 0
    while True:
        code, when_true, when_false, value = instructions[position]
        position += 1
        if code == 0x20:
            assert value % 4 == 0 and value < len(data)
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code in (0x15, 0x35):
            taken = accumulator == value if code == 0x15 else accumulator >= value
            position += when_true if taken else when_false
        else:
            assert code == 0x06
            return int(value)


def numbers(header: Path) -> dict[str, int]:
    found = re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text())
    return {name: int(number) for name, number in found}


def headers_say(table: dict[str, int]) -> tuple[set[int], set[int]]:
    faked = {number for name, number in table.items() if name.removesuffix("32") in FAKED}
    return faked, {number for name, number in table.items() if name in ("mknod", "mknodat")}


@pytest.mark.parametrize(
    ("abi", "header"),
    [
        (X86_64, X86_HEADERS / "unistd_64.h"),
        (I386, X86_HEADERS / "unistd_32.h"),
        (AARCH64, GENERIC_HEADER),
    ],
)
def test_numbers_are_the_headers(abi: Abi, header: Path) -> None:
    if not header.exists():
        pytest.skip(f"{header} is of another architecture")
    faked, mknod = headers_say(numbers(header))
    assert set(abi.faked) == faked
    assert {number for number, _ in abi.mknod} == mknod


@pytest.mark.parametrize(
    ("machine", "abi"), [("x86_64", X86_64), ("x86_64", I386), ("aarch64", AARCH64), ("aarch64", ARM)]
)
def test_exactly_these_calls_are_faked(machine: str, abi: Abi) -> None:
    program = seccomp.remap_root_filter(machine)
    faked = {number for number in range(600) if decide(program, abi.audit, number) == DONE}
    assert faked == set(abi.faked)
    assert {decide(program, abi.audit, number) for number in range(600)} == {DONE, ALLOW}


@pytest.mark.parametrize(
    ("machine", "abi"), [("x86_64", X86_64), ("x86_64", I386), ("aarch64", AARCH64), ("aarch64", ARM)]
)
def test_only_device_nodes_are_faked(machine: str, abi: Abi) -> None:
    program = seccomp.remap_root_filter(machine)
    for number, mode_index in abi.mknod:
        for kind, answer in (
            (stat.S_IFCHR, DONE),
            (stat.S_IFBLK, DONE),
            (stat.S_IFIFO, ALLOW),
            (stat.S_IFSOCK, ALLOW),
            (stat.S_IFREG, ALLOW),
            (0, ALLOW),
        ):
            arguments = [7] * 6
            arguments[mode_index] = kind | 0o6644
            assert decide(program, abi.audit, number, tuple(arguments)) == answer


def test_x32_is_as_if_the_kernel_did_not_have_it() -> None:
    program = seccomp.remap_root_filter("x86_64")
    for number in (0x40000000, 0x40000000 + 92, 0x40000200):
        assert decide(program, X86_64.audit, number) == ERRNO | 38


def test_an_unknown_architecture_is_killed() -> None:
    assert decide(seccomp.remap_root_filter("x86_64"), AARCH64.audit, 92) == KILL_PROCESS
    assert decide(seccomp.remap_root_filter("aarch64"), X86_64.audit, 92) == KILL_PROCESS


def test_unknown_machine() -> None:
    with pytest.raises(LookupError, match="riscv64"):
        seccomp.remap_root_filter("riscv64")
