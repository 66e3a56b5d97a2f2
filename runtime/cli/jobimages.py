"""Which images a job will ask for, as far as Slurm tells its owner before the job starts.

What sbatch leaves for the job's prolog (prefetch.py) is shown by no command. So this reads what is shown: the job's
batch script, and the command line with which it was submitted, which `scontrol show job` has in releases after 24.11,
and sacct where the site keeps accounts. Profiles that are named there are read here and now. Runs as whoever types the
command and only for jobs of his own: what is fetched is fetched with his credentials. Must not hold how images are
pulled.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence

from enclos.runtime import errors, profile
from enclos.runtime.cli import common

OPTIONS = ("--container-image", "--container")
VARIABLES = ("ENCLOS_CONTAINER_IMAGE", "PYXIS_CONTAINER_IMAGE")
PROFILE_OPTION = "--container-profile"
PROFILE_VARIABLE = "ENCLOS_CONTAINER_PROFILE"
SLURM_SECONDS = 30
_JOB = re.compile(r"[0-9]{1,10}([_+][0-9]{1,10})?")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_USE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_BETWEEN_COMMANDS = set(";|&()")
# The image that a profile stands for, "" if it has none.
ImageOf = Callable[[str], str]


def of_job(job: str) -> list[str]:
    """What the job names as images, as it was written there, without repetitions.

    Args:
        job: as squeue shows it: a number, also with `_` and an array's task or `+` and a het job's component.

    Raises:
        EnclosError: job_unknown, job_not_own, job_without_image, slurm_failed, program_missing.
    """
    if _JOB.fullmatch(job) is None:
        raise errors.job_unknown(job)
    _check_owner(job)
    script = _ask("scontrol", "write", "batch_script", job, "-") or ""
    shown = _ask("scontrol", "show", "job", job) or ""

    def image_of(name: str) -> str:
        return _image_of(profile.seen_from(_field(shown, "WorkDir"), name))

    found = [*of_command_line(_submit_line(job, shown), image_of), *of_script(script, image_of)]
    found = list(dict.fromkeys(found))
    if not found:
        raise errors.job_without_image(job)
    return found


def of_command_line(line: str, image_of: ImageOf) -> list[str]:
    """The images that a command line names, where Slurm has joined its words by spaces, without quotes."""
    return _of_command(line.split(), image_of)


def of_script(text: str, image_of: ImageOf) -> list[str]:
    """The images that a batch script names: in #SBATCH lines, as options of srun, in our variables, by profiles.

    The script is read, not run: a variable counts where the script itself sets it to a plain text. What cannot be
    known stays as it was written, `$IMAGE`.
    """
    found: list[str] = []
    of_sbatch: list[str] = []
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip()
        is_sbatch = line.startswith("#SBATCH")
        words = _words(line.removeprefix("#SBATCH"))
        words = [_USE.sub(lambda use: variables.get(use[1] or use[2], use[0]), word) for word in words]
        if is_sbatch:
            of_sbatch += words
            continue
        for assigned in filter(None, map(_ASSIGNMENT.fullmatch, words)):
            variables[assigned[1]] = assigned[2]
            found += [assigned[2]] if assigned[1] in VARIABLES else []
            found += [image_of(assigned[2])] if assigned[1] == PROFILE_VARIABLE else []
        for command in _commands(words):
            found += _of_command(command, image_of)
    return [value for value in [*_of_command(of_sbatch, image_of), *found] if value]


def _of_command(words: Sequence[str], image_of: ImageOf) -> list[str]:
    """The images of one command: what it names itself counts more than its profile."""
    images = list(_values(words, OPTIONS))
    return images or [image for image in map(image_of, _values(words, (PROFILE_OPTION,))) if image]


def _commands(words: Sequence[str]) -> Iterator[list[str]]:
    """The simple commands of a line, as far as `;`, `&&`, pipes and parentheses tell."""
    command: list[str] = []
    for word in words:
        if word and set(word) <= _BETWEEN_COMMANDS:
            yield command
            command = []
        else:
            command.append(word)
    yield command


def _image_of(name: str) -> str:
    """What a profile says; where that is nothing now, a line says why, for the job's own commands will find it."""
    if "$" in name or "`" in name:
        common.say(f"{PROFILE_OPTION}={name}: not looked into: what it stands for is known when the job runs")
        return ""
    try:
        return profile.load(name).options.get("container-image", "")
    except errors.EnclosError as error:
        common.say(f"{error.line()}: not looked into")
        return ""


def _words(line: str) -> list[str]:
    """The words of one line as a shell splits them, up to its comment; of a line that goes on in another, roughly."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    # Of shlex' own comments, one would begin in the middle of `registry#name`.
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        for word in lexer:
            if word.startswith("#"):
                break
            words.append(word)
    except ValueError:  # An open quote.
        words = line.split()
    return words


def _values(words: Sequence[str], options: Sequence[str]) -> Iterator[str]:
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in options and equals:
            yield value
        elif word in options and index + 1 < len(words):
            yield words[index + 1]


# -- Slurm -----------------------------------------------------------------------------------------------------


def _check_owner(job: str) -> None:
    """Refuse jobs of others; root's own command would fetch a user's image with root's credentials, for everybody."""
    owners = set((_ask("squeue", "--noheader", "--format=%U", f"--jobs={job}") or "").split())
    if not owners:
        raise errors.job_unknown(job)
    if owners != {str(os.geteuid())}:
        raise errors.job_not_own(job)


def _field(shown: str, name: str) -> str:
    """What `scontrol show job` says on a line of its own, "" where it does not."""
    found = re.search(rf"^ *{name}=(.*)$", shown, re.MULTILINE)
    return found[1] if found else ""


def _submit_line(job: str, shown: str) -> str:
    """The command that submitted the job, "" where Slurm does not tell."""
    if line := _field(shown, "SubmitLine"):
        return line
    try:
        return _ask("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={job}", "--format=SubmitLine") or ""
    except errors.EnclosError:
        return ""  # Where accounts are not kept, sacct need not be installed.


def _ask(*command: str) -> str | None:
    """What a command of Slurm's prints; None where it refuses, as for a job that it does not know.

    Raises:
        EnclosError: slurm_failed, where slurmctld does not answer; program_missing.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=SLURM_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise errors.program_missing(command[0]) from error
    except subprocess.TimeoutExpired as error:
        raise errors.slurm_failed(command[0], f"no answer in {SLURM_SECONDS} s") from error
    if done.returncode == 0:
        return done.stdout.decode("utf-8", "surrogateescape")
    message = done.stderr.decode("utf-8", "replace").strip()
    if "Unable to contact slurm controller" in message:
        raise errors.slurm_failed(command[0], "unable to contact slurmctld")
    return None
