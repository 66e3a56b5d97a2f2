"""--container-device and GPUs: what Slurm granted is in the container, nothing else, by CDI files and gres of files.

The GPUs are nodes of harmless devices (/dev/null and its like) under other names; Slurm, the agent and the kernel take
them for what the files say.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from boxes import PROJECTA
from conftest import PATIENCE, Result, said
from enclos.runtime.cluster import cgroups
from enclos.runtime.cluster.cluster import Cluster

FOLDER = f"/dev/enclos-test-{os.getpid()}"
# Minor numbers of /dev/null, zero, full, urandom, random: nodes that can be told apart.
MINORS = {"gpu0": 3, "gpu1": 5, "gpu2": 7, "gpu3": 9, "control": 8, "fpga": 3}
CONFIG = 'devices:\n  allow: ["acme.com/fpga=open*"]\n'
IMAGE, IMAGE_FOLDER, IMAGE_NARROW = "/images/gpu.sqsh", "/images/gpu", "/images/narrow.sqsh"
LIBRARY = "libenclosgpu.so.1"


@pytest.fixture(scope="module", autouse=True)
def nodes() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.mkdir(FOLDER)
    for name, minor in MINORS.items():
        os.mknod(f"{FOLDER}/{name}", stat.S_IFCHR, os.makedev(1, minor))
        os.chmod(f"{FOLDER}/{name}", 0o666)
    os.chown(f"{FOLDER}/gpu1", 0, PROJECTA)
    os.chmod(f"{FOLDER}/gpu1", 0o640)
    yield
    shutil.rmtree(FOLDER)


@pytest.fixture(scope="module")
def gpus(make_cluster: Callable[..., Cluster], nodes: None) -> Cluster:
    made = make_cluster(1, gpu_files=f"{FOLDER}/gpu[0-3]", config=CONFIG)
    made.run("mkdir -p /etc/cdi && chmod 755 /etc/cdi")
    make_driver(made.layout.shared)
    make_images(made.layout.images, made.layout.shared)
    put(made, "nvidia.json", nvidia())
    put(made, "acme.yaml", acme())
    return made


@pytest.fixture(autouse=True)
def alone(gpus: Cluster) -> None:
    gpus.await_idle()


def make_driver(shared: Path) -> None:
    """A library as a driver brings it, by its versioned file; and a hook that would leave a trace."""
    folder = shared / "driver"
    folder.mkdir()
    (folder / "answer.c").write_text("int answer(void) { return 42; }\n")
    built = [
        *("cc", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", "-o", f"{folder}/{LIBRARY}.77"),
        f"{folder}/answer.c",
    ]
    subprocess.run(built, check=True)
    (folder / "secret").write_text("of root\n")
    (folder / "secret").chmod(0o600)
    (folder / "hook").write_text("#!/bin/sh\ntouch /shared/hook-ran\n")
    (folder / "hook").chmod(0o755)


def make_images(images: Path, shared: Path) -> None:
    """A C library, its linker's cache, and a program that needs the driver's library from it."""
    root = images / "gpu"
    for name in ("bin", "etc", "lib64", "usr/lib"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin/busybox")
    for applet in ("sh", "ls", "cat", "stat", "find", "sort", "readlink", "sleep", "env", "echo", "dd", "test"):
        (root / "bin" / applet).symlink_to("busybox")
    source = shared / "driver/main.c"
    source.write_text("int answer(void); int main(void) { return answer(); }\n")
    library = shared / f"driver/{LIBRARY}.77"
    subprocess.run(["cc", "-o", root / "bin/main", source, library], check=True)
    listed = subprocess.run(["ldd", "/bin/true"], capture_output=True, text=True, check=True).stdout
    for word in listed.split():
        if word.startswith("/"):
            (root / word.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(word, root / word.lstrip("/"))
    subprocess.run(["/sbin/ldconfig", "-r", root], check=True, capture_output=True)
    pack(root, images / "gpu.sqsh")
    (root / "etc/environment").write_text("NVIDIA_VISIBLE_DEVICES=1\n")
    pack(root, images / "narrow.sqsh")
    (root / "etc/environment").unlink()


def pack(root: Path, path: Path) -> None:
    command = ["mksquashfs", str(root), str(path), "-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def nvidia() -> dict[str, Any]:
    """As nvidia-ctk writes it: by index, by UUID, and all."""
    numbered = [(str(n), [n]) for n in range(4)]
    uuids = [(f"GPU-{n}{n}{n}", [n]) for n in range(4)]
    every = [("all", [0, 1, 2, 3])]
    target = f"/usr/lib/enclos/{LIBRARY}.77"
    hook = {"hookName": "createContainer", "path": "/usr/bin/nvidia-ctk"}
    return {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            {"name": name, "containerEdits": {"deviceNodes": [{"path": f"{FOLDER}/gpu{n}"} for n in which]}}
            for name, which in [*numbered, *uuids, *every]
        ],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void", "DRIVER=77"],
            # Owner and mode as somebody would like them: not heeded.
            "deviceNodes": [{"path": f"{FOLDER}/control", "fileMode": 511, "uid": 61001}],
            "mounts": [
                {"hostPath": f"/shared/driver/{LIBRARY}.77", "containerPath": target, "options": ["ro", "bind"]}
            ],
            "hooks": [
                {
                    **hook,
                    "args": ["nvidia-ctk", "hook", "create-symlinks", "--link", f"{LIBRARY}::/usr/lib/enclos/l.so"],
                },
                {**hook, "args": ["nvidia-ctk", "hook", "update-ldcache", "--folder", "/usr/lib/enclos"]},
            ],
        },
    }


def acme(node: str = f"{FOLDER}/fpga", source: str = "", name: str = "open1") -> dict[str, Any]:
    """Devices that Slurm does not manage, with things that a container never gets."""
    edits: dict[str, Any] = {
        "deviceNodes": [{"path": "/dev/acme/fpga", "hostPath": node}],
        "hooks": [{"hookName": "createRuntime", "path": "/shared/driver/hook", "args": ["hook", "reset"]}],
        "additionalGids": [0],
    }
    if source:
        edits["mounts"] = [{"hostPath": source, "containerPath": "/opt/acme", "options": ["ro"]}]
    devices = [{"name": each, "containerEdits": edits} for each in (name, "closed")]
    return {"cdiVersion": "0.7.0", "kind": "acme.com/fpga", "devices": devices}


def put(cluster: Cluster, name: str, content: object) -> None:
    """Write a CDI file, which is seen at the next step."""
    text = content if isinstance(content, str) else json.dumps(content)
    assert cluster.run(f"cat > /etc/cdi/{name} && chmod 644 /etc/cdi/{name}", input=text).returncode == 0


def srun(cluster: Cluster, *words: str, image: str = IMAGE, **env: str) -> Result:
    return cluster.run(["srun", f"--container-image={image}", *words], "usera", timeout=30, env=env)


FIND = f"find {FOLDER} /dev/acme -type c 2>/dev/null | sort"


def found(cluster: Cluster, *options: str, image: str = IMAGE, notices: tuple[str, ...] = (), **env: str) -> list[str]:
    """The made-up device nodes in a container."""
    done = srun(cluster, *options, "sh", "-c", FIND, image=image, **env)
    assert (done.returncode, said(done.stderr)) == (0, [f"enclos: {text}" for text in notices])
    return [path.removeprefix(f"{FOLDER}/") for path in done.stdout.split()]


def refused(cluster: Cluster, *options: str, **env: str) -> str:
    """The first line of a refusal, without Slurm's frame."""
    done = srun(cluster, *options, "true", **env)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "enclos: " in line]
    return line[line.index("enclos: ") :]


