"""`enclos check`, the part about Slurm: is the plugin loaded, does slurmctld send what we need.

Runs as whoever types the command; calls scontrol and slurmd -V, reads Slurm's files.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from enclos.runtime.cli.finding import Finding, mend, note, ok, skipped
from enclos.runtime.cli.plugin import PluginLine, built_for, plugstack_lines

COMMAND_SECONDS = 10
CONFIGURATION_FILES = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")
PLUGIN_DIRECTORIES = ("/usr/lib/x86_64-linux-gnu/slurm-wlm", "/usr/lib/aarch64-linux-gnu/slurm-wlm",
                      "/usr/lib64/slurm", "/usr/lib/slurm", "/usr/local/lib/slurm")  # fmt: skip

Settings = Mapping[str, str]


def findings(run: Callable[[list[str]], str] | None = None) -> Iterator[Finding]:
    """All findings about Slurm; `run` runs a command and returns what it printed, "" on failure."""
    run = run or command_output
    version = slurm_version(run)
    if version is None:
        yield skipped("slurm", "neither slurmd nor scontrol is installed here")
        return
    yield ok("slurm", f"{version[0]}.{version[1]:02}.{version[2]}")
    answer = run(["scontrol", "show", "config"])
    settings = parse_settings(answer)
    path = configuration_file(settings)
    if not settings and path is not None:
        settings = parse_file(path)
        yield note("slurmctld", "does not answer", f"what follows is from {path}")
    if path is None and not settings:
        yield mend("slurm.conf", "not found", "set SLURM_CONF, or run this where slurmd runs")
        return
    yield from plugin_findings(settings, path, version)
    yield prolog_finding(settings)
    yield from container_findings(settings, path)


# ---------------------------------------------------------------- what Slurm says


def command_output(command: list[str]) -> str:
    """What a command prints, or "" if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def slurm_version(run: Callable[[list[str]], str]) -> tuple[int, ...] | None:
    """The installed release. slurmd first: it is what loads the plugin, and needs no configuration for it."""
    for command in (["slurmd", "-V"], ["scontrol", "--version"]):
        match = re.search(r"([0-9]+)\.([0-9]+)\.([0-9]+)", run(command))
        if match:
            return tuple(int(part) for part in match.groups())
    return None


def parse_settings(text: str) -> dict[str, str]:
    """`scontrol show config` by lower-case names; names in it are aligned with spaces."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and " " not in name.strip():
            found[name.strip().lower()] = value.strip()
    return found


def parse_file(path: Path) -> dict[str, str]:
    """The single-valued lines of slurm.conf; its includes are not followed."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return parse_settings("\n".join(line.partition("#")[0] for line in lines))


def configuration_file(settings: Settings) -> Path | None:
    """slurm.conf as slurmctld names it, else where this host has it."""
    named = [settings.get("slurm_conf", ""), os.environ.get("SLURM_CONF", ""), *CONFIGURATION_FILES]
    return next((Path(path) for path in named if path and Path(path).is_file()), None)


# ---------------------------------------------------------------- the plugin


def plugin_findings(settings: Settings, path: Path | None, version: tuple[int, ...]) -> Iterator[Finding]:
    """plugstack.conf names the plugin, the file is there, and it is for this Slurm."""
    named = settings.get("plugstackconfig", "")
    plugstack = (
        Path(named)
        if named not in ("", "(null)")
        else (path or Path("/etc/slurm/x")).parent / "plugstack.conf"
    )
    hint = f"add 'required {default_plugin_path(settings)}' to {plugstack} and restart slurmd"
    try:
        lines = list(plugstack_lines(plugstack))
    except OSError as error:
        yield mend("plugin", f"{error.filename or plugstack} cannot be read ({error.strerror})", hint)
        return
    ours = [line for line in lines if line.is_ours]
    if not ours:
        yield mend("plugin", f"no line in {plugstack} or the files it includes names it", hint)
        return
    yield ok("plugin", f"{ours[0].place}: {ours[0].mode} {ours[0].path}")
    if len(ours) > 1:
        yield mend("plugin", f"listed again in {ours[1].place}", "remove one of the lines")
    yield plugin_file_finding(ours[0], settings, version)
    yield from earlier_plugin_findings(lines, ours[0])


