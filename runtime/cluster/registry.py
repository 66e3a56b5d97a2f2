"""A real registry on the submit host of a cluster, for users to pull from: Debian's docker-registry, without TLS.

The machines' registries.conf names it as insecure, as a site would. Runs as root.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from enclos.runtime.cluster import daemons, image
from enclos.runtime.cluster.cluster import Cluster, ClusterError
from enclos.runtime.cluster.layout import SUBMIT
from enclos.runtime.cluster.nodes import enter_command
from enclos.runtime.cluster.slurm import address4

PORT = 5000
ADDRESS = f"{SUBMIT}:{PORT}"
INSECURE = f'[[registry]]\nlocation = "{ADDRESS}"\ninsecure = true\n'


def start(cluster: Cluster) -> str:
    """Start the registry, if it does not run; returns its address as a reference begins."""
    if cluster.runs("registry"):
        return ADDRESS
    folder = cluster.layout.state / "registry"
    folder.mkdir(exist_ok=True)
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f"http: {{addr: {address4(0)}:{PORT}}}\n"
    )
    drop_in = cluster.path_on(SUBMIT, "/etc/containers/registries.conf.d/enclos-cluster.conf")
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text(INSECURE)
    machine = cluster.record.machines[SUBMIT]
    log = cluster.layout.log(SUBMIT, "registry")
    try:
        process = daemons.start(machine, ["docker-registry", "serve", str(config)], log)
        cluster.keep("registry", process)
        daemons.await_ready(lambda: _answers(cluster), process, log, "docker-registry")
    except daemons.DaemonFailed as error:
        raise ClusterError(str(error)) from error
    return ADDRESS


def _answers(cluster: Cluster) -> bool:
    probe = f"exec 3<>/dev/tcp/{address4(0)}/{PORT}"
    return cluster.run(["bash", "-c", probe]).returncode == 0


def push(cluster: Cluster, layout: Path, name: str, layout_tag: str = "t") -> str:
    """Copy an image of an OCI layout into the registry; returns its reference. `name` is NAME:TAG."""
    reference = f"docker://{ADDRESS}/{name}"
    command = ["skopeo", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false"]
    # The layout is in this machine's file system, the registry in the cluster's network.
    net = enter_command(cluster.record.machines[SUBMIT], ["--net"])
    target = f"docker://{address4(0)}:{PORT}/{name}"
    done = subprocess.run([*net, *command, f"oci:{layout}:{layout_tag}", target], capture_output=True, text=True)
    if done.returncode != 0:
        raise ClusterError(f"skopeo: {done.stderr.strip()}")
    return reference


def push_demo_image(cluster: Cluster) -> str:
    """The demo's image as a registry has it: two layers, made by umoci."""
    made = image.make()
    layout = cluster.layout.state / "registry/openmpi"
    if not layout.exists():
        for command in (
            ["init", "--layout", str(layout)],
            ["new", "--image", f"{layout}:t"],
            ["insert", "--rootless", "--image", f"{layout}:t", str(made.directory), "/"],
            ["config", "--image", f"{layout}:t", "--config.env", "RING=1", "--config.workingdir", "/"],
        ):
            done = subprocess.run(["umoci", *command], capture_output=True, text=True)
            if done.returncode != 0:
                raise ClusterError(f"umoci: {done.stderr.strip()}")
    return push(cluster, layout, "openmpi:latest")