# ---------------------------------------------------------------- what Slurm granted


def test_granted_gpus_and_nothing_else(gpus: Cluster) -> None:
    assert found(gpus) == []
    assert found(gpus, "--gres=gpu:2") == ["control", "gpu0", "gpu1"]
    assert found(gpus, "--gpus=4") == ["control", "gpu0", "gpu1", "gpu2", "gpu3"]


def test_the_rest_of_dev_is_the_usual(gpus: Cluster) -> None:
    script = "find /dev -type c -o -type l -o -type d | sort"
    plain, with_gpu = (srun(gpus, *options, "sh", "-c", script).stdout.split() for options in ([], ["--gres=gpu:1"]))
    assert set(with_gpu) - set(plain) == {FOLDER, f"{FOLDER}/control", f"{FOLDER}/gpu0"}
    assert set(plain) <= set(with_gpu)


def test_each_step_has_its_own(gpus: Cluster) -> None:
    """In one job, at one time; Slurm gives the second step the GPUs that the first does not have."""
    script = f"""
srun --exact -n1 --gres=gpu:1 --container-image={IMAGE} sh -c '{FIND}; sleep 2' > $HOME/one &
srun --exact -n1 --gres=gpu:2 --container-image={IMAGE} sh -c '{FIND}; sleep 2' > $HOME/two &
wait; cat $HOME/one; echo; cat $HOME/two
"""
    done = gpus.run(["salloc", "-n2", "--gres=gpu:3", "bash", "-c", script], "usera", timeout=60)
    one, two = (set(part.split()) - {f"{FOLDER}/control"} for part in done.stdout.split("\n\n"))
    assert (len(one), len(two)) == (1, 2), done.stderr
    assert one | two == {f"{FOLDER}/gpu{n}" for n in range(3)}


