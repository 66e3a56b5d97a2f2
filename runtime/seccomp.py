"""The system call filter of `--container-remap-root`, as bytes. Pure: the shim installs it.

Package managers give files to owners that the container does not have, and take their identities. In a
user namespace that maps one uid those calls fail. The filter answers "done" without doing anything, so
that the installation goes on; every file then belongs to the user. It is a convenience and protects
nothing: what the calls could do, the kernel has refused already.
"""

import stat
import struct
from dataclasses import dataclass

# linux/filter.h, linux/bpf_common.h
LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
JUMP_NOT_LESS = 0x35  # BPF_JMP | BPF_JGE | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K

# linux/seccomp.h: results, and offsets in struct seccomp_data
ALLOW = 0x7FFF0000
ERRNO = 0x00050000
KILL_PROCESS = 0x80000000
NUMBER_OFFSET = 0
ARCHITECTURE_OFFSET = 4
ARGUMENTS_OFFSET = 16

ENOSYS = 38
X32_BIT = 0x40000000


@dataclass(frozen=True, slots=True)
class Abi:
    """One way of calling the kernel: its AUDIT_ARCH_* and the numbers it has for our calls."""

    audit: int
    faked: tuple[int, ...]
    # (number, index of the mode among the arguments)
    mknod: tuple[tuple[int, int], ...]
    has_x32: bool = False


X86_64 = Abi(
    audit=0xC000003E,
    # chown fchown lchown fchownat, setuid setgid setreuid setregid setgroups setresuid setresgid
    # setfsuid setfsgid
    faked=(92, 93, 94, 260, 105, 106, 113, 114, 116, 117, 119, 122, 123),
    mknod=((133, 1), (259, 2)),
    has_x32=True,
)
# The 32-bit ABIs have each call twice, for 16-bit and for 32-bit ids.
# fmt: off
_COMPAT_FAKED = (
    16, 95, 182, 198, 207, 212,                       # lchown fchown chown, and the same with 32 bits
    23, 46, 70, 71, 81, 138, 139, 164, 170,           # setuid setgid setre* setgroups setfs* setres*
    203, 204, 206, 208, 210, 213, 214, 215, 216,      # the same with 32 bits
)
# fmt: on
I386 = Abi(audit=0x40000003, faked=(*_COMPAT_FAKED, 298), mknod=((14, 1), (297, 2)))
ARM = Abi(audit=0x40000028, faked=(*_COMPAT_FAKED, 325), mknod=((14, 1), (324, 2)))
AARCH64 = Abi(
    audit=0xC00000B7,
    # fchownat fchown, setregid setgid setreuid setuid setresuid setresgid setfsuid setfsgid setgroups
    faked=(54, 55, 143, 144, 145, 146, 147, 149, 151, 152, 159),
    mknod=((33, 2),),
)

# What programs on a machine (uname -m) can call through: 32-bit programs run on both.
ABIS = {"x86_64": (X86_64, I386), "aarch64": (AARCH64, ARM)}


@dataclass(frozen=True, slots=True)
class _Instruction:
    """A sock_filter whose jumps are still distances: `when_true` and `when_false` instructions on."""

    code: int
    value: int
    when_true: int = 0
    when_false: int = 0

    def packed(self) -> bytes:
        return struct.pack("=HBBI", self.code, self.when_true, self.when_false, self.value)


def remap_root_filter(machine: str) -> bytes:
    """The filter for a machine (`os.uname().machine`), an array of struct sock_filter.

    Raises:
        LookupError: a machine that this file has no numbers for.
    """
    if machine not in ABIS:
        raise LookupError(f"no system call numbers for {machine}")
    program = [_Instruction(LOAD_WORD, ARCHITECTURE_OFFSET)]
    for abi in ABIS[machine]:
        section = _section(abi)
        program.append(_Instruction(JUMP_EQUAL, abi.audit, 0, len(section)))
        program.extend(section)
    # An ABI that this machine does not have: nothing can be said about its numbers.
    program.append(_Instruction(RETURN, KILL_PROCESS))
    return b"".join(instruction.packed() for instruction in program)


def _section(abi: Abi) -> list[_Instruction]:
    """Decide a call of one ABI. Every way through it returns."""
    section = [_Instruction(LOAD_WORD, NUMBER_OFFSET)]
    if abi.has_x32:
        # x32 calls have the same AUDIT_ARCH and other numbers. As if the kernel were built without it.
        section.append(_Instruction(JUMP_NOT_LESS, X32_BIT, 0, 1))
        section.append(_Instruction(RETURN, ERRNO | ENOSYS))
    for number in abi.faked:
        section.append(_Instruction(JUMP_EQUAL, number, 0, 1))
        section.append(_Instruction(RETURN, ERRNO))
    for number, mode_index in abi.mknod:
        decision = _device_decision(mode_index)
        section.append(_Instruction(JUMP_EQUAL, number, 0, len(decision)))
        section.extend(decision)
    section.append(_Instruction(RETURN, ALLOW))
    return section


def _device_decision(mode_index: int) -> list[_Instruction]:
    """Fake the making of a device node; fifos, sockets and files are made for real."""
    # Both architectures are little-endian: the low half of an argument comes first.
    return [
        _Instruction(LOAD_WORD, ARGUMENTS_OFFSET + 8 * mode_index),
        _Instruction(AND, stat.S_IFMT(0o177777)),
        _Instruction(JUMP_EQUAL, stat.S_IFCHR, 1, 0),
        _Instruction(JUMP_EQUAL, stat.S_IFBLK, 0, 1),
        _Instruction(RETURN, ERRNO),
        _Instruction(RETURN, ALLOW),
    ]
