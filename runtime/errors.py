"""Every error text of Enclos, each in one place.

An error names its subject as the user typed it, says what happened, the cause where it was
checked, and what to do next. `netns/` and `linux/` raise facts; whoever knows what the user
asked for turns them into one of these. docs/errors.md has a section for each function here
and tests/golden/errors.txt all texts; tests compare.

Must not hold: decisions, system calls, printing. The one look outside is at the sysctls that
limit namespaces, because the kernel's own text for them misleads. Used on both sides of the
privilege line. Texts may hold what a user typed, so control characters are escaped when printed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

ADMIN = "administrator: "
ENTRYPOINT = "--container-entrypoint"
ENTRYPOINT_HINT = "--no-container-entrypoint leaves it out; --container-entrypoint-log shows what it prints"


class EnclosError(Exception):
    """A failure in words for a person.

    Args:
        subject: the option as typed, the network, or the file; may be empty.
        what: what happened.
        cause: a checked cause, or one that starts with "possibly".
        hint: what to do next.
        transient: another attempt, or another user's, may succeed.
    """

    def __init__(self, subject: str, what: str, cause: str = "", hint: str = "", *, transient: bool = False) -> None:
        super().__init__(subject, what, cause, hint)
        self.subject, self.what, self.cause, self.hint = subject, what, cause, hint
        self.transient = transient

    def line(self, node: str = "") -> str:
        """One line without the `enclos: ` prefix, which is added where it is printed."""
        parts = [f"{self.subject}: " if self.subject else "", self.what]
        if self.cause:
            parts.append(f" ({self.cause})")
        if node:
            parts.append(f" on {node}")
        return printable("".join(parts))

    def fields(self) -> list[tuple[str, str]]:
        """The packet that says it to the agent. What it quotes may be of a stranger, and hold what no packet can."""
        parts = [("subject", self.subject), ("what", self.what), ("cause", self.cause), ("hint", self.hint)]
        shown = [(key, printable(text)) for key, text in parts]
        return [("state", "error"), *shown, ("transient", str(int(self.transient)))]

    def __str__(self) -> str:
        return self.line()


class UserError(EnclosError):
    """The user can mend it."""


class AdminError(EnclosError):
    """The administrator has to mend it."""


class UsageError(UserError):
    """Wrong arguments of the `enclos` command; its exit status is 2."""


def printable(text: str) -> str:
    """Escape what could move the cursor, start a new line or forge a log entry."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


def reason(number: int) -> str:
    """Words for an errno, "" for 0; those that mislead here are replaced."""
    words = {
        errno.ENOSPC: "no space left, or a limit of namespaces or mounts is reached",
        errno.EIO: "input/output error",
        errno.ELOOP: "too many symbolic links",
    }
    return words.get(number) or (os.strerror(number).lower() if number else "")


def namespace_limit() -> str:
    """The sysctl that forbids namespaces, or "". The kernel only says "No space left on device"."""
    for name in ("user", "mnt", "ipc", "uts", "net"):
        if _sysctl(f"user/max_{name}_namespaces") == "0":
            return f"user.max_{name}_namespaces is 0"
    return ""


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


# ---------------------------------------------------------------- images


def _image(reference: str) -> str:
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
            _image(reference),
            "image not found",
            hint="images are looked up on the compute node; is the path on a shared file system?",
        )
    return UserError(
        _image(reference),
        "image not found",
        hint="give docker://REGISTRY/NAME:TAG, or the path of a squashfs file or directory: /PATH or ./PATH",
    )


def image_not_readable(reference: str) -> EnclosError:
    """The user may not read the image."""
    return UserError(
        _image(reference),
        "image is not readable",
        "permission denied",
        "you need read access to the file and search access to all directories above it",
    )


def image_wrong_kind(reference: str) -> EnclosError:
    """A socket, device or pipe."""
    return UserError(
        _image(reference),
        "image is neither a regular file nor a directory",
        hint="give a squashfs file or a directory",
    )


def image_has_mounts(reference: str) -> EnclosError:
    """A directory with other file systems mounted below it: an overlay would show what they cover."""
    return UserError(
        _image(reference),
        "image directory has other file systems mounted below it",
        hint="give a directory without mounts inside, or make a squashfs file of it",
    )


def slurm_user_namespace(reference: str) -> EnclosError:
    """slurmstepd itself lives in a user namespace (namespace/linux of Slurm 26.05)."""
    return UserError(
        _image(reference),
        "containers cannot be joined from Slurm's user namespace (namespace.yaml has CLONE_NEWUSER)",
        hint="administrator: remove CLONE_NEWUSER from clone_ns_flags in namespace.yaml",
    )


def not_squashfs(reference: str) -> EnclosError:
    """The file does not start with a squashfs superblock."""
    return UserError(
        _image(reference),
        "image is not a squashfs file",
        hint="'file PATH' tells what it is; mksquashfs or tar2sqfs make one",
    )


def image_sif_unusable(reference: str, detail: str) -> EnclosError:
    """A SIF file (Singularity, Apptainer) without a squashfs partition that this node can run."""
    return UserError(
        _image(reference),
        "this SIF file cannot be used",
        detail,
        "it needs a squashfs root file system that is not encrypted, of the node's architecture",
    )