def test_owner_and_mode_are_those_outside(gpus: Cluster) -> None:
    script = f"stat -c '%n %a %t %T %g' {FOLDER}/*"
    inside = srun(gpus, "--gres=gpu:2", "sh", "-c", script).stdout
    rows = {path.rpartition("/")[2]: rest for path, *rest in map(str.split, inside.splitlines())}
    assert rows == {
        "control": ["666", "1", "8", "65534"],
        "gpu0": ["666", "1", "3", "65534"],
        "gpu1": ["640", "1", "5", str(PROJECTA)],
    }
    use = f"echo x > {FOLDER}/gpu0 && dd if={FOLDER}/gpu1 bs=1 count=1 2>/dev/null | test -n x; echo x > {FOLDER}/gpu1"
    done = srun(gpus, "--gres=gpu:2", "sh", "-c", use)
    assert done.returncode != 0
    assert "can't create" in done.stderr
    assert "gpu1: Permission denied" in done.stderr


@pytest.mark.parametrize("image", [IMAGE, IMAGE_FOLDER])
def test_the_drivers_library_is_found_by_the_images_linker(gpus: Cluster, image: str) -> None:
    """Without ldconfig in the image and without LD_LIBRARY_PATH."""
    assert srun(gpus, "--gres=gpu:1", "/bin/main", image=image).returncode == 42
    assert srun(gpus, "/bin/main", image=image).returncode == 127
    script = f"cd /usr/lib/enclos; readlink {LIBRARY}; readlink l.so; echo $DRIVER; echo x > {LIBRARY}.77"
    done = srun(gpus, "--gres=gpu:1", "sh", "-c", script, image=image)
    assert done.stdout.split() == [f"{LIBRARY}.77", LIBRARY, "77"]
    assert "Read-only file system" in done.stderr


def test_a_read_only_root_has_the_library_too(gpus: Cluster) -> None:
    assert srun(gpus, "--gres=gpu:1", "--container-readonly", "/bin/main").returncode == 42


def test_several_tasks_share_the_steps_gpus(gpus: Cluster) -> None:
    script = f"{FIND}; echo CUDA=$CUDA_VISIBLE_DEVICES"
    done = srun(gpus, "-n2", "--gres=gpu:2", "--gpu-bind=single:1", "sh", "-c", script)
    assert sorted(done.stdout.split()) == sorted(
        [f"{FOLDER}/{name}" for name in ("control", "gpu0", "gpu1")] * 2 + ["CUDA=0", "CUDA=1"]
    )


