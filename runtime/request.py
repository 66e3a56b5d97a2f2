"""A step's request: the fields of PREPARE and JOIN, checked and typed.

The numbers come from slurmstepd, options and environment from the user. Nothing here may
be believed beyond its form: paths are opened elsewhere with the user's rights, and what the
user may have is decided in policy.py. Pure: no system call, no look at a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from enclos.runtime import early, errors, limits, mounts
from enclos.runtime.devices import cdi
from enclos.runtime.early import NAME_BYTES, NAMESPACES, PATH_BYTES, RDMA
from enclos.runtime.images.reference import is_path
from enclos.runtime.mounts import Mount
from enclos.runtime.options import INTERFACE_VARIABLES, OOM_VARIABLE, VISIBLE_VARIABLES

# No job of Slurm's has this id: it stands for all that 'enclos run' starts, each of them a step of it.
RUN_JOB = 0
RUN = "run"
BATCH_STEP = 4294967291
INTERACTIVE_STEP = 4294967290

GROUP_LIMIT = 65536
NAME_LIMIT = 1024
VALUE_LIMIT = 4096
TASK_LIMIT = 65536
_ID_MAX = 2**32 - 2
_PID_MAX = 2**22

_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")

Fields = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class StepRequest:
    """What slurmstepd says about a step and what its user asks for.

    `network` is "" and the flags are None where the user said nothing; policy.decide()
    puts the site's choice there. `image` is as typed; image_path() makes a path of it. It may be ""
    where `name` names a container that exists.
    `devices` are (kind, name) of CDI devices; `gpus` Slurm's numbers of the step's GPUs on this
    node and `gpu_numbers` what Slurm wrote for them into CUDA_VISIBLE_DEVICES; `visible` the job's
    variables that narrow them.
    """

    job: int
    step: int
    uid: int
    gid: int
    groups: tuple[int, ...]
    stepd: int
    tasks: int
    spool: str
    tmpfs: str
    cwd: str
    home: str
    image: str
    name: str
    name_flag: str
    save: str
    network: str
    mounts: tuple[Mount, ...]
    workdir: str
    writable: bool | None
    remap_root: bool | None
    mount_home: bool | None
    entrypoint: bool | None
    entrypoint_log: bool
    limits: limits.Limits
    slurm: bool
    delegate: bool
    environment: tuple[str, ...]
    interface_variables: Mapping[str, str]
    devices: tuple[tuple[str, str], ...] = ()
    gpus: tuple[int, ...] = ()
    gpu_numbers: tuple[int, ...] = ()
    visible: Mapping[str, str] = field(default_factory=dict)
    slurm_conf: str = ""
    rdma: str = ""
    auth_file: str = ""
    runtime_directory: str = ""
    pinned: str = ""
    keeper: int = 0
    oom_kill_step: bool = True

    @property
    def is_run(self) -> bool:
        """A container of `enclos run`: there is no job, no slurmstepd and no other node."""
        return self.job == RUN_JOB

    @property
    def asks_by_default(self) -> bool:
        """Batch and interactive steps: their options often come from those for nested steps."""
        return self.step in (BATCH_STEP, INTERACTIVE_STEP)

    def image_path(self) -> str:
        """The image as an absolute path; "" for one that is imported first."""
        if self.image.startswith("/"):
            return self.image
        if is_path(self.image):
            return f"{self.cwd.rstrip('/')}/{self.image}"
        return ""

    def image_digest(self) -> str:
        """The digest that srun found for this very image, so that all nodes have the same; "" if it found none."""
        image, _, digest = self.pinned.rpartition("=")
        return digest if image == self.image and re.fullmatch("sha256:[0-9a-f]{64}", digest) else ""


def step_name(job: int, step: int) -> str:
    """A step as people name it: JOB.STEP, or run.N."""
    return f"{RUN if job == RUN_JOB else job}.{step}"


def step_key(name: str) -> tuple[int, int] | None:
    """What `step_name` makes, or None for another text."""
    job, _, step = name.partition(".")
    job = str(RUN_JOB) if job == RUN else job
    if not all(part.isascii() and part.isdigit() for part in (job, step)):
        return None
    return int(job), int(step)


def parse(fields: Fields) -> StepRequest:
    """Check the form of a request.

    Raises:
        EnclosError: bad_request where the plugin is to blame; bad_option, given_twice,
            bad_mount_syntax, readonly_and_writable, image_required where the user is.
    """
    cwd = _path(fields, "cwd")
    image = _option(fields, "image")
    name, name_flag = _container_name(fields)
    if not (image or name):
        raise errors.image_required(_first_option(fields))
    return StepRequest(
        job=_number(fields, "job", RUN_JOB, _ID_MAX),
        step=_number(fields, "step", 0, _ID_MAX),
        uid=_number(fields, "uid", 0, _ID_MAX),
        gid=_number(fields, "gid", 0, _ID_MAX),
        groups=_groups(fields),
        stepd=_number(fields, "stepd", 2, _PID_MAX),
        tasks=_number(fields, "tasks", 1, TASK_LIMIT),
        spool=_path(fields, "spool"),
        tmpfs=_path(fields, "tmpfs"),
        cwd=cwd,
        home=_lenient_path(fields, "home"),
        image=_checked(image, "image"),
        name=name,
        name_flag=name_flag,
        save=_save_path(fields, cwd),
        network=_network(fields),
        mounts=_mounts(fields, cwd),
        workdir=_workdir(fields),
        writable=_writable(fields),
        remap_root=_flag(fields, "remap-root"),
        mount_home=_flag(fields, "mount-home"),
        entrypoint=_flag(fields, "entrypoint"),
        entrypoint_log=_flag(fields, "entrypoint-log") is True,
        slurm=_flag(fields, "slurm") is True,
        limits=_limits(fields),
        delegate=_delegate(fields),
        environment=_environment(fields),
        interface_variables=_variables(fields, INTERFACE_VARIABLES),
        devices=_devices(fields),
        gpus=_gpus(fields),
        gpu_numbers=_gpu_numbers(fields),
        visible=_variables(fields, VISIBLE_VARIABLES),
        oom_kill_step=_last(fields, f"env.{OOM_VARIABLE}") != "0",
        slurm_conf=_path(fields, "conf"),
        rdma=_rdma(fields),
        auth_file=_lenient_path(fields, "authfile"),
        runtime_directory=_lenient_path(fields, "runtime"),
        pinned=_last(fields, "pinned"),
        keeper=_number(fields, "keeper", 2, _PID_MAX) if "keeper" in fields else 0,
    )


# ---------------------------------------------------------------- facts of slurmstepd


def _last(fields: Fields, key: str) -> str:
    values = fields.get(key) or ("",)
    return values[-1]


def _number(fields: Fields, key: str, low: int, high: int) -> int:
    text = _last(fields, key)
    if not text.isascii() or not text.isdigit() or len(text) > 10 or not low <= int(text) <= high:
        raise errors.bad_request(f"{key}={text[:32]}")
    return int(text)


def _groups(fields: Fields) -> tuple[int, ...]:
    """Supplementary groups in the credential's order, each once."""
    text = _last(fields, "groups")
    groups: dict[int, None] = {}
    for part in text.split(",") if text else []:
        if not part.isascii() or not part.isdigit() or len(part) > 10 or int(part) > _ID_MAX:
            raise errors.bad_request(f"groups={part[:32]}")
        groups[int(part)] = None
    if len(groups) > GROUP_LIMIT:
        raise errors.bad_request("groups: too many")
    return tuple(groups)


