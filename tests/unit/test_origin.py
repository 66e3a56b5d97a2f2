"""Whose word the kernel's table of mounts says a file's owner is."""

from enclos.runtime.images.origin import is_users_mount

TABLE = rb"""22 1 0:90 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:41 / /home/a\040-\040b rw,nosuid,nodev - fuse.squashfuse squashfuse rw,user_id=61001,group_id=61001,allow_other
31 22 0:42 / /cvmfs ro,nosuid - fuse cvmfs2 rw,user_id=0,group_id=0,default_permissions,allow_other
32 22 0:43 / /nfs rw - nfs4 server:/user_id=0 rw,vers=4.2
33 22 0:44 / /win rw - fuseblk /dev/sdb1 rw,user_id=61002,group_id=0
130 22 0:45 / /tmp rw - tmpfs tmpfs rw
"""


def test_file_systems_of_roots_are() -> None:
    assert [number for number in (22, 30, 31, 32, 33, 130) if not is_users_mount(TABLE, number)] == [22, 31, 32, 130]


def test_an_unknown_mount_is_a_users() -> None:
    assert is_users_mount(TABLE, 2)
    assert is_users_mount(b"", 22)
