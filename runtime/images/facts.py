"""What an image says about its use: variables, working directory, entrypoint, mounts. All of it is its maker's word.

Reads the files that enroot, Singularity and Charliecloud keep in an image, and the configuration of an image from a
registry, which lies beside it. Nothing is executed: shell scripts are read for the assignments that these tools write.
Works on texts and on a function that reads a file inside; makes no system call itself. Used in builders, as the user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from enclos.runtime import environment, errors, mounts
from enclos.runtime.mounts import Mount

Variables = list[tuple[str, str]]
ReadFile = Callable[[str], bytes]
ListNames = Callable[[str], Sequence[str]]

ENROOT_SCRIPT = "/etc/rc"
SINGULARITY = "/.singularity.d"
CHARLIECLOUD = "/ch"
MOST_SCRIPTS = 32
# What $PATH means in an image's texts: not the node's, whose directories are not there.
STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WORD_LIMIT = 4096
MOST_WORDS = 256
# As `apptainer run` does it.
SINGULARITY_ENTRYPOINT = (
    "/bin/sh",
    "-c",
    f'for script in {SINGULARITY}/env/*.sh; do . "$script"; done; exec {SINGULARITY}/runscript "$@"',
    "runscript",
)
# What every container has there already, or what no mount may cover.
OUR_TARGETS = ("/", "/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue")
BINDS = ("bind", "rbind", "x-detach", "x-move")

_REFERENCE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)(?::?-([^{}]*))?\}|([A-Za-z_][A-Za-z0-9_]*))")
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_RC_WORKDIR = re.compile(rb'^cd "?(/[^"\n;&|]*?)"? *(?:&&|\|\||;|$)', re.MULTILINE)


@dataclass(slots=True)
class Facts:
    """`entrypoint`, `command` and `workdir` are empty where the image has none; `warnings` are for the user.

    `command` is what to run when the user names nothing: of an image with an entrypoint it would be only arguments.
    """

    variables: Variables = field(default_factory=list)
    workdir: str = ""
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)


def read(config: str, read_file: ReadFile, list_names: ListNames, known: Mapping[str, str]) -> Facts:
    """The facts of an image, from the first of its descriptions that it has.

    Args:
        config: JSON text of the `config` object of an image from a registry, or "".
        read_file: content of a file inside, empty where there is none.
        list_names: names in a directory inside, empty where there is none.
        known: variables of the job that the image's texts may refer to.
    """
    known = {"PATH": STANDARD_PATH, **known}
    if config:
        return _from_registry(config)
    if scripts := sorted(name for name in list_names(f"{SINGULARITY}/env") if name.endswith(".sh")):
        return _from_singularity([f"{SINGULARITY}/env/{name}" for name in scripts[:MOST_SCRIPTS]], read_file, known)
    if data := read_file(f"{CHARLIECLOUD}/environment"):
        return _from_charliecloud(data, read_file, known)
    return _from_enroot(read_file, known)


# -- registries -----------------------------------------------------------------------------------------------


def _from_registry(config: str) -> Facts:
    """The `config` of an OCI image configuration: https://github.com/opencontainers/image-spec/blob/main/config.md"""
    try:
        raw = json.loads(config)
    except ValueError:
        raw = None
    if not isinstance(raw, dict):
        return Facts(warnings=["the image's configuration cannot be read, ignoring"])
    facts = Facts()
    lines = "\n".join(line for line in _words(raw.get("Env")) if "\n" not in line)
    facts.variables = environment.parse_plain(lines.encode(errors="surrogateescape"))
    workdir = raw.get("WorkingDir")
    facts.workdir = workdir if isinstance(workdir, str) and _is_directory(workdir) else ""
    facts.entrypoint = _words(raw.get("Entrypoint"))
    facts.command = () if facts.entrypoint else _words(raw.get("Cmd"))
    return facts


