"""What a user may write as an image: a name in a registry, an archive, a layout on disk, or a path.

Called by request.py (the form), by imports.py on the node (which way to go) and by `enclos image` as the user. Holds
the syntax alone: what is at a path is found out by whoever opens it, as the user. Pure.

    docker://[USER@]REGISTRY[:PORT]/NAME[:TAG][@sha256:HEX]    skopeo's and docker's spelling
    docker://[USER@]REGISTRY#NAME[:TAG]                        enroot's, also without docker://
    NAME[:TAG][@sha256:HEX]                                    in the site's default registry
    oci:DIR[:TAG]  oci-archive:FILE[:TAG]  docker-archive:FILE[:TAG]  dir:DIR
    /PATH  ./PATH  ../PATH                                     a squashfs or SIF file, or a directory
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

TEXT_LIMIT = 4095
DOCKER_HUB = "docker.io"
LOCAL_KINDS = ("oci", "oci-archive", "docker-archive", "dir")

# https://github.com/distribution/reference: what registries take.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_USER = re.compile(r"[^\s/@#:\x00-\x20]{1,128}")


class BadReference(ValueError):
    """The text is no image reference; the message says what is wrong with it."""


class NoRegistry(BadReference):
    """A name without a registry, where the site has no default one."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One image as a user named it.

    Attributes:
        kind: `registry`, `path`, or one of LOCAL_KINDS.
        text: as typed; the subject of every message.
        path: of a local kind, as typed (relative ones start at the step's working directory); "" otherwise.
        registry, name: of a registry; `registry` with its port.
        tag: "" where none was given; `latest` is then meant.
        digest: `sha256:HEX`, or "".
        user: whose credentials to choose where the user's file has several for the registry; or "".
    """

    kind: str
    text: str
    path: str = ""
    registry: str = ""
    name: str = ""
    tag: str = ""
    digest: str = ""
    user: str = ""

    @property
    def is_registry(self) -> bool:
        return self.kind == "registry"

    @property
    def source(self) -> str:
        """REGISTRY/NAME: what a right to pull is a right to (cache.py's grants); "" for local kinds."""
        return f"{self.registry}/{self.name}" if self.is_registry else ""

    def canonical(self) -> str:
        """The reference in skopeo's spelling without the user.

        With a digest the tag is left out: skopeo takes only one of them, and the digest is the stronger.
        """
        if not self.is_registry:
            text = self.path if self.kind == "path" else f"{self.kind}:{self.path}"
            return f"{text}:{self.tag}" if self.tag else text
        end = f"@{self.digest}" if self.digest else f":{self.tag or 'latest'}"
        return f"docker://{self.source}{end}"

    def pinned(self, digest: str) -> Reference:
        """The same image by its digest, as srun passes it on."""
        return replace(self, digest=digest)


def parse(text: str, default_registry: str = "") -> Reference:
    """Read a reference.

    Args:
        default_registry: REGISTRY[:PORT][/PREFIX] for names without one; "" where the site has none.

    Raises:
        BadReference: with words for the user.
    """
    if not text:
        raise BadReference("it is empty")
    if len(text.encode("utf-8", "surrogateescape")) > TEXT_LIMIT or "\0" in text:
        raise BadReference(f"longer than {TEXT_LIMIT} bytes")
    if is_path(text):
        return Reference("path", text, path=text)
    scheme, colon, rest = text.partition(":")
    if colon and scheme in LOCAL_KINDS:
        return _local(text, scheme, rest)
    if text.startswith("docker://"):
        return _remote(text, text.removeprefix("docker://"), "")
    if "://" in text:
        raise BadReference(f"unknown kind of image '{text.partition('://')[0]}://'")
    return _remote(text, text, default_registry)


def is_path(text: str) -> bool:
    """Whether it is a path, as pyxis decides: a name never begins like that."""
    return text.startswith(("/", "./", "../")) or text in (".", "..")


def _local(text: str, kind: str, rest: str) -> Reference:
    path, colon, tag = rest.rpartition(":")
    if kind == "dir" or not colon or "/" in tag:
        path, tag = rest, ""
    if not path:
        raise BadReference(f"{kind}: needs a path")
    # docker-archive names the image inside in full: FILE:NAME:TAG.
    if kind == "docker-archive" and tag and (found := re.fullmatch(r"(.+?):(.+)", path)):
        path, tag = found[1], f"{found[2]}:{tag}"
    return Reference(kind, text, path=path, tag=tag)


def _remote(text: str, rest: str, default_registry: str) -> Reference:
    rest, _, digest = rest.partition("@sha256:")
    if digest:
        digest = f"sha256:{digest}"
        if _DIGEST.fullmatch(digest) is None:
            raise BadReference("a digest is sha256: and 64 hexadecimal digits")
    user, at, rest = rest.rpartition("@")
    if at and _USER.fullmatch(user) is None:
        raise BadReference("the user before @ has characters that none has")
    registry, name = _split_registry(rest, text.startswith("docker://"), default_registry)
    name, colon, tag = name.rpartition(":") if ":" in name else (name, "", "")
    if _REGISTRY.fullmatch(registry) is None:
        raise BadReference(f"'{registry}' is no name of a registry")
    if _NAME.fullmatch(name) is None or len(name) > 255:
        raise BadReference(f"'{name}' is no name in a registry")
    if colon and _TAG.fullmatch(tag) is None:
        raise BadReference(f"'{tag}' is no tag")
    if registry in ("index.docker.io", "registry-1.docker.io"):
        registry = DOCKER_HUB
    if not _is_registry(registry):
        registry += ":443"  # Without a dot or a port, skopeo would take it for the first part of a name at Docker Hub.
    if registry == DOCKER_HUB and "/" not in name:
        name = f"library/{name}"
    return Reference("registry", text, registry=registry, name=name, tag=tag, digest=digest, user=user)


def _split_registry(rest: str, has_scheme: bool, default_registry: str) -> tuple[str, str]:
    """The registry and what follows it: by `#`, or by docker's rule (a dot, a port, or localhost)."""
    if "#" in rest:
        registry, _, name = rest.partition("#")
        return registry, name
    first, slash, name = rest.partition("/")
    if slash and _is_registry(first):
        return first, name
    if has_scheme:
        return DOCKER_HUB, rest
    if not default_registry:
        raise NoRegistry("it is no path, and the site has no default registry")
    registry, _, prefix = default_registry.partition("/")
    return registry, f"{prefix.strip('/')}/{rest}" if prefix.strip("/") else rest


def _is_registry(first: str) -> bool:
    return "." in first or ":" in first or first == "localhost"

