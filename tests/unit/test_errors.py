"""Error texts: each equals its golden text and is explained in docs/errors.md.

`UPDATE_GOLDEN=1 pytest tests/unit/test_errors.py` writes the golden file anew.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from enclos.runtime import errors
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/errors.txt"
PAGE = ROOT / "docs/errors.md"

IMAGE = "/images/mpi.sqsh"
TOOL = "docker://registry.site:5000/group/tool:1.2"
MOUNT = ("/scratch/in", "/in")
CONF = "/etc/enclos/enclos.yaml"

SAMPLES: dict[str, tuple[object, ...]] = {
    "image_required": ("--container-network",),
    "image_not_found": (IMAGE,),
    "image_not_readable": (IMAGE,),
    "image_wrong_kind": ("/dev/null",),
    "image_has_mounts": ("/images/mpi",),
    "slurm_user_namespace": ("/images/mpi.sqsh",),
    "not_squashfs": ("/images/notes.txt",),
    "image_sif_unusable": ("/home/usera/mpi.sif", "its root file system is ext3"),
    "image_truncated": (IMAGE, 81920, 4096),
    "image_damaged": (IMAGE, "input/output error"),
    "image_not_as_pulled": ("tools:1", "/site/images/images/ab12.sqsh", f"sha256:{'ab12' * 16}", "site"),
    "image_unreadable": ("tools:1", "/home/usera/.local/share/enclos/images/images/ab12.sqsh", errno.ESTALE),
    "image_untrusted": ("/home/usera/mine.sqsh",),
    "image_server_missing": (),
    "image_fuse_failed": (errno.ENODEV,),
    "image_not_in_store": ("debian:13", ["/site/images", "/home/usera/.local/share/enclos/images"]),
    "image_ambiguous": ("ab12ab12", [f"sha256:ab12ab12{'0' * 56} docker://tools:1", f"sha256:ab12ab12{'1' * 56}"]),
    "store_unusable": ("/home/usera/.local/share/enclos/images", errno.EACCES),
    "image_file_unusable": ("out.sqsh", errno.EEXIST),
    "auth_file_unusable": ("/home/usera/auth.json", "no such file or directory"),
    "no_own_store": (),
    "job_unknown": ("1234",),
    "job_not_own": ("1234",),
    "job_without_image": ("1234",),
    "slurm_failed": ("squeue", "unable to contact slurmctld"),
    "idmap_missing": ("docker://ubuntu:24.04",),
    "image_place_missing": (IMAGE, "/proc", errno.ENOTDIR),
    "bad_image_reference": ("ubuntu:24.04", "it is no path, and the site has no default registry"),
    "local_image_missing": ("oci:layout:1.2",),
    "registry_unknown": (TOOL, "registry.site:5000"),
    "registry_unreachable": (TOOL, "registry.site:5000", "connection refused"),
    "registry_busy": (TOOL, "registry.site:5000", "503 Service Unavailable"),
    "registry_tls": (TOOL, "registry.site:5000", "x509: certificate signed by unknown authority"),
    "registry_lost": (TOOL, "registry.site:5000"),
    "image_unknown": (TOOL, "registry.site:5000"),
    "image_unauthorized": (TOOL, "registry.site:5000"),
    "image_no_platform": (TOOL, "no image for linux/amd64, only for linux/arm64"),
    "image_digest_mismatch": (TOOL, f"sha256:{'ab' * 32}", f"sha256:{'cd' * 32}"),
    "image_policy": (TOOL,),
    "image_bad_manifest": (TOOL, "it has no layers"),
    "layer_bad": (TOOL, f"sha256:{'ab' * 32}", "the member ../etc/passwd has '..' in its path"),
    "image_too_large": (TOOL, "more than 1000000 files", "imports.limit_files"),
    "store_full": (TOOL,),
    "store_failed": (TOOL, "/var/cache/enclos", errno.EROFS),
    "store_not_roots": (TOOL, "/local/enclos", "/local/enclos belongs to uid 61001"),
    "import_failed": (TOOL, "a layer did not arrive"),
    "import_timed_out": (TOOL, 3600),
    "program_missing": ("skopeo",),
    "bad_mount_syntax": ("/data:", "empty target"),
    "mount_source_missing": MOUNT,
    "mount_source_denied": MOUNT,
    "mount_target_failed": (*MOUNT, errno.ENOTDIR),
    "unmount_failed": ("/data", errno.EINVAL),
    "mounts_forbidden": ("/scratch",),
    "not_a_device": ("/dev/fuse",),
    "device_missing": ("/dev/fuse",),
    "home_missing": ("/home/usera",),
    "workdir_missing": ("/work",),
    "rootfs_full": ("2G",),
    "device_unknown": ("acme.com/fpga=1", ["acme.com/fpga=0", "nvidia.com/gpu=0"]),
    "device_forbidden": ("acme.com/fpga=0",),
    "device_not_granted": ("nvidia.com/gpu=3",),
    "cdi_broken": ("/etc/cdi/nvidia.yaml", "line 3: mapping values are not allowed here"),
    "cdi_conflict": ("nvidia.com/gpu=0", "/etc/cdi/a.json", "/etc/cdi/b.json"),
    "cdi_node_missing": ("/etc/cdi/nvidia.yaml", "/dev/nvidia0"),
    "cdi_mount_failed": ("/etc/cdi/nvidia.yaml", "/usr/lib/libcuda.so.550.54", errno.ENOENT),
    "gpu_unknown": (4, 4),
    "gpus_not_listed": ("slurmd not found",),
    "save_failed": ("/scratch/mine.sqsh", "no space left on device"),
    "named_missing": ("work",),
    "named_exists": ("work",),
    "named_not_running": ("work",),
    "named_other_network": ("work", "job", "host"),
    "named_image_changed": ("work", IMAGE),
    "named_limit": ("work", 8, ("two", "one")),
    "named_not_there": ("work",),
    "named_lost": ("work",),
    "exec_no_container": ("12.0",),
    "exec_several": ("12", ["12.0", "12.1"]),
    "exec_building": ("12.0",),
    "exec_too_many": ("12.0", 16),
    "exec_failed": ("12.0", "an agent of an older release made it"),
    "exec_ended": ("12.0",),
    "exec_too_large": (131072,),
    "exec_not_found": ("nano",),
    "run_forbidden": ("/usr/sbin/slurmd",),
    "run_too_many": (16,),
    "run_confined": ("it is in another user namespace",),
    "run_failed": ("the process that starts it was killed",),
    "run_nowhere": (errno.ENOENT,),
    "run_useless": ("--container-slurm",),
    "entrypoint_failed": (3,),
    "entrypoint_stayed": (),
    "save_interrupted": (),
    "no_tunnels": (),
    "exec_not_run": ("/data/tool", errno.EACCES),
    "rdma_missing": ("auto",),
    "rdma_needs_network": ("auto",),
    "rdma_not_isolated": ("auto", "shared"),
    "rdma_kernel_exclusive": ("auto", "soft"),
    "rdma_unknown": ("mlx5_7", "mlx5_7", ["mlx5_0", "mlx5_1"]),
    "rdma_forbidden": ("mlx5_0", "mlx5_0"),
    "rdma_too_few": ("4", 2, ["mlx5_3: job 41 has it"]),
    "rdma_in_use": ("mlx5_0", "mlx5_0", "its interface ib0 has an address of the node"),
    "rdma_move_failed": ("auto", "mlx5_0: [errno 95] Operation not supported"),
    "rdma_soft_failed": ("auto", errno.EINVAL, ""),
    "output_failed": ("no space left on device",),
    "partition_failed": ("/etc/opensm/partitions.conf", "all partition keys are in use"),
    "partition_unread": ("/etc/opensm/partitions.conf", "systemctl reload opensm", 1),
    "rdma_no_node": ("auto", "mlx5_0"),
    "rdma_hook_failed": ("/etc/enclos/partition", "the subnet manager does not answer"),
    "bad_option": ("workdir", "work", "it must be an absolute path"),
    "given_twice": ("image",),
    "limit_above_grant": ("--container-limit=memory=8G", "4G"),
    "limit_above_maximum": ("--container-limit=pids=9000", "pids=4096"),
    "limit_unsupported": ("--container-limit=hugetlb=1G:4G", "hugetlb.1GB.max"),
    "limit_no_device": ("--container-limit=io=8:9:rbps=100M", "8:9"),
    "limit_refused": ("--container-limit=io=8:0:rbps=1", "invalid argument"),
    "no_cgroup2": ("--container-limit=memory=8G",),
    "delegate_forbidden": (),
    "delegate_without_slurm": (),
    "delegate_failed": ("device or resource busy",),
    "limit_killed": ("--container-limit=memory=64M", 2),
    "limit_refused_forks": ("--container-limit=pids=8", 3),
    "limit_refused_huge_pages": ("--container-limit=hugetlb=2M:1G", 3),
    "limit_refused_rdma": ("--container-limit=rdma=mlx5_0:hca_object=1000", 3),
    "unshare_pid": (),
    "unshare_against_network": ("job",),
    "profile_not_found": ("pytorch", "searched /etc/enclos/profiles"),
    "profile_bad": ("/etc/enclos/profiles/pytorch.toml", "unknown key 'mount', did you mean 'mounts'?"),
    "slurm_commands_missing": ("no slurm.conf",),
    "slurm_commands_useless": ("--container-network=job",),
    "readonly_and_writable": (),
    "bad_request": ("stepd=x",),
    "unknown_network": ("blue",),
    "network_forbidden": ("none", ("host", "job")),
    "vni_in_use": (43,),
    "no_job_facts": (42,),
    "parts_unknown": (42,),
    "journal_failed": ("/run/enclos/journal", errno.ENOSPC),
    "not_in_nodelist": ("n012",),
    "name_unknown": ("n013-ib",),
    "underlay_not_found": ("ib0: no such interface",),
    "network_failed": (errno.EOPNOTSUPP, "vxlan device of VNI 43"),
    "relay_port_taken": ("127.0.0.1", 40961),
    "agent_not_running": ("/run/enclos/agent.sock", errno.ECONNREFUSED),
    "agent_silent": ("/run/enclos/user.sock", 5),
    "bad_answer": ("its JSON cannot be read",),
    "agent_restarted": (),
    "disabled": (),
    "root_step": (),
    "userns_forbidden": ("user.max_user_namespaces is 0",),
    "build_failed": ("mount the overlay", errno.EINVAL),
    "builder_ended": ("enter the root file system", "killed by SIGKILL"),
    "build_timed_out": (20, "open image /images/mpi.sqsh"),
    "only_root": ("gc",),
    "config_unreadable": (CONF, errno.EACCES),
    "config_syntax": (CONF, 3, "mapping values are not allowed here"),
    "config_unknown_key": (CONF, 3, "network.prot", "network.port"),
    "config_duplicate_key": (CONF, 9, "network.port", 3),
    "config_bad_value": (f"{CONF}:3", "network.port", "80", "expected a whole number from 1024 to 65535"),
    "config_not_a_section": (CONF, 3, "network"),
    "usage": ("ps", "unrecognized arguments: --all"),
}


def functions() -> list[str]:
    """Names of all functions that word an error."""
    return [
        name
        for name, function in inspect.getmembers(errors, inspect.isfunction)
        if function.__module__.startswith(errors.__name__) and function.__annotations__.get("return") == "EnclosError"
    ]


def sample(name: str) -> str:
    """What a user sees of one error."""
    error = getattr(errors, name)(*SAMPLES[name])
    on_node = "" if name.startswith("config_") or name == "usage" else "n012"
    return f"enclos: {error.line(on_node)}\n" + (f"hint: {error.hint}\n" if error.hint else "")


def test_every_function_has_a_sample() -> None:
    assert set(SAMPLES) == set(functions())


def test_texts_are_the_golden_ones() -> None:
    text = "\n".join(f"[{name}]\n{sample(name)}" for name in SAMPLES)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_explains_it(name: str) -> None:
    """A section per error: marked with the function's name, with its text, and with words beside the text."""
    match = re.search(rf"^<!-- {name} -->\n(.*?)(?=^<!-- |^# |\Z)", PAGE.read_text(), re.S | re.M)
    assert match, f"docs/errors.md has no section <!-- {name} -->"
    section = match[1]
    assert section.startswith("## ")
    assert f"```\n{sample(name)}```" in section
    assert len(section.partition("```\n")[2].partition("```\n")[2].strip()) > 30


