"""Which images a job will ask for, as far as Slurm tells its owner before the job starts.

What sbatch leaves for the job's prolog (prefetch.py) is shown by no command. So this reads what is shown: the job's
batch script, and the command line with which it was submitted, which `scontrol show job` has in releases after 24.11,
and sacct where the site keeps accounts. Runs as whoever types the command and only for jobs of his own: what is
fetched is fetched with his credentials. Must not hold how images are pulled.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator

from enclos.runtime import errors

OPTIONS = ("--container-image", "--container")
VARIABLES = ("ENCLOS_CONTAINER_IMAGE", "PYXIS_CONTAINER_IMAGE")
SLURM_SECONDS = 30
_JOB = re.compile(r"[0-9]{1,10}([_+][0-9]{1,10})?")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_USE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_SUBMIT_LINE = re.compile(r"^ *SubmitLine=(.*)$", re.MULTILINE)


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
    found = list(dict.fromkeys([*of_command_line(_submit_line(job)), *of_script(script)]))
    if not found:
        raise errors.job_without_image(job)
    return found


def of_command_line(line: str) -> list[str]:
    """The images that a command line names, where Slurm has joined its words by spaces, without quotes."""
    return list(_values(line.split()))


def of_script(text: str) -> list[str]:
    """The images that a batch script names: in #SBATCH lines, as options of srun, in our variables.

    The script is read, not run: a variable counts where the script itself sets it to a plain text. What cannot be
    known stays as it was written, `$IMAGE`.
    """
    found: list[str] = []
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip()
        if line.startswith("#SBATCH"):
            line = line.removeprefix("#SBATCH")
        words = [_USE.sub(lambda use: variables.get(use[1] or use[2], use[0]), word) for word in _words(line)]
        for word in words:
            if assigned := _ASSIGNMENT.fullmatch(word):
                variables[assigned[1]] = assigned[2]
                found += [assigned[2]] if assigned[1] in VARIABLES else []
        found += _values(words)
    return [value for value in found if value]


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


def _values(words: list[str]) -> Iterator[str]:
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in OPTIONS and equals:
            yield value
        elif word in OPTIONS and index + 1 < len(words):
            yield words[index + 1]


# -- Slurm -----------------------------------------------------------------------------------------------------


def _check_owner(job: str) -> None:
    """Refuse jobs of others; root's own command would fetch a user's image with root's credentials, for everybody."""
    owners = set((_ask("squeue", "--noheader", "--format=%U", f"--jobs={job}") or "").split())
    if not owners:
        raise errors.job_unknown(job)
    if owners != {str(os.geteuid())}:
        raise errors.job_not_own(job)


def _submit_line(job: str) -> str:
    """The command that submitted the job, "" where Slurm does not tell."""
    if found := _SUBMIT_LINE.search(_ask("scontrol", "show", "job", job) or ""):
        return found[1]
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
