"""What srun needs to run in a container of any content (--container-slurm): found on the node, mounted inside.

The commands keep their paths, so that scripts find them: a small program stands there that starts the real one with the
node's loader and libraries (spank/command.c). Configuration, plugins and munge's socket appear where the node has them.
All of it is root's and readable by everybody; it is mounted read-only with the user's rights, like any other source.

Reads files and runs ldd on root's programs, in the agent and in `enclos render`; decides nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from enclos.runtime import errors
from enclos.runtime.mounts import WHERE_MISSING, Mount

PLACE = "/run/enclos/slurm"
OPTION = "--container-slurm"
CONFIGURATIONS = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")
COMMANDS = (
    *("srun", "sbatch", "salloc", "sattach", "sbcast", "scancel", "squeue", "sinfo", "scontrol"),
    *("sstat", "sacct", "sacctmgr", "sprio", "sshare", "sreport", "sdiag", "strigger", "scrontab"),
)
# Opened by name at run time, so that srun itself does not show what they need.
PLUGINS = ("auth_*.so", "cred_*.so", "mpi_*.so", "hash_*.so")
LIBRARY_DIRECTORIES = 8  # as spank/command.c has them
INCLUDE_DEPTH = 8
LDD_SECONDS = 20
# What mpi_pmix opens, in a directory that is written in it when it is compiled.
PMIX_LIBRARIES = (b"libpmix.so", b"libpmix.so.2")


@dataclass(frozen=True, slots=True)
class SlurmClient:
    """Slurm's commands on this node, and what belongs to them.

    Attributes:
        commands: (path, real path) of each: the second is where the file is, links resolved.
        loader: the dynamic loader that they name.
        libraries: directories with all their libraries, and their plugins'.
        places: files and directories that have to be at the same path inside.
        opened: libraries that a plugin opens by their full path.
        accounts: names of users that slurm.conf holds, which the commands look up.
        program: the bytes of the program that stands for them.
        preloaded: the bytes of the library that leads them to the node's `opened`; empty where the loader takes none.
    """

    commands: tuple[tuple[str, str], ...]
    loader: str
    libraries: tuple[str, ...]
    places: tuple[str, ...]
    opened: tuple[str, ...]
    accounts: tuple[str, ...]
    program: bytes
    preloaded: bytes

    def mounts(self) -> tuple[Mount, ...]:
        """What is mounted where, in the form of a user's mounts."""
        pairs = [(self.loader, f"{PLACE}/loader")]
        pairs += [(real, f"{PLACE}/bin/{os.path.basename(path)}") for path, real in self.commands]
        pairs += [(directory, f"{PLACE}/lib/{index}") for index, directory in enumerate(self.libraries)]
        pairs += [(path, path) for path in self.places]
        if self.preloaded:
            pairs += [(path, f"{PLACE}/opened{path}") for path in self.opened]
        found = [Mount(source, target, "bind", True, (), f"{source}:{target}") for source, target in pairs]
        if not self.preloaded:
            # A program of the image keeps the library that it was linked with, and srun has to do with it.
            options = ("nofail", WHERE_MISSING)
            found += [Mount(path, path, "bind", True, options, f"{path}:{path}") for path in self.opened]
        return tuple(found)

    def programs(self) -> Iterator[tuple[tuple[str, ...], bytes]]:
        """What of ours is put at which paths."""
        yield tuple(path for path, _ in self.commands), self.program
        if self.preloaded:
            yield (f"{PLACE}/opened.so",), self.preloaded


_known: dict[tuple[tuple[str, int], ...], SlurmClient] = {}


def find() -> SlurmClient:
    """Slurm on this node; ldd takes a tenth of a second, so it is looked for once, and again when a file has changed.

    Raises:
        EnclosError: slurm_commands_missing.
    """
    srun = shutil.which("srun")
    if srun is None:
        raise errors.slurm_commands_missing("srun is not in the agent's PATH")
    configuration = _configuration()
    # A directory changes with the files that come and go in it: an upgrade of Slurm, a new plugstack.conf.
    watched = (srun, os.path.dirname(srun), configuration, os.path.dirname(configuration))
    state = tuple((path, os.stat(path).st_mtime_ns) for path in watched)
    if state not in _known:
        found = _look(srun, configuration)
        _known.clear()
        _known[state] = found
    return _known[state]


def _look(srun: str, configuration: str) -> SlurmClient:
    settings = _settings(Path(configuration))
    found = [f"{os.path.dirname(srun)}/{name}" for name in COMMANDS]
    commands = tuple((name, os.path.realpath(name)) for name in found if os.path.isfile(name))
    loader, libraries = _needed([os.path.realpath(srun)])
    plugins = _plugin_directories(settings, libraries)
    opened = [str(file) for directory in plugins for pattern in PLUGINS for file in Path(directory).glob(pattern)]
    spank = list(_spank_plugins(Path(configuration), settings, plugins))
    by_path = list(dict.fromkeys(name for plugin in opened for name in opened_by_path(Path(plugin).read_bytes())))
    _, more = _needed([*opened, *spank, *by_path])
    directories = dict.fromkeys(os.path.realpath(os.path.dirname(name)) for name in (*libraries, *more))
    if len(directories) > LIBRARY_DIRECTORIES:
        raise errors.slurm_commands_missing(f"libraries in more than {LIBRARY_DIRECTORIES} directories")
    places = [os.path.dirname(configuration), *plugins, *spank, *_munge(settings)]
    return SlurmClient(
        commands=commands,
        loader=loader,
        libraries=tuple(directories),
        places=tuple(dict.fromkeys(places)),
        opened=tuple(by_path),
        accounts=tuple(dict.fromkeys(["root", *(settings.get(key, "root") for key in ("slurmuser", "slurmduser"))])),
        program=_beside_the_plugin("slurm-command"),
        preloaded=_beside_the_plugin("slurm-opened.so") if by_path and _preloads(loader) else b"",
    )


