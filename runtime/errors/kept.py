"""Errors: named containers, and those that are saved."""

from __future__ import annotations

from collections.abc import Iterable

from enclos.runtime.errors.error import ADMIN, AdminError, EnclosError, UserError
from enclos.runtime.errors.mounts import NAMES_CHARACTERS


def save_failed(path: str, cause: str) -> EnclosError:
    """The container cannot be written to this file, or could not."""
    return UserError(
        f"--container-save={path}",
        "the container cannot be saved there",
        cause,
        "the directory has to exist on the compute node, be yours to write and have room; a file there is replaced",
    )


def _named(name: str) -> str:
    return f"--container-name={name}"


def named_missing(name: str) -> EnclosError:
    """No container of that name, and no image to make one from."""
    return UserError(
        _named(name),
        f'a container with name "{name}" does not exist, and --container-image is not set',
        hint="it has to have been created on this node, in a job by the same one; or give --container-image as well",
    )


def named_exists(name: str) -> EnclosError:
    """`create`, and it is there."""
    return UserError(
        _named(name),
        '"create" flag was passed to --container-name but the container already exists',
        hint="leave the flag away to use it, or take another name",
    )


def named_not_running(name: str) -> EnclosError:
    """`exec`, and no step runs in it."""
    return UserError(
        _named(name),
        '"exec" flag was passed to --container-name but the container is not running',
        hint="leave the flag away to start it",
    )


def named_other_network(name: str, network: str, asked: str) -> EnclosError:
    """A running container is entered with its network, and the step asked for another."""
    return UserError(
        _named(name),
        f"the container runs on network {network}, not on {asked}",
        hint="leave --container-network away to enter it, or start another on the same files with NAME:no_exec",
    )


def named_image_changed(name: str, image: str) -> EnclosError:
    """The file behind the image's path is another one: what was written is not a change to that."""
    return UserError(
        _named(name),
        f"its image {image} has changed since the container was created",
        hint="put the image back, or take another name",
    )


def named_limit(name: str, limit: int, names: Iterable[str]) -> EnclosError:
    """Too many of one user. Nothing else lists those that nobody uses."""
    return UserError(
        _named(name),
        f"you have {limit} named containers on this node already",
        ", ".join(sorted(names))[:NAMES_CHARACTERS],
        "use one of them, or remove one there by 'enclos rm NAME'; administrator: named.per_user in enclos.yaml",
    )


def named_not_there(name: str) -> EnclosError:
    """Nothing to remove."""
    return UserError(
        f"rm {name}",
        "you have no container of this name here in which no step runs",
        hint="'enclos ps' shows those that run; each node has its own",
    )


def save_interrupted() -> EnclosError:
    """As spank/save.c says it."""
    return AdminError(
        "--container-save",
        "the agent ended before the container was saved",
        hint="run the step again; " + ADMIN + "journalctl -u enclosd",
    )


def named_lost(name: str) -> EnclosError:
    """Its record is there and its files are not."""
    return AdminError(
        _named(name),
        "what was written into the container is gone",
        hint="take another name; " + ADMIN + "something was unmounted or deleted below /run/enclos/named",
    )