def _gpus(fields: Fields) -> tuple[int, ...]:
    """Slurm's numbers of the step's GPUs. slurmstepd sets them for a step that has some, and takes others' away."""
    text = _last(fields, "gpus")
    numbers = _numbers(text)
    if text and not numbers:
        raise errors.bad_request(f"gpus={text[:32]}")
    return tuple(dict.fromkeys(numbers))


def _gpu_numbers(fields: Fields) -> tuple[int, ...]:
    """The numbers in CUDA_VISIBLE_DEVICES or its like; none where it holds names (MIG)."""
    return _numbers(_last(fields, "gpu_numbers"))


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) > NAME_LIMIT or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        return ()
    return tuple(int(part) for part in parts)


def _path(fields: Fields, key: str) -> str:
    """A path that slurmstepd gave, or ""."""
    text = _last(fields, key)
    if text and (not text.startswith("/") or len(text.encode("utf-8", "surrogateescape")) > PATH_BYTES):
        raise errors.bad_request(f"{key}={text[:32]}")
    return text


def _lenient_path(fields: Fields, key: str) -> str:
    """A path from the job's environment, where anything may stand; "" if it is no path."""
    text = _last(fields, key)
    return text if text.startswith("/") and len(text.encode("utf-8", "surrogateescape")) <= PATH_BYTES else ""


# ---------------------------------------------------------------- options of the user


def _first_option(fields: Fields) -> str:
    names = [key.removeprefix("option.") for key in fields if key.startswith("option.")]
    return f"--container-{names[0]}" if names else "container"


def _option(fields: Fields, name: str) -> str:
    """The one value of an option, or ""."""
    values = list(dict.fromkeys(fields.get(f"option.{name}") or ()))
    if len(values) > 1:
        raise errors.given_twice(name)
    return values[0] if values else ""


def _checked(path: str, name: str) -> str:
    if len(path.encode("utf-8", "surrogateescape")) > PATH_BYTES:
        raise errors.bad_option(name, path[:32] + "…", f"longer than {PATH_BYTES} bytes")
    return path


def _container_name(fields: Fields) -> tuple[str, str]:
    """NAME[:FLAG]; two empty texts where no name was given."""
    text = _option(fields, "name")
    if not text:
        return "", ""
    name, _, flag = text.partition(":")
    size = len(name.encode("utf-8", "surrogateescape"))
    if not 0 < size <= NAME_BYTES or "/" in name or not name.isprintable():
        wanted = f"a name has 1 to {NAME_BYTES} bytes, and no slash or control character"
        raise errors.bad_option("name", text[:NAME_BYTES], wanted if name else "empty name")
    if (flag or "auto") not in early.NAME_FLAGS:
        raise errors.bad_option("name", text[: 2 * NAME_BYTES], early.NAME[-1].words)
    return name, flag or "auto"


