"""Errors: devices."""

from __future__ import annotations

from collections.abc import Sequence

from enclos.runtime.errors.error import ADMIN, AdminError, EnclosError, UserError, reason


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
    return AdminError(file, f"names {path}, which cannot be mounted", reason(number), ADMIN + "generate the file anew")


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


def partition_unread(file: str, command: str, status: int) -> EnclosError:
    """The file is as it should be, and the site's command has not made OpenSM read it."""
    return EnclosError(
        f"partition: {file}",
        f"OpenSM was not told ({command}: exit status {status})",
        hint="it goes on with what it read before; the next 'enclos partition' with --reload tells it",
    )