def test_batch_script_and_its_steps(gpus: Cluster) -> None:
    script = f"#!/bin/sh\n{FIND}\necho CUDA=$CUDA_VISIBLE_DEVICES\n"
    gpus.run("cat > $HOME/batch.sh", "usera", input=script)
    words = f"sbatch -W --gres=gpu:2 --container-image={IMAGE} -o $HOME/batch.out $HOME/batch.sh && cat $HOME/batch.out"
    done = gpus.run(words, "usera", timeout=60)
    lines = [line.removeprefix(f"{FOLDER}/") for line in done.stdout.splitlines()[1:]]
    assert lines == ["control", "gpu0", "gpu1", "CUDA=0,1"], done.stderr


# ---------------------------------------------------------------- what a user says of it


@pytest.mark.parametrize(
    ("value", "kept"),
    [("all", ["control", "gpu0", "gpu1"]), ("1", ["control", "gpu1"]), ("GPU-000", ["control", "gpu0"]), ("void", []),
     ("", []), ("none", ["control"])],
)  # fmt: skip
def test_nvidia_visible_devices_of_the_job(gpus: Cluster, value: str, kept: list[str]) -> None:
    assert found(gpus, "--gres=gpu:2", NVIDIA_VISIBLE_DEVICES=value) == kept


@pytest.mark.parametrize("entry", ["2", "GPU-333", "all,GPU-333"])
def test_nvidia_visible_devices_never_exceeds_the_grant(gpus: Cluster, entry: str) -> None:
    notice = f"NVIDIA_VISIBLE_DEVICES: {entry.rpartition(',')[2]} is not among the step's GPUs, ignoring"
    allowed = found(gpus, "--gres=gpu:1", notices=(notice,), NVIDIA_VISIBLE_DEVICES=f"0,{entry}")
    assert allowed == ["control", "gpu0"]


def test_nvidia_visible_devices_of_the_image(gpus: Cluster) -> None:
    assert found(gpus, "--gres=gpu:3", image=IMAGE_NARROW) == ["control", "gpu1"]
    assert found(gpus, "--gres=gpu:3", image=IMAGE_NARROW, NVIDIA_VISIBLE_DEVICES="2") == ["control", "gpu2"]


def test_a_cdi_file_does_not_set_the_variable_for_nested_steps(gpus: Cluster) -> None:
    done = srun(gpus, "--gres=gpu:1", "sh", "-c", "echo ${NVIDIA_VISIBLE_DEVICES-unset}")
    assert done.stdout == "unset\n"


def test_numbers_in_variables_are_those_of_the_container(gpus: Cluster) -> None:
    """The first two GPUs are another job's: Slurm's numbers are 2 and 3, but a program that counts finds 0 and 1."""
    script = "echo $CUDA_VISIBLE_DEVICES $ROCR_VISIBLE_DEVICES $GPU_DEVICE_ORDINAL $SLURM_STEP_GPUS"
    holder = gpus.popen(["srun", "--gres=gpu:2", "sleep", "60"], "userb")
    try:
        deadline = time.monotonic() + 20 * PATIENCE
        while "R" not in gpus.run(["squeue", "-h", "-u", "userb", "-o", "%t"]).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        bare = gpus.run(["srun", "--gres=gpu:2", "sh", "-c", script], "usera").stdout
        inside = srun(gpus, "--gres=gpu:2", "sh", "-c", f"{FIND}; {script}").stdout.splitlines()
        one = srun(gpus, "--gres=gpu:2", "sh", "-c", script, NVIDIA_VISIBLE_DEVICES="1").stdout
        tasks = srun(gpus, "-n2", "--gres=gpu:2", "--gpu-bind=single:1", "sh", "-c", script).stdout
    finally:
        gpus.run(["scancel", "-u", "userb"])
        holder.wait(timeout=20)
    assert bare == "2,3 2,3 2,3 2,3\n"
    assert inside == [f"{FOLDER}/control", f"{FOLDER}/gpu2", f"{FOLDER}/gpu3", "0,1 0,1 0,1 2,3"]
    assert one == "0 0 0 2,3\n"
    assert sorted(tasks.splitlines()) == ["0 0 0 2", "1 1 1 3"]