def _save_path(fields: Fields, cwd: str) -> str:
    """Where to save the container, as an absolute path; "" if nowhere."""
    path = _checked(_option(fields, "save"), "save")
    if path.endswith("/"):
        raise errors.bad_option("save", path, early.SAVE[-1].words)
    return path if not path or path.startswith("/") else f"{cwd.rstrip('/')}/{path}"


def _flag(fields: Fields, name: str) -> bool | None:
    values = set(fields.get(f"option.{name}") or ())
    if values == {"0", "1"}:
        raise errors.bad_option(name, "", f"both --container-{name} and --no-container-{name} were specified")
    if not values:
        return None
    if values not in ({"0"}, {"1"}):
        raise errors.bad_option(name, min(values)[:32], "expected 0 or 1")
    return values == {"1"}


def _writable(fields: Fields) -> bool | None:
    """--container-writable and --container-readonly, which may come as 0 from the environment."""
    writable, readonly = _flag(fields, "writable"), _flag(fields, "readonly")
    if writable is not None and writable is readonly:
        raise errors.readonly_and_writable()
    return writable if readonly is None else not readonly


def _network(fields: Fields) -> str:
    """--container-network, or what --container-unshare says of it; ipc and uts are the container's own anyway."""
    network = _option(fields, "network")
    unshare = _option(fields, "unshare")
    namespaces = unshare.split(",") if unshare else []
    if "pid" in namespaces:
        raise errors.unshare_pid()
    for namespace in namespaces:
        if namespace not in NAMESPACES:
            raise errors.bad_option("unshare", unshare[:64], f"unknown namespace '{namespace[:32]}'")
    if "net" not in namespaces:
        return network
    if network not in ("", "none"):
        raise errors.unshare_against_network(network[:32])
    return "none"


def _limits(fields: Fields) -> limits.Limits:
    text = _option(fields, "limit")
    try:
        return limits.parse(text) if text else ()
    except limits.BadLimit as error:
        raise errors.bad_option("limit", error.text, error.detail) from error


def _delegate(fields: Fields) -> bool:
    value = _option(fields, "cgroup")
    if value not in ("", "readonly", "delegate"):
        raise errors.bad_option("cgroup", value[:32], early.CGROUP[-1].words)
    return value == "delegate"


def _mounts(fields: Fields, cwd: str) -> tuple[Mount, ...]:
    found: dict[Mount, None] = {}
    for text in fields.get("option.mounts") or ():
        found.update(dict.fromkeys(mounts.parse(text, cwd)))
    if len(found) > mounts.MOUNT_LIMIT:
        raise errors.bad_mount_syntax("…", f"more than {mounts.MOUNT_LIMIT} mounts")
    return tuple(found)


def _workdir(fields: Fields) -> str:
    """A relative one starts at the container's root, as pyxis has it."""
    path = _checked(_option(fields, "workdir"), "workdir")
    return f"/{path}" if path and not path.startswith("/") else path


def _environment(fields: Fields) -> tuple[str, ...]:
    """Names of variables that keep the job's value."""
    names: dict[str, None] = {}
    for text in fields.get("option.env") or ():
        for name in text.split(","):
            if _ENVIRONMENT_NAME.fullmatch(name) is None or len(name) > NAME_LIMIT:
                raise errors.bad_option(
                    "env", text[:64], f"invalid format: '{name[:64]}' is not a name of a variable"
                )
            names[name] = None
    if len(names) > NAME_LIMIT:
        raise errors.bad_option("env", "…", f"more than {NAME_LIMIT} names")
    return tuple(names)


def _devices(fields: Fields) -> tuple[tuple[str, str], ...]:
    """--container-device: (kind, name) of each."""
    found: dict[tuple[str, str], None] = {}
    for text in fields.get("option.device") or ():
        for part in text.split(","):
            kind, _, name = part.partition("=")
            if not cdi.is_kind(kind) or not cdi.is_name(name):
                raise errors.bad_option(
                    "device", text[:64], "invalid format: expected VENDOR/CLASS=NAME, or VENDOR/CLASS=all"
                )
            found[kind, name] = None
    if len(found) > NAME_LIMIT:
        raise errors.bad_option("device", "…", f"more than {NAME_LIMIT} devices")
    return tuple(found)


def _rdma(fields: Fields) -> str:
    """--container-rdma as typed."""
    text = _option(fields, "rdma")
    for check in RDMA:
        if text and check.refuses(text):
            raise errors.bad_option("rdma", text[:64], check.words)
    return text


def _variables(fields: Fields, names: Sequence[str]) -> dict[str, str]:
    """`env.NAME` fields. Overlong values name nothing and are left out."""
    found = {name: fields.get(f"env.{name}") for name in names}
    return {name: values[-1] for name, values in found.items() if values and len(values[-1]) <= VALUE_LIMIT}