def default_plugin_path(settings: Settings) -> str:
    """Where the plugin is on this node, or would be put: `make install` puts it beside the folder of the package."""
    installed = Path(__file__).resolve().parents[4] / "spank_enclos.so"
    if installed.is_file():
        return str(installed)
    directory = settings.get("plugindir", "").split(":")[0]
    found = next((d for d in PLUGIN_DIRECTORIES if Path(d).is_dir()), PLUGIN_DIRECTORIES[0])
    return f"{directory or found}/spank_enclos.so"


def plugin_file_finding(line: PluginLine, settings: Settings, version: tuple[int, ...]) -> Finding:
    """The file exists and was built for the installed release (same major and minor number)."""
    directories = [d for d in settings.get("plugindir", "").split(":") if d] or list(PLUGIN_DIRECTORIES)
    candidates = [Path(line.path)] if line.path.startswith("/") else [Path(d, line.path) for d in directories]
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        return mend(
            "plugin file", f"{line.path} does not exist", "build and install it: make && make install"
        )
    built = built_for(path)
    if built is None:
        return note("plugin file", f"{path}: cannot tell for which Slurm it was built")
    words = f"built for Slurm {built[0]}.{built[1]:02}"
    if built[:2] != version[:2]:
        installed = f"{version[0]}.{version[1]:02}"
        return mend(
            "plugin file",
            f"{path} is {words}, installed is {installed}",
            "build it again against the installed Slurm",
        )
    return ok("plugin file", f"{path}, {words}")


def earlier_plugin_findings(lines: list[PluginLine], ours: PluginLine) -> Iterator[Finding]:
    """An earlier required plugin that fails makes Slurm skip the ones after it."""
    earlier = [line for line in lines[: lines.index(ours)] if line.mode == "required"]
    if earlier:
        names = ", ".join(f"{Path(line.path).name} ({line.place})" for line in earlier)
        yield note("plugin order", f"required plugins before ours: {names}",
                   "when one of them fails, Slurm skips ours; put our line first")  # fmt: skip


# ---------------------------------------------------------------- slurmctld's configuration


def prolog_finding(settings: Settings) -> Finding:
    """Only with Alloc has the prolog the node list from slurmctld; Contain and X11 imply it."""
    flags = {flag.strip().lower() for flag in settings.get("prologflags", "").split(",")}
    if flags & {"alloc", "contain", "x11"}:
        return ok("PrologFlags", settings["prologflags"])
    return mend(
        "PrologFlags",
        "Alloc is not set",
        "set PrologFlags=Alloc in slurm.conf: job networks need the trusted list of nodes",
    )


def container_findings(settings: Settings, path: Path | None) -> Iterator[Finding]:
    """Slurm's own container features that get into the way."""
    directory = path.parent if path is not None else Path("/etc/slurm")
    if (directory / "oci.conf").exists():
        yield note("oci.conf", f"{directory / 'oci.conf'} exists: Slurm's own code takes srun --container",
                   "users have to write --container-image; remove the file to have both")  # fmt: skip
    else:
        yield ok("oci.conf", "absent, so srun --container=IMAGE works as well")
    kind = ",".join(settings.get(name, "") for name in ("jobcontainertype", "namespacetype")).strip(",")
    if "linux" in kind and _clones_user_namespace(directory):
        yield mend("job_container", f"{kind} with user namespaces: no container can be joined from there",
                   "remove CLONE_NEWUSER from namespace.yaml")  # fmt: skip
    else:
        yield ok("job_container", kind if kind and kind != "(null)" else "none")


def _clones_user_namespace(directory: Path) -> bool:
    """Whether namespace/linux makes a user namespace: root in slurmstepd then has no power over ours."""
    try:
        return "CLONE_NEWUSER" in (directory / "namespace.yaml").read_text(errors="replace")
    except OSError:
        return False