def image_truncated(reference: str, expected: int, found: int) -> EnclosError:
    """The file is shorter than its superblock says; both in bytes."""
    return UserError(
        _image(reference),
        "image is truncated",
        f"{found} bytes, its header says {expected}",
        "copy or build it again",
    )


def image_damaged(reference: str, detail: str) -> EnclosError:
    """The kernel refused to mount it, or to read files in it."""
    return UserError(
        _image(reference),
        "image cannot be read",
        detail,
        "possibly damaged, or its compression is not known to the node's kernel; build it again with gzip"
        " or zstd",
    )


def image_untrusted(reference: str) -> EnclosError:
    """images.user_files is refuse and the file belongs to a user."""
    return UserError(
        _image(reference),
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


def job_unknown(job: str) -> EnclosError:
    """`enclos image pull --job`: slurmctld does not know it, or does not tell this user of it."""
    return UserError(f"--job={job}", "no such job", hint="'squeue --me' lists yours")


def job_not_own(job: str) -> EnclosError:
    """Its images are fetched with its user's credentials, so root cannot do it as root either."""
    return UserError(
        f"--job={job}",
        "it is another user's",
        hint=f"{ADMIN}runuser -l USER -c 'enclos image pull --job={job}': with his credentials, into his store",
    )


def job_without_image(job: str) -> EnclosError:
    """Nothing that Slurm shows of the job names an image."""
    return UserError(
        f"--job={job}",
        "it names no image",
        "searched its batch script, and its command line where Slurm shows that",
        "write '#SBATCH --container-image=IMAGE' into the script, or pull IMAGE by its name",
    )


def slurm_failed(command: str, detail: str) -> EnclosError:
    """A command of Slurm's that ours needs has no answer."""
    hint = "try again; 'scontrol ping' shows whether slurmctld is up"
    return UserError(command, "Slurm does not answer", detail, hint)


def idmap_missing(reference: str) -> EnclosError:
    """An image of several layers on a kernel without idmapped mounts of squashfs."""
    return AdminError(
        _image(reference),
        "the kernel cannot show its layers as yours (no idmapped mounts of squashfs before Linux 6.2)",
        hint="convert it to one squashfs file ('enclos image export'): squashfuse serves that",
    )


def image_place_missing(reference: str, path: str, number: int) -> EnclosError:
    """Where every container has something mounted, the image has something else."""
    return UserError(
        _image(reference),
        f"nothing can be mounted at {path} of the image",
        reason(number),
        "it has to be a directory, or missing",
    )


# ---------------------------------------------------------------- images of registries and archives


def bad_image_reference(reference: str, detail: str) -> EnclosError:
    """Neither a path nor a reference."""
    return UserError(
        _image(reference),
        "no such kind of image",
        detail,
        "give docker://REGISTRY/NAME:TAG, /PATH or ./PATH; see enclos-srun(1)",
    )


def local_image_missing(reference: str) -> EnclosError:
    """The archive or layout does not exist on this node."""
    return UserError(
        _image(reference),
        "image not found",
        hint="archives and layouts are looked up on the compute node; is the path on a shared file system?",
    )


def registry_unknown(reference: str, registry: str) -> EnclosError:
    """The registry's name has no address."""
    return UserError(
        _image(reference),
        f"no such registry: {registry}",
        "its name has no address",
        "is the name right? 'docker://NAME' alone means Docker Hub",
    )


def registry_unreachable(reference: str, registry: str, cause: str) -> EnclosError:
    """No connection to the registry."""
    return UserError(
        _image(reference),
        f"cannot reach the registry {registry}",
        cause,
        "can this node reach it? 'enclos image pull' on a login node may help",
        transient=True,
    )


def registry_busy(reference: str, registry: str, cause: str) -> EnclosError:
    """It answers that it cannot, or that this user or address has asked too often."""
    return UserError(
        _image(reference),
        f"the registry {registry} does not serve it now",
        cause,
        "try again later; where pulls are counted, as on Docker Hub, 'skopeo login' allows more of them",
        transient=True,
    )


def registry_tls(reference: str, registry: str, cause: str) -> EnclosError:
    """The registry's certificate is not trusted, or it speaks no TLS."""
    return AdminError(
        _image(reference),
        f"no secure connection to the registry {registry}",
        cause,
        f"{ADMIN}trust its certificate in /etc/containers/certs.d/{registry}, or mark it insecure in registries.conf",
    )


def registry_lost(reference: str, registry: str) -> EnclosError:
    """The connection ended in the middle."""
    return UserError(
        _image(reference),
        f"lost the connection to the registry {registry}",
        hint="run it again: layers that are complete are kept",
        transient=True,
    )


def image_unknown(reference: str, registry: str) -> EnclosError:
    """The registry does not have the name, the tag or the digest."""
    return UserError(
        _image(reference),
        "image not found",
        f"the registry {registry} has no such name or tag",
        "check name and tag; many registries also say this of images that you may not see",
    )


def image_unauthorized(reference: str, registry: str) -> EnclosError:
    """The registry refuses, with the user's credentials or without."""
    return UserError(
        _image(reference),
        "not allowed to pull the image",
        f"the registry {registry} refuses",
        f"'skopeo login {registry}' stores your credentials; they have to be in your home on the compute node too",
        transient=True,
    )


def image_no_platform(reference: str, detail: str) -> EnclosError:
    """An index without an image for this kind of node."""
    return UserError(_image(reference), "image is not for this kind of node", detail, "choose another tag")


def image_digest_mismatch(reference: str, wanted: str = "", found: str = "") -> EnclosError:
    """What came is not what its digest says."""
    return UserError(
        _image(reference),
        "image does not match its digest",
        f"wanted {wanted[:19]}…, got {found[:19]}…" if wanted else "",
        "possibly a damaged registry or proxy; it was not used",
    )


def image_policy(reference: str) -> EnclosError:
    """policy.json of the node rejects the image."""
    return UserError(
        _image(reference),
        "image is rejected by the policy of this site",
        "/etc/containers/policy.json",
        "use an image that is signed as the site wants it",
    )


def image_bad_manifest(reference: str, detail: str) -> EnclosError:
    """The manifest or the configuration cannot be used."""
    return UserError(_image(reference), "image cannot be used", detail, "build or push it again")


def layer_bad(reference: str, digest: str, detail: str) -> EnclosError:
    """A layer is no archive, or holds what no image may hold."""
    subject = f"layer {digest[7:19]} of the image" if digest else "a layer of the image"
    return UserError(_image(reference), f"{subject} is not usable", detail, "build the image again")


def image_too_large(reference: str, detail: str, setting: str) -> EnclosError:
    """A limit of the site."""
    return UserError(
        _image(reference), "image is larger than the site allows", detail, f"{ADMIN}{setting} in enclos.yaml"
    )


def store_full(reference: str) -> EnclosError:
    """No space, or no quota, where images are kept."""
    return AdminError(
        _image(reference),
        "no space left for images",
        "disk or quota is full",
        "in a store of yours: 'enclos image rm' and 'enclos image gc'; "
        f"{ADMIN}imports.cache_directory and imports.cache_size in enclos.yaml",
    )


def store_failed(reference: str, directory: str, number: int) -> EnclosError:
    """The cache cannot be written to."""
    return AdminError(
        _image(reference),
        f"cannot write to the image cache {directory}",
        reason(number),
        f"{ADMIN}imports.cache_directory in enclos.yaml",
    )


def store_not_roots(reference: str, directory: str, detail: str) -> EnclosError:
    """Somebody else than root can put images into the node's cache."""
    return AdminError(
        _image(reference),
        f"the image cache {directory} is not root's alone",
        detail,
        f"{ADMIN}stop enclosd, remove that, and let enclosd make it; or another imports.cache_directory",
    )


def import_failed(reference: str, detail: str) -> EnclosError:
    """An import failed for a reason that has no text of its own."""
    return UserError(_image(reference), "image cannot be imported", detail, "administrator: journalctl -u enclosd")


def import_timed_out(reference: str, seconds: int) -> EnclosError:
    """imports.deadline_seconds."""
    return UserError(
        _image(reference),
        f"the import took longer than {seconds} s",
        hint="run it again: layers that are complete are kept; administrator: imports.deadline_seconds",
        transient=True,
    )


def program_missing(name: str) -> EnclosError:
    """A program that imports need is not installed."""
    return AdminError("images", f"the program {name} is not installed", hint=f"{ADMIN}install it; see 'enclos check'")


# ---------------------------------------------------------------- mounts and directories


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
    return AdminError(
        f"devices.nodes: {path}", "not a device node", hint=ADMIN + "mend devices.nodes in enclos.yaml"
    )


def device_missing(path: str) -> EnclosError:
    """devices.nodes names nothing."""
    return AdminError(
        f"devices.nodes: {path}", "no such device node", hint=ADMIN + "mend devices.nodes in enclos.yaml"
    )


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


# ---------------------------------------------------------------- devices


def _device(text: str) -> str:
    return f"--container-device={text}"


def device_unknown(text: str, known: Sequence[str]) -> EnclosError:
    """No CDI file of the node describes it."""
    shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
    return UserError(
        _device(text),
        "no such device on this node",
        f"there are {shown}" if known else "it has no CDI files",
        "'enclos check' on the node lists its CDI files",
    )


def device_forbidden(text: str) -> EnclosError:
    """Neither granted by Slurm nor allowed by devices.allow."""
    return UserError(
        _device(text),
        "this device is not allowed",
        "neither granted by Slurm nor in devices.allow",
        "request GPUs with --gres or --gpus; administrator: devices.allow in enclos.yaml",
    )


def device_not_granted(text: str) -> EnclosError:
    """A GPU that Slurm manages and that is not the step's."""
    return UserError(
        _device(text),
        "Slurm did not grant this GPU to the step",
        hint="drop the option: granted GPUs are in the container without it; '=all' names them as well",
    )


def cdi_broken(file: str, detail: str) -> EnclosError:
    """A CDI file that may describe what is looked for cannot be used."""
    return AdminError(file, "this CDI file cannot be used", detail, ADMIN + "mend it, or generate it anew")


def cdi_conflict(device: str, one: str, other: str) -> EnclosError:
    """Two files of one directory describe the same device."""
    return AdminError(
        f"device {device}", "two CDI files describe it", f"{one} and {other}", ADMIN + "remove one of the files"
    )


def cdi_node_missing(file: str, path: str) -> EnclosError:
    """A CDI file names a device node that the node does not have, or that is none."""
    return AdminError(
        file, f"names {path}, which is no device node here", hint=ADMIN + "load the driver, then generate the file anew"
    )


def cdi_mount_failed(file: str, path: str, number: int) -> EnclosError:
    """A CDI file names a file or directory of the host that the user cannot open."""
    return AdminError(
        file, f"names {path}, which cannot be mounted", reason(number), ADMIN + "generate the file anew"
    )


def gpu_unknown(number: int, count: int) -> EnclosError:
    """Slurm granted a GPU that slurmd's list does not have."""
    return AdminError(
        "devices.gpus",
        f"Slurm granted GPU {number}, but the list of this node's GPUs has {count}",
        hint=ADMIN + "compare devices.gpus in enclos.yaml, or 'slurmd -G', with gres.conf",
    )


def gpus_not_listed(detail: str) -> EnclosError:
    """slurmd does not say which device files its GPUs are."""
    return AdminError(
        "devices.gpus",
        "cannot learn which device files Slurm's GPUs have",
        detail,
        ADMIN + "'slurmd -G' has to work as root, or set devices.gpus in enclos.yaml",
    )


def _rdma(text: str) -> str:
    return f"--container-rdma={text}"


def rdma_missing(text: str) -> EnclosError:
    """The kernel has no RDMA."""
    return UserError(
        _rdma(text),
        "this node has no RDMA",
        hint="ask Slurm for a node that has it; administrator: 'rdma dev' on the node lists devices",
    )


def rdma_needs_network(text: str) -> EnclosError:
    """No network, no RDMA."""
    return UserError(
        _rdma(text),
        "not possible on --container-network=none",
        hint="use --container-network=job or host, or drop the option",
    )


def rdma_not_isolated(text: str, mode: str) -> EnclosError:
    """The site's job networks promise RDMA isolation, and the kernel's mode cannot give it."""
    return EnclosError(
        _rdma(text),
        f"RDMA isolation needs namespace mode exclusive, found {mode}",
        hint=f"use --container-network=host; {ADMIN}set it at boot (ib_core netns_mode=0); 'enclos check' says more",
    )


def rdma_kernel_exclusive(text: str, mode: str) -> EnclosError:
    """rdma.mode needs devices that all namespaces see."""
    return EnclosError(
        _rdma(text),
        f"rdma.mode {mode} needs namespace mode shared, found exclusive",
        hint=f"use --container-network=host; {ADMIN}set rdma.mode to exclusive, or boot with ib_core netns_mode=1",
    )


def rdma_in_use(text: str, name: str, reason: str) -> EnclosError:
    """Moving the device would take it away from somebody."""
    return UserError(
        _rdma(text),
        f"RDMA device {name} is in use",
        reason,
        "ask for another one, or for a number of them; administrator: 'rdma resource' and 'enclos ps' on the node",
    )


def rdma_move_failed(text: str, detail: str) -> EnclosError:
    """The kernel or the driver refused."""
    return EnclosError(
        _rdma(text),
        "cannot move the RDMA device into the job's network",
        detail,
        ADMIN + "the driver has to support it ('rdma dev set DEVICE netns NAME'); see the agent's log",
    )


def rdma_soft_failed(text: str, code: int, detail: str) -> EnclosError:
    """No Soft-RoCE on the overlay interface."""
    return EnclosError(
        _rdma(text),
        "cannot make a Soft-RoCE device in the job's network",
        detail or reason(code),
        ADMIN + "it needs the module rdma_rxe, and a kernel whose rxe works in network namespaces (7.2 does, 6.1 not)",
    )


def rdma_no_node(text: str, name: str) -> EnclosError:
    """Programs could not open the device."""
    return EnclosError(
        _rdma(text),
        f"RDMA device {name} has no uverbs node",
        hint=ADMIN + "modprobe ib_uverbs; 'enclos check' says more",
    )


def rdma_hook_failed(command: str, detail: str) -> EnclosError:
    """The site's command for devices that come and go."""
    return EnclosError(
        "rdma.hook", f"{command} failed", detail, ADMIN + "it runs as root with attach or detach; see the admin guide"
    )


def rdma_unknown(text: str, name: str, known: Sequence[str]) -> EnclosError:
    """No device of that name, or one without a uverbs node."""
    return UserError(
        _rdma(text),
        f"no RDMA device {name} on this node",
        f"there are {', '.join(known[:8])}" if known else "there is none that containers may have",
        "'auto' takes what the node has; names may differ between nodes",
    )


def rdma_forbidden(text: str, name: str) -> EnclosError:
    """rdma.devices does not have it."""
    return UserError(
        _rdma(text),
        f"RDMA device {name} is not for containers",
        "not in rdma.devices",
        "'auto' takes those that are; administrator: rdma.devices in enclos.yaml",
    )


def rdma_too_few(text: str, found: int, busy: Sequence[str] = ()) -> EnclosError:
    """Fewer active devices than asked for; `busy` tells why others don't count."""
    return UserError(
        _rdma(text),
        f"too few RDMA devices are active and for containers ({found})",
        "; ".join(busy[:4]),
        hint="ask for fewer, or 'auto'; administrator: rdma.devices in enclos.yaml, 'rdma link' on the node",
    )


def partition_failed(file: str, detail: str) -> EnclosError:
    """OpenSM's file cannot be read or changed."""
    return EnclosError(f"partition: {file}", "not changed", detail, "nothing was written; see opensm(8) for the file")


# ---------------------------------------------------------------- saving


def save_failed(path: str, cause: str) -> EnclosError:
    """The container cannot be written to this file, or could not."""
    return UserError(
        f"--container-save={path}",
        "the container cannot be saved there",
        cause,
        "the directory has to exist on the compute node, be yours to write and have room; a file there is replaced",
    )


# ---------------------------------------------------------------- named containers


def _named(name: str) -> str:
    return f"--container-name={name}"


def named_missing(name: str) -> EnclosError:
    """No container of that name, and no image to make one from."""
    return UserError(
        _named(name),
        f'a container with name "{name}" does not exist, and --container-image is not set',
        hint="it has to have been created on this node, in a job by the same one; or give --container-image as well",
    )


def named_exists(name: str) -> EnclosError:
    """`create`, and it is there."""
    return UserError(
        _named(name),
        '"create" flag was passed to --container-name but the container already exists',
        hint="leave the flag away to use it, or take another name",
    )


def named_not_running(name: str) -> EnclosError:
    """`exec`, and no step runs in it."""
    return UserError(
        _named(name),
        '"exec" flag was passed to --container-name but the container is not running',
        hint="leave the flag away to start it",
    )


def named_other_network(name: str, network: str, asked: str) -> EnclosError:
    """A running container is entered with its network, and the step asked for another."""
    return UserError(
        _named(name),
        f"the container runs on network {network}, not on {asked}",
        hint="leave --container-network away to enter it, or start another on the same files with NAME:no_exec",
    )


def named_image_changed(name: str, image: str) -> EnclosError:
    """The file behind the image's path is another one: what was written is not a change to that."""
    return UserError(
        _named(name),
        f"its image {image} has changed since the container was created",
        hint="put the image back, or take another name",
    )


def named_limit(name: str, limit: int, names: Iterable[str]) -> EnclosError:
    """Too many of one user. Nothing else lists those that nobody uses."""
    return UserError(
        _named(name),
        f"you have {limit} named containers on this node already",
        ", ".join(sorted(names))[:NAMES_CHARACTERS],
        "use one of them, or remove one there by 'enclos rm NAME'; administrator: named.per_user in enclos.yaml",
    )


def named_not_there(name: str) -> EnclosError:
    """Nothing to remove."""
    return UserError(
        f"rm {name}",
        "you have no container of this name here in which no step runs",
        hint="'enclos ps' shows those that run; each node has its own",
    )


def exec_no_container(name: str) -> EnclosError:
    """Not there, or another user's, or without a container: the same words, so that nothing leaks."""
    return UserError(
        name, "you have no container of this name here", hint="'enclos ps' on the node where it runs shows yours"
    )


def exec_several(job: str, names: Sequence[str]) -> EnclosError:
    """Which one?"""
    return UserError(job, "the job has several containers here", ", ".join(names), "name one of them")


def exec_building(name: str) -> EnclosError:
    """Nobody is in yet."""
    return UserError(
        name, "the container is not ready, or cannot be entered any more", hint="'enclos ps' shows its state"
    )


def exec_too_many(name: str, limit: int) -> EnclosError:
    """A bound of what one user may hold."""
    return UserError(
        name, f"you have {limit} programs of 'enclos exec' on this node, or too many are starting", hint="end some"
    )


def exec_failed(name: str, cause: str) -> EnclosError:
    """The kernel or the record is in the way."""
    return AdminError(
        name,
        "the container cannot be entered",
        cause,
        "srun --overlap with --container-name=JOB.STEP does the same; " + ADMIN + "journalctl -u enclosd",
    )


def exec_ended(name: str) -> EnclosError:
    """Its step ended, or somebody killed what waited for the program."""
    return UserError(name, "the program was ended, possibly with its step", hint="'enclos ps' shows what runs")


def exec_too_large(number: int) -> EnclosError:
    """Command and environment do not fit into a packet."""
    return UserError(
        "exec", f"command and environment are larger than {number} bytes", hint="begin with env -i"
    )


def exec_not_found(command: str) -> EnclosError:
    """In the container; srun's tasks say the same."""
    return UserError(command, "command not found in the container", hint="it is looked for along the PATH inside")


def exec_not_run(command: str, number: int) -> EnclosError:
    """It is there."""
    return UserError(command, "cannot be run in the container", reason(number), "is it a program for this machine?")


def run_forbidden(slurm: str) -> EnclosError:
    """`enclos run` where it may not be; `slurm` is what shows that the machine is a node of Slurm's."""
    if slurm:
        hint = "srun --container-image=IMAGE starts containers here; " + ADMIN + "run.allow in enclos.yaml"
        return UserError("run", "this machine is a node of Slurm's", slurm, hint)
    return UserError("run", "not allowed by the administrator", hint=ADMIN + "run.allow in enclos.yaml")


def run_too_many(limit: int) -> EnclosError:
    """A bound of what one user may hold."""
    hint = "'enclos ps' shows them; " + ADMIN + "run.per_user in enclos.yaml"
    what = f"you have {limit} containers of 'enclos run' on this machine, more are not allowed"
    return UserError("run", what, hint=hint)


def run_confined(why: str) -> EnclosError:
    """The command is in a sandbox: what it starts here would be outside of it."""
    return UserError("run", "it cannot be used from inside a container or sandbox", why, "type it in a login shell")


def run_failed(cause: str) -> EnclosError:
    """The kernel is in the way, or what stands for slurmstepd was killed."""
    return AdminError("run", "the program could not be started", cause, ADMIN + "journalctl -u enclosd")


def run_nowhere(number: int) -> EnclosError:
    """The command's working directory has no path any more."""
    return UserError("run", "the directory that you are in cannot be named", reason(number), "cd to another one")


def run_useless(option: str) -> EnclosError:
    """An option that only means something in a job."""
    return UserError(option, "it means nothing without Slurm", hint="leave it away")


def entrypoint_failed(status: int) -> EnclosError:
    """As spank/entrypoint.c says it."""
    return UserError(ENTRYPOINT, f"the image's entrypoint failed with status {status}", hint=ENTRYPOINT_HINT)


def entrypoint_stayed() -> EnclosError:
    """It ended well, and never executed what it was given."""
    return UserError(ENTRYPOINT, "the image's entrypoint did not execute its arguments", hint=ENTRYPOINT_HINT)


def save_interrupted() -> EnclosError:
    """As spank/save.c says it."""
    return AdminError(
        "--container-save",
        "the agent ended before the container was saved",
        hint="run the step again; " + ADMIN + "journalctl -u enclosd",
    )


def no_tunnels() -> EnclosError:
    """A job network where the agent found no Slurm when it started."""
    return AdminError(
        "--container-network=job",
        "the agent was started without Slurm",
        hint=ADMIN + "start enclosd again, with slurmd's PATH and SLURM_CONF",
    )


def named_lost(name: str) -> EnclosError:
    """Its record is there and its files are not."""
    return AdminError(
        _named(name),
        "what was written into the container is gone",
        hint="take another name; " + ADMIN + "something was unmounted or deleted below /run/enclos/named",
    )


# ---------------------------------------------------------------- options


def bad_option(name: str, value: str, detail: str) -> EnclosError:
    """A value that cannot be used."""
    return UserError(f"--container-{name}={value}", f"invalid argument: {detail}", hint="see enclos-srun(1)")


def given_twice(name: str) -> EnclosError:
    """An option with two different values."""
    return UserError(f"--container-{name}", "specified multiple times", hint="give it once")


def unshare_pid() -> EnclosError:
    """--container-unshare=pid: no process can join a pid namespace."""
    return UserError(
        "--container-unshare=pid",
        "pid is not possible",
        "tasks are started by Slurm, and no process can join a pid namespace",
        "other users' processes are hidden in every container",
    )


def unshare_against_network(network: str) -> EnclosError:
    """--container-unshare=net and a network of another kind."""
    return UserError(
        "--container-unshare=net",
        f"cannot be combined with --container-network={network}",
        hint="net means --container-network=none; give one of them",
    )


def profile_not_found(name: str, detail: str) -> EnclosError:
    """--container-profile and no file of that name."""
    return UserError(f"--container-profile={name}", "profile not found", detail, "'enclos profile ls' lists profiles")


def profile_bad(path: str, detail: str) -> EnclosError:
    """A profile that cannot be used."""
    hint = "'enclos profile validate' checks it; see enclos-srun(1)"
    return UserError(f"profile {path}", "cannot be used", detail, hint)


def slurm_commands_missing(detail: str) -> EnclosError:
    """--container-slurm and something of Slurm is not where it is looked for."""
    return AdminError(
        "--container-slurm",
        "cannot find Slurm's commands",
        detail,
        ADMIN + "enclosd's PATH and SLURM_CONF have to be those of slurmd",
    )


def slurm_commands_useless(option: str) -> EnclosError:
    """--container-slurm where srun could not work."""
    return UserError(
        "--container-slurm",
        f"cannot be combined with {option}",
        hint="srun in the container has to reach slurmctld, and to be you",
    )


def limit_above_grant(subject: str, granted: str) -> EnclosError:
    """A limit may only be tighter than what the job has."""
    return UserError(
        subject,
        f"above what Slurm granted ({granted})",
        hint="ask for less, or for more with --mem, --cpus-per-task",
    )


def limit_above_maximum(subject: str, maximum: str) -> EnclosError:
    """More than the site gives to anybody of this partition or account."""
    return UserError(subject, f"above the site's maximum ({maximum})", hint="ask for less")


def limit_unsupported(subject: str, what: str) -> EnclosError:
    """The kernel has no such controller, or no such file in it."""
    return UserError(
        subject, f"the kernel cannot limit this ({what} is missing)", hint="drop the limit; 'enclos check' lists them"
    )


def limit_no_device(subject: str, device: str) -> EnclosError:
    """No such block or RDMA device."""
    return UserError(
        subject,
        f"no such device ({device})",
        hint="'lsblk' and 'rdma dev' on the compute node list them; a partition of a disk cannot be limited",
    )


def limit_refused(subject: str, detail: str) -> EnclosError:
    """The kernel took the limit for wrong."""
    return AdminError(subject, f"cannot be set ({detail})", hint=f"{ADMIN}'enclos check' tests all requirements")


def no_cgroup2(subject: str) -> EnclosError:
    """Slurm or the node is on cgroup v1."""
    return AdminError(
        subject,
        "limits need cgroup v2 (/sys/fs/cgroup is not)",
        hint=f"{ADMIN}boot with systemd.unified_cgroup_hierarchy=1",
    )


def delegate_forbidden() -> EnclosError:
    """limits.delegate is false."""
    return UserError(
        "--container-cgroup=delegate",
        "the site does not allow it",
        hint=f"{ADMIN}limits.delegate in enclos.yaml",
    )


def delegate_without_slurm() -> EnclosError:
    """Slurm or the node is on cgroup v1, or Slurm makes no cgroups for tasks."""
    return AdminError(
        "--container-cgroup=delegate",
        "Slurm makes no cgroup of version 2 for the step's tasks",
        hint=f"{ADMIN}it needs proctrack/cgroup and task/cgroup with cgroup v2",
    )


def delegate_failed(detail: str) -> EnclosError:
    """The kernel refused, or Slurm has put the task elsewhere."""
    return AdminError(
        "--container-cgroup=delegate",
        f"cannot make a cgroup for the task ({detail})",
        hint=f"{ADMIN}'enclos check' tests all requirements",
    )


def limit_killed(subject: str, count: int) -> EnclosError:
    """Told when a task ends: the memory limit was reached."""
    return UserError(
        subject,
        f"the step reached this limit ({count} of its processes were killed)",
        hint="ask for more memory, or use less; 'enclos top' shows live use",
    )


def limit_refused_forks(subject: str, count: int) -> EnclosError:
    """Told when a task ends: the limit of processes was reached."""
    return UserError(
        subject,
        f"the step reached this limit (a new process or thread was refused {count} times)",
        hint="ask for more, or start fewer; threads count",
    )


def readonly_and_writable() -> EnclosError:
    """Both forms at once."""
    return UserError(
        "", "both --container-writable and --container-readonly were specified", hint="give one of them"
    )


def bad_request(detail: str) -> EnclosError:
    """The plugin sent something that is not of the protocol."""
    return AdminError(
        "agent",
        "cannot understand the request of the Slurm plugin",
        detail,
        ADMIN + "are enclosd and spank_enclos.so of the same release?",
    )


# ---------------------------------------------------------------- networks


def unknown_network(name: str, user: str = "") -> EnclosError:
    """No such name; reads the same for a network of another tenant."""
    return UserError(
        f"--container-network={name}",
        f"no such network{f' for user {user}' if user else ''}",
        hint="use host, job or none",
    )


def network_forbidden(name: str, allowed: Sequence[str]) -> EnclosError:
    """A built-in network that the site does not offer."""
    return UserError(
        f"--container-network={name}", "not allowed at this site", hint=f"allowed: {', '.join(allowed)}"
    )


def vni_in_use(vni: int) -> EnclosError:
    """Another device on this node has the job's VNI."""
    return AdminError(
        "network job",
        "its number is in use on this node",
        f"VNI {vni}",
        "try another node; " + ADMIN + "'ip -d link show type vxlan' shows the device",
    )


def no_job_facts(job: int) -> EnclosError:
    """The prolog has not told the agent about the job."""
    return AdminError(
        "--container-network=job",
        f"the nodes of job {job} are not known",
        "the Slurm prolog did not announce the job",
        ADMIN + "set PrologFlags=Alloc in slurm.conf; 'enclos check' tests it",
    )


def parts_unknown(leader: int) -> EnclosError:
    """slurmctld did not say which nodes the parts of a heterogeneous job have."""
    return AdminError(
        "--container-network=job",
        f"the nodes of the parts of heterogeneous job {leader} are not known",
        "slurmctld did not tell them",
        "try again; " + ADMIN + f"'squeue --jobs={leader}' has to work for root on the node",
    )


def not_in_nodelist(node: str) -> EnclosError:
    """The job's node list does not have this node."""
    return AdminError(
        "--container-network=job",
        f"node {node} is not in the job's node list",
        hint=ADMIN + "does slurmd run under the name that slurm.conf has?",
    )


def name_unknown(name: str) -> EnclosError:
    """A node's underlay name does not resolve."""
    return AdminError(
        "network job",
        f"the name {name} of a node cannot be resolved",
        hint=ADMIN + "check /etc/hosts or DNS, and network.underlay.name in enclos.yaml",
    )


def underlay_not_found(detail: str) -> EnclosError:
    """No interface for the overlay."""
    return AdminError(
        "network job",
        "no network interface to the other nodes was found",
        detail,
        ADMIN + "set network.underlay in enclos.yaml; 'enclos check' tests it",
    )


def network_failed(number: int, what: str) -> EnclosError:
    """The kernel refused to make the job's network."""
    return AdminError(
        "network job",
        f"cannot be made: {what}",
        reason(number),
        ADMIN + "'enclos check' tests all requirements",
    )


def relay_port_taken(address: str, port: int) -> EnclosError:
    """PMIx cannot be brought into the network."""
    return UserError(
        "network job",
        f"PMIx port {port} on {address} is already used inside the container's network",
        "possibly by another step of this job",
        "end the program that listens there, or run the step again",
    )


# ---------------------------------------------------------------- node and agent


def agent_not_running(socket: str, number: int) -> EnclosError:
    """Nobody answers at the socket."""
    return AdminError(
        "", "agent is not running", f"{socket}: {reason(number)}", ADMIN + "systemctl status enclosd"
    )


def agent_silent(socket: str, seconds: int) -> EnclosError:
    """It accepts the connection and does not answer."""
    return AdminError(
        "", "agent does not answer", f"{socket}: nothing for {seconds} s", ADMIN + "journalctl -u enclosd"
    )


def bad_answer(detail: str) -> EnclosError:
    """The agent's answer is not of the protocol."""
    return AdminError(
        "agent",
        "its answer cannot be understood",
        detail,
        ADMIN + "are enclos and enclosd of the same release?",
    )


def agent_restarted() -> EnclosError:
    """The agent ended while it made the container."""
    return AdminError(
        "agent",
        "it ended while the container was being made",
        hint="run the step again; " + ADMIN + "journalctl -u enclosd",
    )


def disabled() -> EnclosError:
    """The kill switch."""
    return UserError(
        "--container-image",
        "containers are switched off by the administrator",
        hint="run without a container, or ask the administrator (enabled in enclos.yaml)",
    )


def root_step() -> EnclosError:
    """Root asked for a container."""
    return UserError(
        "--container-image",
        "steps of root are refused",
        hint="run as an ordinary user (srun --uid); " + ADMIN + "step.allow_root in enclos.yaml",
    )


def userns_forbidden(cause: str = "") -> EnclosError:
    """No user namespaces on this node. A sysctl that forbids them, read back, goes before `cause`."""
    return AdminError(
        "",
        "cannot create a user namespace",
        namespace_limit() or cause,
        ADMIN + "raise it; 'enclos check' tests all requirements",
    )


def build_failed(operation: str, number: int) -> EnclosError:
    """An operation of the plan failed."""
    return AdminError(
        "container",
        f"cannot be made: {operation}",
        reason(number),
        ADMIN + "journalctl -u enclosd; 'enclos check' tests all requirements",
    )


def journal_failed(directory: str, number: int) -> EnclosError:
    """A record cannot be written, and nothing is made that could not be undone."""
    return AdminError(
        directory,
        "the agent cannot write its records",
        os.strerror(number).lower(),
        ADMIN + "df -h /run; is it full or read-only?",
    )


def builder_ended(operation: str, status: str) -> EnclosError:
    """The builder was killed or ended by itself."""
    return AdminError(
        "container",
        f"its builder ended during: {operation}" if operation else "its builder ended",
        status,
        "run the step again; " + ADMIN + "journalctl -u enclosd",
    )


def build_timed_out(seconds: int, operation: str = "") -> EnclosError:
    """The deadline passed."""
    return AdminError(
        "container",
        f"not ready after {seconds} s",
        f"during: {operation}" if operation else "",
        "run the step again; is a file system slow or hanging? "
        + ADMIN
        + "step.build_deadline_seconds in enclos.yaml",
    )


def only_root(verb: str) -> EnclosError:
    """A verb of the administrator's."""
    return UserError(verb, "only root may do this", hint="run it as root on the compute node")


# ---------------------------------------------------------------- configuration and command line


def _place(path: str, line: int) -> str:
    return f"{path}:{line}" if line else path


def config_unreadable(path: str, number: int) -> EnclosError:
    """The file is there but cannot be read, or one that was named is not there."""
    hint = "give the path of a file" if number == errno.ENOENT else "check owner and mode of the file"
    return AdminError(path, "cannot read the configuration", reason(number), hint)


def config_syntax(path: str, line: int, detail: str) -> EnclosError:
    """Not YAML."""
    return AdminError(
        _place(path, line),
        f"not valid YAML: {detail}",
        hint="in this line or before: indent with spaces; quote values with a brace, colon or #, as \"{node}-ib\"",
    )


def config_unknown_key(path: str, line: int, key: str, nearest: str) -> EnclosError:
    """A key that no row has."""
    return AdminError(
        _place(path, line),
        f"unknown key '{key}'",
        hint=f"did you mean '{nearest}'?" if nearest else "enclos.yaml(5) lists all keys",
    )


def config_duplicate_key(path: str, line: int, key: str, first: int) -> EnclosError:
    """The same key twice."""
    return AdminError(
        _place(path, line), f"key '{key}' again", f"first in line {first}", "remove one of them"
    )


def config_bad_value(place: str, key: str, value: str, expected: str) -> EnclosError:
    """A value of the wrong kind; place is file:line or the environment variable."""
    return AdminError(place, f"{key}: bad value {value}: {expected}", hint="enclos.yaml(5) explains each key")


def config_not_a_section(path: str, line: int, key: str) -> EnclosError:
    """A section that is not a mapping."""
    return AdminError(
        _place(path, line),
        f"{key or 'the file'}: expected keys with values",
        hint="enclos.yaml(5) shows an example",
    )


def usage(verb: str, detail: str) -> EnclosError:
    """Bad arguments of the command; `verb` is empty before one was found."""
    command = f"enclos {verb}".rstrip()
    return UsageError(verb, detail, hint=f"'{command} --help' lists all arguments")