def _words(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        return ()
    words = [word for word in value[:MOST_WORDS] if isinstance(word, str) and len(word) <= WORD_LIMIT]
    return tuple(word for word in words if "\0" not in word)


def _is_directory(path: str) -> bool:
    return path.startswith("/") and len(path.encode(errors="surrogateescape")) <= mounts.PATH_LIMIT and "\0" not in path


# -- enroot ---------------------------------------------------------------------------------------------------


def _from_enroot(read_file: ReadFile, known: Mapping[str, str]) -> Facts:
    facts = Facts()
    for name, value in environment.parse_etc_environment(read_file("/etc/environment")):
        if value not in (f"${{{name}}}", f"${name}"):  # That keeps the job's own.
            facts.variables.append((name, expand(value, known)))
    if script := read_file(ENROOT_SCRIPT):
        facts.entrypoint = (ENROOT_SCRIPT,)
        facts.workdir = rc_workdir(script)
    return facts


def rc_workdir(script: bytes) -> str:
    """The directory into which the /etc/rc that enroot writes goes first; the image's WORKDIR."""
    found = _RC_WORKDIR.search(script)
    return found[1].decode(errors="surrogateescape") if found else ""


def fstab(data: bytes, known: Mapping[str, str]) -> tuple[list[Mount], list[str]]:
    """The mounts of an image's /etc/fstab as enroot understands it, and warnings about lines that are none.

    Lines for real file systems, which a distribution's fstab has, are left out in silence: nobody may mount those.
    """
    found: list[Mount] = []
    warnings: list[str] = []
    for raw in data.split(b"\n"):
        fields = expand(raw.decode(errors="surrogateescape"), known).split()
        if len(fields) < 2 or fields[0].startswith("#") or fields[1].rstrip("/") in OUR_TARGETS or fields[1] == "/":
            continue
        text = _mount_text(fields)
        if not text or len(found) == mounts.MOUNT_LIMIT:
            continue
        try:
            found += mounts.parse(text, known.get("PWD", ""))
        except errors.EnclosError as error:
            warnings.append(f"/etc/fstab of the image: {error.what}, ignoring '{text}'")
    return found, warnings


def _mount_text(fields: Sequence[str]) -> str:
    """A line of fstab in the words of --container-mounts; "" for what is not for us. Fields may be left out."""
    source, target = _unescape(fields[0]), _unescape(fields[1])
    rest = [word for word in fields[2:4] if not word.isdigit()]
    options = [option for word in rest for option in word.split(",")]
    if source == "tmpfs" or (rest and rest[0] == "tmpfs"):
        source, options = "tmpfs", [option for option in options if option != "tmpfs"]
    elif not any(option in BINDS for option in options):
        return ""
    flags = "+".join(option for option in options if option not in ("none", "x-move"))
    parts = (part.replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:") for part in (source, target))
    return ":".join(parts) + (f":{flags}" if flags else "")


def _unescape(text: str) -> str:
    """fstab(5) writes blanks as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


# -- Charliecloud ---------------------------------------------------------------------------------------------


def _from_charliecloud(data: bytes, read_file: ReadFile, known: Mapping[str, str]) -> Facts:
    """ch-run(1), `--set-env`: a line is NAME=VALUE, where a $NAME counts if it is a whole part between colons."""
    facts = Facts()
    seen = dict(known)
    for name, value in environment.parse_plain(data):
        if len(value) >= 2 and value[0] == value[-1] == "'":
            value = value[1:-1]
        parts = [seen.get(part[1:], "") if part.startswith("$") else part for part in value.split(":")]
        seen[name] = ":".join(part for part in parts if part) if "$" in value else value
        facts.variables.append((name, seen[name]))
    try:
        raw = json.loads(read_file(f"{CHARLIECLOUD}/metadata.json") or b"{}")
    except ValueError:
        raw = {}
    workdir = raw.get("cwd") if isinstance(raw, dict) else ""
    facts.workdir = workdir if isinstance(workdir, str) and _is_directory(workdir) else ""
    return facts


# -- Singularity ----------------------------------------------------------------------------------------------


def _from_singularity(scripts: Sequence[str], read_file: ReadFile, known: Mapping[str, str]) -> Facts:
    """Its environment is what scripts set. Plain assignments are taken; what needs a shell runs with the entrypoint."""
    facts = Facts(entrypoint=SINGULARITY_ENTRYPOINT)
    seen = dict(known)
    for path in scripts:
        left_out = False
        for name, value in _assignments(read_file(path).decode(errors="surrogateescape")):
            if not name:
                left_out = True
            elif len(facts.variables) < environment.MOST_VARIABLES:
                seen[name] = expand(value, seen)
                facts.variables.append((name, seen[name]))
        # The others are Singularity's own, for its shell prompt and its apps.
        if left_out and path.endswith(("/90-environment.sh", "/10-docker2singularity.sh")):
            facts.warnings.append(f"{path} of the image needs a shell, which --container-entrypoint starts, ignoring")
    return facts


def _assignments(script: str) -> Iterator[tuple[str, str]]:
    """(NAME, VALUE with references) of each line that is one assignment; ("", "") for a line that is something else."""
    for raw in script.split("\n"):
        line = raw.strip().rstrip(";").rstrip()
        if not line or line.startswith(("#", "export -")) or re.fullmatch(r"export(\s+[A-Za-z_][A-Za-z0-9_]*)+", line):
            continue
        found = _ASSIGNMENT.fullmatch(line)
        value = _unquote(found[2]) if found else None
        yield (found[1], value) if found and value is not None else ("", "")


def _unquote(text: str) -> str | None:
    """The value of an assignment, or None where only a shell could tell."""
    if len(text) >= 2 and text[0] == text[-1] == "'" and "'" not in text[1:-1]:
        return text[1:-1].replace("$", "$$")
    if len(text) >= 2 and text[0] == text[-1] == '"':
        # Singularity's own: "${NAME:-"value"}".
        text = re.sub(r':-"([^"]*)"\}', r":-\1}", text[1:-1])
    elif re.search(r"[\s;&|<>()*?\[\]~]", text):
        return None
    if '"' in text.replace('\\"', "") or "'" in text or "`" in text or "$(" in text:
        return None
    return re.sub(r'\\([\\"`])', r"\1", text).replace("\\$", "$$")


def expand(text: str, known: Mapping[str, str]) -> str:
    """Replace ${NAME}, $NAME and ${NAME:-VALUE}; what is not known is empty. `$$` is a dollar."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, default, plain = match.groups()
        return known.get(name or plain, "") or default or ""

    return re.sub(rf"\$\$|{_REFERENCE.pattern}", value, text)