def _configuration() -> str:
    named = [os.environ.get("SLURM_CONF", ""), *CONFIGURATIONS]
    found = next((name for name in named if name and os.path.isfile(name)), None)
    if found is None:
        raise errors.slurm_commands_missing("no slurm.conf")
    return found


def _settings(path: Path, depth: int = 0) -> dict[str, str]:
    """slurm.conf's lines NAME=VALUE by lower-case names, with the files that it includes."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        text = line.partition("#")[0].strip()
        name, equals, value = text.partition("=")
        if equals and " " not in name.strip():
            found[name.strip().lower()] = value.strip()
        elif text.lower().startswith("include ") and depth < INCLUDE_DEPTH:
            found |= _settings(path.parent / text.split(None, 1)[1], depth + 1)
    return found


def _plugin_directories(settings: dict[str, str], libraries: list[str]) -> list[str]:
    """PluginDir, else where Slurm's own library is."""
    named = [name for name in settings.get("plugindir", "").split(":") if name]
    beside = [os.path.dirname(name) for name in libraries if os.path.basename(name).startswith("libslurm")]
    return list(dict.fromkeys(name for name in (*named, *beside) if os.path.isdir(name)))


def opened_by_path(plugin: bytes) -> Iterator[str]:
    """PMIx' library where mpi_pmix opens it by its path: ldd does not show it, and no library path leads there."""
    texts = set(re.findall(rb"(?<=\0)[\w./+-]+(?=\0)", plugin))
    for name in PMIX_LIBRARIES:
        if name in texts:
            paths = (f"{text.decode().rstrip('/')}/{name.decode()}" for text in sorted(texts) if text.startswith(b"/"))
            yield from (path for path in paths if os.path.isfile(path))


def _spank_plugins(configuration: Path, settings: dict[str, str], plugins: list[str]) -> Iterator[str]:
    """Files that plugstack.conf names: srun opens them, and a required one that is missing ends it."""
    named = settings.get("plugstackconfig", "") or str(configuration.parent / "plugstack.conf")
    yield from _plugstack(Path(named), plugins, 0)


def _plugstack(path: Path, plugins: list[str], depth: int) -> Iterator[str]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.partition("#")[0].split()
        if len(words) < 2:
            continue
        if words[0] == "include" and depth < INCLUDE_DEPTH:
            pattern = str(path.parent / words[1])
            for included in sorted(Path("/").glob(pattern.lstrip("/"))):
                yield from _plugstack(included, plugins, depth + 1)
        elif words[0] in ("required", "optional"):
            candidates = [words[1]] if words[1].startswith("/") else [f"{one}/{words[1]}" for one in plugins]
            yield from (name for name in candidates[:1] if os.path.isfile(name))


def _munge(settings: dict[str, str]) -> Iterator[str]:
    """The directory of munge's socket, under each of its names."""
    match = re.search(r"socket=([^,\s]+)", settings.get("authinfo", ""))
    directories = [os.path.dirname(match[1])] if match else ["/run/munge", "/var/run/munge"]
    yield from (name for name in directories if os.path.isdir(name))


def _needed(files: list[str]) -> tuple[str, list[str]]:
    """The loader, and the paths of all libraries of some programs and plugins."""
    if not files:
        return "", []
    try:
        done = subprocess.run(["ldd", *files], capture_output=True, text=True, timeout=LDD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise errors.slurm_commands_missing("ldd cannot be run") from error
    libraries = re.findall(r"=>\s+(/\S+)\s+\(0x", done.stdout)
    loaders = re.findall(r"^\s+(/\S*/ld[-.]\S*)\s+\(0x", done.stdout, re.MULTILINE)
    return (os.path.realpath(loaders[0]) if loaders else ""), list(dict.fromkeys(libraries))


def _preloads(loader: str) -> bool:
    """Whether the loader takes --preload: from glibc 2.30 on."""
    try:
        done = subprocess.run([loader, "--help"], capture_output=True, text=True, timeout=LDD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "--preload" in done.stdout


def _beside_the_plugin(name: str) -> bytes:
    """What spank/command.c or opened.c makes: `make install` puts it beside the package, a checkout has it in build."""
    here = Path(__file__).resolve()
    candidates = [here.parents[1] / "build" / name, here.parents[3] / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.read_bytes()
    raise errors.slurm_commands_missing(f"{name} is not installed beside the plugin")
