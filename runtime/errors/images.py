"""Errors: images that are files and directories, and how a step gets its root."""

from __future__ import annotations

from collections.abc import Sequence

from enclos.runtime.errors.error import ADMIN, AdminError, EnclosError, UserError, reason


def image_as(reference: str) -> str:
    """The subject of an error of an image: the option as typed."""
    return f"--container-image={reference}"


def image_required(option: str) -> EnclosError:
    """A container option without an image."""
    return UserError(
        option, "it needs --container-image as well", hint="give --container-image=PATH, or drop this option"
    )


def image_not_found(reference: str) -> EnclosError:
    """The path does not exist on this node, or it is no path at all."""
    if reference.startswith(("/", ".")):
        return UserError(
            image_as(reference),
            "image not found",
            hint="images are looked up on the compute node; is the path on a shared file system?",
        )
    return UserError(
        image_as(reference),
        "image not found",
        hint="give docker://REGISTRY/NAME:TAG, or the path of a squashfs file or directory: /PATH or ./PATH",
    )


def image_not_readable(reference: str) -> EnclosError:
    """The user may not read the image."""
    return UserError(
        image_as(reference),
        "image is not readable",
        "permission denied",
        "you need read access to the file and search access to all directories above it",
    )


def image_wrong_kind(reference: str) -> EnclosError:
    """A socket, device or pipe."""
    return UserError(
        image_as(reference),
        "image is neither a regular file nor a directory",
        hint="give a squashfs file or a directory",
    )


def image_has_mounts(reference: str) -> EnclosError:
    """A directory with other file systems mounted below it: an overlay would show what they cover."""
    return UserError(
        image_as(reference),
        "image directory has other file systems mounted below it",
        hint="give a directory without mounts inside, or make a squashfs file of it",
    )


def slurm_user_namespace(reference: str) -> EnclosError:
    """slurmstepd itself lives in a user namespace (namespace/linux of Slurm 26.05)."""
    return UserError(
        image_as(reference),
        "containers cannot be joined from Slurm's user namespace (namespace.yaml has CLONE_NEWUSER)",
        hint="administrator: remove CLONE_NEWUSER from clone_ns_flags in namespace.yaml",
    )


def not_squashfs(reference: str) -> EnclosError:
    """The file does not start with a squashfs superblock."""
    return UserError(
        image_as(reference),
        "image is not a squashfs file",
        hint="'file PATH' tells what it is; mksquashfs or tar2sqfs make one",
    )


def image_sif_unusable(reference: str, detail: str) -> EnclosError:
    """A SIF file (Singularity, Apptainer) without a squashfs partition that this node can run."""
    return UserError(
        image_as(reference),
        "this SIF file cannot be used",
        detail,
        "it needs a squashfs root file system that is not encrypted, of the node's architecture",
    )


def image_truncated(reference: str, expected: int, found: int) -> EnclosError:
    """The file is shorter than its superblock says; both in bytes."""
    return UserError(
        image_as(reference),
        "image is truncated",
        f"{found} bytes, its header says {expected}",
        "copy or build it again",
    )


def image_damaged(reference: str, detail: str) -> EnclosError:
    """The kernel refused to mount it, or to read files in it."""
    return UserError(
        image_as(reference),
        "image cannot be read",
        detail,
        "possibly damaged, or its compression is not known to the node's kernel; build it again with gzip or zstd",
    )


def image_not_as_pulled(reference: str, path: str, digest: str, kind: str) -> EnclosError:
    """The file of a store (`site` or `user`) has other bytes than when it was put there."""
    mend = f"'enclos image rm {digest[:19]}', then pull or import it again"
    what, cause = "image is damaged", f"{path} is not what its checksum says"
    if kind == "site":
        return AdminError(image_as(reference), what, cause, f"{ADMIN}{mend}, as root")
    return UserError(image_as(reference), what, cause, mend)