# ---------------------------------------------------------------- attempts to get more


def test_forged_variables_grant_nothing(gpus: Cluster) -> None:
    every = "0,1,2,3"
    names = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE")
    forged = dict.fromkeys(names, every) | {"NVIDIA_VISIBLE_DEVICES": "all"}
    assert found(gpus, image=IMAGE, notices=(), **forged) == []
    assert found(gpus, "--gres=gpu:1", image=IMAGE, notices=(), **forged) == ["control", "gpu0"]
    script = f"""
export {" ".join(f"{name}={every}" for name in names)}
srun --overlap --gres=none --container-image={IMAGE} sh -c '{FIND}'; echo
srun --overlap --container-image={IMAGE} sh -c '{FIND}'
"""
    done = gpus.run(["salloc", "--gres=gpu:1", "bash", "-c", script], "usera", timeout=60)
    nothing, granted = done.stdout.split("\n\n") if "\n\n" in done.stdout else ("", done.stdout.lstrip("\n"))
    assert (nothing.split(), granted.split()) == ([], [f"{FOLDER}/control", f"{FOLDER}/gpu0"])


def test_forged_variables_in_a_batch_script_grant_nothing(gpus: Cluster) -> None:
    gpus.run("cat > $HOME/forged.sh", "usera", input=f"#!/bin/sh\n{FIND}\necho end\n")
    export = "env SLURM_JOB_GPUS=0,1,2,3 SLURM_STEP_GPUS=0,1,2,3 CUDA_VISIBLE_DEVICES=0,1,2,3"
    words = f"{export} sbatch -W --container-image={IMAGE} -o $HOME/forged.out $HOME/forged.sh && cat $HOME/forged.out"
    assert gpus.run(words, "usera", timeout=60).stdout.splitlines()[1:] == ["end"]


@pytest.mark.parametrize("name", ["3", "GPU-333"])
def test_the_option_opens_no_gpu_that_was_not_granted(gpus: Cluster, name: str) -> None:
    assert refused(gpus, "--gres=gpu:1", f"--container-device=nvidia.com/gpu={name}") == (
        f"enclos: --container-device=nvidia.com/gpu={name}: Slurm did not grant this GPU to the step on n1"
    )
    assert found(gpus, "--gres=gpu:1", "--container-device=nvidia.com/gpu=all") == ["control", "gpu0"]


# ---------------------------------------------------------------- other devices

LEFT_OUT = (
    "/etc/cdi/acme.yaml: additional groups (additionalGids) are not given, ignoring",
    "/etc/cdi/acme.yaml: its hook hook reset is not run, ignoring",
)


def test_a_device_that_the_site_allows(gpus: Cluster) -> None:
    for name in ("open1", "all"):
        assert found(gpus, f"--container-device=acme.com/fpga={name}", notices=LEFT_OUT) == ["/dev/acme/fpga"]
    assert found(gpus, notices=LEFT_OUT, ENCLOS_CONTAINER_DEVICE="acme.com/fpga=open1") == ["/dev/acme/fpga"]
    both = found(gpus, "--gres=gpu:1", "--container-device=acme.com/fpga=open1", notices=LEFT_OUT)
    assert both == ["/dev/acme/fpga", "control", "gpu0"]
    assert not (gpus.layout.shared / "hook-ran").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("acme.com/fpga=closed", "this device is not allowed (neither granted by Slurm nor in devices.allow)"),
        ("nvidia.com/gpu=all", "this device is not allowed (neither granted by Slurm nor in devices.allow)"),
        ("acme.com/fpga=open1,acme.com/fpga=no", "no such device on this node (there are acme.com/fpga=closed, "
         "acme.com/fpga=open1, nvidia.com/gpu=0, nvidia.com/gpu=1, nvidia.com/gpu=2, nvidia.com/gpu=3, "
         "nvidia.com/gpu=GPU-000, nvidia.com/gpu=GPU-111, …)"),
    ],
)  # fmt: skip
def test_refusals_on_the_node(gpus: Cluster, value: str, text: str) -> None:
    subject = value.rpartition(",")[2]
    assert refused(gpus, f"--container-device={value}") == f"enclos: --container-device={subject}: {text} on n1"