def test_the_page_has_no_section_of_a_lost_error() -> None:
    assert set(re.findall(r"^<!-- (\w+) -->$", PAGE.read_text(), re.M)) == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_form(name: str) -> None:
    """One line, one hint, no full stop, no prefix of its own."""
    error = getattr(errors, name)(*SAMPLES[name])
    for text in (error.line(), error.hint):
        assert text.isprintable()
        assert not text.startswith("enclos:")
        assert not text.endswith((".", " "))
    assert error.hint


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("readonly_and_writable", "both --container-writable and --container-readonly were specified"),
        ("bad_mount_syntax", "invalid format"),
        ("mount_source_missing", "source path does not exist"),
        ("given_twice", "specified multiple times"),
        ("workdir_missing", "couldn't chdir"),
        ("image_not_found", "not found"),
    ],
)
def test_words_that_scripts_for_pyxis_look_for(name: str, words: str) -> None:
    assert words in sample(name)


@given(st.text())
def test_nothing_typed_can_move_the_cursor_or_forge_a_line(text: str) -> None:
    line = errors.image_not_found(text).line(text)
    assert line.isprintable()
    if text.isprintable():
        assert text in line


def test_printable_escapes() -> None:
    assert errors.printable("a\x1b[2J\nb\udcff") == "a\\x1b[2J\\nb\\udcff"


def test_misleading_errno_is_replaced() -> None:
    assert errors.reason(errno.ENOSPC) != os.strerror(errno.ENOSPC).lower()
    assert errors.reason(errno.EACCES) == "permission denied"


@pytest.mark.skipif(
    subprocess.run(["unshare", "-Ur", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs user namespaces",
)
def test_a_limit_of_user_namespaces_is_read_back() -> None:
    """In a user namespace of its own, where the limit can be set by anybody."""
    program = "from enclos.runtime import errors; print(errors.userns_forbidden('no space left').line())"
    script = f'echo 0 > /proc/sys/user/max_user_namespaces; exec {sys.executable} -c "{program}"'
    done = subprocess.run(["unshare", "-Ur", "sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "cannot create a user namespace (user.max_user_namespaces is 0)\n"