def image_unreadable(reference: str, path: str, number: int) -> EnclosError:
    """The file of a store cannot be read when it is compared with its checksum."""
    return UserError(
        image_as(reference),
        "image cannot be read",
        f"{path}: {reason(number)}",
        "is the file system of the store in order on this node? If others can read it, tell your administrator",
    )


def image_untrusted(reference: str) -> EnclosError:
    """images.user_files is refuse and the file belongs to a user."""
    return UserError(
        image_as(reference),
        "image is not trusted",
        "not owned by root, or writable by others",
        "use an image of the site or an unpacked directory; administrator: images.user_files in enclos.yaml",
    )


def image_server_missing() -> EnclosError:
    """images.user_files is fuse, and there is no squashfuse."""
    return AdminError(
        "images.user_files: fuse",
        "squashfuse is not installed",
        hint=ADMIN + "install squashfuse where the agent's PATH has it; 'enclos check' looks for it",
    )


def image_fuse_failed(number: int) -> EnclosError:
    """The kernel has no FUSE, or refused to mount it."""
    return AdminError(
        "images.user_files: fuse",
        "no file system can be mounted for squashfuse",
        reason(number),
        ADMIN + "modprobe fuse; 'enclos check' tries it",
    )


def image_not_in_store(reference: str, directories: Sequence[str]) -> EnclosError:
    """`enclos image` was given something that no store has."""
    return UserError(
        reference,
        "no such image",
        f"searched {', '.join(directories) or 'no store'}",
        "'enclos image ls' lists images, 'enclos image pull' fetches one",
    )


def image_ambiguous(reference: str, matches: Sequence[str]) -> EnclosError:
    """Several images of the stores have digests that begin so; `matches` are digests, perhaps each with a name."""
    return UserError(
        reference, "several images have such a digest", ", ".join(matches), "give more digits of it, or a name"
    )


def store_unusable(directory: str, number: int, detail: str = "") -> EnclosError:
    """`enclos image` cannot read or write a store, or it is somebody else's."""
    return UserError(
        directory,
        "cannot be used as a store of images",
        detail or reason(number),
        "is it yours, on a file system that is mounted and has room?",
    )


def image_file_unusable(path: str, number: int) -> EnclosError:
    """The file that `enclos image export` writes or `enclos image import` reads."""
    return UserError(
        path,
        "the file cannot be used",
        reason(number),
        "'enclos image export' makes a new file, 'enclos image import' reads one that is there",
    )


def auth_file_unusable(path: str, detail: str) -> EnclosError:
    """The file of --authfile."""
    return UserError(
        f"--authfile={path}",
        "the file cannot be used",
        detail,
        "'skopeo login --authfile FILE REGISTRY' makes one; without this option skopeo's own is looked for",
    )


def no_own_store() -> EnclosError:
    """The site gave this user no store, or root no site store."""
    return UserError(
        "image",
        "there is no store that you may fill",
        hint=ADMIN + "images.user_store, and for root images.site_store, in enclos.yaml",
    )


def slurm_failed(command: str, detail: str) -> EnclosError:
    """A command of Slurm's that ours needs has no answer."""
    hint = "try again; 'scontrol ping' shows whether slurmctld is up"
    return UserError(command, "Slurm does not answer", detail, hint)


def idmap_missing(reference: str) -> EnclosError:
    """An image of several layers on a kernel without idmapped mounts of squashfs."""
    return AdminError(
        image_as(reference),
        "the kernel cannot show its layers as yours (no idmapped mounts of squashfs before Linux 6.2)",
        hint="convert it to one squashfs file ('enclos image export'): squashfuse serves that",
    )


def image_place_missing(reference: str, path: str, number: int) -> EnclosError:
    """Where every container has something mounted, the image has something else."""
    return UserError(
        image_as(reference),
        f"nothing can be mounted at {path} of the image",
        reason(number),
        "it has to be a directory, or missing",
    )
