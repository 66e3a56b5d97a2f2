"""The numbers of constants.py and the machine-independent ones of seccomp.py, as the C headers spell them."""

import subprocess
from pathlib import Path

import pytest
from enclos.runtime import seccomp
from enclos.runtime.linux import constants

# The kernel's headers, and those of the C library for what only it names; they do not go together.
KERNEL_HEADERS = [f"linux/{name}.h" for name in ("fcntl", "openat2", "mount", "sched", "capability", "prctl", "audit")]
KERNEL_HEADERS.append("linux/nsfs.h")
KERNEL_HEADERS.append("linux/seccomp.h")
KERNEL_HEADERS.append("linux/inotify.h")
C_LIBRARY_HEADERS = ["sys/mount.h"]
C_LIBRARY_NAMES = {"MNT_FORCE", "MNT_DETACH", "UMOUNT_NOFOLLOW"}
SECCOMP = {
    "AUDIT_ARCH_X86_64": seccomp.X86_64.audit,
    "AUDIT_ARCH_I386": seccomp.I386.audit,
    "AUDIT_ARCH_AARCH64": seccomp.AARCH64.audit,
    "AUDIT_ARCH_ARM": seccomp.ARM.audit,
    "SECCOMP_RET_ALLOW": seccomp.ALLOW,
    "SECCOMP_RET_ERRNO": seccomp.ERRNO,
    "SECCOMP_RET_KILL_PROCESS": seccomp.KILL_PROCESS,
}
# Newer than the oldest headers that we are built with.
MAY_BE_MISSING = {"MOUNT_ATTR_NOSYMFOLLOW"}


def header_values(names: set[str], headers: list[str], folder: Path) -> dict[str, int]:
    """What a C program that includes the headers prints for these names."""
    lines = ["#define _GNU_SOURCE", *(f"#include <{header}>" for header in ["stdio.h", *headers])]
    lines.append("int main(void) {")
    for name in sorted(names):
        guard = name in MAY_BE_MISSING
        lines += [f"#ifdef {name}"] * guard
        lines.append(f'printf("{name} %lld\\n", (long long)({name}));')
        lines += ["#endif"] * guard
    source = folder / "constants.c"
    source.write_text("\n".join([*lines, "return 0;", "}"]))
    command = ["cc", "-o", str(folder / "constants"), str(source)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode:
        pytest.fail(compiled.stderr)
    output = subprocess.check_output(folder / "constants", text=True)
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def test_constants_are_the_headers(tmp_path: Path) -> None:
    ours = {name: value for name, value in vars(constants).items() if name.isupper()}
    ours.update(SECCOMP)
    assert len(ours) > 70
    theirs = header_values(set(ours) - C_LIBRARY_NAMES, KERNEL_HEADERS, tmp_path)
    theirs |= header_values(C_LIBRARY_NAMES, C_LIBRARY_HEADERS, tmp_path)
    assert set(ours) - set(theirs) <= MAY_BE_MISSING
    assert {name: ours[name] for name in theirs} == theirs
