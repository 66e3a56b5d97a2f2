"""Errors: mounts and directories."""

from __future__ import annotations

import errno

from enclos.runtime.errors.error import ADMIN, AdminError, EnclosError, UserError, reason

MOUNTS = "--container-mounts"
# Of a list of names in an error.
NAMES_CHARACTERS = 400


def _mount(source: str, target: str, option: str) -> str:
    return f"{option}={source}:{target}" if source != target else f"{option}={source}"


def bad_mount_syntax(text: str, detail: str) -> EnclosError:
    """--container-mounts cannot be understood."""
    return UserError(
        f"--container-mounts={text}",
        f"invalid format: {detail}",
        hint="write SRC[:DST[:FLAG[+FLAG]]], several separated by commas",
    )


def mount_source_missing(source: str, target: str, option: str = MOUNTS) -> EnclosError:
    """Nothing there, seen with the user's rights. `option` is mounts.site for the site's own mounts."""
    return UserError(
        _mount(source, target, option), "source path does not exist", hint="sources are looked up on the compute node"
    )


def mount_source_denied(source: str, target: str, option: str = MOUNTS) -> EnclosError:
    """The user may not go there, or may do nothing with what is there."""
    return UserError(
        _mount(source, target, option),
        "source path is not accessible",
        "permission denied",
        "sources are opened with your rights on the compute node",
    )


def mount_target_failed(source: str, target: str, number: int, option: str = MOUNTS) -> EnclosError:
    """The place to mount on cannot be made or used."""
    return UserError(
        _mount(source, target, option),
        "couldn't mount at this target in the container",
        reason(number),
        "does the target exist in the image, and is it a directory if the source is one?",
    )


def unmount_failed(target: str, number: int, option: str = MOUNTS) -> EnclosError:
    """umount:TARGET and nothing that could be taken away there."""
    # EINVAL is also what the kernel says of a mount that is locked with the one above it.
    missing = number in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR)
    words = "nothing is mounted there that could be taken away" if missing else reason(number)
    hint = "mounts are made and taken away in the order in which they are given"
    return UserError(f"{option}=umount:{target}", "couldn't unmount in the container", words, hint)


def not_a_device(path: str) -> EnclosError:
    """devices.nodes names something else."""
    return AdminError(f"devices.nodes: {path}", "not a device node", hint=ADMIN + "mend devices.nodes in enclos.yaml")


def device_missing(path: str) -> EnclosError:
    """devices.nodes names nothing."""
    return AdminError(f"devices.nodes: {path}", "no such device node", hint=ADMIN + "mend devices.nodes in enclos.yaml")


def mounts_forbidden(text: str) -> EnclosError:
    """mounts.user is false."""
    return UserError(
        f"--container-mounts={text}",
        "mounts are not allowed at this site",
        hint="ask the administrator to add it to mounts.site in enclos.yaml",
    )


def home_missing(path: str) -> EnclosError:
    """--container-mount-home and no home directory on this node."""
    return UserError(
        "--container-mount-home",
        f"home directory {path or '(unknown)'} cannot be opened",
        hint="drop the option, or check $HOME on the compute node",
    )


def workdir_missing(path: str) -> EnclosError:
    """The directory is not in the container."""
    return UserError(
        f"--container-workdir={path}",
        "couldn't chdir: no such directory in the container",
        hint="it has to exist in the image or in a mount",
    )


def rootfs_full(limit: str) -> EnclosError:
    """The container's tmpfs is full while it is being made."""
    return UserError(
        "container",
        f"its writable layer is full (limit {limit})",
        hint="write to a mounted directory instead; administrator: rootfs.tmpfs_size in enclos.yaml",
    )
