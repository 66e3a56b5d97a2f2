"""A runtime of containers inside a container: crun, as podman uses it, in a delegated cgroup. In a guest: tests/vm.

Its containers have cgroups of their own below the task's, with limits that the kernel enforces there; whatever it
leaves ends with the step.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Leftovers
from enclos.runtime.cluster import image
from enclos.runtime.cluster.cluster import Cluster
from shells import Shells

pytestmark = [pytest.mark.vm_new, pytest.mark.vm_slurm]

RUNTIME = "crun"
OPTIONS = (
    "--mem=100",
    "--container-image=/images/openmpi.sqsh",
    "--container-cgroup=delegate",
    "--container-mounts=/shared/nested:/nested",
)
# The recipe of the user guide, for whoever has no manager that does it: out of the way, controllers on.
READY = """\
cd /sys/fs/cgroup && mkdir own && echo $$ > own/cgroup.procs && echo 0 > own/cgroup.procs || exit 9
echo "+memory +pids" > cgroup.subtree_control && mkdir /tmp/run
"""
RUN = """\
export LD_LIBRARY_PATH=/nested/lib XDG_RUNTIME_DIR=/tmp/run
run() {
    name=$1; shift; mkdir "/tmp/$name" && cp "/nested/$name.json" "/tmp/$name/config.json"
    /nested/crun --root=/tmp/run/crun --cgroup-manager=cgroupfs run --bundle="/tmp/$name" "$@" "$name"
    echo "$name $?"
}
cd /sys/fs/cgroup"""
DETACH = """\
run daemon --detach > /tmp/said 2>&1; cat /tmp/said
cat memory.max cgroup.type; cd daemon && cat memory.max pids.max cgroup.controllers
for i in $(seq 100); do [ "$(wc -l < cgroup.procs)" = 5 ] && break; sleep 0.1; done; wc -l < cgroup.procs"""
MEMORY, PROCESSES = 20 << 20, 10
# Each box is a container of the runtime's, with a program that its limits concern.
PROGRAMS = {
    "eater": "x=$(head -c 60000000 /dev/zero | tr '\\0' x); echo survived",
    "forker": "for i in $(seq 30); do sleep 5 & done; echo survived",
    "daemon": "trap '' TERM INT HUP; (setsid sh -c 'sleep 1000 & sleep 1001; true' &); sleep 1002; true",
}


def config(name: str, uid: int, group_id: int) -> dict[str, Any]:
    """What the OCI runtime specification calls a bundle's config.json; only the user's own ids are mapped."""
    mounts = [("proc", "/proc"), ("tmpfs", "/dev"), ("tmpfs", "/tmp"), ("cgroup", "/sys/fs/cgroup")]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "/nested/root", "readonly": True},
        "process": {
            "cwd": "/",
            "args": ["sh", "-c", PROGRAMS[name]],
            "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
        },
        "mounts": [{"type": kind, "source": kind, "destination": where} for kind, where in mounts],
        "linux": {
            "cgroupsPath": f"/{name}",
            "namespaces": [{"type": kind} for kind in ("user", "mount", "pid", "ipc", "uts", "network", "cgroup")],
            "uidMappings": [{"containerID": 0, "hostID": uid, "size": 1}],
            "gidMappings": [{"containerID": 0, "hostID": group_id, "size": 1}],
            "resources": {"memory": {"limit": MEMORY, "swap": MEMORY}, "pids": {"limit": PROCESSES}},
        },
    }


@pytest.fixture(scope="module")
def nested(limited: Cluster) -> Path:
    """The runtime from this machine's files, a root file system for its containers, and their bundles."""
    binary = shutil.which(RUNTIME)
    assert binary is not None, f"{RUNTIME} is not installed; `make deps` installs it"
    folder = limited.layout.shared / "nested"
    for name in ("lib", "root/bin", "root/proc", "root/tmp", "root/sys/fs/cgroup", "root/dev"):
        (folder / name).mkdir(parents=True)
    shutil.copy(binary, folder / RUNTIME)
    for library in image.libraries(Path(binary)):
        shutil.copy(library, folder / "lib" / library.name)
    shutil.copy(image.make("openmpi").directory / "usr/bin/busybox", folder / "root/bin/busybox")
    for applet in ("sh", "head", "tr", "seq", "sleep", "setsid"):
        (folder / "root/bin" / applet).symlink_to("busybox")
    uid, group_id = (int(limited.run(["id", word], user="usera").stdout) for word in ("-u", "-g"))
    for name in PROGRAMS:
        (folder / f"{name}.json").write_text(json.dumps(config(name, uid, group_id)))
    return folder


def test_its_containers_have_limits_and_none_outlives_the_step(
    limited: Cluster, nested: Path, limited_leftovers: Leftovers
) -> None:
    """One test, because in a guest a step and a count of what is left take longer than all the rest.

    Memory and processes run out in a container alone. Then one is left running, detached, with daemons in it, none of
    which heeds a signal: scancel ends it, and no cgroup is left.
    """
    with Shells(limited, "usera", ["n1"], *OPTIONS) as shells:
        shells.ok("n1", READY)
        said = shells.run("n1", f"{RUN}; run eater; run forker 2>&1")
        expected = ["eater 137", "sh: can't fork: Resource temporarily unavailable", "forker 2"]
        # A busybox of Debian 13 tells of what was killed, one of Debian 12 does not.
        assert [row for row in said.text.splitlines() if row != "Killed"] == expected, said
        said = shells.run("n1", f"{RUN}; {DETACH}")
        *rows, controllers, running = said.text.splitlines()
        assert rows == ["daemon 0", "max", "domain", str(MEMORY), str(PROCESSES)] and running == "5", said
        assert {"memory", "pids"} <= set(controllers.split())
        asleep = ["pgrep", "--uid", "usera", "--full", "--exact", "sleep 100[012]"]
        assert len(limited.run(asleep, node="n1").stdout.split()) == 3
        limited.run(["scancel", "--user=usera"])
        limited.await_idle(60)
        assert limited.run(asleep, node="n1").stdout == ""
    assert limited_leftovers.rows(60) == []
