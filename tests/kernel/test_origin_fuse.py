"""Whose file system a file is on, as the kernel's own tables say: needs root and /dev/fuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

# Mounted as fusermount does it for a user; nobody serves it, and an O_PATH descriptor asks for nothing.
PROBE = """
import ctypes, os, sys
from enclos.runtime.images.origin import vouched_for_by_user
libc = ctypes.CDLL(None, use_errno=True)
where = sys.argv[1].encode()
print(vouched_for_by_user(os.open(where, os.O_PATH)))
for user in (61001, 0):
    options = f"fd={os.open('/dev/fuse', os.O_RDWR)},rootmode=40000,user_id={user},group_id=0,allow_other"
    if libc.mount(b"x", where, b"fuse.squashfuse", 6, options.encode()):
        sys.exit(os.strerror(ctypes.get_errno()))
    print(vouched_for_by_user(os.open(where, os.O_PATH)))
"""


@pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK), reason="no /dev/fuse")
def test_a_users_fuse_mount_is_told_from_roots(tmp_path: Path) -> None:
    command = ["unshare", "--mount", "--propagation=private", sys.executable, "-c", PROBE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.stderr, done.stdout.split()) == ("", ["False", "True", "False"])
