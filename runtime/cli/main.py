"""`enclos VERB …`: finds the verb and runs it.

A verb is a module of this package with `run(arguments) -> exit status`, imported only when
it is called, so that each starts as quickly as what it needs. To add one, add a line to
VERBS. Runs as whoever types the command.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from enclos.runtime.errors import EnclosError, UsageError

# verb: (module of this package, one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "ps": ("ps", "list the containers on this node"),
    "run": ("run", "run a command in a container, on a machine without Slurm"),
    "image": ("image", "pull, list and remove images: your own and the site's"),
    "exec": ("exec", "run a command in a running container of yours"),
    "shell": ("shell", "open a shell in a running container of yours"),
    "top": ("top", "show what the containers on this node use, against their limits"),
    "check": ("check", "test whether this node can run containers, and say what to mend"),
    "gc": ("gc", "undo what ended jobs left on this node (root)"),
    "rm": ("rm", "remove a named container on this node"),
    "render": ("render", "print the plan of a container without making it"),
    "profile": ("profile", "show, list or check profiles (--container-profile)"),
    "partition": ("partition", "give tenants partitions of an InfiniBand fabric (OpenSM's partitions.conf)"),
    "config": ("config", "show the settings in force, or validate a configuration file"),
}

GLOBAL_OPTIONS = {
    "--help": "list the verbs; after a verb, explain it",
    "--version": "print the version",
    "--debug": "before the verb: on an error, show where in the program it came from",
}

STANDARD_ERROR = 2
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def usage() -> str:
    """The text of `enclos --help`."""
    width = max(len(verb) for verb in VERBS)
    verbs = "\n".join(f"  {verb.ljust(width)}  {text}" for verb, (_, text) in VERBS.items())
    return f"""usage: enclos VERB [ARGUMENT...]

Containers with private networks for Slurm job steps. A step is started by srun:
  srun --container-image=IMAGE --container-network=job COMMAND

{verbs}

'enclos VERB --help' explains a verb; see also enclos(1) and enclos-srun(1).
--version prints the version; --debug before the verb shows where an error came from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command; returns the exit status."""
    _fill_standard_descriptors()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = given[:1] == ["--debug"]
    given = given[1:] if debug else given
    try:
        try:
            return _dispatch(given)
        except EnclosError as error:
            if debug:
                raise
            return _report(error)
        finally:  # --help leaves by SystemExit.
            if sys.stdout is not None:  # It was closed by whoever started this.
                sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has gone.
        _forget_output()
        return EXIT_FAILED
    except OSError as error:
        # A full disk; an error about a file of ours would name it.
        if debug or error.errno != errno.ENOSPC or error.filename is not None:
            raise
        from enclos.runtime import errors

        _forget_output()
        return _report(errors.output_failed(os.strerror(error.errno).lower()))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _report(error: EnclosError) -> int:
    from enclos.runtime.cli import common

    common.report(error)
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


def _forget_output() -> None:
    """Python would complain again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


def _fill_standard_descriptors() -> None:
    """Whoever starts this without one of them gets nothing there, and not what is opened next."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
        pass
    os.close(fd)


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if given else EXIT_USAGE
    if given[0] == "--version":
        from enclos import __version__

        print(f"enclos {__version__}")
        return 0
    if given[0] not in VERBS:
        from enclos.runtime import errors

        raise errors.usage("", f"no such verb: {given[0]}")
    module = import_module(f"enclos.runtime.cli.{VERBS[given[0]][0]}")
    return int(module.run(given[1:]))


if __name__ == "__main__":
    sys.exit(main())
