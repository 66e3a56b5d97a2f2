"""What the tasks of a step are told at JOIN: namespaces, variables, entrypoint; and the files that they share.

The packet is docs/protocol.md's. Every task of the step on this node gets the same one.
"""

from __future__ import annotations

import os

from enclos.runtime import environment, errors, linux, plan, policy, seccomp
from enclos.runtime.container import Container
from enclos.runtime.devices import choice
from enclos.runtime.request import StepRequest
from enclos.runtime.stepimage import NOTICE_CHARACTERS
from enclos.runtime.stepnetwork import StepNetwork
from enclos.runtime.steps import JoinReply, Surroundings

# What container root may do to the files and processes of its own container: nothing here reaches further than
# the user namespace, and mounting (CAP_SYS_ADMIN) is not among it.
ROOT_CAPABILITIES = linux.capability_mask(
    linux.CAP_CHOWN,
    linux.CAP_DAC_OVERRIDE,
    linux.CAP_DAC_READ_SEARCH,
    linux.CAP_FOWNER,
    linux.CAP_KILL,
    linux.CAP_SETGID,
    linux.CAP_SETUID,
    linux.CAP_SETPCAP,
    linux.CAP_SYS_CHROOT,
)


class Answer:
    """Of one step. `drop` after a failed attempt to build, and at the end."""

    def __init__(self, around: Surroundings, record_name: str) -> None:
        self._around = around
        self._record_name = record_name
        self._seccomp_fd = -1
        self._entrypoint_fd = -1

    def make(
        self,
        request: StepRequest,
        decision: policy.Decision,
        container: Container,
        network: StepNetwork,
        commands: str,
        notices: list[str],
    ) -> JoinReply:
        """The whole answer.

        Args:
            commands: where Slurm's commands are in the container, "" if they are not brought in.
            notices: lines for the user; those that arise here are added.
        """
        fields = [("status", "ok"), ("workdir", request.workdir or container.workdir or "/")]
        fds = dict(container.namespaces)
        if network.fd >= 0:
            fds["net"] = network.fd
        if decision.remap_root:
            fields.append(("keep_caps", f"{ROOT_CAPABILITIES:x}"))
            fds["seccomp"] = self._seccomp()
            fields.append(("set", f"HOME={plan.ROOT_HOME}"))
        fields += _variables(request, container, commands)
        if network.kind == "job" and self._around.config.rdma.mode == "soft" and _rdma(container):
            fields += [("default", environment.SOFT_ROCE), ("default", environment.UCX_QUIET)]
        if network.fd >= 0 and request.interface_variables:
            fields += self._without_interfaces(request, container, network, notices)
        if container.entrypoint:
            fields += [("entrypoint", word) for word in container.entrypoint]
            fields += [("entrypoint_log", "1")] if request.entrypoint_log else []
            fds["entrypoint"] = self._entrypoint()
        fields += [("command", word) for word in container.command]
        fields += [("notice", errors.printable(text[:NOTICE_CHARACTERS])) for text in (*notices, *container.warnings)]
        return JoinReply(fields, fds)

    def drop(self) -> None:
        """Close the files that tasks share."""
        for fd in (self._seccomp_fd, self._entrypoint_fd):
            if fd >= 0:
                os.close(fd)
        self._seccomp_fd = self._entrypoint_fd = -1

    def _entrypoint(self) -> int:
        """What the tasks share: the first one runs the entrypoint, all take over what it changed."""
        if self._entrypoint_fd < 0:
            self._entrypoint_fd = os.memfd_create("enclos-entrypoint", os.MFD_CLOEXEC)
        return self._entrypoint_fd

    def _seccomp(self) -> int:
        if self._seccomp_fd < 0:
            self._seccomp_fd = os.memfd_create("enclos-seccomp", os.MFD_CLOEXEC)
            os.write(self._seccomp_fd, seccomp.remap_root_filter(os.uname().machine))
        return self._seccomp_fd

    def _without_interfaces(
        self, request: StepRequest, container: Container, network: StepNetwork, notices: list[str]
    ) -> list[tuple[str, str]]:
        """Take away the job's variables that name interfaces which the container does not have."""
        names = ["lo", *([self._around.config.network.ifname] if network.kind == "job" else [])]
        names += self._around.devices.holdings.interfaces(self._record_name)
        addresses = [address for address in network.addresses if address]
        unset = environment.unset_interfaces(request.interface_variables, names, addresses, _rdma(container))
        if unset.notice:
            notices.append(unset.notice)
        return [("unset", name) for name in unset.names]


def _rdma(container: Container) -> list[str]:
    """The names of its RDMA devices."""
    return [device.partition("=")[2] for device in container.devices if device.startswith("rdma=")]


def _variables(request: StepRequest, container: Container, commands: str) -> list[tuple[str, str]]:
    """The image's and the devices' variables, and those of the job's that hold outside only."""
    pairs = [(name, value) for name, _, value in (entry.partition("=") for entry in container.environment)]
    wanted = dict(environment.from_image(pairs, ()))
    if commands and "PATH" in wanted:
        wanted["PATH"] = environment.path_with(wanted["PATH"], commands)
    kept = request.environment
    fields = [("default" if name in kept else "set", f"{name}={value}") for name, value in wanted.items()]
    fields += [("unset", name) for name in environment.NODE_ONLY_NAMES if name not in (*wanted, *kept)]
    fields += [("set", entry) for entry in container.device_environment]
    if places := choice.renumber(request.gpus, request.gpu_numbers, container.gpus):
        fields.append(("gpu_places", ",".join(f"{number}:{place}" for number, place in places.items())))
    return fields
