"""Soft-RoCE as a driver of hardware behaves: the kernel's own source with three changes, built once per kernel.

As it comes, rxe cannot be moved between network namespaces, nor does it outlive a move of its interface, so that a
driver which can both (mlx5, bnxt_re, ...) could be tried with hardware alone. The source and the headers are Debian's
packages of exactly the kernel that boots; the compiler is the one of the root that the trial cluster keeps of that
release. Kept beside the kernel. Runs as root.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from enclos.runtime.cluster import releases

from vm.kernels import SUITES, Apt, Kernel, KernelUnavailable, cache, locked, run

FOLDER = "drivers/infiniband/sw/rxe"

# (file, what is there, what is put there)
CHANGES = (
    # Programs that have the device open when it moves: all drivers of hardware have this, most of them as empty.
    (
        "rxe_verbs.c",
        "static const struct ib_device_ops rxe_dev_ops = {\n",
        "static void rxe_disassociate_ucontext(struct ib_ucontext *ibuc)\n{\n}\n\n"
        "static const struct ib_device_ops rxe_dev_ops = {\n"
        "\t.disassociate_ucontext = rxe_disassociate_ucontext,\n",
    ),
    # A move destroys queue pair 1 and makes it again; rxe never forgets that there was one, and rdma_cm is dead.
    (
        "rxe_verbs.c",
        "\terr = rxe_cleanup(qp);\n\tif (err)\n\t\trxe_err_qp(",
        "\tif (qp_type(qp) == IB_QPT_GSI)\n\t\tto_rdev(ibqp->device)->port.qp_gsi_index = 0;\n\n"
        "\terr = rxe_cleanup(qp);\n\tif (err)\n\t\trxe_err_qp(",
    ),
    # An interface that moves to another namespace is unregistered here and registered there, but stays.
    (
        "rxe_net.c",
        "\tcase NETDEV_UNREGISTER:\n\t\tib_unregister_device_queued(&rxe->ib_dev);\n"
        "\t\trxe_net_del(&rxe->ib_dev);\n\t\tbreak;\n",
        "\tcase NETDEV_UNREGISTER:\n\t\trxe_net_del(&rxe->ib_dev);\n"
        "\t\tif (ndev->reg_state != NETREG_REGISTERED)\n\t\t\tib_unregister_device_queued(&rxe->ib_dev);\n"
        "\t\tbreak;\n\tcase NETDEV_REGISTER:\n\t\trxe_net_init(ndev);\n\t\tbreak;\n",
    ),
)

# In a mount namespace of its own. The packages lie over the root, whose files stay as they are.
BUILD = """\
set -eu
mount -t tmpfs -o size=512m build "$work/over"
mkdir "$work/over/upper" "$work/over/work" "$work/over/root"
mount -t overlay -o "lowerdir=$work/unpacked:$system,upperdir=$work/over/upper,workdir=$work/over/work" \\
    overlay "$work/over/root"
mkdir "$work/over/root/source"
mount --bind "$work/source" "$work/over/root/source"
mount -t proc proc "$work/over/root/proc"
# Without pahole, which only debuggers miss.
chroot "$work/over/root" make -C "/usr/src/linux-headers-$release" M=/source \\
    CONFIG_RDMA_RXE=m CONFIG_DEBUG_INFO_BTF_MODULES= modules
chroot "$work/over/root" strip --strip-debug /source/rdma_rxe.ko
"""


def module(kernel: Kernel) -> Path:
    """The path of rdma_rxe.ko for a kernel, built when it is not there yet: a minute, and 180 MB to fetch.

    Raises:
        KernelUnavailable: it cannot be built; the text says why.
    """
    digest = hashlib.sha256(repr((CHANGES, BUILD)).encode()).hexdigest()[:12]
    target = cache() / "kernels" / f"rxe.{kernel.release}.{digest}.ko"
    with locked(target.parent):
        if not target.exists():
            work = target.with_suffix(".new")
            shutil.rmtree(work, ignore_errors=True)
            try:
                _build(kernel, work).rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def _build(kernel: Kernel, work: Path) -> Path:
    for name in ("packages", "unpacked", "over"):
        (work / name).mkdir(parents=True)
    for package in _download(kernel, work / "packages"):
        run(["dpkg-deb", "--extract", str(package), str(work / "unpacked")])
    (archive,) = (work / "unpacked/usr/src").glob("linux-source-*.tar.*")
    source = _source(archive, work / "source")
    for name, before, after in CHANGES:
        _change(source / name, before, after)
    try:
        root = releases.find(_slurm_of(SUITES[kernel.name]))
    except releases.ReleaseError as error:
        raise KernelUnavailable(str(error)) from error
    values = {"work": str(work), "system": str(root.path if root else "/"), "release": kernel.release}
    script = "".join(f"{name}='{value}'\n" for name, value in values.items()) + BUILD
    command = ["unshare", "--mount", "--fork", "--kill-child", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-8:])
        raise KernelUnavailable(f"rxe does not build for {kernel.release}:\n{tail}")
    return source / "rdma_rxe.ko"


def _slurm_of(suite: str) -> str:
    """The root of a suite is known by its Slurm."""
    return next(slurm for slurm, name in releases.SUITES.items() if name == suite)


def _download(kernel: Kernel, folder: Path) -> Iterator[Path]:
    """Source and headers of this very kernel; the archive may have gone on to another one."""
    apt = Apt(folder, SUITES[kernel.name])
    run(["apt-get", "-qq", "update"], apt.environment)
    headers = f"linux-headers-{kernel.release}"
    version = apt.field(headers, "Version")
    number = re.match(r"\d+\.\d+", kernel.release)
    source = f"linux-source-{number[0] if number else kernel.release}"
    if (found := apt.field(source, "Version")) != version:
        raise KernelUnavailable(f"{source} is of {found}, the kernel of {version}: remove the cache to have both anew")
    parts = [name for name in apt.depends(headers) if name.startswith(("linux-headers-", "linux-kbuild-"))]
    run(["apt-get", "-qq", "download", source, headers, *parts], apt.environment, cwd=folder)
    return folder.glob("*.deb")


def _source(archive: Path, target: Path) -> Path:
    """The driver's folder of the kernel's source."""
    target.mkdir()
    with tarfile.open(archive, "r|*") as opened:
        for member in opened:
            _, _, path = member.name.partition("/")
            if member.isfile() and path.startswith(f"{FOLDER}/") and (content := opened.extractfile(member)):
                (target / Path(path).name).write_bytes(content.read())
    return target


def _change(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    if text.count(before) != 1:
        raise KernelUnavailable(f"{file.name} of this kernel is another one than our change is for: {before!r}")
    file.write_text(text.replace(before, after))