@pytest.mark.parametrize(
    "value", ["gpu", "nvidia.com/gpu", "nvidia.com/gpu=", "nvidia.com/gpu=0,,", "nvidia.com=0", "a/b=/x"]
)
def test_srun_refuses_another_form(gpus: Cluster, value: str) -> None:
    before = gpus.slurmctld_log().count("_slurm_rpc_allocate_resources")
    done = srun(gpus, f"--container-device={value}", "true")
    assert done.returncode != 0
    words = "invalid format: expected VENDOR/CLASS=NAME, or VENDOR/CLASS=all"
    assert f"enclos: --container-device={value}: {words}" in done.stderr
    assert gpus.slurmctld_log().count("_slurm_rpc_allocate_resources") == before


def test_a_broken_file_matters_when_it_is_needed(gpus: Cluster) -> None:
    put(gpus, "zz-broken.json", '{\n "cdiVersion": "0.5.0",\n "kind": }')
    try:
        assert found(gpus, "--gres=gpu:1") == ["control", "gpu0"]
        assert refused(gpus, "--container-device=acme.com/nic=0") == (
            "enclos: /etc/cdi/zz-broken.json: this CDI file cannot be used (line 3: expecting value) on n1"
        )
        put(gpus, "zz-broken.json", {**acme(), "kind": "acme.com/nic", "containerEdits": {"mount": []}})
        assert refused(gpus, "--container-device=acme.com/nic=0") == (
            "enclos: /etc/cdi/zz-broken.json: this CDI file cannot be used (containerEdits: unknown field mount) on n1"
        )
        gpus.run("chmod 666 /etc/cdi/zz-broken.json")
        assert "it can be written by others than root" in refused(gpus, "--container-device=acme.com/nic=0")
    finally:
        gpus.run("rm /etc/cdi/zz-broken.json")
    assert "no such device on this node" in refused(gpus, "--container-device=acme.com/nic=0")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (acme(node="/dev/acme-is-gone"), "names /dev/acme-is-gone, which is no device node here"),
        (acme(node="/shared"), "names /shared, which is no device node here"),
        (acme(source="/opt/gone"), "names /opt/gone, which cannot be mounted (no such file or directory)"),
        (
            acme(source="/shared/driver/secret"),
            "names /shared/driver/secret, which cannot be mounted (permission denied)",
        ),
    ],
)
def test_a_file_that_names_what_is_not_there(gpus: Cluster, content: object, text: str) -> None:
    put(gpus, "acme.yaml", content)
    try:
        assert refused(gpus, "--container-device=acme.com/fpga=open1") == f"enclos: /etc/cdi/acme.yaml: {text} on n1"
    finally:
        put(gpus, "acme.yaml", acme())


def test_a_file_in_run_counts_more(gpus: Cluster) -> None:
    gpus.run("mkdir -p -m 755 /run/cdi", node="n1")
    text = json.dumps(acme(node=f"{FOLDER}/control", name="open2"))
    gpus.run("cat > /run/cdi/acme.json", node="n1", input=text)
    try:
        notices = tuple(text.replace("/etc/cdi/acme.yaml", "/var/run/cdi/acme.json") for text in LEFT_OUT)
        assert found(gpus, "--container-device=acme.com/fpga=open2", notices=notices) == ["/dev/acme/fpga"]
    finally:
        gpus.run("rm -r /run/cdi", node="n1")


def test_a_gpu_without_a_cdi_file_is_said(gpus: Cluster) -> None:
    gpus.run("mv /etc/cdi/nvidia.json /etc/cdi/nvidia.off")
    try:
        notice = f"GPU 0 ({FOLDER}/gpu0) is in no CDI file of this node, ignoring"
        assert found(gpus, "--gres=gpu:1", notices=(notice,)) == []
        gpus.run("mv /etc/cdi/acme.yaml /etc/cdi/acme.off")
        notice = "this node has no CDI files: no GPU in the container, ignoring"
        assert found(gpus, "--gres=gpu:1", notices=(notice,)) == []
    finally:
        gpus.run("cd /etc/cdi; mv nvidia.off nvidia.json; mv acme.off acme.yaml")
    assert found(gpus, "--gres=gpu:1") == ["control", "gpu0"]


# ---------------------------------------------------------------- what shows it


def test_ps_shows_devices(gpus: Cluster) -> None:
    running = gpus.popen(
        ["srun", "--gres=gpu:2", f"--container-image={IMAGE}", "sh", "-c", "echo up; sleep 60"], "usera"
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        table = gpus.run(["enclos", "ps"], "usera", node="n1").stdout
        listed = json.loads(gpus.run(["enclos", "ps", "--json"], "usera", node="n1").stdout)
    finally:
        gpus.run(["scancel", "-u", "usera"])
        running.wait(timeout=20)
    assert "nvidia.com/gpu=0,1" in table.splitlines()[1].split()
    assert listed[0]["devices"] == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]


def test_render_shows_devices(gpus: Cluster) -> None:
    """To a user, whom slurmd does not answer where it uses cgroup v2: the agent knows since a step had GPUs."""
    assert srun(gpus, "--gres=gpu:1", "sh", "-c", "echo").returncode == 0
    silent = gpus.layout.shared / "silent/slurmd"
    silent.parent.mkdir()
    silent.write_text("#!/bin/sh\nexit 1\n")
    silent.chmod(0o755)
    options = f"--container-image={IMAGE} --gpus=1,2 --container-device=acme.com/fpga=all"
    shown = gpus.run(f"PATH=/shared/silent:$PATH enclos render {options}", "usera", node="n1")
    assert "choose devices: nvidia.com/gpu=1 nvidia.com/gpu=2 acme.com/fpga=open1" in shown.stdout.splitlines(), shown


def test_check_tests_files_and_gpus(gpus: Cluster) -> None:
    def lines() -> list[str]:
        # In a cgroup of the node's, as in a login of root's there: slurmd looks for its own from where it is.
        place = cgroups.MOUNT_POINT / cgroups.FIRST_PROCESS / "cgroup.procs"
        enter = f"echo 0 > {place}; " if cgroups.available() else ""
        done = gpus.run(f"{enter}enclos check", node="n1", timeout=60)
        return [line for line in done.stdout.splitlines() if "CDI" in line or "GPUs" in line]

    assert lines() == [
        "ok      CDI file: /etc/cdi/acme.yaml: 2 of acme.com/fpga",
        "note    CDI file: /etc/cdi/acme.yaml: additional groups (additionalGids) are not given",
        "note    CDI file: /etc/cdi/acme.yaml: its hook hook reset is not run",
        "ok      CDI file: /etc/cdi/nvidia.json: 9 of nvidia.com/gpu",
        "ok      GPUs: 4 of Slurm's 4 are in CDI files",
    ]
    less = nvidia()
    less["devices"] = less["devices"][:1]
    put(gpus, "nvidia.json", less)
    put(gpus, "acme.yaml", acme(node="/dev/acme-is-gone"))
    put(gpus, "zz.json", "{")
    try:
        found = lines()
    finally:
        put(gpus, "nvidia.json", nvidia())
        put(gpus, "acme.yaml", acme())
        gpus.run("rm /etc/cdi/zz.json")
    assert "mend    CDI file: /etc/cdi/acme.yaml names what is not there: /dev/acme-is-gone" in found
    assert any(line.startswith("mend    CDI file: /etc/cdi/zz.json: line 1: ") for line in found)
    assert f"mend    GPUs: in no CDI file: 1 ({FOLDER}/gpu1), 2 ({FOLDER}/gpu2), 3 ({FOLDER}/gpu3)" in found
